"""A wrapper that runs any module on unreliable workers."""

from ..scheduling.policy import Waiting
from ._coded_wrapper import CodedWrapper
from ._fixed_batch import FixedBatch
from ._from_factory import FromFactory
from ._mean import Interval
from ._program import Program
from ._report import Report

__all__ = ["CodedWrapper", "FixedBatch", "FromFactory", "Interval", "Program", "Report", "Waiting"]
