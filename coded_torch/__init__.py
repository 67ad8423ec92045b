"""Coded computing: every answer of a batch from whichever workers reply first."""

from importlib.metadata import version

from . import codes, functional, linear, metrics, nn, points, stragglers, workers
from .codes import NotEnoughResults

__version__ = version("coded_torch")
__all__ = [
    "NotEnoughResults",
    "codes",
    "functional",
    "linear",
    "metrics",
    "nn",
    "points",
    "stragglers",
    "workers",
]
