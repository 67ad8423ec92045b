"""Spline problems that several test files share: knots, samples, tolerances."""

import numpy as np
import torch

KNOTS = ("equidistant", "chebyshev", "thinned", "random3", "random4")
SMOOTHINGS = (0.0, 1e-12, 1e-8, 1e-4, 1.0, 1e3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Against exact arithmetic, relative to the largest value. float64 and float32: some fifty times
# the rounding error at 512 knots. Half precision: one rounding of the result, half an ulp of the
# largest result, plus float32's error.
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


def make_samples(n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values [n, G, m] of every layout: contiguous, strided, expanded, empty, any batch."""
    generator = torch.Generator().manual_seed(n)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "contiguous": randn(n, 1, 5),
        "groups": randn(n, 6, 3),
        "full tiles": randn(n, 2, 192),
        "group major": randn(3, n, 70).transpose(0, 1),
        "strided columns": randn(n, 2, 9)[:, :, ::2],
        "every other row": randn(2 * n, 2, 4)[::2],
        "expanded": randn(n, 1, 1).expand(n, 2, 4),
        "no groups": randn(n, 0, 3),
        "no columns": randn(n, 2, 0),
    }
