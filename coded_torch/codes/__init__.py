"""Codes: an encoder, and a decoder for every set of workers. :class:`Code` says how to add one."""

from ._base import BatchPlan, Code, DeadlineExceeded, FixedCode, NotEnoughResults
from ._repetition import RegressionCode, ReplicationCode
from .curves import BerrutCode, CurveCode, FloaterHormannCode, LagrangeCode, SplineCode

__all__ = ["BatchPlan", "BerrutCode", "Code", "CurveCode", "DeadlineExceeded", "FixedCode"]
__all__ += ["FloaterHormannCode", "LagrangeCode", "NotEnoughResults", "RegressionCode"]
__all__ += ["ReplicationCode", "SplineCode"]
