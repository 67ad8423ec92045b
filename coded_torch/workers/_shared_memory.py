r"""Objects in messages between two local processes, with their tensors in shared memory.

``csrc/lane`` sends the messages. Large received tensors are views of the memory that both processes
map. The sender writes there again when the receiver holds no view any more.
"""

import contextlib
import functools
import importlib
import io
import math
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._extension import lane
from .._table import Units
from .._torch import positional
from ._torchscript import with_scripts
from ._untuned import LONGEST_FORM, MOST_FORMS

_ALIGNMENT = 64  # bytes of a cache line
# Bytes up to which a tensor of a long message is copied: a view would keep the whole memory.
_SHORT = 1 << 16
_PLAIN = bytes, bool, type(None)
_CPU = torch.device("cpu")
# How the dtypes of results are stored that are joined without a look at each; the others are rare.
_KINDS: dict[torch.dtype, Any] = {}
if lane is not None:
    _KINDS |= dict.fromkeys((torch.float32, torch.complex64), lane.Kind.SINGLE)
    _KINDS |= dict.fromkeys((torch.float64, torch.complex128), lane.Kind.DOUBLE)
    _KINDS |= {torch.float16: lane.Kind.HALF, torch.bfloat16: lane.Kind.BFLOAT16}
    _KINDS |= dict.fromkeys((torch.int64, torch.int32, torch.int16), lane.Kind.OTHER)
    _KINDS |= dict.fromkeys((torch.int8, torch.uint8, torch.bool), lane.Kind.OTHER)


