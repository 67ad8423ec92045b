"""A wrapper that runs any module on unreliable workers.

One call of a :class:`CodedWrapper`, file by file:

- ``coded_wrapper.py``: the call, from arguments to answers and report; ``module_proxy.py``: how the
  wrapper stands in for the module;
- ``inputs.py``: the arguments, leaf by leaf: which are divided, and which are shared;
- ``division.py``: the batch as rows, or as the columns of a code;
- ``execute.py``: carries out the decisions of ``scheduling/waiting.py`` on a request to a pool;
- ``result_checks.py``: which replies are good, by their form;
- ``predict_missing.py``: answers from results, and predictions with the help of surrogates;
- ``call_errors.py``: the exceptions that are raised instead, and the answers that they hold;
- ``report.py``: the report of the call.
"""

from ..scheduling.waiting import Waiting
from .coded_wrapper import CodedWrapper
from .report import Report

__all__ = ["CodedWrapper", "Report", "Waiting"]
