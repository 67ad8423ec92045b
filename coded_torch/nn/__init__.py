"""Modules that answer although workers are lost.

One call of a :class:`CodedWrapper`, file by file:

- ``coded_wrapper.py``: the call, from arguments to answers and report;
- ``_inputs.py``: the arguments, leaf by leaf; which are divided, and which are shared;
- ``_units.py``: the batch as rows, or as the columns of a code: ``codes/plans.py`` orders and
  groups it (``geometry.py``, ``grouping.py``) and fits the code to it (``codes/spline.py``, ...),
  which encodes it by linear maps (``linear/``, ``ops.py``);
- ``waiting.py``: whom to ask, when, and when to stop: decisions only;
- ``_collect.py``: does what was decided, on a request to a pool (``workers/base.py``,
  ``workers/local.py``, ...);
- ``_results.py``: which replies are good;
- ``_residuals.py``: answers from results, with the help of surrogates;
- ``report.py``: what became of it.
"""

from .coded_wrapper import CodedWrapper
from .report import Report
from .waiting import Waiting

__all__ = ["CodedWrapper", "Report", "Waiting"]
