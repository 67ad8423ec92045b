"""A wrapper that runs any module on unreliable workers."""

from ..scheduling.policy import Waiting
from .coded_wrapper import CodedWrapper
from .mean import Interval
from .report import Report

__all__ = ["CodedWrapper", "Interval", "Report", "Waiting"]
