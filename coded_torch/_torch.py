"""Torch's state around a call: transforms, autocast, default devices, streams and weights."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils._device import DeviceContext
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    register_dataclass,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_map_,
    tree_structure,
    tree_unflatten,
)

from ._arguments import arguments, bound

_T = TypeVar("_T")
#: The structure of a single tensor.
LEAF = tree_structure(0)
_ALIGNMENT = 16  # bytes, as wide as the widest access of a kernel
_generators = threading.Lock()


@contextlib.contextmanager
def random_numbers_kept(
    devices: Iterable[torch.device] = (), seed: int | None = None
) -> Iterator[None]:
    """Go on with the random numbers of the CPU, and of CUDA devices, after a block that draws some.

    With a seed, the block draws numbers of this seed.

    Unlike in :func:`torch.random.fork_rng`, one thread at a time reads or sets states. torch holds
    a generator's lock while it makes the tensor of its state. If this collects garbage, another
    thread may take the interpreter, wait for the generator's lock, and none goes on.
    """
    devices = list(devices)
    with _generators:
        state = torch.get_rng_state()
        states = [torch.cuda.get_rng_state(device) for device in devices]
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(seed)
    try:
        yield
    finally:
        with _generators:
            torch.set_rng_state(state)
            for device, state_of_device in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(state_of_device, device)


def plain(owner: str, argument: str, tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, without gradients and without the wrappers of transforms."""
    numbers = torch.func.debug_unwrap(tensor).detach()
    if numbers.dim() != tensor.dim():
        requirement = f"{argument} must not be under torch.func.vmap, which hides the batch"
        got = f"{numbers.dim() - tensor.dim()} hidden dimensions"
        raise ValueError(f"{owner}: {requirement}; give the whole batch at once, got {got}")
    return numbers


def differentiated(tensor: Tensor) -> bool:
    """Return whether a derivative with respect to a tensor may be asked for."""
    return (
        (torch.is_grad_enabled() and tensor.requires_grad)
        or bool(torch._C._are_functorch_transforms_active())
        or tangent_of(tensor) is not None
    )


def tangent_of(tensor: Tensor) -> Tensor | None:
    """Return the tangent of a dual tensor, None of others."""
    if forward_ad._current_level < 0:  # unpacking would take microseconds for nothing
        return None
    found: Tensor | None = forward_ad.unpack_dual(tensor).tangent
    return found


def refuse_derivatives(owner: str, leaves: Iterable[Any], module: nn.Module) -> None:
    """Raise a RuntimeError if a derivative is asked for that another process does not compute."""
    has_transforms = torch._C._are_functorch_transforms_active()
    if not (has_transforms or torch.is_grad_enabled() or forward_ad._current_level >= 0):
        return
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    duals = tensors if forward_ad._current_level < 0 else [*module.parameters(), *module.buffers()]
    if any(map(differentiated, tensors)) or any(tangent_of(x) is not None for x in duals):
        remedy = "call under torch.no_grad(), or use DeviceWorkers, or LocalWorkers for torch.func"
        requirement = "inputs must not require gradients, nor weights have tangents"
        raise RuntimeError(
            f"{owner}: {requirement}, as none pass through other processes; {remedy}"
        )


def tracer() -> str:
    """Return what traces the computations of this thread; "" if nothing does."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    proxy = torch._C._TorchDispatchModeKey.PROXY
    mode = torch._C._get_dispatch_mode(proxy)
    mode_of_export = None
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch):
        mode_of_export = torch._ops._get_dispatch_mode_pre_dispatch(proxy)
    is_traced = mode is not None or mode_of_export is not None
    return "make_fx or torch.export" if is_traced else ""


def refuse_tracing() -> None:
    """Raise a RuntimeError if torch traces what this thread computes."""
    if by := tracer():
        what = f"a call must not be traced by {by}"
        why = "which would record what other threads compute as constants"
        raise RuntimeError(f"CodedWrapper: {what}, {why}; use LocalWorkers")


class _Block(contextlib.ContextDecorator):
    """A state of torch in a block or a function; it costs little where it holds already."""

    #: Return the context that brings the state about; None if it holds.
    _change: Callable[[], Any]

    def __init__(self, *args: str) -> None:
        self._args = args

    def _recreate_cm(self) -> Any:  # each call of a function enters its own
        return type(self)(*self._args)

    def __enter__(self) -> None:
        self._context = self._change()
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *error: Any) -> Any:
        if self._context is not None:
            return self._context.__exit__(*error)
        return None


class exactly(_Block):  # noqa: N801 - callers read these classes as functions
    """Run a block, or a function, without autocast, which rounds products to half precision."""

    def _change(self) -> Any:
        (device,) = self._args or ("cpu",)
        if torch.is_autocast_enabled(device):
            return torch.autocast(device, enabled=False)
        return None


class _Host(DeviceContext):
    """The host as the default device, on top of all modes, which hold again after it."""

    __enter__ = TorchFunctionMode.__enter__
    __exit__ = TorchFunctionMode.__exit__


class on_host(_Block):  # noqa: N801
    """Make new tensors on the host; the caller's own code runs in a block of :class:`as_called`."""

    def _change(self) -> Any:
        mode = _get_current_function_mode()  # a mode would slow down every call
        if mode is None or isinstance(mode, _Host):
            return None
        return _Host("cpu")


