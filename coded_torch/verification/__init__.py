"""Find workers that return wrong results: a few rows are computed twice.

Nothing here waits or knows a clock: :class:`Trials` is a waiting policy
(:mod:`coded_torch.scheduling`) around another one.
"""

from .scores import Results, Scores
from .strikes import Strikes
from .trials import Trials

__all__ = ["Results", "Scores", "Strikes", "Trials"]
