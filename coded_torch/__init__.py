"""Coded computing: every answer of a batch from whichever workers reply first."""

from importlib.metadata import version

from . import (
    calibration,
    codes,
    functional,
    geometry,
    grouping,
    linear,
    metrics,
    nn,
    points,
    stragglers,
    tuning,
    workers,
)
from .codes import NotEnoughResults

__version__ = version("coded_torch")
__all__ = [
    "NotEnoughResults",
    "calibration",
    "codes",
    "functional",
    "geometry",
    "grouping",
    "linear",
    "metrics",
    "nn",
    "points",
    "stragglers",
    "tuning",
    "workers",
]