class as_called(_Block):  # noqa: N801
    """Let the caller's default device hold again, in a block within :class:`on_host`."""

    def _change(self) -> Any:
        at_host = isinstance(_get_current_function_mode(), _Host)
        return _pop_mode_temporarily() if at_host else None


class outside(on_host):  # noqa: N801
    """Compute with plain tensors on the host: a transform's have no memory, and end with it."""

    def _change(self) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is None:
            return super()._change()
        return self._without_transforms()

    @contextlib.contextmanager
    def _without_transforms(self) -> Iterator[None]:
        with on_host(), temporarily_clear_interpreter_stack():
            yield


def read_here(tensor: Tensor) -> Tensor:
    """Keep the memory of a tensor of another stream until the current stream has read it."""
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
    parts = zip(staged.to(device, non_blocking=True).split(spans), sizes, tensors, strict=True)
    return [part[:size].view(t.dtype).view(t.shape) for part, size, t in parts]


def placed(
    owner: object,
    copies: dict[tuple[Any, ...], _T],
    device: torch.device,
    make: Callable[[], _T],
    *kind: Any,
) -> _T:
    """Return the copy that an object keeps on a device, for every stream; make it if needed.

    Each stream has its own: the stream's order alone separates a copy from its uses, and the last
    use from the next of the memory. The key is the device, the ``kind``, such as a dtype, and the
    stream. While a CUDA graph is captured, of which a new copy would be a part, none is made.
    """
    on_stream = 0
    capturing = False
    if device.type == "cuda" and not torch.compiler.is_compiling():
        on_stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    found = copies.get((device, *kind, on_stream))
    if found is None and capturing:
        found = next((c for k, c in list(copies.items()) if k[:-1] == (device, *kind)), None)
        if found is None:
            what = "".join(f" to {x} values" for x in kind)
            requirement = f"the map must have been applied{what} on {device} before a CUDA graph"
            raise RuntimeError(f"{type(owner).__name__}: {requirement} captures it, got none")
    if found is None:
        found = copies[(device, *kind, on_stream)] = make()
    return found


def in_training(module: nn.Module) -> bool:
    """Return whether a module is in training mode; a frozen TorchScript has no mode."""
    mode: bool = getattr(module, "training", False)
    return mode


def device_of(module: Any) -> torch.device | None:
    """Return the device of a module's first weight; None if it has none, or is not a module."""
    if not isinstance(module, nn.Module):
        return None
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), None)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], TreeSpec]:
    """Return the leaves and the structure of a tree, which may be a single tensor.

    Dataclasses that torch has not seen are registered, as Hugging Face registers its outputs.
    """
    if isinstance(tree, Tensor):
        return [tree], LEAF
    leaves, spec = tree_flatten(tree, is_leaf)
    unknown = {type(x) for x in leaves if hasattr(type(x), "__dataclass_fields__")}
    registered = [kind for kind in unknown if _register(kind)]
    if registered:
        return flatten(tree, is_leaf)
    return leaves, spec


def _register(kind: Any) -> bool:
    """Let torch see the fields of a dataclass, and return whether it can make one of them.

    It cannot where making one computes: an object of joined fields would be another one.
    """
    is_made_of_fields = "__dataclass_params__" in vars(kind) and kind.__dataclass_params__.init
    is_made_of_fields &= all(field.init for field in dataclasses.fields(kind))
    if not is_made_of_fields or hasattr(kind, "__post_init__"):
        return False
    try:
        register_dataclass(kind)
    except ValueError:  # it is registered: the caller wants it to be a leaf
        return False
    return True


