"""Tensors and messages of the Open Inference Protocol, version 2.

A tensor is raw bytes, or numbers in JSON. Strings, one per row, are an array of objects ``[B]`` of
NumPy. A server's answer is untrusted: its shapes, dtypes and sizes are checked before memory is
allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote

import numpy as np
import orjson
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import count, instance, printable, shown
from .._torch import is_texts

Texts: TypeAlias = "np.ndarray[Any, np.dtype[np.object_]]"  #: strings ``[B]``, one per row
#: The datatypes of the protocol that this package knows, and their dtypes.
DATATYPES: dict[str, Any] = {"BOOL": torch.bool, "UINT8": torch.uint8, "BF16": torch.bfloat16}
DATATYPES |= {f"INT{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
DATATYPES |= {f"FP{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)}
DATATYPES |= {"BYTES": np.dtype(object)}  # strings
_NAMES = {dtype: datatype for datatype, dtype in DATATYPES.items()}
HEADER = 2**16  #: bytes of JSON beside the numbers of a message, at most; not tuned
NUMBER = 32  #: bytes of one number in JSON, at most: float64 takes 25
TEXT = 2**16  #: bytes of a string, on average over the rows of a message, at most; not tuned
ANY_SHAPE = 2**26  #: bytes of tensors of an open size, at most; not tuned
_HERE = b"\0"  # where numbers go, as JSON has no such byte
_NUMBERS = 2**12  # numbers that are written at once: .3 ms, for which an event loop may wait
_CHARACTERS = 200  # of a name or of the words of a server, at most; not tuned
_ADDRESSES = re.compile(
    r"\w+://\S+"
    r"|\[[\da-f.]*:[\da-f:.]*\](:\d+)?"  # IPv6
    r"|\b(\d{1,3}\.){3}\d{1,3}\b(:\d+)?"
    r"|\b[\w.-]*[a-z][\w.-]*:\d{2,5}\b",  # a name and a port
    re.IGNORECASE,
)


def cleaned(text: str) -> str:
    """Return the words of a server in at most 200 printable characters, without addresses."""
    return printable(_ADDRESSES.sub("<address>", text[: 2 * _CHARACTERS]), _CHARACTERS)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or an output of a served model."""

    name: str  #: the name in requests and answers
    datatype: str  #: a key of :data:`DATATYPES`, such as "FP32"
    shape: tuple[int, ...]  #: the shape of one row, without the batch; -1 allows any size. Strings
    #: are one per row, so the shape of BYTES is () or (1,).

    def __post_init__(self) -> None:
        instance(self, "name", self.name, str)
        if not self.name.isprintable() or len(self.name) > _CHARACTERS:
            raise ValueError(
                f"{type(self).__name__}: name must have at most {_CHARACTERS} printable "
                f"characters, got {shown(self.name)}"
            )
        if self.datatype not in DATATYPES:
            raise ValueError(
                f"{type(self).__name__}: datatype must be one of {', '.join(DATATYPES)}, got "
                f"{shown(self.datatype)}"
            )
        instance(self, "shape", self.shape, Sequence)
        sizes = tuple(count(self, "shape", size, least=-1) for size in self.shape)
        object.__setattr__(self, "shape", sizes)
        if self.is_text and sizes not in ((), (1,)):
            raise ValueError(
                f"{type(self).__name__}: the shape of BYTES must be () or (1,), one string per "
                f"row, got {shown(sizes)}"
            )

    @classmethod
    def of(cls, name: str, batch: Tensor | Texts) -> TensorSpec:
        """Return the spec of a batch ``[B, ...]``; TypeError if its dtype is not supported."""
        if batch.dtype not in _NAMES:
            raise TypeError(
                f"TensorSpec: {name} must be of one of DATATYPES, got {shown(batch.dtype)}"
            )
        return cls(name, _NAMES[batch.dtype], tuple(batch.shape[1:]))

    @property
    def dtype(self) -> Any:
        """The dtype of a tensor of this datatype, or of an array of strings."""
        return DATATYPES[self.datatype]

    @property
    def is_text(self) -> bool:
        """Whether rows are strings."""
        return self.datatype == "BYTES"

    def metadata(self) -> dict[str, Any]:
        """Return the protocol's description of a batch of any size."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a row may have this shape."""
        pairs = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(ours in (-1, size) for ours, size in pairs)


