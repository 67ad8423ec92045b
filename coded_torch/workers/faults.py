r"""What may go wrong with one call of the module, on purpose."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Fault"]

_DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong with one call of the module.

    Attributes:
        delay: seconds that the call takes longer; infinite: it hangs.
        kind: a name of :attr:`KINDS`, or None: the result is right.
    """

    #: What a fault may do: end the worker, or return something else than the module did.
    KINDS: ClassVar = ("crash", "nan", "infinity", "shape", "dtype", "structure")

    delay: float = 0.0
    kind: str | None = None

    def __bool__(self) -> bool:
        """Whether anything goes wrong."""
        return self.delay > 0 or self.kind is not None

    def around(self, call: Callable[[], Any], die: Callable[[], None] | None = None) -> Any:
        """What a worker returns instead of ``call()``; ``die`` ends it, by default by an error."""
        if self.delay > 0:
            time.sleep(min(self.delay, _DAY))
        if self.kind == "crash":
            if die is not None:
                die()
            raise RuntimeError("an injected crash")
        return self.spoil(call())

    def spoil(self, value: Any) -> Any:
        """The result, made wrong in the way of this fault."""
        if self.kind == "structure":
            return [value, None]
        return pytree.tree_map_only(Tensor, self._spoil_leaf, value)

    def _spoil_leaf(self, leaf: Tensor) -> Tensor:
        if self.kind in ("nan", "infinity"):
            return torch.full_like(leaf, math.nan if self.kind == "nan" else math.inf)
        if self.kind == "shape":
            return torch.cat([leaf, leaf])
        if self.kind == "dtype":
            return leaf.to(torch.float64 if leaf.dtype != torch.float64 else torch.float32)
        return leaf


def kill_own_process() -> None:
    """End this process as a crash of compiled code would: at once, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)
