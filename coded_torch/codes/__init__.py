"""Codes: an encoder, and a decoder for every set of workers that may answer."""

from .base import BatchPlan, Code, CurveCode, FixedCode, NotEnoughResults
from .berrut import BerrutCode
from .calibrated import CalibratedCode
from .kernel import KernelCode
from .lagrange import LagrangeCode
from .replication import ReplicationCode
from .spline import SplineCode

__all__ = [
    "BatchPlan",
    "BerrutCode",
    "CalibratedCode",
    "Code",
    "CurveCode",
    "FixedCode",
    "KernelCode",
    "LagrangeCode",
    "NotEnoughResults",
    "ReplicationCode",
    "SplineCode",
]
