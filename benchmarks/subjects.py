"""The networks that schemes are tried on, their inputs, and a student of each.

Students are cheap enough to run beside the batch, and taught without labels. LeNet-5's has 21
thousand multiply-adds a picture, for 417 thousand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coded_torch.demo import digits, lenet5
from coded_torch.surrogates import distill

from . import networks, tasks
from .networks import CACHE, SEED, Batch, Subject

NUM_TUNING_SHIPPED = 500  # the tuning digits of the 2,000 that ship, as in the demo
NUM_TUNING_ROWS = 240  # the tuning rows of a table, or of a text
SOFTMAX = "-softmax"  # the end of a name
AT_ONCE = 256  # images through a network at once
EPOCHS = 40  # of a student on the images of a network
TASK_EPOCHS = 60  # of a perceptron on the training rows of a table or a text
_VERSION = 2  # of the students' teaching; a file of another version is not read


@torch.no_grad()
def run(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the model's outputs."""
    return torch.cat([model(part) for part in images.split(AT_ONCE)])


@functools.cache
def subject(name: str, quick: bool = False, seed: int = 0) -> Subject:
    """Return a network of ``networks.PICTURES``, ``tasks.TABLES`` or ``tasks.SEQUENCES``.

    A name that ends in "-softmax" is a network whose outputs are probabilities instead of logits.
    With ``quick``, LeNet-5 and the digits that ship stand for all pictures. The seed is of the
    training; of a table, it is the split. Raises a MissingDataError if a package is not installed.
    """
    if name.endswith(SOFTMAX):
        of = subject(name.removesuffix(SOFTMAX), quick, seed)
        return of._replace(model=nn.Sequential(of.model, nn.Softmax(-1)).eval())
    if name not in networks.PICTURES:
        task = tasks.task(name, seed)
        return Subject(task.model, *Batch(task.inputs, task.labels).cut(NUM_TUNING_ROWS))
    if quick:
        found = Subject(lenet5(), *Batch(*digits()).cut(NUM_TUNING_SHIPPED))
    else:
        found = networks.load(name, seed)
    found.model.to(memory_format=torch.channels_last)  # convolutions are faster
    return found


@functools.cache
def student_of(name: str, quick: bool = False, seed: int = 0) -> nn.Module:
    """Return the student of a subject, with the same arguments.

    A student of pictures comes from the cache, else it is taught in minutes. With ``quick`` it
    learns from the tuning images in two epochs.
    """
    if name.endswith(SOFTMAX):
        logits = student_of(name.removesuffix(SOFTMAX), quick, seed)
        return nn.Sequential(logits, nn.Softmax(-1)).eval()
    if name not in networks.PICTURES:
        return of_task(tasks.task(name, seed))
    of = subject(name, quick, seed)

    def taught(images: Tensor, epochs: int) -> nn.Module:
        model = networks.seeded(small_network, SEED)
        distill(model, of.model, images.split(500), epochs=epochs, augment=shifted, seed=SEED)
        return model

    if quick:
        return taught(of.tuning.images, 2)

    def train() -> nn.Module:
        images = networks.learnt_images()
        return taught(images.contiguous(memory_format=torch.channels_last), EPOCHS)

    path = CACHE / f"student-{name}-seed{seed}-{_VERSION}.npz"
    return networks.cached(path, small_network, train)


def small_network() -> nn.Module:
    """21 thousand multiply-adds a picture."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 6, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(6, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )


def shifted(images: Tensor) -> Tensor:
    """Shift every picture by up to two pixels, each way."""
    generator = torch.Generator().manual_seed(int(images.sum()) % 2**31)
    moves = torch.randint(-2, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([x.roll(move, (-2, -1)) for x, move in zip(images, moves, strict=True)])


def of_task(task: tasks.Task) -> nn.Module:
    """Return a small perceptron on means over time, or on the features, of a task's inputs."""
    sizes = task.inputs.shape[-1], task.model(task.inputs[:1]).shape[-1]

    def build() -> nn.Module:
        return nn.Sequential(Pooled(), nn.Linear(sizes[0], 16), nn.Tanh(), nn.Linear(16, sizes[1]))

    model = networks.seeded(build, SEED)
    distill(model, task.model, task.training.split(500), epochs=TASK_EPOCHS, seed=SEED)
    return model


class Pooled(nn.Module):
    """The mean over time of sequences ``[B, T, D]``; features ``[B, D]`` as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if x.dim() == 3 else x
