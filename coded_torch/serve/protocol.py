"""The Open Inference Protocol, version 2: reading requests and writing answers.

KServe, Triton and others speak it. Binary tensors are its extension ``binary_tensor_data``:
https://github.com/kserve/open-inference-protocol and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from ..open_inference.tensors import (
    ADDED,
    DATATYPES,
    TensorSpec,
    cast,
    from_bytes,
    from_json,
    to_bytes,
    to_json,
)

__all__ = [
    "VERSION",
    "InferRequest",
    "RequestError",
    "example_request",
    "format_answer",
    "largest_body",
    "parse",
    "read_body",
]

# The largest JSON beside the numbers, and one number in JSON, in bytes. They are bounds, not tuned.
_HEADER, _NUMBER = 2**16, 32
# The largest body in bytes if the model leaves sizes open. It is a bound, not tuned.
_ANY_SHAPE = 2**26
#: The only version of every model.
VERSION = "1"


class RequestError(HTTPException):
    """A request gets no answer.

    Args:
        status: the status of HTTP. 503 comes with ``Retry-After``.
        reason: one of few words, by which the metrics count.
        message: the text for the client.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status == 503 else None)
        self.reason = reason


class InferRequest(NamedTuple):
    """A request for inference.

    Attributes:
        id: the client's name for the request, or "".
        inputs: ``[n, ...]`` each, in the order of the model's arguments.
        outputs: the outputs that the client wants, and whether each is sent in binary.
        timeout: seconds, infinite if the client names none.
        coverage: the level of radii; 0 if the client names none.
    """

    id: str
    inputs: list[Tensor]
    outputs: list[tuple[TensorSpec, bool]]
    timeout: float
    coverage: float = 0.0


async def read_body(request: Request, most: int) -> bytes:
    """Return the unpacked body of a request; ``most`` bounds its bytes, packed and unpacked."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        must = f"Content-Encoding must be gzip or deflate, got {encoding!r:.80}"
        raise RequestError(415, "invalid", must)
    # 32 more than the largest window: zlib tells gzip from deflate by the header.
    unpacker = None if encoding == "identity" else zlib.decompressobj(32 + zlib.MAX_WBITS)
    parts, packed, size = [], 0, 0
    async for chunk in request.stream():
        packed += len(chunk)
        if unpacker is not None:
            try:
                chunk = unpacker.decompress(chunk, most - size + 1)  # a bomb is not unpacked
            except zlib.error as error:
                raise ValueError(f"the body must be {encoding}, got {error}") from None
        size += len(chunk)
        if max(packed, size) > most:
            raise RequestError(413, "too_large", f"the body must be at most {most} bytes, unpacked")
        parts.append(chunk)
    if unpacker is not None and (not unpacker.eof or unpacker.unused_data):
        got = "more than that" if unpacker.eof else "only the beginning"
        raise ValueError(f"the body must be {encoding}, got {got}")
    return b"".join(parts)


def largest_body(inputs: Sequence[TensorSpec], max_rows: int) -> int:
    """Return the number of bytes that a request with so many rows may need."""
    if any(-1 in spec.shape for spec in inputs):
        return _ANY_SHAPE
    return _HEADER + _NUMBER * max_rows * sum(math.prod(spec.shape) for spec in inputs)


def parse(
    body: bytes,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_rows: int,
) -> InferRequest:
    """Parse the body of a request for inference.

    Args:
        body: JSON, followed by binary tensors.
        header_length: Inference-Header-Content-Length, the length of the JSON. None if all is JSON.
        inputs, outputs: the specs of the model.
        max_rows: the number of rows that a request may have.

    Raises:
        ValueError: the request is wrong. The error names the field, its requirement and value.
    """
    length = len(body)
    if header_length is not None:
        length = int(header_length) if header_length.isdecimal() else -1
        must = f"an integer of at most the length of the body, {len(body)}"
        valid = 0 <= length <= len(body)
        _require(valid, "Inference-Header-Content-Length", must, header_length)
    head, tail = memoryview(body)[:length], memoryview(body)[length:]
    try:
        message = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the request must be JSON, got {error}") from None
    _require(type(message) is dict, "the request", "an object", message)
    parameters = _field("the request", message, "parameters", dict, {})
    microseconds = _field("the request", parameters, "timeout", int, 0)
    must = "a number of microseconds, or 0 for none"
    _require(0 <= microseconds < 2**63, "timeout of the request", must, microseconds)
    coverage = _field("the request", parameters, "coverage", float, 0.0)
    _require(0 <= coverage < 1, "coverage of the request", "between 0 and 1", coverage)
    binary = _field("the request", parameters, "binary_data_output", bool, False)
    return InferRequest(
        _field("the request", message, "id", str, ""),
        _inputs(message, tail, inputs, max_rows),
        _outputs(message, outputs, binary),
        microseconds / 1e6 or math.inf,
        coverage,
    )


_KINDS = {
    float: "a number with a decimal point",
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
}


def _require(valid: bool, what: str, must: object, got: object) -> None:
    if not valid:
        raise ValueError(f"{what} must be {must}, got {got!r:.80}")


def _field(owner: str, entry: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return a field of an object, or the default if it is missing or null."""
    value = entry.get(key)
    if value is None and default is not None:
        return default
    _require(type(value) is kind, f"{key} of {owner}", _KINDS[kind], value)
    return value


def _entries(
    word: str, entries: list[Any], specs: Sequence[TensorSpec]
) -> Iterator[tuple[str, TensorSpec, dict[str, Any], dict[str, Any]]]:
    """Yield each input or output in words, its spec, its object and its parameters."""
    left = {spec.name: spec for spec in specs}
    for entry in entries:
        _require(type(entry) is dict, f"an entry of {word}s", "an object", entry)
        name = _field(f"an entry of {word}s", entry, "name", str)
        _require(name in left, f"an {word}", f"once one of {[spec.name for spec in specs]}", name)
        owner = f"{word} {name!r}"
        yield owner, left.pop(name), entry, _field(owner, entry, "parameters", dict, {})


def _inputs(
    message: dict[str, Any], tail: memoryview, specs: Sequence[TensorSpec], max_rows: int
) -> list[Tensor]:
    given: dict[str, Tensor] = {}
    listed = _field("the request", message, "inputs", list)
    for owner, spec, entry, parameters in _entries("input", listed, specs):
        datatype, shape = (_field(owner, entry, *x) for x in (("datatype", str), ("shape", list)))
        known = ", ".join(DATATYPES)
        _require(datatype in DATATYPES, f"datatype of {owner}", f"one of {known}", datatype)
        whole = bool(shape) and all(type(size) is int and size > 0 for size in shape)
        fits = whole and spec.fits(shape[1:])
        _require(fits, f"shape of {owner}", spec.metadata()["shape"], shape)
        must = f"1 to {max_rows}, the largest batch"
        _require(shape[0] <= max_rows, f"the number of rows of {owner}", must, shape[0])
        binary = "binary_data_size" in parameters
        if binary == ("data" in entry):
            raise ValueError(f"{owner} must have either data or a binary_data_size")
        if binary:
            size = _field(owner, parameters, "binary_data_size", int)
            must = f"at most the {len(tail)} bytes that are left of the body"
            _require(0 <= size <= len(tail), f"binary_data_size of {owner}", must, size)
            tensor, tail = from_bytes(owner, datatype, shape, tail[:size]), tail[size:]
        else:
            tensor = from_json(owner, datatype, shape, _field(owner, entry, "data", list))
        given[spec.name] = cast(owner, spec, tensor)
    _require(len(given) == len(specs), "inputs", [spec.name for spec in specs], list(given))
    _require(not len(tail), "bytes after the last tensor", 0, len(tail))
    tensors = [given[spec.name] for spec in specs]
    rows = [len(tensor) for tensor in tensors]
    _require(len(set(rows)) == 1, "the numbers of rows of inputs", "equal", rows)
    return tensors


def _outputs(
    message: dict[str, Any], specs: Sequence[TensorSpec], binary: bool
) -> list[tuple[TensorSpec, bool]]:
    wanted = []
    listed = _field("the request", message, "outputs", list, [])
    for owner, spec, _, parameters in _entries("output", listed, (*specs, *ADDED)):
        if parameters.get("classification"):
            raise ValueError(f"{owner} must be asked for as it is, not as a classification")
        wanted.append((spec, _field(owner, parameters, "binary_data", bool, binary)))
    return wanted or [(spec, binary) for spec in specs]


def example_request(
    inputs: Sequence[TensorSpec], examples: Sequence[Tensor], row: int
) -> dict[str, Any]:
    """Return a request with one row of the examples, for orjson."""
    pairs = zip(inputs, examples, strict=True)
    entries = [
        spec.metadata() | {"shape": [1, *x.shape[1:]], "data": to_json(x[row])} for spec, x in pairs
    ]
    return {"id": f"example {row}", "inputs": entries}


def format_answer(
    model: str,
    request: InferRequest,
    answers: Mapping[str, Tensor],
    parameters: Mapping[str, Any],
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if binary tensors follow."""
    outputs, tail = [], []
    for spec, binary in request.outputs:
        tensor = answers[spec.name]
        entry = spec.metadata() | {"shape": list(tensor.shape)}
        if binary:
            tail.append(to_bytes(tensor))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = to_json(tensor)
        outputs.append(entry)
    message = {
        "model_name": model,
        "model_version": VERSION,
        **({"id": request.id} if request.id else {}),
        "parameters": parameters,
        "outputs": outputs,
    }
    head = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([head, *tail]), len(head) if tail else None
