"""Modules that answer although workers are lost."""

from .coded_wrapper import CodedWrapper, RunReport

__all__ = ["CodedWrapper", "RunReport"]
