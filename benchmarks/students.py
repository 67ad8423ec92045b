"""Students of the networks: what is cheap enough to run beside the batch, taught without labels.

Weights go to the cache of :mod:`benchmarks.networks`. A student has less than a fifteenth of its
network's multiply-adds: 21 thousand a picture for LeNet-5's 417 thousand, 138 thousand for the
ViT's 2.3 million, 1.75 million for the RepVGG's 29 million.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.surrogates import distill

from . import networks
from .data import CACHE
from .networks import pixels, training_images
from .subjects import SEED, subject

__all__ = ["RECIPES", "Student", "small_network", "student"]


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


class Patches(nn.Module):
    """138 thousand multiply-adds a picture: perceptrons on patches like those of the ViT."""

    def __init__(self, width: int = 40, features: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.each, self.each_again = nn.Linear(width, width), nn.Linear(width, width)
        self.among = nn.Linear(16, 16)
        self.together = nn.Linear(16 * width, features)
        self.more = nn.Linear(features, features)
        self.head = nn.Linear(features, 10)
        self.act = nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.embed(images).flatten(2).mT + self.positions)  # [B, 16, width]
        x = x + self.act(self.each(x))
        x = x + self.act(self.among(x.mT)).mT
        x = x + self.act(self.each_again(x))
        x = self.act(self.together(x.flatten(1)))
        outputs: Tensor = self.head(x + self.act(self.more(x)))
        return outputs


def convolutions() -> nn.Module:
    """1.75 million multiply-adds a picture."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(2352, 40),
        nn.SiLU(),
        nn.Linear(40, 10),
    )


class Recipe(NamedTuple):
    """A student's network, and its epochs: the larger a teacher, the longer an epoch."""

    build: Callable[[], nn.Module]
    epochs: int


_VERSION = 2  # of what students learn: weights of another one are not what is measured
RECIPES = {
    "lenet5": Recipe(small_network, 40),
    "vit": Recipe(Patches, 40),
    "repvgg": Recipe(convolutions, 20),
}


class Student(NamedTuple):
    """A taught student.

    Attributes:
        model: in evaluation mode.
        error: the variance of what it misses over the variance of the outputs, held out.
        seconds: the time of teaching it, of one thread.
    """

    model: nn.Module
    error: float
    seconds: float


@functools.cache
def student(name: str, quick: bool = False) -> Student:
    """Return the student of a network, taught on its training images, without labels.

    A quick one is taught on the tuning images. It is taught first if the cache does not have it,
    which takes minutes.
    """
    of, recipe = subject(name, quick), RECIPES[name]
    path = CACHE / f"student-{name}-{_VERSION}.npz"
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator
        torch.manual_seed(SEED)
        model = recipe.build()
    if quick or not path.exists():
        start = time.thread_time()
        images = of.tuning.images if quick else learnt_from(name)
        epochs = 2 if quick else recipe.epochs
        error = distill(
            model, of.model, images.split(500), epochs=epochs, augment=shifted, seed=SEED
        )
        taught = Student(model, error, time.thread_time() - start)
        if not quick:
            state = {key: value.numpy() for key, value in model.state_dict().items()}
            np.savez_compressed(path, error=taught.error, seconds=taught.seconds, **state)
        return taught
    with np.load(path) as arrays:
        found = dict(arrays)
    error, seconds = float(found.pop("error")), float(found.pop("seconds"))
    model.load_state_dict({key: torch.from_numpy(value) for key, value in found.items()})
    return Student(model.eval(), error, seconds)


def learnt_from(name: str) -> Tensor:
    """Return the images that a network has learnt from; codes are tuned and tried on others."""
    images = pixels(training_images(networks.RECIPES[name].load())[0])
    return images.contiguous(memory_format=torch.channels_last)


def shifted(images: Tensor) -> Tensor:
    """Shift every picture by up to two pixels, each way."""
    generator = torch.Generator().manual_seed(int(images.sum()) % 2**31)
    moves = torch.randint(-2, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([x.roll(move, (-2, -1)) for x, move in zip(images, moves, strict=True)])