#: The outputs that this package's server gives every model beside its own: whether a row is
#: estimated; the bound that its error is within; the p-value of its label; its source, 0 from the
#: worker asked first, 1 from a later one, 2 estimated; whether two workers computed it alike;
#: whether its first result was wrong and was replaced. JSON has null for infinite numbers and for
#: NaN, which stands for unknown.
ADDED = (
    TensorSpec("estimated", "BOOL", ()),
    TensorSpec("error_bound", "FP32", ()),
    TensorSpec("label_p_value", "FP32", ()),
    TensorSpec("source", "UINT8", ()),
    TensorSpec("verified", "BOOL", ()),
    TensorSpec("corrected", "BOOL", ()),
)
#: What one of them was named before. For one version servers answer to both names, and metadata
#: list what older clients know: these ask for any other output as if it was the model's own.
FORMER = {"error_bound": TensorSpec("radius", "FP32", ())}
LISTED = tuple(FORMER.get(spec.name, spec) for spec in ADDED)


def texts(rows: Iterable[str]) -> Texts:
    """Return strings as an array."""
    return np.array([*rows], object)


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of a tree, with strings as arrays, and its structure."""
    leaves, spec = pytree.tree_flatten(tree, is_texts)
    return [texts(leaf) if is_texts(leaf) else leaf for leaf in leaves], spec


def listed(leaves: Iterable[Any]) -> list[Any]:
    """Return leaves as a module takes and makes them, with strings in lists."""
    return [x if isinstance(x, Tensor) else x.tolist() for x in leaves]


def _texts_of_bytes(spec: TensorSpec, count: int, data: memoryview) -> Texts:
    """Return strings, each of which stands after the number of its bytes, in four bytes."""
    found = list[str]()
    at = 0
    for _ in range(count):
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        try:
            found.append(str(data[begin:at], "utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{spec.name} must be UTF-8, but row {len(found)} is not") from None
    requirement = f"all of {count} strings, each after its length in 4 bytes"
    require(at == len(data), f"the bytes of {spec.name}", requirement, len(data))
    return texts(found)


def from_bytes(spec: TensorSpec, shape: Sequence[int], data: memoryview) -> Tensor | Texts:
    """Return a tensor whose elements are little-endian and in row-major order, or strings."""
    if spec.is_text:
        return _texts_of_bytes(spec, shape[0], data)
    stored = torch.uint8 if spec.dtype is torch.bool else spec.dtype
    tensor = torch.empty(*shape, dtype=stored)
    if len(data):
        # Bytes that cannot change, or do not lie where elements of their size may, are copied.
        copied = data.readonly or np.frombuffer(data, np.uint8).ctypes.data % stored.itemsize
        tensor = torch.frombuffer(bytearray(data) if copied else data, dtype=stored).reshape(*shape)
    return tensor != 0 if spec.dtype is torch.bool else tensor


def from_json(name: str, spec: TensorSpec, shape: Sequence[int], data: list[Any]) -> Any:
    """Return a tensor of the numbers in a list, which is flat or nested like the shape, or strings.

    Null is NaN, for which JSON has no number.
    """
    numbers = math.prod(shape)
    rows = data
    if len(rows) == shape[0] and len(rows) and type(rows[0]) is list:
        for size in shape[1:]:
            if all(type(row) is list and len(row) == size for row in rows):
                rows = list(itertools.chain.from_iterable(rows))
    kind: Any = _TYPES.get(spec.datatype, int if "INT" in spec.datatype else float)
    kinds = {int, float, type(None)} if kind is float else {kind}
    valid = len(rows) == numbers and set(map(type, rows)) <= kinds
    if valid and rows and kind is int:
        limits = torch.iinfo(spec.dtype)
        valid = limits.min <= min(rows) and max(rows) <= limits.max
    requirement = (
        f"{numbers} numbers of {spec.datatype}, in one list or nested as the shape {list(shape)}"
    )
    if spec.is_text:
        require(
            valid, f"data of {name}", requirement.replace("numbers of BYTES", "strings"), rows[:8]
        )
        "".join(rows).encode()  # raises a ValueError if half of a pair stands alone
        return texts(rows)
    require(valid, f"data of {name}", requirement, rows[:8])
    return torch.from_numpy(np.array(rows, kind).reshape(shape)).to(spec.dtype)


_TYPES = {"BOOL": bool, "BYTES": str}  # of elements in JSON
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
_KINDS |= {int: "an integer", float: "a number"}


def require(valid: bool, what: str, requirement: object, got: object) -> None:
    """Raise a ValueError unless a field is valid. All faults of messages are a ValueError."""
    if not valid:
        raise ValueError(f"{what} must be {requirement}, got {got!r:.80}")


def field(owner: str, entry: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return a field of an object, or the default if it is missing or null."""
    value = entry.get(key)
    if kind is int and type(value) is str and value.isdecimal() and len(value) < 20:
        value = int(value)  # protobuf writes integers of 64 bits like this
    if kind is float and type(value) is int:  # both are numbers
        value = float(value)
    if value is None and default is not None:
        return default
    require(type(value) is kind, f"{key} of {owner}", _KINDS[kind], value)
    return value


