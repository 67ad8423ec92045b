"""Plans inside function transforms, under autocast, and whatever the caller's default device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils._device import DeviceContext

__all__ = ["as_called", "differentiated", "exactly", "on_host", "outside", "plain"]


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


class _Host(DeviceContext):
    """The host as the default device, on top of all modes: theirs hold again when it is popped."""

    __enter__ = TorchFunctionMode.__enter__
    __exit__ = TorchFunctionMode.__exit__


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Make new tensors on the host in a block, or a function, whatever the caller's default device.

    The caller's own code, run from within, is put into a block of :func:`as_called`.
    """
    mode = _get_current_function_mode()
    if mode is None or isinstance(mode, _Host):
        yield  # without a mode there is no default device, and every call of torch is faster
        return
    with _Host("cpu"):
        yield


@contextlib.contextmanager
def as_called() -> Iterator[None]:
    """Let the caller's default device hold again, in a block within :func:`on_host`."""
    if not isinstance(_get_current_function_mode(), _Host):
        yield
        return
    with _pop_mode_temporarily():
        yield


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Compute with plain tensors on the host in a block, though a transform may be under way.

    Within a transform every operation returns wrapped tensors, whatever it is given. Those have no
    memory that numpy could read, and a plan that kept one would outlive its transform.
    """
    with on_host():
        if torch._C._functorch.peek_interpreter_stack() is None:
            yield
            return
        with temporarily_clear_interpreter_stack():
            yield
