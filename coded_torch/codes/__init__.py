"""Codes: an encoder, and a decoder for every set of workers. :class:`Code` says how to add one."""

from .base import BatchPlan, Code, DeadlineExceeded, FixedCode, NotEnoughResults
from .curves import BerrutCode, CurveCode, FloaterHormannCode, LagrangeCode, SplineCode
from .repetition import RegressionCode, ReplicationCode

__all__ = ["BatchPlan", "BerrutCode", "Code", "CurveCode", "DeadlineExceeded", "FixedCode"]
__all__ += ["FloaterHormannCode", "LagrangeCode", "NotEnoughResults", "RegressionCode"]
__all__ += ["ReplicationCode", "SplineCode"]