def most_bytes(specs: Sequence[TensorSpec], rows: int) -> int:
    """Return the largest number of bytes of a message with ``rows`` rows of tensors."""

    def most(spec: TensorSpec) -> int:
        size = TEXT if spec.is_text else NUMBER * math.prod(spec.shape)
        return ANY_SHAPE if -1 in spec.shape else rows * size

    return HEADER + sum(map(most, specs))


def split(body: bytes | bytearray, length: str | None) -> tuple[memoryview, memoryview]:
    """Return the JSON of a message and its tail, by its Inference-Header-Content-Length."""
    size = len(body)
    if length is not None:
        size = -1
        if length.isdecimal() and len(length) < 20:
            size = int(length)
    requirement = f"an integer of at most the length of the body, {len(body)}"
    require(0 <= size <= len(body), "Inference-Header-Content-Length", requirement, length)
    return memoryview(body)[:size], memoryview(body)[size:]


def entries(
    word: str, listed: list[Any], specs: Sequence[TensorSpec]
) -> Iterator[tuple[str, TensorSpec, dict[str, Any], dict[str, Any]]]:
    """Yield each input or output in words, its spec, its object and its parameters."""
    left = {spec.name: spec for spec in specs}
    for entry in listed:
        require(type(entry) is dict, f"an entry of {word}s", "an object", entry)
        name = field(f"an entry of {word}s", entry, "name", str)
        require(name in left, f"an {word}", f"once one of {[spec.name for spec in specs]}", name)
        owner = f"{word} {name!r}"
        yield owner, left.pop(name), entry, field(owner, entry, "parameters", dict, {})


def tensors_of(
    word: str, listed: list[Any], specs: Sequence[TensorSpec], tail: memoryview, rows: range
) -> dict[str, Any]:
    """Return the tensors of all specs, by their names; ``tail`` holds the binary ones.

    Shapes and sizes are checked before memory is allocated.
    """
    given: dict[str, Any] = {}
    for owner, spec, entry, parameters in entries(word, listed, specs):
        datatype, shape = (field(owner, entry, *x) for x in (("datatype", str), ("shape", list)))
        require(datatype == spec.datatype, f"datatype of {owner}", spec.datatype, datatype)
        whole = bool(shape) and all(type(size) is int and size >= 0 for size in shape)
        fits = whole and spec.fits(shape[1:]) and (word == "output" or 0 not in shape[1:])
        require(fits, f"shape of {owner}", spec.metadata()["shape"], shape)
        requirement = f"from {rows[0]} to {rows[-1]}"
        require(shape[0] in rows, f"the number of rows of {owner}", requirement, shape[0])
        if ("binary_data_size" in parameters) == ("data" in entry):
            raise ValueError(f"{owner} must have either data or a binary_data_size")
        if callable(entry.get("data")):  # a server reads numbers when their shape is known
            tensor = entry["data"](owner, spec, shape)
        elif "data" in entry:
            tensor = from_json(owner, spec, shape, field(owner, entry, "data", list))
        else:
            stated = field(owner, parameters, "binary_data_size", int)
            size = stated if spec.is_text else math.prod(shape) * spec.dtype.itemsize
            requirement = f"{size}, of {len(tail)} bytes that are left of the body"
            fits = 0 <= stated == size <= len(tail)
            require(fits, f"binary_data_size of {owner}", requirement, stated)
            tensor = from_bytes(spec, shape, tail[:size])
            tail = tail[size:]
        given[spec.name] = tensor
    require(len(given) == len(specs), f"{word}s", [spec.name for spec in specs], list(given))
    require(not len(tail), "bytes after the last tensor", 0, len(tail))
    return given


class EndpointError(RuntimeError):
    """A server failed, or did not keep the protocol; ``lost`` if it did so while it computed.

    ``status`` is the one that it answered, or 0.
    """

    def __init__(self, message: str, lost: bool = False, status: int = 0) -> None:
        super().__init__(message)
        self.lost = lost
        self.status = status


class RefusedError(ValueError):
    """A server refused a request as wrong; the message is the server's."""


class Model(NamedTuple):
    """The model of a server, by its metadata."""

    name: str
    inputs: tuple[TensorSpec, ...]  #: one for each argument, in order
    outputs: tuple[TensorSpec, ...]

    @property
    def path(self) -> str:
        return f"/v2/models/{quote(self.name, safe='')}"


