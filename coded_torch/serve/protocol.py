"""Connections, and the messages of the Open Inference Protocol, version 2, on them.

KServe, Triton and others speak it. Binary tensors are its extension ``binary_tensor_data``:
https://github.com/kserve/open-inference-protocol and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
import resource
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import anyio
import orjson
import torch
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .. import open_inference as wire
from ..open_inference import ADDED, TensorSpec, field, require

__all__ = ["VERSION", "Connection", "InferRequest", "Reader", "RequestError"]
__all__ += ["format_answer", "parse", "read_body"]

VERSION = "1"  #: the only version of every model

# Bounds, which are not tuned. First of a connection, then of bodies.
_MOST_CONNECTIONS, _HEADER_BYTES = 2048, 2**14
_HEADERS_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
_TOGETHER = 2**27  # bytes of all bodies that are being read, unless four of one model are more
_READING = 5.0  # seconds in which a body must come
_UNPACKED, _RATIO = 2**20, 32  # bytes that any packed body may have, and more by its packed size
_PIECE = 2**16  # bytes of numbers that are parsed at once: 1 ms, for which the event loop may wait

_MOST_JSON = "the bytes of JSON beside numbers", f"at most {wire.HEADER}"
# A string, or the name of a list of data and the begin of the list.
_STRING = re.compile(rb'"(?:(data"\s*:\s*\[)|[^"\\]*(?:\\.[^"\\]*)*")', re.S)
_NO_COMMAS = bytes(set(range(256)) - set(b"[,]"))
_NO_BRACKETS = bytes.maketrans(b"[]", b"  ")


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


async def read_body(
    request: Request, most: int, count: Callable[[int], None] = lambda size: None
) -> bytearray:
    """Return a body of at most ``most`` bytes. ``count`` gets the number of bytes that came."""
    body = bytearray()
    async for chunk in request.stream():
        count(len(chunk))
        body += chunk
        if len(body) > most:
            raise RequestError(413, "too_large", f"the body must be at most {most} bytes, unpacked")
    return body


class Reader:
    """Reads requests, whose bodies are bounded in bytes, each and together, and in time.

    Packed bodies, and bodies of more than 64 KB, are parsed in one thread.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_rows: int
    ) -> None:
        self.inputs, self.outputs, self.max_rows = inputs, outputs, max_rows
        self.most = wire.most_bytes(inputs, max_rows)  # bytes of one body, packed and unpacked
        self.left = max(_TOGETHER, 4 * self.most)
        self._thread = ThreadPoolExecutor(1, "coded_torch parse")

    async def read(self, request: Request, deadline: float) -> InferRequest:
        """Return a request. Its body must come within half of the time to its deadline, or 5 s."""
        length = request.headers.get("inference-header-content-length")
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "deflate"):
            must = f"Content-Encoding must be gzip or deflate, got {encoding!r:.80}"
            raise RequestError(415, "invalid", must)
        sizes = list[int]()

        def count(size: int) -> None:
            sizes.append(size)
            self.left -= size
            if self.left < 0:
                raise RequestError(503, "queue_full", "too many bytes of requests are being read")

        def work() -> InferRequest:
            whole = body if encoding == "identity" else self._unpack(body, encoding)
            return parse(whole, length, self.inputs, self.outputs, self.max_rows, deadline)

        seconds = min(_READING, (deadline - time.monotonic()) / 2)
        late = f"the body did not come within {seconds:.3g} s"
        try:
            with anyio.fail_after(seconds):  # unlike asyncio's, makes no task
                body = await read_body(request, self.most, count)
            if encoding == "identity" and len(body) <= wire.HEADER:
                return work()
            late = "the body was not parsed within the deadline"
            with anyio.fail_after(deadline - time.monotonic()):
                return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except TimeoutError:
            raise RequestError(408, "late", late) from None
        except (ValueError, RecursionError) as error:  # JSON may be too deep
            raise RequestError(400, "invalid", str(error)) from None
        finally:
            self.left += sum(sizes)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _unpack(self, body: bytearray, encoding: str) -> bytearray:
        most = min(self.most, _UNPACKED + _RATIO * len(body))
        # With 32 added to the largest window, zlib reads from the header if it is gzip or deflate.
        unpacker = zlib.decompressobj(32 + zlib.MAX_WBITS)
        try:
            unpacked = unpacker.decompress(body, most + 1)  # a bomb is not unpacked
        except zlib.error as error:
            raise ValueError(f"the body must be {encoding}, got {error}") from None
        if len(unpacked) > most:
            why = f"the body must be at most {most} bytes, unpacked"
            why += "" if most == self.most else f" from {len(body)} bytes"
            raise RequestError(413, "too_large", why)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError(f"the body must be {encoding}, whole and once")
        return bytearray(unpacked)


