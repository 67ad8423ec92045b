"""What need not be chosen anew in every call: metrics and lengths, of a wrapper with a deadline."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..codes.base import Code
from ..codes.kernel import KernelCode
from ..input_space.distances import Choice

__all__ = ["Narrowing"]

_WHOLE = 3  # calls in which all compete, that are remembered
_EVERY = 16  # calls, after which all compete once more


class Narrowing:
    """Lets only those metrics and lengths compete that have won lately, in most calls.

    Comparing thirteen metrics takes three times as long as all else that predicting does, and one
    module's results are predicted best by the same few of them in call after call.
    """

    def __init__(self) -> None:
        self._code: Code | None = None
        self._narrow: Code | None = None
        self._won: deque[Sequence[Choice]] = deque(maxlen=_WHOLE)
        self._calls = 0

    def __reduce__(self) -> tuple[type[Narrowing], tuple[()]]:
        return Narrowing, ()

    def of(self, code: Code) -> Code:
        """The code as the next call should use it."""
        if code is not self._code:
            self._code, self._narrow, self._calls = code, None, 0
            self._won.clear()
        return code if self._narrow is None or self._calls % _EVERY == 0 else self._narrow

    def note(self, code: Code, choices: Sequence[Choice]) -> None:
        """Take note of a call in which something was predicted.

        Args:
            code: as it was used.
            choices: that were made.
        """
        self._calls += 1
        if code is self._code and isinstance(code, KernelCode) and choices:
            self._won.append(choices)
            if len(self._won) == _WHOLE:
                self._narrow = code.narrowed([choice for some in self._won for choice in some])
