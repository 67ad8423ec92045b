"""The messages of the Open Inference Protocol, version 2, as a client writes and reads them.

An answer is untrusted: its shapes, dtypes and sizes are checked before memory is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from torch import Tensor

from .tensors import DATATYPES, TensorSpec, from_bytes, from_json, to_bytes, to_json

__all__ = ["EndpointError", "Model", "answer_bytes", "outputs_of", "parsed", "request", "specs_of"]

_HEADER = 2**16  # bytes of JSON beside the numbers of an answer, at most; not tuned
_NUMBER = 32  # bytes of one number in JSON, at most: float64 takes 25


class EndpointError(RuntimeError):
    """A server failed, or did not keep the protocol.

    Attributes:
        lost: whether the connection ended while the server computed.
    """

    def __init__(self, message: str, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class Model(NamedTuple):
    """The model of a server, by its metadata.

    Attributes:
        name: the name of the model.
        inputs: the specs of the inputs, in the order of the module's arguments.
        outputs: the specs of the outputs.
        binary: whether the server takes and sends binary tensors.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    binary: bool

    @property
    def path(self) -> str:
        """The path of the model on its server."""
        return f"/v2/models/{quote(self.name, safe='')}"


def parsed(body: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in a body; an EndpointError if it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise EndpointError(f"sent {what} that is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise EndpointError(f"sent {what} that is no object")
    return found


def specs_of(metadata: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    """Return the specs of inputs or outputs, without the dimension of the batch."""
    try:
        return tuple(
            TensorSpec(each["name"], each["datatype"], tuple(each["shape"][1:]))
            for each in metadata[key]
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EndpointError(f"sent metadata with unusable {key}: {error}") from None


def request(model: Model, inputs: Sequence[Tensor]) -> tuple[bytes, int]:
    """Return the body of a request, and the length of its JSON; 0 if all of it is JSON."""
    entries, tail = [], []
    for spec, tensor in zip(model.inputs, inputs, strict=True):
        entry: dict[str, Any] = {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(tensor.shape),
        }
        if model.binary:
            tail.append(to_bytes(tensor))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = to_json(tensor).tolist()
        entries.append(entry)
    outputs = [
        {"name": spec.name, **({"parameters": {"binary_data": True}} if model.binary else {})}
        for spec in model.outputs
    ]
    head = json.dumps({"inputs": entries, "outputs": outputs}).encode()
    return b"".join([head, *tail]), len(head) if model.binary else 0


def answer_bytes(model: Model, rows: int) -> int:
    """Return the most bytes that an answer may have; 64 MiB for an output whose size is open."""
    return _HEADER + sum(
        2**26 if -1 in spec.shape else rows * math.prod(spec.shape) * _NUMBER
        for spec in model.outputs
    )


def outputs_of(model: Model, data: bytes, length: str | None, rows: int) -> list[Tensor]:
    """Return the outputs of an answer, checked before memory is allocated for them."""
    view = memoryview(data)
    cut = len(data)
    if length is not None:
        cut = int(length) if length.isdecimal() and len(length) < 20 else -1
        if not 0 <= cut <= len(data):
            raise EndpointError("sent a wrong Inference-Header-Content-Length")
    message, tail = parsed(bytes(view[:cut]), "an answer"), view[cut:]
    entries = message.get("outputs")
    if not isinstance(entries, list):
        raise EndpointError("sent an answer without outputs")
    found: dict[str, Tensor] = {}
    specs = {spec.name: spec for spec in model.outputs}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in specs or name in found:
            raise EndpointError(f"sent an output that was not asked for, {name!r:.80}")
        spec, shape = specs[name], entry.get("shape")
        fits = isinstance(shape, list) and shape[:1] == [rows] and spec.fits(shape[1:])
        if not fits or not all(type(x) is int and x >= 0 for x in shape):
            raise EndpointError(f"sent {name!r} of shape {shape!r:.80}, not {[rows, *spec.shape]}")
        if entry.get("datatype") != spec.datatype:
            raise EndpointError(
                f"sent {name!r} of {entry.get('datatype')!r:.20}, not {spec.datatype}"
            )
        parameters = entry.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            data_here = entry.get("data")
            if not isinstance(data_here, list):
                raise EndpointError(f"sent {name!r} without data")
            found[name] = from_json(name, spec.datatype, shape, data_here)
            continue
        expected = math.prod(shape) * DATATYPES[spec.datatype].itemsize
        if size != expected or size > len(tail):
            raise EndpointError(f"sent {size!r:.20} bytes for {name!r}, not {expected}")
        found[name], tail = from_bytes(name, spec.datatype, shape, tail[:size]), tail[size:]
    if len(found) < len(specs) or len(tail):
        raise EndpointError("sent an answer of another length than its outputs have")
    return [found[spec.name] for spec in model.outputs]
