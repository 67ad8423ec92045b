"""The Open Inference Protocol, version 2: reading requests and writing answers.

KServe, Triton and others speak it. Binary tensors are its extension ``binary_tensor_data``:
https://github.com/kserve/open-inference-protocol and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from torch import Tensor

from .errors import RequestError, invalid
from .tensors import DATATYPES, TensorSpec, as_taken, from_bytes, from_json, to_bytes, to_json

__all__ = [
    "EXPECTED_ERROR",
    "PREDICTED",
    "VERIFIED",
    "VERSION",
    "InferRequest",
    "example_request",
    "format_answer",
    "largest_body",
    "parse",
    "read_body",
]

_HEADER, _NUMBER = 2**16, 32  # bytes: of JSON beside the numbers; of one number in JSON, at most
_ANY_SHAPE = 2**26  # bytes, the bound of a body where the model leaves sizes open
_WINDOWS = {"gzip": 31, "deflate": 15}  # zlib's window bits, which name the format
#: The only version of every model.
VERSION = "1"
#: The output that says which rows are predicted.
PREDICTED = TensorSpec("predicted", "BOOL", ())
#: The output that says which rows two workers computed alike.
VERIFIED = TensorSpec("verified", "BOOL", ())
#: The output with the root mean squared error to expect of each row, NaN where it is not known.
EXPECTED_ERROR = TensorSpec("expected_error", "FP32", ())


@dataclasses.dataclass(frozen=True)
class InferRequest:
    """A request for inference."""

    id: str | None  # for its answer
    inputs: list[Tensor]  # [n, ...] each, in the order of the model's arguments
    outputs: list[tuple[TensorSpec, bool]]  # that the client wants, and whether in binary
    timeout: float | None  # seconds


async def read_body(request: Request, most: int) -> bytes:
    """Return the unpacked body of a request; ``most`` bounds its bytes, packed and unpacked."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WINDOWS):
        raise RequestError(
            415, "invalid", f"Content-Encoding must be gzip or deflate, got {encoding!r}"
        )
    too_large = RequestError(413, "too_large", f"the body must be at most {most} bytes, unpacked")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise too_large
    unpacker = zlib.decompressobj(_WINDOWS[encoding]) if encoding in _WINDOWS else None
    parts, packed, size = [], 0, 0
    async for chunk in request.stream():
        packed += len(chunk)
        if packed > most:
            raise too_large
        if unpacker is not None:
            try:
                chunk = unpacker.decompress(chunk, most - size + 1)  # a bomb is not unpacked
            except zlib.error as error:
                raise invalid(f"the body must be {encoding}, got {error}") from None
        size += len(chunk)
        if size > most:
            raise too_large
        parts.append(chunk)
    if unpacker is not None and (not unpacker.eof or unpacker.unused_data):
        what = "more than that" if unpacker.eof else "only the beginning"
        raise invalid(f"the body must be {encoding}, got {what}")
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
        body: JSON, and binary tensors behind it.
        header_length: Inference-Header-Content-Length, the length of the JSON. None: all is JSON.
        inputs, outputs: the specs of the model.
        max_rows: the number of rows that a request may have.

    Raises:
        RequestError: the request is wrong (400).
    """
    head, tail = _split(body, header_length)
    try:
        message = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the request must be JSON, got {error}") from None
    _typed("the request", message, dict)
    id = None if message.get("id") is None else _typed("id", message["id"], str)
    parameters = _typed("parameters of the request", message.get("parameters", {}), dict)
    if (timeout := parameters.get("timeout")) is not None:
        if type(timeout) is not int or not 0 < timeout < 2**63:
            raise invalid(f"timeout must be a positive number of microseconds, got {timeout!r:.80}")
        timeout /= 1e6
    given = _inputs(message, tail, {spec.name: spec for spec in inputs}, max_rows)
    tensors = [given[spec.name] for spec in inputs]
    if len(sizes := {len(tensor) for tensor in tensors}) > 1:
        raise invalid(f"inputs must have as many rows as each other, got {sorted(sizes)}")
    binary = _typed("binary_data_output", parameters.get("binary_data_output", False), bool)
    return InferRequest(id, tensors, _outputs(message, outputs, binary), timeout)


def _split(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    # int refuses texts of more than 4,300 digits.
    length = int(header_length) if header_length.isdecimal() and len(header_length) < 20 else -1
    if not 0 <= length <= len(body):
        raise invalid(
            "Inference-Header-Content-Length must be an integer of at most the length of the body, "
            f"{len(body)}, got {header_length!r:.80}"
        )
    return view[:length], view[length:]


def _inputs(
    message: dict[str, Any], tail: memoryview, specs: Mapping[str, TensorSpec], max_rows: int
) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    for entry, parameters in _entries("input", message.get("inputs"), specs):
        spec, name = specs[entry["name"]], entry["name"]
        datatype, shape = _form(spec, entry, max_rows)
        size = parameters.get("binary_data_size")
        if any(key.startswith("shared_memory") for key in parameters):
            raise invalid(f"input {name!r} must come in the request, not in shared memory")
        if (size is None) == ("data" not in entry):
            raise invalid(f"input {name!r} must have either data or a binary_data_size")
        if size is None:
            tensor = from_json(name, datatype, shape, entry["data"])
        else:
            if type(size) is not int or not 0 <= size <= len(tail):
                raise invalid(
                    f"binary_data_size of input {name!r} must be at most the {len(tail)} bytes "
                    f"that are left of the body, got {size!r:.80}"
                )
            tensor, tail = from_bytes(name, datatype, shape, tail[:size]), tail[size:]
        given[name] = as_taken(spec, tensor)
    if missing := specs.keys() - given.keys():
        raise invalid(f"inputs must hold all of the model's, got none of {sorted(missing)}")
    if len(tail):
        raise invalid(f"the body must end with the last tensor, got {len(tail)} bytes more")
    return given


def _form(spec: TensorSpec, entry: dict[str, Any], max_rows: int) -> tuple[str, list[int]]:
    """Return the datatype and the shape of an input."""
    datatype, shape = entry.get("datatype"), entry.get("shape")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise invalid(
            f"datatype of input {spec.name!r} must be one of {', '.join(DATATYPES)}, "
            f"got {datatype!r:.80}"
        )
    whole = isinstance(shape, list) and all(type(size) is int and size >= 1 for size in shape)
    if not (whole and shape and spec.fits(shape[1:])):
        raise invalid(
            f"shape of input {spec.name!r} must be {[-1, *spec.shape]}, got {shape!r:.80}"
        )
    if shape[0] > max_rows:
        raise invalid(
            f"input {spec.name!r} must have 1 to {max_rows} rows, the largest batch, got {shape[0]}"
        )
    return datatype, shape


def _outputs(
    message: dict[str, Any], specs: Sequence[TensorSpec], binary: bool
) -> list[tuple[TensorSpec, bool]]:
    if not message.get("outputs"):
        return [(spec, binary) for spec in specs]
    known = {spec.name: spec for spec in (*specs, PREDICTED, EXPECTED_ERROR, VERIFIED)}
    wanted = []
    for entry, parameters in _entries("output", message["outputs"], known):
        name = entry["name"]
        if parameters.get("classification"):
            raise invalid(f"output {name!r} must be asked for as it is, not as a classification")
        mine = parameters.get("binary_data", binary)
        wanted.append((known[name], _typed(f"binary_data of output {name!r}", mine, bool)))
    return wanted


def _entries(
    word: str, entries: Any, known: Mapping[str, TensorSpec]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the entries of a list of inputs or outputs, each with its parameters."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for entry in _typed(f"{word}s", entries, list):
        _typed(f"an entry of {word}s", entry, dict)
        name = _typed(f"the name of an entry of {word}s", entry.get("name"), str)
        if name not in known or name in found:
            which = "once" if name in known else f"one of {', '.join(map(repr, known))}"
            raise invalid(f"an {word} must be {which}, got {name!r:.80}")
        parameters = entry.get("parameters", {})
        found[name] = entry, _typed(f"parameters of {word} {name!r}", parameters, dict)
    return list(found.values())


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


def _typed(what: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise invalid(f"{what} must be {_KINDS[kind]}, got {value!r:.80}")
    return value


def example_request(
    inputs: Sequence[TensorSpec], examples: Sequence[Tensor], row: int
) -> dict[str, Any]:
    """Return a request with one row of the examples, for orjson."""
    pairs = zip(inputs, examples, strict=True)
    return {
        "id": f"example {row}",
        "inputs": [
            spec.metadata() | {"shape": [1, *x.shape[1:]], "data": to_json(x[row])}
            for spec, x in pairs
        ],
    }


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
        said = spec.metadata() | {"shape": list(tensor.shape)}
        if binary:
            tail.append(to_bytes(tensor))
            said["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            said["data"] = to_json(tensor)
        outputs.append(said)
    message = {
        "model_name": model,
        "model_version": VERSION,
        **({} if request.id is None else {"id": request.id}),
        "parameters": parameters,
        "outputs": outputs,
    }
    head = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([head, *tail]), len(head) if tail else None
