"""Modules that answer although workers are lost."""

from .coded_wrapper import CodedWrapper
from .run_report import RunReport
from .waiting import Waiting

__all__ = ["CodedWrapper", "RunReport", "Waiting"]
