r"""The call of a module by a worker, and the faults that a call may be given."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .base import Arguments

_DAY = 86_400.0  # seconds that a hung call sleeps, longer than any call waits


class InjectedCrash(RuntimeError):  # noqa: N818 - it stands for the end of a process
    """The end of a worker that cannot end alone, such as a thread."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of one module call."""

    KINDS: ClassVar = ("crash", "nan", "infinity", "shape", "dtype", "structure")

    delay: float = 0.0  #: seconds that the call takes longer; if infinite, it hangs
    kind: str | None = None  #: an element of :attr:`KINDS`, or None if the result is right

    def __bool__(self) -> bool:
        return self.delay > 0 or self.kind is not None

    def spoil(self, value: Any) -> Any:
        """Return the result that the fault makes of a module's output, a pytree."""
        if self.kind == "structure":
            return [value, None]
        return pytree.tree_map_only(Tensor, self._spoil_leaf, value)

    def _spoil_leaf(self, leaf: Tensor) -> Tensor:
        if self.kind in ("nan", "infinity") and (leaf.is_floating_point() or leaf.is_complex()):
            return torch.full_like(leaf, math.nan if self.kind == "nan" else math.inf)
        if self.kind == "dtype":
            return leaf.to(torch.float64 if leaf.dtype != torch.float64 else torch.float32)
        return torch.cat([leaf, leaf]) if self.kind == "shape" else leaf


def compute(
    module: nn.Module,
    arguments: Arguments | None,
    fault: Fault | None = None,
    die: Callable[[], None] | None = None,
) -> Any:
    """Call a module for a :meth:`Task.payload` as a worker must, with the fault of the part.

    Arguments of None stand for no call. A crash calls ``die``, or else raises an InjectedCrash.
    """
    if arguments is None:
        return None
    args, kwargs = arguments
    if fault is None:
        return module(*args, **kwargs)
    time.sleep(min(fault.delay, _DAY))
    if fault.kind == "crash":
        if die is not None:
            die()
        raise InjectedCrash("an injected crash")
    return fault.spoil(module(*args, **kwargs))


def kill_own_process() -> None:
    """End this process at once, as a crash of compiled code would."""
    os.kill(os.getpid(), signal.SIGKILL)
