"""Codes: an encoder, and a decoder for every set of workers that may answer.

To add a code:

1. In a new file, subclass :class:`FixedCode`, or :class:`CurveCode` for functions of a point.
2. Export it here, and name it in ``peers`` of ``evaluation/compare.py``.
3. Inherit ``coded_torch.testing.codes.CodeTests``, as ``tests/codes/test_lagrange.py`` does.
"""

from .base import Code, FixedCode
from .curves import BerrutCode, CurveCode, FloaterHormannCode, LagrangeCode, SplineCode
from .plans import BatchPlan, DeadlineExceeded, NotEnoughResults
from .repetition import RegressionCode, ReplicationCode

__all__ = ["BatchPlan", "BerrutCode", "Code", "CurveCode", "DeadlineExceeded", "FixedCode"]
__all__ += ["FloaterHormannCode", "LagrangeCode", "NotEnoughResults", "RegressionCode"]
__all__ += ["ReplicationCode", "SplineCode"]
