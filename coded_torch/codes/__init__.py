"""Codes: an encoder, and a decoder for every set of workers that may answer."""

from .base import Code, CurveCode, NotEnoughResults
from .berrut import BerrutCode
from .lagrange import LagrangeCode
from .replication import ReplicationCode
from .spline import SplineCode

__all__ = [
    "BerrutCode",
    "Code",
    "CurveCode",
    "LagrangeCode",
    "NotEnoughResults",
    "ReplicationCode",
    "SplineCode",
]
