"""Codes: an encoder, and a decoder for every set of workers that may answer."""

from .base import Code, FixedCode
from .batch_plan import BatchPlan
from .berrut import BerrutCode
from .curve import CurveCode
from .errors import DeadlineExceeded, NotEnoughResults
from .kernel import KernelCode
from .lagrange import LagrangeCode
from .plans import plan_batch, plan_rows
from .regression import RegressionCode
from .replication import ReplicationCode
from .spline import SplineCode

__all__ = [
    "BatchPlan",
    "BerrutCode",
    "Code",
    "CurveCode",
    "DeadlineExceeded",
    "FixedCode",
    "KernelCode",
    "LagrangeCode",
    "NotEnoughResults",
    "RegressionCode",
    "ReplicationCode",
    "SplineCode",
    "plan_batch",
    "plan_rows",
]
