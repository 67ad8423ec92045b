"""Reproduce the comparison of the LeTCC paper, in two minutes: ``python -m benchmarks.letcc``.

It prints tables and draws a figure. No data are downloaded: LeNet-5 and 2,000 digits of MNIST are
in the package. Networks shaped as RepVGG and ViT stand for the paper's larger models. They learn
the digits of scikit-learn here, in seconds, as CIFAR-10 and ImageNet are in no package.

As in arXiv 2406.00300, a batch has K rows in order of arrival, outputs are probabilities, S workers
are lost uniformly, every scheme answers the same batches from the same received sets, and both
smoothings are chosen on other batches. Lagrange's code has the decoder degree of least error there.
Slopes are those of ``convergence``, and compromised workers those of ``adversaries``, in part.
``python -m benchmarks letcc`` keeps the numbers in benchmarks/results.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import Code, LagrangeCode, SplineCode
from coded_torch.demo import digits, lenet5
from coded_torch.experiments.compare import compare
from coded_torch.experiments.scores import Comparison, Row

from . import adversaries, convergence, networks, theorem
from .networks import SEED, Batch, TransformerBlock
from .runs import Measurement, MissingDataError, keep, read_results

BATCHES = 20  # that are answered, as often as the paper repeats
TUNING = 5  # further batches, on which numbers of codes are chosen
LEARNT = 1000  # digits of scikit-learn that networks learn; others are answered
EPOCHS = 30
#: N, K and the numbers of lost workers, by network; the paper's S are among them.
SETTINGS: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {
    "LeNet-5": [(100, 60, (10, 20, 30)), (100, 20, (20, 40, 60, 80))],
    "RepVGG-shaped": [(60, 20, (15, 25, 35))],
    "ViT-shaped": [(20, 8, (1, 3, 5))],
}
SMALL = {"LeNet-5": [(100, 20, (20,))]}  # no network is trained
SCHEMES = ("the paper's scheme", "Berrut", "the paper's, ordered", "replication", "regression")
#: How far the paper has RMSE below Berrut's code in %, and accuracy above it in points; means over
#: S, in the text of arXiv 2406.00300. Its RepVGG reads CIFAR-10 and its ViT ImageNet.
PAPER = {"LeNet-5": (15, 2), "RepVGG-shaped": (17, 5), "ViT-shaped": (9, 4)}
SIZES = {"RepVGG, CIFAR-10": (60, 20, 35, 3 * 32**2), "ViT, ImageNet": (20, 8, 3, 3 * 224**2)}
ATTACKS = ("noise", "negated", "x 1.5", "classes swapped")
#: Tasks of ``convergence`` whose slopes are printed.
SLOPES = (
    ("x sin x", "S fixed", False), ("x sin x", "S fixed", True), ("kinks", "S fixed", False),
    ("kinks", "lost side by side", False),
)  # fmt: skip


class RepVGGBlock(nn.Module):
    """A convolution of 3 x 3, one of 1 x 1 and the input, each normalised, and their sum's ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.wide = _normalised(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False))
        self.narrow = _normalised(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
        self.same = nn.BatchNorm2d(inputs) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        total = self.wide(x) + self.narrow(x)
        return torch.relu(total if self.same is None else total + self.same(x))


def _normalised(convolution: nn.Conv2d) -> nn.Module:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


def repvgg() -> nn.Module:
    """Return a network for images ``[B, 1, 8, 8]``, in the form in which RepVGG is trained."""
    widths = ((1, 16), (16, 16), (16, 32), (32, 32), (32, 64))
    blocks = [RepVGGBlock(*each) for each in widths]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class ViT(nn.Module):
    """A vision transformer for images ``[B, 1, 8, 8]``: 16 patches, a class token, two blocks."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.head(self.blocks(tokens)[:, 0])


BUILDS: dict[str, Callable[[], nn.Module]] = {"RepVGG-shaped": repvgg, "ViT-shaped": ViT}


@functools.cache
def network(name: str) -> tuple[nn.Module, Batch]:
    """Return a network whose outputs are probabilities, and rows that it has not learnt."""
    if name == "LeNet-5":
        return nn.Sequential(lenet5(), nn.Softmax(-1)).eval(), Batch(*digits())
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        how = "pip install scikit-learn"
        raise MissingDataError(f"digits are not installed; get them with: {how}") from error
    read = load_digits()
    images = torch.from_numpy(read.images).float()[:, None] / 16
    labels = torch.from_numpy(read.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    learnt, others = Batch(images, labels).take(order).cut(LEARNT)
    assert learnt.labels is not None

    def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(learnt.images[rows]), learnt.labels[rows])

    adam = functools.partial(torch.optim.AdamW, weight_decay=0.1)
    model = networks.fit(BUILDS[name], loss_of, LEARNT, 64, adam, EPOCHS, SEED, one_cycle=4e-3)
    return nn.Sequential(model, nn.Softmax(-1)).eval().requires_grad_(False), others


def lagrange(num_data: int, num_workers: int) -> dict[str, Code]:
    """Return Lagrange's code in order of arrival, which the paper compares with."""
    degree = num_data - 1
    code = LagrangeCode(num_data, num_workers, decoder_degree=degree, ordering="arrival")
    return {"Lagrange": code}


def compared(name: str, n: int, k: int, lost: tuple[int, ...], quick: bool) -> dict[str, Any]:
    """Return the scores of each scheme by S, and how LeTCC's differ from Berrut's."""
    model, rows = network(name)
    count = 2 if quick else BATCHES
    subject = networks.Subject(model, rows, rows)
    batches = [*subject.batches("held_out", k, TUNING + count)]
    found = compare(
        model,
        [x.images for x in batches],
        [(n, k, s) for s in lost],
        labels=[x.labels for x in batches if x.labels is not None],
        extra=lagrange,
        schemes=SCHEMES,
        tuning_batches=TUNING,
    )
    whole = model(rows.images).argmax(1) == rows.labels
    table: dict[str, Any] = {"accuracy": round(float(whole.double().mean()), 4), "lost": {}}
    for row in found.rows:
        by_scheme = table["lost"].setdefault(f"S = {row.setting.num_stragglers}", {})
        by_scheme[row.name] = {"rmse": row.rmse, "relative_accuracy": row.relative_accuracy}
    return table | {"against Berrut": _against_berrut(found)}


def _against_berrut(found: Comparison) -> dict[str, float]:
    """Return by how much LeTCC's RMSE is lower, in %, and its accuracy higher, in points."""
    rows = {(row.setting, row.name): row for row in found.rows}
    settings = dict.fromkeys(setting for setting, _ in rows)

    def mean(of: Callable[[Row, Row], float]) -> float:
        pairs = [(rows[x, "the paper's scheme"], rows[x, "Berrut"]) for x in settings]
        return round(float(np.mean([of(*pair) for pair in pairs])), 2)

    return {
        "RMSE lower, %": mean(lambda a, b: 100 * (1 - _first(a.rmse) / _first(b.rmse))),
        "accuracy higher, points": mean(
            lambda a, b: 100 * (_first(a.relative_accuracy) - _first(b.relative_accuracy))
        ),
    }


def _first(interval: list[float | None] | None) -> float:
    value = None if interval is None else interval[0]
    return float("nan") if value is None else value


def kernel_times(n: int, k: int, s: int, width: int) -> dict[str, Any]:
    """Return the milliseconds of encoding and decoding one group of inputs of a paper's size."""
    code = SplineCode(k, n)
    inputs = torch.randn(k, width, generator=torch.Generator().manual_seed(SEED))
    received = range(s, n)
    results = code.encode(inputs)[s:]
    steps = {
        "encode": lambda: code.encode(inputs),
        "decode": lambda: code.decode(results, received),
    }
    table: dict[str, Any] = {"setting": str((n, k, s)), "numbers per input": width}
    for step, run in steps.items():
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        table[f"{step}, ms"] = float(f"{1000 * statistics.median(seconds):.3g}")
    return table


def slopes(name: str, delays: str, noisy: bool, quick: bool) -> dict[str, Any]:
    found = convergence.convergence(name, delays, noisy, quick)["spline"]
    return {key: found[key] for key in ("fitted slope", "slope of the bound")}


def attacked(attack: str) -> dict[str, Any]:
    found = adversaries.attacked("lenet5", 240, adversaries.ATTACKS[attack], quick=True, draws=6)
    return {"codes": {code: found["codes"][code] for code in adversaries.CODES}}


def measurements(quick: bool) -> Iterable[Measurement]:
    for name, settings_of in (SMALL if quick else SETTINGS).items():
        for n, k, lost in settings_of:
            work = functools.partial(compared, name, n, k, lost, quick)
            yield ("networks", name, str((n, k))), work
    for name, size in SIZES.items():
        yield ("sizes", name), functools.partial(kernel_times, *size)
    for name, delays, noisy in SLOPES:
        key = "slopes", name, delays, "noise" if noisy else "no noise"
        yield key, functools.partial(slopes, name, delays, noisy, quick)
    for power in theorem.POWERS[:2]:
        task = convergence.Task("x sin x", quick, 1)
        key = "slopes with adversaries", "x sin x", f"a = {power}"
        yield key, functools.partial(theorem.adversaries, task, power)
    for attack in ATTACKS:
        yield ("adversaries", attack), functools.partial(attacked, attack)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batches": 2 if quick else BATCHES,
        "tuning batches": TUNING,
        "epochs": EPOCHS,
    }


