"""Modules that answer although workers are lost.

One call of a :class:`CodedWrapper`, file by file:

- ``_stand_in.py``, ``coded_wrapper.py``: the call, from arguments to answers and report;
- ``_inputs.py``: the arguments, leaf by leaf; which are divided, and which are shared;
- ``_units.py``: the batch as rows, or as the columns of a code: ``codes/plans.py`` orders and
  groups it (``geometry.py``, ``grouping.py``) and fits the code to it (``codes/spline.py``, ...);
  the plan, ``codes/batch_plan.py``, encodes it by linear maps (``linear/``, ``ops.py``);
- ``waiting.py``: what to ask, when, and when to stop: the policy; its decisions in one call are in
  ``_decisions.py``, what it has learnt of latencies in ``_history.py``;
- ``_collect.py``: does what was decided, on a request to a pool (``workers/base.py``,
  ``workers/local.py``, ...), where late results are dropped (``workers/live.py``);
- ``_results.py``: which replies are good, by their form;
- ``_guesses.py``: what surrogates (``surrogates/``) make of the inputs;
- ``_residuals.py``: answers from results, with their help;
- ``report.py``: what became of it.
"""

from ..scheduling.waiting import Waiting
from .coded_wrapper import CodedWrapper
from .report import Report

__all__ = ["CodedWrapper", "Report", "Waiting"]
