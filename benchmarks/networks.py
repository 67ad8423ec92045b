"""Train the networks of the benchmarks: ``python benchmarks/networks.py lenet5``.

Weights go to a cache outside the repository; ``--write-package`` writes the files that ship in the
package instead: the weights in half precision and every fifth test digit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data import DataSet, MissingDataError, mnist
from torch import Tensor, nn

import coded_torch
from coded_torch.demo.lenet5 import LeNet5

PACKAGE_DATA = Path(coded_torch.__file__).parent / "data"
SHIPPED_DIGITS = slice(None, None, 5)  # of all: the halves of the test set are not equally hard


class Recipe(NamedTuple):
    """How a network is trained."""

    build: Callable[[], nn.Module]
    load: Callable[[], DataSet]
    epochs: int
    learning_rate: float
    weight_decay: float
    shippable: bool = False


RECIPES = {
    "lenet5": Recipe(LeNet5, mnist, epochs=4, learning_rate=4e-3, weight_decay=0.1, shippable=True)
}


def pixels(images: Tensor) -> Tensor:
    """``uint8 [n, h, w] -> float32 [n, 1, h, w]`` in 0..1, what every network here expects."""
    return images.unsqueeze(1).float() / 255


def train(recipe: Recipe, data: DataSet, seed: int) -> nn.Module:
    """Train on the training images alone, with Adam and a one-cycle learning rate."""
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator
        torch.manual_seed(seed)
        model = recipe.build()
    shuffle = torch.Generator().manual_seed(seed)
    images, labels, batch = pixels(data.train_images), data.train_labels, 128
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        recipe.learning_rate,
        epochs=recipe.epochs,
        steps_per_epoch=-(-len(labels) // batch),
    )
    for epoch in range(1, recipe.epochs + 1):
        start, total = time.perf_counter(), 0.0
        model.train()
        for rows in torch.randperm(len(labels), generator=shuffle).split(batch):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch}: training loss {total / len(labels):.4f}, {seconds:.1f} s", flush=True
        )
    return model.eval()


def round_to_half(model: nn.Module) -> None:
    """Round every weight to half precision, in place, so that what is measured is what is saved."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is at the label."""
    right = [
        model(pixels(x)).argmax(-1) == y
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return torch.cat(right).float().mean().item()


def save(model: nn.Module, path: Path) -> None:
    """Save the weights as half-precision arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().numpy() for name, tensor in model.state_dict().items()}
    np.savez_compressed(path, **weights)


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "coded_torch"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=cache, help="default: %(default)s")
    parser.add_argument(
        "--write-package", action="store_true", help="write the files that ship in coded_torch/data"
    )
    args = parser.parse_args()
    recipe = RECIPES[args.network]
    if args.write_package and not recipe.shippable:
        parser.error(f"--write-package: {args.network} does not ship in the package")
    try:
        data = recipe.load()
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    model = train(recipe, data, args.seed)
    round_to_half(model)
    shipped = data.test_images[SHIPPED_DIGITS], data.test_labels[SHIPPED_DIGITS]
    for what, images, labels in (
        ("test images", data.test_images, data.test_labels),
        ("every fifth of them", *shipped),
    ):
        print(f"{len(labels)} {what}: {accuracy(model, images, labels):.2%} right")
    folder = PACKAGE_DATA if args.write_package else args.cache
    save(model, folder / f"{args.network}.npz")
    print(f"wrote {folder / args.network}.npz")
    if args.write_package:
        images, labels = (tensor.numpy().astype(np.uint8) for tensor in shipped)
        np.savez_compressed(folder / "digits.npz", images=images, labels=labels)
        print(f"wrote {folder / 'digits.npz'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