#: The headings and the tables that are printed, in this order.
PRINTED = {
    "RMSE over S": "letcc_rmse",
    "Relative accuracy over S": "letcc_accuracy",
    "LeTCC beside Berrut's code, here and in the paper, means over S": "letcc",
    "Encoding and decoding one group, at the sizes of the paper's larger models": "letcc_sizes",
    "Slopes of log error: over log N, or over log S where workers are lost side by side": (
        "letcc_slopes"
    ),
    "Slopes where the number of compromised workers is a power of N": "letcc_compromised_slopes",
    "Five compromised workers, LeNet-5 at (100, 20, 10), squared error over the variance": (
        "letcc_adversaries"
    ),
}


def main() -> int:
    """Measure, print the tables and write the figure."""
    from . import pictures, report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.letcc", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="fewer batches, rough numbers")
    parser.add_argument(
        "--figure", type=Path, default=Path("letcc.png"), help="a file [letcc.png here]"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "letcc.json")
        keep("letcc", sys.modules[__name__], quick=args.quick, path=path)
        results = {"letcc": read_results(path)["measured"]}
    for heading, table in PRINTED.items():
        print(f"\n{heading}\n\n{report.markdown(table, results)}")
    pictures.letcc(results).savefig(args.figure, dpi=pictures.DPI)
    print(f"\nThe figure, RMSE over S, is in {args.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
