"""Cheap approximations of a module, for ``CodedWrapper(..., surrogate=...)``.

Codes then decode what these do not know. :class:`Memory` learns by itself, from what the wrapper
has answered; :func:`distill` teaches a smaller network.
"""

from .distillation import distill
from .memory import Memory

__all__ = ["Memory", "distill"]
