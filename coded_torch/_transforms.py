"""Plans inside function transforms: :func:`torch.func.grad`, ``jacrev``, ``jvp``, not ``vmap``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

__all__ = ["differentiated", "exactly", "outside", "plain"]


def plain(owner: str, argument: str, tensor: Tensor) -> Tensor:
    """The numbers of a tensor, without gradients and without what a transform has wrapped it in.

    Raises:
        ValueError: :func:`torch.func.vmap` hides a dimension of the tensor.
    """
    numbers = torch.func.debug_unwrap(tensor).detach()
    if numbers.dim() != tensor.dim():
        raise ValueError(
            f"{owner}: {argument} must not be under torch.func.vmap, which hides the batch; "
            f"give the whole batch at once, got {numbers.dim() - tensor.dim()} hidden dimensions"
        )
    return numbers


def differentiated(tensor: Tensor) -> bool:
    """Whether a derivative may be asked of what is computed from a tensor now."""
    return (
        (torch.is_grad_enabled() and tensor.requires_grad)
        or bool(torch._C._are_functorch_transforms_active())
        or forward_ad.unpack_dual(tensor).tangent is not None
    )


@contextlib.contextmanager
def exactly(device: str = "cpu") -> Iterator[None]:
    """A block, or a function, without autocast, which would round products to half precision."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """A block that computes with plain tensors, though a transform may be under way.

    Within a transform every operation returns wrapped tensors, whatever it is given. Those have no
    memory that numpy could read, and a plan that kept one would outlive its transform.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield
