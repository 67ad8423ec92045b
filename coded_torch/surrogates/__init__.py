"""Cheap approximations of a module, for ``CodedWrapper(..., surrogate=...)``.

Codes then decode the residuals. :class:`Memory` learns by itself from computed answers.
:func:`distill` teaches a smaller network.
"""

from typing import Any

from ._distillation import distill
from ._memory import Memory

__all__ = ["Memory", "distill"]


def checked(given: Any) -> tuple[Any, ...]:
    """Return surrogates as a tuple: as an attribute, a module would be a submodule."""
    several = tuple(given) if isinstance(given, list | tuple) else (given,)
    for wrong in (x for x in several if not (callable(x) or isinstance(x, Memory))):
        requirement = (
            "surrogate must be a callable of the module's inputs, a Memory, or a list of such"
        )
        raise TypeError(f"CodedWrapper: {requirement}, got {type(wrong).__name__}")
    return several
