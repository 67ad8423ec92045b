"""Old names, until the wrapper uses the new ones."""

from .base import DeadlineExceeded, NotEnoughResults

__all__ = ["DeadlineExceeded", "NotEnoughResults"]
