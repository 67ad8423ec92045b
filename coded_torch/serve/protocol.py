"""The Open Inference Protocol, version 2: the bodies of requests and answers.

KServe, Triton and others speak it. Binary tensors are its extension ``binary_tensor_data``:
https://github.com/kserve/open-inference-protocol and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from .. import open_inference as wire
from ..open_inference import ADDED, TensorSpec, field, require

__all__ = ["VERSION", "InferRequest", "RequestError", "format_answer", "parse", "read_body"]

VERSION = "1"  #: the only version of every model


class RequestError(HTTPException):
    """A request gets no answer. Metrics count by the reason, one of few words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status == 503 else None)
        self.reason = reason


class InferRequest(NamedTuple):
    """A request for inference."""

    id: str  #: the client's name for the request, or ""
    inputs: list[Tensor]  #: ``[n, ...]`` each, in the order of the model's arguments
    outputs: list[tuple[TensorSpec, bool]]  #: the wanted ones, and whether in binary
    timeout: float  #: seconds, infinite if the client names none
    coverage: float  #: the level of radii; 0 if the client names none


async def read_body(request: Request, most: int) -> bytes:
    """Return the unpacked body of a request; ``most`` bounds its bytes, packed and unpacked."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        must = f"Content-Encoding must be gzip or deflate, got {encoding!r:.80}"
        raise RequestError(415, "invalid", must)
    too_large = RequestError(413, "too_large", f"the body must be at most {most} bytes, unpacked")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    if encoding == "identity":
        return bytes(body)
    # With 32 added to the largest window, zlib reads from the header if it is gzip or deflate.
    unpacker = zlib.decompressobj(32 + zlib.MAX_WBITS)
    try:
        unpacked = unpacker.decompress(body, most + 1)  # a bomb is not unpacked
    except zlib.error as error:
        raise ValueError(f"the body must be {encoding}, got {error}") from None
    if len(unpacked) > most:
        raise too_large
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"the body must be {encoding}, whole and once")
    return unpacked


def parse(
    body: bytes,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_rows: int,
) -> InferRequest:
    """Parse the body of a request for inference: JSON, followed by binary tensors.

    ``header_length`` is the Inference-Header-Content-Length. A ValueError names the field that is
    wrong, its requirement and value.
    """
    head, tail = wire.split(body, header_length)
    try:
        message = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the request must be JSON, got {error}") from None
    require(type(message) is dict, "the request", "an object", message)
    parameters = field("the request", message, "parameters", dict, {})
    microseconds = field("the request", parameters, "timeout", int, 0)
    must = "a number of microseconds, or 0 for none"
    require(0 <= microseconds < 2**63, "timeout of the request", must, microseconds)
    coverage = field("the request", parameters, "coverage", float, 0.0)
    require(0 <= coverage < 1, "coverage of the request", "between 0 and 1", coverage)
    binary = field("the request", parameters, "binary_data_output", bool, False)
    name = field("the request", message, "id", str, "")
    listed = field("the request", message, "inputs", list)
    given = wire.tensors_of("input", listed, inputs, tail, range(1, max_rows + 1))
    tensors = [given[spec.name] for spec in inputs]
    rows = [len(tensor) for tensor in tensors]
    require(len(set(rows)) == 1, "the numbers of rows of inputs", "equal", rows)
    for spec, tensor in zip(inputs, tensors, strict=True):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite()).reshape(len(tensor), -1).any(1).nonzero()[0])
            raise ValueError(f"input {spec.name!r} must be finite, but row {row} is not")
    wanted = []
    listed = field("the request", message, "outputs", list, [])
    for owner, spec, _, how in wire.entries("output", listed, (*outputs, *ADDED)):
        if how.get("classification"):
            raise ValueError(f"{owner} must be asked for as it is, not as a classification")
        wanted.append((spec, field(owner, how, "binary_data", bool, binary)))
    wanted = wanted or [(spec, binary) for spec in outputs]
    return InferRequest(name, tensors, wanted, microseconds / 1e6 or math.inf, coverage)


def format_answer(
    model: str,
    request: InferRequest,
    answers: Mapping[str, Tensor],
    parameters: Mapping[str, Any],
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if binary tensors follow."""
    message = {"model_name": model, "model_version": VERSION, "parameters": parameters}
    message |= {"id": request.id} if request.id else {}
    tensors = ((spec, answers[spec.name], binary) for spec, binary in request.outputs)
    return wire.written(message, "outputs", tensors)
