"""Coded computing: every answer of a batch from whichever workers reply first."""

from importlib.metadata import version

from . import (
    codes,
    functional,
    geometry,
    grouping,
    linear,
    metrics,
    nn,
    points,
    stragglers,
    surrogates,
    tuning,
    workers,
)
from .codes import NotEnoughResults
from .compare import compare

__version__ = version("coded_torch")
__all__ = [
    "NotEnoughResults",
    "codes",
    "compare",
    "functional",
    "geometry",
    "grouping",
    "linear",
    "metrics",
    "nn",
    "points",
    "stragglers",
    "surrogates",
    "tuning",
    "workers",
]
