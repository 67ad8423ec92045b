"""Memory that devices and other streams read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["placed", "read_here", "to_device"]

_T = TypeVar("_T")
_ALIGNMENT = 16  # bytes, as wide as the widest access of a kernel


def read_here(tensor: Tensor) -> Tensor:
    """Keep the memory of a tensor until the current stream has read it, though it is freed.

    The allocator knows only the stream that made the tensor.
    """
    if tensor.device.type != "cpu":
        tensor.record_stream(torch.accelerator.current_stream(tensor.device))
    return tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return host tensors on ``device``; on CUDA, by one copy that the host does not wait for."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return [t.to(device) for t in tensors]
    sizes = [t.numel() * t.element_size() for t in tensors]
    spans = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    staged = torch.empty(sum(spans), dtype=torch.uint8, device="cpu", pin_memory=True)
    for span, size, t in zip(staged.split(spans), sizes, tensors, strict=True):
        span[:size].copy_(t.contiguous().view(-1).view(torch.uint8))
    parts = staged.to(device, non_blocking=True).split(spans)
    return [
        part[:size].view(t.dtype).view(t.shape)
        for part, size, t in zip(parts, sizes, tensors, strict=True)
    ]


def placed(
    owner: object,
    copies: dict[tuple[Any, ...], _T],
    device: torch.device,
    make: Callable[[], _T],
    *kind: Any,
) -> _T:
    """Return what an object keeps on a device, for every stream; it is made if there is none.

    Each stream has its own: its order is all that separates a copy from its uses, and the last use
    from the memory's next.

    Args:
        owner: the object, for the message.
        copies: what it keeps, by device, kind and stream.
        device: where it is wanted.
        make: makes it.
        kind: what else tells copies apart, such as a dtype.

    Raises:
        RuntimeError: a CUDA graph is captured, of which a new copy would be a part.
    """
    on_stream, capturing = 0, False
    if device.type == "cuda" and not torch.compiler.is_compiling():
        on_stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    found = copies.get((device, *kind, on_stream))
    if found is None and capturing:
        found = next((c for k, c in list(copies.items()) if k[:-1] == (device, *kind)), None)
        if found is None:
            what = "".join(f" to {x} values" for x in kind)
            raise RuntimeError(
                f"{type(owner).__name__}: the map must have been applied{what} on {device} before "
                "it is captured in a CUDA graph, got none"
            )
    if found is None:
        found = copies[(device, *kind, on_stream)] = make()
    return found