def parsed(body: bytes | memoryview) -> dict[str, Any]:
    """Return the JSON object in a body. Raises a ValueError if the body is not a JSON object."""
    for loads in (orjson.loads, json.loads):  # servers in Python write NaN, which orjson refuses
        with contextlib.suppress(ValueError, RecursionError):
            found = loads(bytes(body))
            if isinstance(found, dict):
                return found
    raise ValueError("the answer must be a JSON object")


def specs_of(metadata: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    """Return the specs of inputs or outputs, without the batch; a ValueError if they are wrong."""
    try:
        found = [(each["name"], each["datatype"], each["shape"][1:]) for each in metadata[key]]
        return tuple(TensorSpec(name, kind, tuple(shape)) for name, kind, shape in found)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"sent metadata with unusable {key}: {cleaned(str(error))}") from None


def written(
    message: dict[str, Any], key: str, tensors: Iterable[tuple[TensorSpec, Any, bool]]
) -> tuple[list[bytes | memoryview], int | None]:
    """Return the pieces of a body, and the length of its JSON if binary tensors follow.

    The message gets a list of tensors by the key, each in binary or not.
    """
    entries = []
    lists = list[Any]()
    tail = list[bytes | memoryview]()
    for spec, tensor, binary in tensors:
        shape = [len(tensor), *spec.shape] if spec.is_text else list(tensor.shape)
        entry = spec.metadata() | {"shape": shape}
        content = _content(spec, tensor, binary)
        if binary:
            tail.append(content)
            entry["parameters"] = {"binary_data_size": len(content)}
        else:
            entry["data"] = orjson.Fragment(_HERE)
            lists.append(content)
        entries.append(entry)
    first, *others = orjson.dumps({**message, key: entries}).split(_HERE)
    head = [first]
    for numbers, text in zip(lists, others, strict=True):
        for at in range(0, max(1, len(numbers)), _NUMBERS):
            if at:
                time.sleep(0)  # lets an event loop run, which waits for the interpreter's lock
            # orjson writes null for NaN and infinity.
            piece = orjson.dumps(numbers[at : at + _NUMBERS], option=orjson.OPT_SERIALIZE_NUMPY)
            head.append((b"," if at else b"[") + piece[1:-1])
        head.append(b"]" + text)
    length = sum(map(len, head))
    if tail:  # elements can be read in place
        head.append(b" " * (-length % 64))
        length += len(head[-1])
    return [*head, *tail], length if tail else None


def _content(spec: TensorSpec, rows: Any, binary: bool) -> Any:
    """Return the bytes of a tensor or of strings, or what orjson writes as a list of them."""
    if spec.is_text:
        if not binary:
            return list(rows)
        encoded = [text.encode() for text in rows]
        return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
    if rows.dtype in (torch.float16, torch.bfloat16):  # NumPy lacks one, orjson both
        rows = rows.view(torch.int16) if binary else rows.float()
    numbers = np.ascontiguousarray(rows.numpy(force=True)).reshape(-1)
    return numbers.view(np.uint8).data if binary else numbers  # little-endian, as in memory


def request(
    model: Model, inputs: Sequence[Any], binary: bool, own: str = ""
) -> tuple[bytes, int | None]:
    """Return the body of a request, and the length of its JSON, which a header tells a server.

    The length is None if all tensors are in the JSON. ``own`` is the id of the request, if any.
    """
    how = {}
    if binary:
        how = {"parameters": {"binary_data": True}}
    outputs = [{"name": spec.name, **how} for spec in model.outputs]
    triples = [(spec, x, binary) for spec, x in zip(model.inputs, inputs, strict=True)]
    message = {"outputs": outputs} | ({"id": own} if own else {})
    pieces, length = written(message, "inputs", triples)
    return b"".join(pieces), length


def outputs_of(
    model: Model, data: bytes, length: str | None, rows: int
) -> tuple[list[Any], dict[str, Any]]:
    """Return the outputs of an answer, and its fields with the number of estimated rows."""
    head, tail = split(data, length)
    message = parsed(head)
    name = field("the answer", message, "model_name", str, model.name)
    require(name == model.name, "model_name of the answer", repr(model.name), name)
    listed = field("the answer", message, "outputs", list)
    found = tensors_of("output", listed, model.outputs, tail, range(rows, rows + 1))
    parameters = field("the answer", message, "parameters", dict, {})
    estimated = field("the answer", parameters, "estimated_rows", int, 0)
    requirement = f"from 0 to {rows}"
    require(0 <= estimated <= rows, "estimated_rows of the answer", requirement, estimated)
    return [found[spec.name] for spec in model.outputs], message | {"estimated_rows": estimated}
