"""A wrapper that runs any module on unreliable workers."""

from ..scheduling.policy import Waiting
from .coded_wrapper import CodedWrapper
from .fixed_batch import FixedBatch
from .from_factory import FromFactory
from .mean import Interval
from .program import Program
from .report import Report

__all__ = ["CodedWrapper", "FixedBatch", "FromFactory", "Interval", "Program", "Report", "Waiting"]