def is_texts(node: Any) -> bool:
    """Return whether a node of inputs is a list, or a NumPy or pandas column, of strings."""
    is_column = isinstance(node, np.ndarray) or hasattr(node, "to_numpy")
    is_flat = getattr(node, "ndim", 0) == 1 if is_column else isinstance(node, list)
    return is_flat and len(node) > 0 and all(isinstance(x, str) for x in node)


def unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """Return the tree of these leaves and this structure."""
    if spec is LEAF:
        return leaves[0]
    return tree_unflatten(leaves, spec)


@functools.cache
def positional(count: int) -> tuple[TreeSpec, TreeSpec]:
    """Return the structures of ``(args, kwargs)`` and of args, for ``count`` positional tensors."""
    args = (0,) * count
    return tree_structure((args, {})), tree_structure(args)


def leaf_name(root: str, tree: Any, index: int) -> str:
    """Return the Python expression of a leaf of ``tree``."""
    path, _ = tree_flatten_with_path(tree)[0][index]
    return root + keystr(path)


def broadcast_dims(argument: str, dims: Any, spec: TreeSpec, *names: str) -> list[Any]:
    """Return the batch dimension of each leaf, or a name of ``names``, from a pytree prefix."""
    if dims is None or type(dims) is int:  # the same for all leaves
        return [dims] * spec.num_leaves
    flat: list[int | None] = []
    tree = tree_unflatten([0] * spec.num_leaves, spec)

    def repeat(dim: Any, subtree: Any) -> None:
        """Add one entry of ``dims`` for each leaf below it."""
        if not (dim is None or dim in names or type(dim) is int):
            *some, last = "integers", "None", *map(repr, names)
            requirement = f"{argument} must hold {', '.join(some)} or {last}"
            raise TypeError(f"CodedWrapper: {requirement}, got {dim!r}")
        flat.extend([dim] * tree_structure(subtree).num_leaves)

    try:
        tree_map_(repeat, dims, tree)
    except ValueError:
        requirement = f"{argument} must be a pytree prefix of the values"
        got = f"{dims!r} for {tree_map(lambda _: '*', tree)}"
        raise ValueError(f"CodedWrapper: {requirement}, got {got}") from None
    return flat


class WrongRows(ValueError):  # noqa: N818 - it reaches callers as a ValueError
    """An output has not one row for each of the inputs."""


def check_batch(output: Any, index: int, leaf: Tensor, dim: int, size: int) -> None:
    """Raise a WrongRows unless leaf ``index`` of ``output`` has ``size`` rows at ``dim``."""
    if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != size:
        name = leaf_name("output", output, index)
        requirement = f"{name} must have size {size}, the batch size, at dim {dim}"
        raise WrongRows(f"CodedWrapper: {requirement}, got shape {tuple(leaf.shape)}")


def has_rows(leaf: Any) -> bool:
    """Return whether a leaf is a tensor that can be read row by row."""
    is_strided = isinstance(leaf, Tensor) and leaf.layout is torch.strided
    return is_strided and leaf.dim() > 0 and not leaf.is_nested


def different_rows(inputs: Sequence[Any]) -> list[int]:
    """Return the numbers of the first row and of the first that differs from it, if one does.

    Inputs are tensors, or lists of strings.
    """

    def differs(row: int) -> bool:
        pairs = ((x[row], x[0]) for x in inputs)
        return any(not (a.equal(b) if isinstance(a, Tensor) else a == b) for a, b in pairs)

    other = next(filter(differs, range(1, len(inputs[0]))), 0)
    return [0, other] if other else [0]


def sample(batch: Any) -> inspect.BoundArguments:
    """Return the first row of a batch, and the first that differs from it, as bound arguments."""
    given = arguments(batch)
    leaves, spec = tree_flatten(given, is_texts)
    rows = different_rows(leaves)
    chosen = [x[rows] if isinstance(x, Tensor) else [x[row] for row in rows] for x in leaves]
    args, kwargs = tree_unflatten(chosen, spec)
    return bound(args, kwargs)


def as_real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, and any other tensor as it is."""
    if tensor.dtype.is_complex:
        return torch.view_as_real(tensor.resolve_conj())
    return tensor
