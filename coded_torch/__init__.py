"""Coded computing: every answer of a batch from whichever workers reply first.

An argument of the wrong type raises a TypeError, an argument out of its domain a ValueError.
"""

from importlib.metadata import version

from . import codes, linear, nn, stragglers, surrogates, workers
from .codes import DeadlineExceeded, NotEnoughResults
from .evaluation.compare import compare
from .evaluation.tune import tune
from .input_space.regression import Regression
from .nn import CodedWrapper, Report, Waiting

__version__ = version("coded_torch")
__all__ = ["CodedWrapper", "DeadlineExceeded", "NotEnoughResults", "Regression", "Report"]
__all__ += ["Waiting", "codes", "compare", "linear", "nn", "stragglers"]
__all__ += ["surrogates", "tune", "workers"]