def _lists(head: bytearray) -> tuple[bytes, list[bytearray]]:
    """Return JSON with ``[i]`` in place of list i of numbers named "data", and the lists as text.

    A list is found and not read: it ends before the next string or the end of its object.
    """
    kept, lists = list[bytes | bytearray](), list[bytearray]()
    # Nothing is kept yet from `start` on. The lists have `rest` bytes.
    start = at = rest = 0
    while (quote := head.find(b'"', at)) >= 0:
        require(quote - rest <= wire.HEADER, *_MOST_JSON, len(head))
        if not (found := _STRING.match(head, quote, quote + wire.HEADER)):
            break
        at = found.end()
        if found[1]:
            end = head.find(b'"', at)
            end = len(head) if end < 0 else end
            brace = head.find(b"}", at, end)
            end = head.rfind(b"]", at, end if brace < 0 else brace) + 1
            if end:  # a list without an end holds strings, or is cut off
                kept += head[start : at - 1], b"[%d]" % len(lists)
                lists.append(head[at - 1 : end])
                rest += len(lists[-1])
                start = at = end
    require(len(head) - rest <= wire.HEADER, *_MOST_JSON, len(head))
    return b"".join([*kept, head[start:]]), lists


def _numbers(
    text: bytearray, until: float, name: str, spec: TensorSpec, shape: list[int]
) -> Tensor:
    """Return a tensor of the numbers in a list, which is flat or nested like the shape."""
    count, nested = math.prod(shape), b""
    must = f"{count} numbers of {spec.datatype}, in one list or nested as the shape {shape}"
    wrong = ValueError(f"data of {name} must be {must}, got {str(text[:80], errors='replace')}")
    most = wire.HEADER + wire.NUMBER * count
    require(len(text) <= most, f"the bytes of data of {name}", f"at most {most}", len(text))
    if len(text) <= 2 * count:
        raise wrong
    for size in reversed(shape):
        nested = b"[%b]" % ((nested + b",") * size)[:-1]
    if text.translate(None, _NO_COMMAS) not in (nested, b"[%b]" % (b"," * (count - 1))):
        raise wrong
    text, at, tensors = text.translate(_NO_BRACKETS), 0, list[Tensor]()
    while at < len(text):
        end = text.find(b",", at + _PIECE)
        piece = text[at : end if end >= 0 else len(text)]
        at += len(piece) + 1
        try:
            numbers = orjson.loads(b"[%b]" % bytes(piece))
            tensors.append(wire.from_json(name, spec, [piece.count(b",") + 1], numbers))
        except ValueError:
            raise wrong from None
        if at < len(text):
            time.sleep(0)  # lets the event loop run, which waits for the interpreter's lock
            if time.monotonic() > until:
                raise TimeoutError
    return torch.cat(tensors).reshape(shape)


def parse(
    body: bytearray,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_rows: int,
    until: float = math.inf,
) -> InferRequest:
    """Parse the body of a request for inference: JSON, followed by binary tensors.

    ``header_length`` is the Inference-Header-Content-Length. A ValueError names the field that is
    wrong, its requirement and value. A TimeoutError ends the parsing of numbers at ``until``.
    """
    head, tail = wire.split(body, header_length)
    shortened, lists = _lists(bytearray(head) if tail else body)
    try:
        message = orjson.loads(shortened)
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
    for entry in listed:  # numbers are read when their shape is known
        data = entry.get("data") if type(entry) is dict else None
        if type(data) is list and len(data) == 1 and type(data[0]) is int:
            require(data[0] < len(lists), "data of an input", 'named "data"', data)
            entry["data"] = functools.partial(_numbers, lists[data[0]], until)
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


class Connection(HttpToolsProtocol):
    """A connection that no client can hold: ``uvicorn.run(app, http=Connection)``.

    The headers of a request have at most 16 KB. They end within 5 s of the connection, or of the
    first byte after an answer, which the client reads within 30 s. At most half of the process's
    file descriptors are connections: a further connection ends the one that is idle the longest, or
    gets 503.
    """

    # Without a limit, the number of descriptors is -1.
    most = min(_MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**63 // 2)
    rest, since = 0, 0.0  # bytes since the last body or request; the time of the last answer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timers = dict[float, asyncio.TimerHandle]()  # the timers by their seconds

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = time.monotonic()
        self._limit(_HEADERS_SECONDS)
        others = [each for each in self.connections if not each.transport.is_closing()]
        if len(others) > self.most:
            idle = [each for each in others if isinstance(each, Connection) and each.is_idle]
            first = min(idle, key=lambda each: each.since)
            first.end(b"503 Service Unavailable" if first is self else b"")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unlimit(_HEADERS_SECONDS, _ANSWER_SECONDS)

    def data_received(self, data: bytes) -> None:
        self.rest += len(data)
        super().data_received(data)
        if self.rest > _HEADER_BYTES:
            self.end(b"431 Request Header Fields Too Large")
        elif not self.is_idle:
            self._unlimit(_HEADERS_SECONDS)
        elif _HEADERS_SECONDS not in self._timers:
            self._limit(_HEADERS_SECONDS)

    def on_body(self, body: bytes) -> None:
        self.rest = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.rest = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit(_ANSWER_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unlimit(_ANSWER_SECONDS)

    def end(self, status: bytes) -> None:
        """Close the connection, after an answer without a body if there is a status."""
        if status:
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n" % status)
        self.transport.close()

    def _limit(self, seconds: float) -> None:
        self._timers[seconds] = self.loop.call_later(seconds, self.transport.abort)

    def _unlimit(self, *limits: float) -> None:
        for seconds in limits:
            if timer := self._timers.pop(seconds, None):
                timer.cancel()
