"""Old names, until the wrapper uses the new ones."""

from .regression import RegressionCode as KernelCode

__all__ = ["KernelCode"]
