"""Codes: an encoder, and a decoder for every set of workers that may answer.

To add a code:

1. In a new file, subclass :class:`FixedCode`, whose matrices no input changes. A code that
   evaluates functions of a point subclasses :class:`CurveCode`.
2. Inherit ``coded_torch.testing.codes.CodeTests``, as ``tests/codes/test_lagrange.py`` does.
3. Export it here. ``peers`` in ``evaluation/compare.py`` names the codes of comparisons.
"""

from .base import Code, FixedCode
from .curves import BerrutCode, CurveCode, FloaterHormannCode, LagrangeCode, SplineCode
from .plans import BatchPlan, DeadlineExceeded, NotEnoughResults
from .repetition import RegressionCode, ReplicationCode

__all__ = ["BatchPlan", "BerrutCode", "Code", "CurveCode", "DeadlineExceeded", "FixedCode"]
__all__ += ["FloaterHormannCode", "LagrangeCode", "NotEnoughResults", "RegressionCode"]
__all__ += ["ReplicationCode", "SplineCode"]
