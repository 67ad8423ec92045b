"""Spline problems that several test files share: knots, samples, tolerances."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

KNOTS = ("equidistant", "chebyshev", "thinned", "random3", "random4")
SMOOTHINGS = (0.0, 1e-12, 1e-8, 1e-4, 1.0, 1e3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Against exact arithmetic, relative to the largest value. float64 and float32: some fifty times
# what rounding amounts to at 512 knots. Half precision: one rounding of the result, half an ulp of
# the largest result, plus float32's error.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-8 + 1e-5,
    torch.float16: 2.0**-11 + 1e-5,
}


def make_knots(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n knots within [-1, 1]; "random3" has gap ratios up to 1e3."""
    if n == 1:
        return np.zeros(1)
    if kind == "equidistant":
        return np.linspace(-1, 1, n)
    if kind.startswith("random"):
        gaps = 10 ** rng.uniform(-float(kind[6:]), 0, n - 1)
        knots = np.concatenate([[0.0], np.cumsum(gaps)])
        return 2 * knots / knots[-1] - 1
    total = n if kind == "chebyshev" else int(np.ceil(n / 0.6))
    nodes = -np.cos(np.pi * (2 * np.arange(total) + 1) / (2 * total))
    return np.sort(rng.choice(nodes, n, replace=False))


def make_points(knots: np.ndarray, rng: np.random.Generator, count: int = 24) -> np.ndarray:
    """Inside, outside and exactly at the knots, shuffled."""
    at_knots = knots[:: max(1, len(knots) // 8)]
    points = np.concatenate([rng.uniform(-1.1, 1.1, count), at_knots, [-3.0, 3.0]])
    return rng.permutation(points)


@dataclass(frozen=True)
class Sample:
    """Values of one layout, [n, G, m] as the operator takes them."""

    name: str
    values: torch.Tensor

    def __str__(self):
        return self.name


def make_samples(n: int, dtype: torch.dtype) -> list[Sample]:
    """Every layout the operator may meet: contiguous, strided, expanded, empty, any batch."""
    generator = torch.Generator().manual_seed(n)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        Sample("contiguous", randn(n, 1, 5)),
        Sample("groups", randn(n, 6, 3)),
        Sample("full tiles", randn(n, 2, 192)),
        Sample("group major", randn(3, n, 70).transpose(0, 1)),
        Sample("strided columns", randn(n, 2, 9)[:, :, ::2]),
        Sample("every other row", randn(2 * n, 2, 4)[::2]),
        Sample("expanded", randn(n, 1, 1).expand(n, 2, 4)),
        Sample("no groups", randn(n, 0, 3)),
        Sample("no columns", randn(n, 2, 0)),
    ]


def memory_for(result: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """By layout, memory full of 7 and a view of it as large as a result, columns side by side."""
    rows, *groups, columns = result.shape
    memory = result.new_full((2 * rows, *groups, columns + 3), 7)
    yield "contiguous", *2 * (torch.full_like(result, 7),)
    yield "padded columns", memory, memory[:rows, ..., :columns]
    yield "every other row", memory, memory[::2, ..., :columns]
    if groups:
        memory = result.new_full((*groups, rows, columns), 7)
        yield "group major", memory, memory.transpose(0, 1)
