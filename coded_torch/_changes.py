"""Whether a module has changed, so that copies of it are made anew."""

import enum
import functools
import itertools
import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from types import BuiltinFunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ._extension import Look, Samples
from ._torch import in_training, outside
from ._untuned import MOST_ELEMENTS, MOST_NESTED

Fingerprint = tuple[list[Any], tuple[Any, ...]]
# The fingerprints that are known in a block of `unchanged`, by the id of a module.
_KNOWN: ContextVar[dict[int, tuple[nn.Module, Fingerprint]] | None] = ContextVar(
    "_KNOWN", default=None
)
_INTERNAL = frozenset(vars(nn.Module()))  # attributes that every module has
# The types of attributes that are compared by value, as are tuples and lists of them.
_PLAIN = {type(None), bool, int, str, bytes, BuiltinFunctionType}
_PLAIN |= {torch.dtype, torch.device, torch.memory_format}
_FLOATS, _COLLECTIONS = (float, complex), (tuple, list, dict)
# Other attributes are compared by identity: by id, a weak reference and a number that is not used
# again. A fingerprint that held them would keep alive the modules to which they lead.
_NUMBERS = itertools.count()
_OBJECTS = dict[int, tuple[weakref.ref[Any], int]]()
# What a compiled look compares with: the types of values that do not change, of tensors that run no
# code of others, and the names of attributes that are compared whole.
_SAME_TYPES = frozenset(_PLAIN - {BuiltinFunctionType}).union(_FLOATS)
_TENSORS = frozenset([Tensor, nn.Parameter])
_WHOLE = frozenset(["_parameters", "_buffers", "_modules"])
# The last fingerprint by the id of a module, with a weak reference to it, by which it is removed.
_LAST = dict[int, tuple[weakref.ref[nn.Module], Look | None, Samples, Fingerprint]]()


class unchanged:  # noqa: N801 - callers read it as a function
    """Take modules as unchanged in a block, so that :func:`fingerprint` walks each one once."""

    def __enter__(self) -> None:
        self._token = _KNOWN.set({})

    def __exit__(self, *_: object) -> None:
        _KNOWN.reset(self._token)


def fingerprint(module: nn.Module) -> Fingerprint:
    """Return the module's tensors, and a key that differs once the module has changed.

    Keep what comes with the key. If it is freed, its memory may hold other weights.
    """
    known = _KNOWN.get()
    if known is None:
        known = {}
    if id(module) in known:
        return known[id(module)][1]
    _count_steps()
    with outside():
        last = _LAST.get(id(module))
        if last is not None and last[0]() is not module:
            last = None
        if last is not None and last[1] is not None and _is_same(last[1]):
            _, _, samples, (kept, key) = last
            hashed = samples.hash()
            found = last[3] if hashed == key[1] else (kept, (key[0], hashed))
        else:
            found, samples = _walk(module)
            # To make a look takes half of the time of a walk: not for weights in training.
            look = _look_at(module) if last and last[3][1] == found[1] else None
            own = weakref.ref(module, functools.partial(_remove, _LAST, id(module)))
            _LAST[id(module)] = own, look, samples, found
            if not all(isinstance(x, Tensor) and x.layout is torch.strided for x in found[0]):
                del _LAST[id(module)]  # others may lead to the module, and would keep it alive
    known[id(module)] = module, found
    return found


def _walk(module: nn.Module) -> tuple[Fingerprint, Samples]:
    """Return the fingerprint of a module, and samples of its tensors, by looking at every part."""
    kept: list[Any] = []
    look = functools.partial(_look, kept)
    looks = list[Any]()
    places = {id(part): place for place, part in enumerate(module.modules())}
    for part in module.modules():
        looks += [(name, places.get(id(m))) for name, m in part._modules.items()]
        looks += (type(part), in_training(part))
        looks += [(name, look(value)) for name, value in part._parameters.items()]
        looks += [(name, look(value)) for name, value in part._buffers.items()]
        looks += map(look, filter(None, (part._forward_pre_hooks, part._forward_hooks)))
        attributes = part.__dict__.items()
        looks += [(name, look(value)) for name, value in attributes if name not in _INTERNAL]
    samples = _samples_of([x for x in kept if isinstance(x, Tensor)])
    return (kept, (tuple(looks), samples.hash())), samples


def _is_same(look: Look) -> bool:
    try:
        return bool(look.same())
    except Exception:  # a tensor may have lost its memory, and a part its attributes
        return False


