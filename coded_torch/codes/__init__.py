"""Codes: an encoder, and a decoder for every set of workers that may answer."""

from .base import Code, FixedCode
from .berrut import BerrutCode, FloaterHormannCode
from .lagrange import LagrangeCode
from .nodes import CurveCode
from .plans import BatchPlan, DeadlineExceeded, NotEnoughResults
from .repetition import RegressionCode, ReplicationCode
from .spline import SplineCode

__all__ = ["BatchPlan", "BerrutCode", "Code", "CurveCode", "DeadlineExceeded", "FixedCode"]
__all__ += ["FloaterHormannCode", "LagrangeCode", "NotEnoughResults", "RegressionCode"]
__all__ += ["ReplicationCode", "SplineCode"]
