"""Old names, until the wrapper uses the new ones."""

from .metrics import METRICS, Choice

__all__ = ["METRICS", "Choice"]
