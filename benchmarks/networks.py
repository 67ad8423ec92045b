"""The networks of the benchmarks: trained once, and then in a cache outside the repository."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import coded_torch
from coded_torch.demo.lenet5 import LeNet5

from .data import CACHE, Batch, mnist
from .runs import progress

SEED = 0  # the seed of batches and of lost workers
SHIPPED = Path(coded_torch.__file__).parent / "data"
NUM_TUNING = 5_000  # the last training images: no gradient sees them, benchmarks tune on them
EPOCHS = 4  # of a network on pictures


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


def smooth() -> nn.Module:
    """Return LeNet-5 with tanh for ReLU and means for maxima, smooth as theorems ask for."""
    stands = {nn.ReLU: nn.Tanh(), nn.MaxPool2d: nn.AvgPool2d(2)}
    model = LeNet5()
    for name, layer in model.named_children():
        setattr(model, name, stands.get(type(layer), layer))
    return model


PICTURES: dict[str, Callable[[], nn.Module]] = {"lenet5": LeNet5, "lenet5-tanh": smooth}


class Subject(NamedTuple):
    """A network in evaluation mode, and inputs for it that no gradient has seen.

    Choose every parameter on ``tuning``; report on ``held_out``.
    """

    model: nn.Module
    tuning: Batch
    held_out: Batch

    def batches(self, part: str, size: int, count: int) -> Iterator[Batch]:
        """Yield disjoint random batches, as many as there are, at most ``count``."""
        whole: Batch = getattr(self, part)
        order = torch.randperm(len(whole.images), generator=torch.Generator().manual_seed(SEED))
        size = min(size, len(order))
        yield from map(whole.take, order.split(size)[: min(count, len(order) // size)])


def load(name: str, seed: int = 0) -> Subject:
    """Return a network of ``PICTURES`` from the cache, else it is trained first, in minutes.

    Raises:
        MissingDataError: the package with its data is not installed.
    """
    train, held_out = mnist()
    learnt, tuning = train.cut(-NUM_TUNING)
    path, build = CACHE / f"{name}-seed{seed}.npz", PICTURES[name]
    return Subject(cached(path, build, lambda: trained(build, learnt, seed)), tuning, held_out)


def learnt_images() -> Tensor:
    """Return the images that networks learn from; codes are tuned and tried on others."""
    return mnist()[0].cut(-NUM_TUNING)[0].images


def cached(path: Path, build: Callable[[], nn.Module], train: Callable[[], nn.Module]) -> nn.Module:
    """Return a network with the weights of a file, which is written first if it is not there."""
    if not path.exists():
        print(f"training {path.stem}: {path} does not exist", flush=True)
        save(train(), path)
    with torch.device("meta"):  # it draws no first weights from the global random state
        model = build()
    with np.load(path) as arrays:
        weights = {key: torch.from_numpy(arrays[key]).float() for key in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a network with first weights of a seed."""
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator
        torch.manual_seed(seed)
        return build()


def trained(build: Callable[[], nn.Module], learnt: Batch, seed: int) -> nn.Module:
    """Return a network that has learnt the classes of pictures, with a one-cycle learning rate."""

    def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(learnt.images[rows]), learnt.labels[rows])

    def steps(shuffle: torch.Generator) -> Sequence[Tensor]:
        return torch.randperm(len(learnt.images), generator=shuffle).split(128)

    def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, weight_decay=0.1)

    return fit(build, loss_of, steps, adam, EPOCHS, seed, one_cycle=4e-3)


@torch.enable_grad()
def fit(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    steps: Callable[[torch.Generator], Sequence[Tensor]],
    optimiser_of: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    epochs: int,
    seed: int,
    one_cycle: float | None = None,
) -> nn.Module:
    """Return a trained network in evaluation mode.

    Its weights are rounded to half precision, so that measured and shipped ones agree.

    Args:
        build: makes the network, with first weights.
        loss_of: maps the network and the rows of a step to their loss.
        steps: draws the rows of each step of an epoch.
        optimiser_of: makes an optimiser of parameters.
        epochs: passes over all rows.
        seed: the seed of first weights and of the order of rows.
        one_cycle: the largest learning rate. Defaults to None, the optimiser's own throughout.
    """
    model, shuffle = seeded(build, seed), torch.Generator().manual_seed(seed)
    optimiser, schedule = optimiser_of(model.parameters()), None
    if one_cycle:
        total = epochs * len(steps(torch.Generator()))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, one_cycle, total)
    for _ in progress(range(epochs), "epochs"):
        for rows in steps(shuffle):
            loss = loss_of(model, rows)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if schedule:
                schedule.step()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    return model.eval().requires_grad_(False)


def save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: x.numpy() for name, x in model.state_dict().items()})


def ship() -> None:
    """Write the files that ship in coded_torch/data: the weights and every fifth test digit.

    No code is tuned on images that ship, so all the others may teach.
    """
    train, (images, labels) = mnist()
    save(trained(LeNet5, train, 0).half(), SHIPPED / "lenet5.npz")
    images, labels = (255 * images[::5, 0]).round().byte(), labels[::5].byte()
    np.savez_compressed(SHIPPED / "digits.npz", images=images.numpy(), labels=labels.numpy())
