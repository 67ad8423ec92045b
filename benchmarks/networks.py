"""The networks of the benchmarks: trained once, and then in a cache outside the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import coded_torch
from coded_torch.demo.lenet5 import LeNet5

from .data import CACHE, DataSet, mnist

__all__ = ["RECIPES", "Images", "Network", "load", "ship"]

SHIPPED = Path(coded_torch.__file__).parent / "data"
NUM_TUNING = 5_000  # the last training images: no gradient sees them, benchmarks tune on them


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each normalised first and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, tokens, width]
        qkv = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, width / heads]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.perceptron(x)


class Recipe(NamedTuple):
    """The training of a network."""

    build: Callable[[], nn.Module]
    load: Callable[[], DataSet]
    epochs: int
    learning_rate: float
    weight_decay: float


def smooth() -> nn.Module:
    """Return LeNet-5 with tanh for ReLU and means for maxima, smooth as theorems ask for."""
    stands = {nn.ReLU: nn.Tanh(), nn.MaxPool2d: nn.AvgPool2d(2)}
    model = LeNet5()
    for name, layer in model.named_children():
        setattr(model, name, stands.get(type(layer), layer))
    return model


RECIPES = {
    "lenet5": Recipe(LeNet5, mnist, epochs=4, learning_rate=4e-3, weight_decay=0.1),
    "lenet5-tanh": Recipe(smooth, mnist, epochs=4, learning_rate=4e-3, weight_decay=0.1),
}


class Images(NamedTuple):
    """Images ``float32 [n, 1, h, w]`` in 0..1 and labels ``int64 [n]``."""

    images: Tensor
    labels: Tensor


class Network(NamedTuple):
    """A trained network in evaluation mode, and images that no gradient has seen.

    Choose every parameter on ``tuning``; report on ``held_out``, the official test set.
    """

    name: str
    model: nn.Module
    tuning: Images
    held_out: Images


def load(name: str, seed: int = 0) -> Network:
    """Return the network from the cache; it is trained first, in minutes, if it is not there.

    Raises:
        MissingDataError: the package with its data is not installed.
    """
    recipe = RECIPES[name]
    data = recipe.load()
    model = cached(
        weights_file(name, seed),
        recipe.build,
        lambda: train(recipe, *training_images(data), seed),
    )
    tuning = tuning_images(data)
    held_out = Images(pixels(data.test_images), data.test_labels)
    return Network(name, model, Images(pixels(tuning[0]), tuning[1]), held_out)


def cached(path: Path, build: Callable[[], nn.Module], train: Callable[[], nn.Module]) -> nn.Module:
    """Return a network with the weights of a file, which is written first if it is not there."""
    if not path.exists():
        print(f"training {path.stem}: {path} does not exist", flush=True)
        save(train(), path)
    with torch.device("meta"):  # it draws no first weights from the global random state
        model = build()
    with np.load(path) as arrays:
        weights = {key: torch.from_numpy(array).float() for key, array in arrays.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def weights_file(name: str, seed: int) -> Path:
    """Return where the weights are cached."""
    return CACHE / f"{name}-seed{seed}.npz"


def training_images(data: DataSet) -> tuple[Tensor, Tensor]:
    """Return the images and labels that networks learn from."""
    return data.train_images[:-NUM_TUNING], data.train_labels[:-NUM_TUNING]


def tuning_images(data: DataSet) -> tuple[Tensor, Tensor]:
    """Return the images and labels that are kept back to tune codes on."""
    return data.train_images[-NUM_TUNING:], data.train_labels[-NUM_TUNING:]


def pixels(images: Tensor) -> Tensor:
    """``uint8 [n, h, w] -> float32 [n, 1, h, w]`` in 0..1, as every network here expects."""
    return images.unsqueeze(1).float() / 255


@torch.enable_grad()
def train(recipe: Recipe, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Train with Adam and a one-cycle learning rate; in evaluation mode, half precision."""
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator
        torch.manual_seed(seed)
        model = recipe.build()
    shuffle = torch.Generator().manual_seed(seed)
    images, batch = pixels(images), 128
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        recipe.learning_rate,
        epochs=recipe.epochs,
        steps_per_epoch=-(-len(labels) // batch),
    )
    for epoch in range(1, recipe.epochs + 1):
        total = 0.0
        model.train()
        for rows in torch.randperm(len(labels), generator=shuffle).split(batch):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch}: loss {total / len(labels):.4f}", flush=True)
    round_to_half(model)
    return model.eval()


def round_to_half(model: nn.Module) -> None:
    """Round every weight to half precision, in place, so that measured and saved weights agree."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


def save(model: nn.Module, path: Path) -> None:
    """Save the weights as half-precision arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().numpy() for name, tensor in model.state_dict().items()}
    np.savez_compressed(path, **weights)


def ship() -> None:
    """Write the files that ship in coded_torch/data: the weights and every fifth test digit.

    No code is tuned on images that ship, so all the others may teach.
    """
    data = mnist()
    save(train(RECIPES["lenet5"], data.train_images, data.train_labels, 0), SHIPPED / "lenet5.npz")
    images, labels = data.test_images[::5], data.test_labels[::5].byte()
    np.savez_compressed(SHIPPED / "digits.npz", images=images.numpy(), labels=labels.numpy())
