"""Find workers that return wrong results: a few rows are computed twice.

Nothing here waits or knows a clock. :meth:`Strikes.draw` adds secret check rows to the parts of a
call. Then :meth:`Trials.decisions` is a generator of decisions that is sent events, as a
waiting policy (:mod:`coded_torch.scheduling.waiting`).
"""

from .scores import Results, Scores
from .strikes import Drawn, Strikes
from .trials import Trials

__all__ = ["Drawn", "Results", "Scores", "Strikes", "Trials"]
