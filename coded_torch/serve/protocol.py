"""The Open Inference Protocol, version 2, as messages: what a request says, how an answer reads.

The protocol of KServe, Triton and others, with the extension for binary tensors:
https://github.com/kserve/open-inference-protocol and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from torch import Tensor

from .errors import invalid
from .tensors import DATATYPES, TensorSpec, checked, from_bytes, from_json, to_bytes, to_json

__all__ = [
    "EXPECTED_ERROR",
    "PREDICTED",
    "VERSION",
    "InferRequest",
    "format_answer",
    "header_timeout",
    "largest_body",
    "parse",
]

_HEADER, _NUMBER = 2**16, 32  # bytes: of JSON beside numbers; of a number in it
_ANY_SHAPE = 2**26  # bytes, of inputs whose sizes the model leaves open
#: The only one of every model.
VERSION = "1"
#: Which rows were predicted; an output of every model, for clients that ask for it.
PREDICTED = TensorSpec("predicted", "BOOL", ())
#: The root mean squared error to expect of each row, NaN where it is not known; likewise.
EXPECTED_ERROR = TensorSpec("expected_error", "FP32", ())


@dataclasses.dataclass(frozen=True)
class InferRequest:
    """What a client asks.

    Attributes:
        id: that its answer shall carry; None: none.
        inputs: ``[n, ...]`` each, in the order of the model's.
        rows: n, how many there are.
        outputs: that it wants, and whether in binary.
        timeout: seconds; None: it does not say.
    """

    id: str | None
    inputs: list[Tensor]
    rows: int
    outputs: list[tuple[TensorSpec, bool]]
    timeout: float | None


def parse(
    body: bytes,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_rows: int,
) -> InferRequest:
    """Read the body of a request for inference.

    Args:
        body: JSON, and binary tensors behind it.
        header_length: of the JSON, as Inference-Header-Content-Length says; None: all is JSON.
        inputs: of the model.
        outputs: of the model.
        max_rows: that a request may have.

    Raises:
        RequestError: with status 400 and what is wrong.
    """
    head, tail = _split(body, header_length)
    try:
        message = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the request must be JSON, got {error}") from None
    _typed("the request", message, dict)
    id = message.get("id")
    if id is not None:
        _typed("id", id, str)
    parameters = _parameters("the request", message)
    timeout = parameters.get("timeout")
    if timeout is not None:
        timeout = microseconds("timeout", timeout)
    given = _inputs(message, tail, {spec.name: spec for spec in inputs}, max_rows)
    tensors = [given[spec.name] for spec in inputs]
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) > 1:
        raise invalid(f"inputs must have as many rows as each other, got {sorted(sizes)}")
    binary = parameters.get("binary_data_output", False)
    _typed("binary_data_output", binary, bool)
    return InferRequest(id, tensors, sizes.pop(), _outputs(message, outputs, binary), timeout)


def microseconds(name: str, value: Any) -> float:
    """A time of a request, in seconds."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise invalid(f"{name} must be a positive number of microseconds, got {value!r:.80}")
    return value / 1e6


def format_answer(
    model: str,
    request: InferRequest,
    answers: Mapping[str, Tensor],
    parameters: Mapping[str, Any],
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON if binary tensors follow.

    Args:
        model: its name.
        request: that is answered.
        answers: its rows of every output.
        parameters: scalars.
    """
    outputs, tail = [], []
    for spec, binary in request.outputs:
        tensor = answers[spec.name]
        said: dict[str, Any] = {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(tensor.shape),
        }
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


def _split(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    # isdecimal knows digits of all scripts, as int does; a very long one int refuses.
    if not (header_length.isdecimal() and len(header_length) < 20):
        raise invalid(
            f"Inference-Header-Content-Length must be an integer, got {header_length!r:.80}"
        )
    length = int(header_length)
    if length > len(body):
        raise invalid(
            "Inference-Header-Content-Length must be at most the length of the body, "
            f"{len(body)}, got {length}"
        )
    return view[:length], view[length:]


def _inputs(
    message: dict[str, Any], tail: memoryview, specs: Mapping[str, TensorSpec], max_rows: int
) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    for entry in _entries("inputs", message.get("inputs")):
        name, parameters = entry["name"], _parameters(f"input {entry['name']!r}", entry)
        if name not in specs or name in given:
            which = "once" if name in specs else f"one of {', '.join(map(repr, specs))}"
            raise invalid(f"an input must be {which}, got {name!r:.80}")
        spec = specs[name]
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
        given[name] = checked(spec, tensor)
    if missing := specs.keys() - given.keys():
        raise invalid(f"inputs must hold all of the model's, got none of {sorted(missing)}")
    if len(tail):
        raise invalid(f"the body must end with the last tensor, got {len(tail)} bytes more")
    return given


def _form(spec: TensorSpec, entry: dict[str, Any], max_rows: int) -> tuple[str, list[int]]:
    """The datatype and the shape of an input."""
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
    if not 1 <= shape[0] <= max_rows:
        raise invalid(
            f"input {spec.name!r} must have 1 to {max_rows} rows, the largest batch, got {shape[0]}"
        )
    return datatype, shape


def _outputs(
    message: dict[str, Any], specs: Sequence[TensorSpec], binary: bool
) -> list[tuple[TensorSpec, bool]]:
    known = {spec.name: spec for spec in (*specs, PREDICTED, EXPECTED_ERROR)}
    wanted: dict[str, tuple[TensorSpec, bool]] = {}
    if not message.get("outputs"):
        return [(spec, binary) for spec in specs]
    for entry in _entries("outputs", message["outputs"]):
        name, parameters = entry["name"], _parameters(f"output {entry['name']!r}", entry)
        if name not in known or name in wanted:
            which = "once" if name in known else f"one of {', '.join(map(repr, known))}"
            raise invalid(f"an output must be {which}, got {name!r:.80}")
        if parameters.get("classification"):
            raise invalid(f"output {name!r} must be asked for as it is, not as a classification")
        mine = parameters.get("binary_data", binary)
        _typed(f"binary_data of output {name!r}", mine, bool)
        wanted[name] = known[name], mine
    return list(wanted.values())


def _entries(what: str, entries: Any) -> list[dict[str, Any]]:
    _typed(what, entries, list)
    for entry in entries:
        _typed(f"an entry of {what}", entry, dict)
        _typed(f"the name of an entry of {what}", entry.get("name"), str)
    return list(entries)


def _parameters(what: str, entry: dict[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    _typed(f"parameters of {what}", parameters, dict)
    return dict(parameters)


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


def _typed(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise invalid(f"{what} must be {_KINDS[kind]}, got {value!r:.80}")


def header_timeout(value: str | None) -> float | None:
    """The time that a request's header says, in seconds."""
    if value is None:
        return None
    if not (value.isdecimal() and len(value) < 20):
        raise invalid(f"Coded-Torch-Timeout must be a number of microseconds, got {value!r:.80}")
    return microseconds("Coded-Torch-Timeout", int(value))


def largest_body(inputs: Sequence[TensorSpec], max_rows: int) -> int:
    """Bytes that a request for so many rows may need."""
    if any(-1 in spec.shape for spec in inputs):
        return _ANY_SHAPE
    return _HEADER + _NUMBER * max_rows * sum(math.prod(spec.shape) for spec in inputs)
