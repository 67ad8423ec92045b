"""Batch inference that finishes when workers crash, hang, straggle or return wrong numbers.

An argument of the wrong type raises a TypeError, an argument out of its domain a ValueError.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import codes, linear, nn, stragglers, surrogates, workers
from .codes import DeadlineExceeded, NotEnoughResults
from .input_space import metrics
from .input_space._regression import Regression
from .nn import CodedWrapper, Interval, Report, Waiting

if TYPE_CHECKING:
    from .experiments._tune import tune
    from .experiments.compare import compare
    from .experiments.scores import Setting

__version__ = version("coded_torch")
__all__ = ["CodedWrapper", "DeadlineExceeded", "Interval", "NotEnoughResults", "Regression"]
__all__ += ["Report", "Setting", "Waiting", "codes", "compare", "linear", "metrics", "nn"]
__all__ += ["stragglers", "surrogates", "tune", "workers"]
_EXPERIMENTS = {"compare": "compare", "tune": "_tune", "Setting": "scores"}


def __getattr__(name: str) -> Any:
    if name in _EXPERIMENTS:  # nothing else of the package needs them
        return getattr(import_module(f"{__name__}.experiments.{_EXPERIMENTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
