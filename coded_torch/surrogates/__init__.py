"""Cheap approximations of a module, for ``CodedWrapper(..., surrogate=...)``.

Codes then decode the residuals. :class:`Memory` learns by itself from exact answers.
:func:`distill` teaches a smaller network.
"""

from .distillation import distill
from .memory import Memory

__all__ = ["Memory", "distill"]