def _look_at(module: nn.Module) -> Look | None:
    """Return a compiled look at a module; None if it has attributes that this cannot compare."""
    parts = [*module.modules()]
    # A script has its weights in objects of C++, which a look compares by identity only.
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        return None
    try:
        return Look(parts, _WHOLE, _SAME_TYPES, _TENSORS, MOST_ELEMENTS)
    except (TypeError, RuntimeError):  # such as an ordered dict, or a tensor of inference mode
        return None


def _remove(known: dict[int, Any], place: int, reference: weakref.ref[Any]) -> None:
    """Remove what is known of an object that has ended, unless its id is another's by now."""
    if known.get(place, (None,))[0] is reference:
        del known[place]


def _look(kept: list[Any], value: Any, seen: dict[int, int] | None = None) -> Any:
    """Return an attribute as it is compared; add to ``kept`` what must outlive that."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind in _FLOATS:  # -0.0 equals 0.0, and is another number
        return kind, repr(value)
    # Most tuples are sizes: to look at them first takes a fifth of the time.
    if kind is tuple and len(value) <= MOST_ELEMENTS:
        kinds = tuple(map(type, value))
        if _PLAIN.issuperset(kinds):
            return kinds, value
    if isinstance(value, Tensor):
        value = torch.func.debug_unwrap(value)  # a transform's tensor has no memory
        if value.layout is not torch.strided:
            kept.append(value)
            return id(value), _version_of(value)
        value = value.detach()  # follows no later assignment to data
        kept.append(value)
        bits = value.dtype, value.is_conj(), value.is_neg()
        return value.data_ptr(), _version_of(value), value.shape, value.stride(), *bits
    if seen is None:  # the numbers of the collections so far, by their ids
        seen = {}
    if isinstance(value, _COLLECTIONS):
        if id(value) in seen or len(seen) == MOST_NESTED:  # it may hold itself
            return type(value), len(value), seen.get(id(value))
        seen[id(value)] = len(seen)
        items = [*itertools.islice(value, MOST_ELEMENTS)]
        if isinstance(value, dict):
            items += itertools.islice(value.values(), MOST_ELEMENTS)
        return type(value), len(value), *[_look(kept, item, seen) for item in items]
    if isinstance(value, MethodType):  # a new object each time that it is taken
        return _look(kept, value.__func__), _look(kept, value.__self__, seen)
    if isinstance(value, np.generic):
        return value.dtype, value.tobytes()
    if isinstance(value, enum.Enum):
        return type(value), value
    try:
        return _number_of(value)
    except TypeError:  # no weak reference to it can be made
        kept.append(value)
        return type(value), id(value)


def _number_of(value: Any) -> int:
    """Return a number of an object that no other object has had; a TypeError for some types."""
    found, number = _OBJECTS.get(id(value), (None, 0))
    if found is None or found() is not value:
        number = next(_NUMBERS)
        own = weakref.ref(value, functools.partial(_remove, _OBJECTS, id(value)))
        _OBJECTS[id(value)] = own, number
    return number


def state_of(tensor: Tensor) -> tuple[int, int, int]:
    """Return what differs once a tensor, which must be kept, has changed."""
    _count_steps()
    address = tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
    return address, _version_of(tensor), _samples_of([tensor]).hash()


def _samples_of(tensors: Iterable[Tensor]) -> Samples:
    """Return samples of tensors on the host, which must be kept.

    A tensor has four samples of 64 bytes, or one of all its bytes if these are few. They show
    changes that torch does not count, such as those by NumPy.
    """
    ranges = list[tuple[int, int]]()
    for x in tensors:
        if not x.is_cpu or x.layout is not torch.strided or not x.data_ptr():
            continue
        address = x.data_ptr()
        size = x.nbytes
        if not x.is_contiguous():
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            size = (last + 1) * x.itemsize
        # A storage may have been freed or cut by its owner.
        if x.storage_offset() * x.itemsize + size <= x.untyped_storage().nbytes():
            ranges.append((address, size))
    return Samples(ranges)


def _version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place, also by optimizers; 0 in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


@functools.cache
def _count_steps() -> None:
    """Count the steps of all optimizers as changes: fused ones do not.

    Without a gradient, a weight has not changed. Hooks may clear gradients after the step, and a
    closure makes them during it, so that weights with gradients before or after it count.
    """
    noted = weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Tensor]]()

    def with_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        weights = [x for group in optimizer.param_groups for x in group["params"]]
        return [x for x in weights if x.grad is not None and not x.is_inference()]

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        noted[optimizer] = with_gradients(optimizer)

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        changed = noted.pop(optimizer, []) + with_gradients(optimizer)
        increment_version(list({id(x): x for x in changed}.values()))

    register_optimizer_step_pre_hook(note)
    register_optimizer_step_post_hook(count)
