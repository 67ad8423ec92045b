"""Students of the networks: cheap enough to run beside the batch, and taught without labels.

Weights go to the cache of :mod:`benchmarks.networks`. The student has 21 thousand multiply-adds a
picture, for LeNet-5's 417 thousand.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.surrogates import distill

from . import networks
from .data import CACHE
from .networks import pixels, training_images
from .tasks import Task

__all__ = ["of_task", "small_network", "student"]

SEED = 0  # the seed of first weights, and the order of batches


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


# The version of the students' teaching; a file of another version is not read.
_VERSION = 2
EPOCHS = 40  # on the images of a network
TASK_EPOCHS = 60  # the epochs of a perceptron on the training rows of a table or a text


@functools.cache
def student(
    name: str, teacher: nn.Module, seed: int = 0, images: Tensor | None = None
) -> nn.Module:
    """Return the student of a network, from the cache if the cache has it; else it is taught.

    Args:
        name: in ``networks.RECIPES``.
        teacher: the network.
        seed: the seed of the network's training.
        images: the images to learn from, in two epochs. Defaults to the network's training images,
            in minutes.
    """
    path = CACHE / f"student-{name}-seed{seed}-{_VERSION}.npz"
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator
        torch.manual_seed(SEED)
        model = small_network()
    if images is not None:
        return _taught(model, teacher, images, 2)
    if not path.exists():
        _taught(model, teacher, learnt_from(name), EPOCHS)
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        np.savez_compressed(path, **state)
    with np.load(path) as arrays:
        found = {key: torch.from_numpy(arrays[key]) for key in model.state_dict()}
    model.load_state_dict(found)
    return model.eval()


def of_task(task: Task) -> nn.Module:
    """Return a small perceptron on means over time, or on the features, of a task's inputs."""
    outputs = task.model(task.inputs[:1]).shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        width = task.inputs.shape[-1]
        layers = [nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, outputs)]
        model = nn.Sequential(Pooled(), *layers)
    return _taught(model, task.model, task.training, TASK_EPOCHS, shift=False)


class Pooled(nn.Module):
    """The mean over time of sequences ``[B, T, D]``; features ``[B, D]`` as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if x.dim() == 3 else x


def _taught(
    model: nn.Module, teacher: nn.Module, inputs: Tensor, epochs: int, shift: bool = True
) -> nn.Module:
    augment = shifted if shift else None
    distill(model, teacher, inputs.split(500), epochs=epochs, augment=augment, seed=SEED)
    return model


def learnt_from(name: str) -> Tensor:
    """Return the images that a network has learnt from; codes are tuned and tried on others."""
    images = pixels(training_images(networks.RECIPES[name].load())[0])
    return images.contiguous(memory_format=torch.channels_last)


def shifted(images: Tensor) -> Tensor:
    """Shift every picture by up to two pixels, each way."""
    generator = torch.Generator().manual_seed(int(images.sum()) % 2**31)
    moves = torch.randint(-2, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([x.roll(move, (-2, -1)) for x, move in zip(images, moves, strict=True)])