class Pickled:
    """The pickle of an object without its tensors, which lie behind the pickle in memory.

    With ``has_storages``, whole storages are written, so that tensors that share one still do.
    """

    def __init__(self, value: Any, has_storages: bool = False) -> None:
        self._has_storages = has_storages
        # By id: each tensor with its persistent id, and each written tensor with its place.
        self._places: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}
        self._tensors: dict[int, tuple[Tensor, int]] = {}
        self._behind = 0  # bytes of the tensors
        buffer = io.BytesIO()
        kind = with_scripts(_pickler()) if has_storages else _pickler()
        pickler = kind(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = self._place
        pickler.dump(value)
        self.stream = buffer.getvalue()
        if b"__main__" in self.stream and _pickler() is pickle.Pickler and is_interactive():
            what = "a class or function of an interactive session cannot be sent by name"
            how = "install cloudpickle, or define it in a file that can be imported"
            raise pickle.PicklingError(f"{what}; {how}")
        self.size = _aligned(len(self.stream)) + self._behind  # bytes of pickle and tensors

    def message(self, blocks: Any = None) -> Any:
        """Return the message with the object; without blocks, any number of workers share it."""
        tensors = [tensor for tensor, _ in self._tensors.values()]
        places = [place for _, place in self._tensors.values()]
        return _message(lane.Form(self.stream, self.size, places), tensors, blocks)

    def form(self, tensors: Sequence[Tensor]) -> Any:
        """Return the form of messages with these tensors; None if the object has one twice."""
        places = [self._tensors[id(tensor)][1] for tensor in tensors]
        return lane.Form(self.stream, self.size, places) if _are_distinct(places) else None

    def _place(self, obj: Any) -> tuple[Any, ...] | None:
        """Return dtype, shape and place of a plain tensor, also a parameter's; else None.

        A view of a storage has its strides and its number, too.
        """
        if type(obj) is not Tensor or not _is_plain(obj):
            return None
        if id(obj) not in self._places:
            form = str(obj.dtype).removeprefix("torch."), tuple(obj.shape)
            if self._has_storages and not (obj.is_conj() or obj.is_neg()):
                storage = obj.untyped_storage()
                numbers = torch.empty(0, dtype=torch.uint8, device=obj.device).set_(storage)
                begin = self._written(storage._cdata, numbers)
                begin += int(obj.storage_offset()) * obj.element_size()
                place: tuple[Any, ...] = (*form, begin, obj.stride(), len(self._places))
            else:
                place = (*form, self._written(id(obj), obj))
            self._places[id(obj)] = obj, place
        return self._places[id(obj)][1]

    def _written(self, key: int, tensor: Tensor) -> int:
        """Return the place of a tensor, which is written once."""
        if key not in self._tensors:
            self._tensors[key] = tensor, self._behind
            self._behind += _aligned(tensor.nbytes)
        return self._tensors[key][1]


def _is_plain(tensor: Tensor) -> bool:
    is_strided = tensor.layout is torch.strided and not tensor.is_quantized
    return is_strided and not tensor.is_meta and tensor.numel() > 0


def _is_in_memory(tensor: Tensor) -> bool:
    """Return whether the numbers of a tensor lie as they are in the memory of this process."""
    is_contiguous = tensor.is_cpu and tensor.is_contiguous()
    return is_contiguous and not (tensor.is_conj() or tensor.is_neg())


def _message(form: Any, tensors: Sequence[Tensor], blocks: Any) -> Any:
    """Return the message of a form with the numbers of tensors, which it holds as a copy."""
    pieces = list[tuple[int, int]]()
    copies = list[Tensor]()  # pieces are addresses: the memory must last until they are read
    for tensor in tensors:
        if not _is_in_memory(tensor):
            tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            copies.append(tensor)
        pieces.append((tensor.data_ptr(), tensor.nbytes))
    return lane.Message(form, pieces, blocks)


def _are_distinct(values: Sequence[Any]) -> bool:
    return len({*values}) == len(values)


# The pickles of messages are mostly the same but for their numbers. Pickling takes 26 us for a
# part, and so does reading it. So pickles are known by the form of an object, and forms by pickles.
# The form has a dtype and a shape for each tensor or, of a known pickle, also its place.
_known_forms: dict[Any, Any] = {}
_forms: dict[bytes, Any] = {}


class _Place(NamedTuple):
    """A tensor in a message."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the beginning of the message


class _FormError(TypeError):
    """An object that is not of tuples, tensors and constants alone has no form."""


def _form(value: Any, of_tensor: Callable[[Tensor], Any]) -> Any:
    """Return a value with each tensor replaced by ``of_tensor``, or raise a _FormError."""
    kind = type(value)
    if kind is Tensor and _is_plain(value):
        return of_tensor(value)
    if kind is tuple:
        return tuple([x if type(x) in _PLAIN else _form(x, of_tensor) for x in value])
    if kind in _PLAIN:
        return value
    if kind is dict and not value:
        return dict
    raise _FormError


def pack(value: Any, blocks: Any) -> Any:
    """Return a message with an object, ready to be sent."""
    tensors = list[Tensor]()

    def of_tensor(tensor: Tensor) -> Any:
        tensors.append(tensor)
        return tensor.dtype, tensor.shape

    try:
        form = _known_form(_form(value, of_tensor), lambda: value, tensors)
    except _FormError:
        form = None
    if form is None or not _are_distinct([*map(id, tensors)]):
        return Pickled(value).message(blocks)
    return _message(form, tensors, blocks)


def _known_form(key: Any, make: Callable[[], Any], tensors: list[Tensor]) -> Any:
    """Return the form of messages with a key; None if the object has a tensor twice.

    If it is not known, ``make`` returns such an object.
    """
    form = _known_forms.get(key)
    if form is None:
        pickled = Pickled(make())
        form = pickled.form(tensors)
        if form is not None and len(pickled.stream) <= LONGEST_FORM:
            _remember(_known_forms, key, form)
    return form


class PartsInMemory:
    """Makes messages with the parts of a task from addresses, without a tensor for each part.

    It notes where the tensors of the task lie in memory. It is made anew whenever parts are asked
    for, as the tensors may have moved.
    """

    def __init__(self, task: Any, head: bytes) -> None:
        self._task = task
        self._head = head
        self._forms = dict[int, Any]()  # by the number of units
        self.batch: Any = None  #: the tensors of the task; None if parts have to be packed
        tensors = list[tuple[int, int, int, Any]]()
        self.may_look = True  #: whether messages tell that the divided tensors are finite
        self._kinds = list[Any]()
        if task.texts or task.spec is not positional(len(task.leaves))[0]:
            return
        for leaf, dim in zip(task.leaves, task.dims, strict=True):
            if type(leaf) is not Tensor or not _is_plain(leaf) or dim not in (0, None):
                return
            if not _is_in_memory(leaf):
                return
            size = leaf.nbytes
            kind = _KINDS.get(leaf.dtype)
            if kind is None:
                self.may_look = False
                kind = lane.Kind.OTHER
            unit_bytes = 0 if dim is None else size // task.num_units
            tensors.append((leaf.data_ptr(), size, unit_bytes, kind))
            self._kinds.append((leaf.dtype, leaf.shape if dim is None else leaf.shape[1:], dim))
        if _are_distinct([*map(id, task.leaves)]):
            self.batch = lane.Batch(tensors)

    def message(self, part: Any, blocks: Any) -> Any:
        """Return the message of a part; None if it has to be packed."""
        if self.batch is None or part.fault is not None:
            return None
        units = part.units
        ((form, array),) = self.rows([units])
        return self.batch.message(form, array, blocks)

    def rows(self, parts: Sequence[Sequence[int]]) -> list[tuple[Any, Any]]:
        """Return the form of the message of each part, and its units, as an array if it has one."""
        rows = list[tuple[Any, Any]]()
        for units in parts:
            size = len(units)
            if size not in self._forms:
                self._forms[size] = self._form(units)
            rows.append((self._forms[size], getattr(units, "array", units)))
        return rows

    def _form(self, units: Sequence[int]) -> Any:
        """Return the form of the message of units, made from a packed part if it is new."""
        tensors = list[Tensor]()

        def make() -> Any:
            payload = self._task.payload(units)
            tensors.extend(payload[0])
            return self._head, None, payload

        rows = len(units) * self._task.unit_rows
        return _known_form((PartsInMemory, self._head, rows, *self._kinds), make, tensors)


def unpack(received: Any) -> Any:
    """Return the object of a message. Large tensors are views of its memory."""
    stream = received.pickle
    memory = received.memory
    copied = _SHORT if received.is_long else 0
    form = _forms.get(stream)
    if form is not None:
        return _made(form, memory, copied)
    unpickler = _Unpickler(stream, memory, copied)
    value = unpickler.load()
    if len(stream) <= LONGEST_FORM:
        with contextlib.suppress(_FormError):
            form = _form(value, unpickler.place)
            _remember(_forms, stream, form)
    return value


# How the replies to a round are joined, by their pickles: None if they are not alike.
_known_joins: dict[Any, Any] = {}


def joined(replies: Sequence[Any], units: Sequence[Units], task: Any) -> Any:
    """Return the values that processes replied for parts as one, of all their units in order.

    Return None if they do not have the rows of the units, or one is not finite, or if it is one
    large reply, which nobody has to copy.
    """
    if len(replies) == 1 and replies[0].is_long:
        return None
    sizes = tuple(map(len, units))
    key = (lane.pickles(replies), sizes, task.unit_rows)
    plan = _known_joins.get(key)
    if plan is None:
        plan = _join_of(*key)
        if plan is None:
            return None
        _remember(_known_joins, key, plan)
    is_tuple, leaves, places = plan
    num_units = sum(sizes)
    tensors = list[Tensor]()
    targets = list[tuple[int, int, int, Any]]()
    for shape, dtype, unit_bytes, kind in leaves:
        tensor = torch.empty(shape, dtype=dtype, device=_CPU)
        tensors.append(tensor)
        targets.append((tensor.data_ptr(), num_units * unit_bytes, unit_bytes, kind))
    arrays = [*map(attrgetter("array"), units)]
    if num_units < task.num_units:  # columns that are not asked for have no place
        asked = np.sort(np.concatenate(arrays))
        arrays = [asked.searchsorted(array) for array in arrays]
    if not lane.join(targets, replies, places, arrays):
        return None
    return tuple(tensors) if is_tuple else tensors[0]


def _join_of(pickles: Sequence[bytes], sizes: Sequence[int], unit_rows: int) -> Any:
    """Return whether the value is a tuple, its leaves, and their places in each reply.

    A leaf is the shape, the dtype, the bytes of a unit and the kind of numbers.
    """
    forms = list[Any]()
    for stream in pickles:
        form = _forms.get(stream)
        if type(form) is not tuple or len(form) != 2 or form[0] is not True:
            return None
        forms.append(form[1])
    is_tuple = type(forms[0]) is tuple
    alike = forms[0] if is_tuple else (forms[0],)
    places = list[list[int]]()
    for form, size in zip(forms, sizes, strict=True):
        own = form if is_tuple else (form,)
        if type(form) is not type(forms[0]) or len(own) != len(alike):
            return None
        for place, other in zip(own, alike, strict=True):
            if type(place) is not _Place or place.dtype is not other.dtype:
                return None
            if place.shape[:1] != (size * unit_rows,) or place.shape[1:] != other.shape[1:]:
                return None
        places.append([place.offset for place in own])
    leaves = list[Any]()
    for place in alike:
        kind = _KINDS.get(place.dtype)
        if kind is None:
            return None
        shape = (sum(sizes) * unit_rows, *place.shape[1:])
        unit_bytes = place.dtype.itemsize * math.prod(shape[1:]) * unit_rows
        leaves.append((shape, place.dtype, unit_bytes, kind))
    return (is_tuple, leaves, places) if leaves else None


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= MOST_FORMS:
        known.clear()
    known[key] = value


def _made(form: Any, memory: Any, copied: int) -> Any:
    """Return the object of a known form, from the memory of a message."""
    kind = type(form)
    if kind is _Place:
        tensor = _tensor_at(memory, *form)
        return tensor.clone() if tensor.nbytes <= copied else tensor
    if kind is tuple:
        return tuple([x if type(x) in _PLAIN else _made(x, memory, copied) for x in form])
    return {} if form is dict else form


def is_interactive() -> bool:
    """Return whether the main script is not a file that others can import. Workers replace this."""
    return not os.path.isfile(getattr(sys.modules["__main__"], "__file__", ""))


@functools.cache
def _pickler() -> Any:
    """Return the class of picklers; cloudpickle's pickles the classes of a session by value."""
    with contextlib.suppress(ImportError):
        if is_interactive():
            return importlib.import_module("cloudpickle").CloudPickler
    return pickle.Pickler


def import_main() -> None:
    """Do nothing, where the main script runs. Workers replace this."""


class _Unpickler(pickle.Unpickler):
    """Reads a :class:`Pickled`. Tensors of up to ``copied`` bytes are copied, others are views."""

    def __init__(self, stream: bytes, memory: Any, copied: int) -> None:
        super().__init__(io.BytesIO(stream))
        self._memory = memory
        self._start = _aligned(len(stream))
        self._copied = copied
        self._read: dict[tuple[Any, ...], Tensor] = {}
        self._placed = set[int]()

    def place(self, tensor: Tensor) -> _Place:
        """Return the place of a tensor that was read, and is in the object once."""
        for (_, shape, offset, *view), read in self._read.items():
            if read is tensor and not view and offset not in self._placed:
                self._placed.add(offset)
                return _Place(tensor.dtype, shape, self._start + offset)
        raise _FormError

    def find_class(self, module: str, name: str) -> Any:
        if module != "__main__":
            return super().find_class(module, name)
        import_main()
        try:
            return super().find_class(module, name)
        except AttributeError:
            what = f"{name} is not defined when a worker imports the main script"
            how = "move it out of the `if`, to the top level of the script, or into a module"
            raise AttributeError(f"{what}; {how}") from None

    def persistent_load(self, place: tuple[Any, ...]) -> Tensor:
        if place not in self._read:
            dtype, shape, offset, *view = place
            kind = getattr(torch, dtype)
            tensor = _tensor_at(self._memory, kind, shape, self._start + offset, *view[:1])
            self._read[place] = tensor.clone() if tensor.nbytes <= self._copied else tensor
        return self._read[place]


def _tensor_at(
    memory: Any, dtype: torch.dtype, shape: tuple[int, ...], offset: int, strides: Any = None
) -> Tensor:
    """Return a view of memory, which is contiguous unless there are strides."""
    if strides is None:
        count = math.prod(shape)
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
    count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    return flat.as_strided(shape, strides)


def _aligned(size: int) -> int:  # to whole cache lines
    return -(-size // _ALIGNMENT) * _ALIGNMENT


if lane is not None:
    os.register_at_fork(before=lane.note_fork)
