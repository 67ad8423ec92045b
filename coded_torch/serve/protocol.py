"""Requests of the Open Inference Protocol, version 2: their bodies, and what is in them.

KServe, Triton and others speak it. Binary tensors are its extension ``binary_tensor_data``:
https://github.com/kserve/open-inference-protocol and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

import asyncio
import functools
import math
import re
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import orjson
import torch
from starlette.exceptions import HTTPException
from starlette.types import Receive
from torch import Tensor

from .. import open_inference as wire
from ..nn.finite import finite
from ..open_inference import ADDED, FORMER, TensorSpec, field, require

if sys.version_info >= (3, 11):
    from asyncio import timeout as timeout
else:
    from async_timeout import timeout as timeout

# Bounds of bodies, which are not tuned.
_TOGETHER = 2**27  # bytes of all bodies that are being read, unless four of one model are more
_READING = 5.0  # seconds in which a body must come
_UNPACKED, _RATIO = 2**20, 32  # bytes that any packed body may have, and more by its packed size
_PIECE = 2**16  # bytes that are parsed at once: 1 ms, for which the event loop may wait

_MOST_LISTS = 1000  # lists of numbers that are set aside; a further list is JSON like any other
# Numbers, or strings that are not nested. Whatever the text, this takes time linear in it: no
# string of a list stands before a colon.
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_STRINGS = rb"\[\s*%b(?:\s*,\s*%b)*\s*\]" % (_STRING, _STRING)
_LIST = re.compile(rb'("data"\s*:\s*)(\[[^"{}]*\]|%b)' % _STRINGS, re.DOTALL)
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
    inputs: list[Any]  #: ``[n, ...]`` each, in the order of the model's arguments
    outputs: list[tuple[TensorSpec, bool]]  #: the wanted ones, and whether in binary
    timeout: float  #: seconds, infinite if the client names none
    coverage: float  #: the level of error bounds; 0 if the client names none


class Reader:
    """Reads requests, whose bodies are bounded in bytes, each and together, and in time.

    Packed bodies, and bodies of more than 64 KB, are parsed in one thread.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Any, max_rows: int, examples: Any = ()
    ) -> None:
        self.inputs, self.outputs, self.max_rows = inputs, outputs, max_rows
        shown = [TensorSpec.of("", x) for x in examples]  # may be larger than any of an open size
        # Bytes of one body, packed and unpacked.
        self.most = max(wire.most_bytes(each, max_rows) for each in (inputs, shown))
        self.left = max(_TOGETHER, 4 * self.most)
        self.thread = ThreadPoolExecutor(1, "coded_torch parse")

    async def read(self, headers: Any, receive: Receive, deadline: float) -> InferRequest:
        """Return a request. Its body must come within half of the time to its deadline, or 5 s."""
        length = headers.get("inference-header-content-length")
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "deflate"):
            must = f"Content-Encoding must be gzip or deflate, got {encoding!r:.80}"
            raise RequestError(415, "invalid", must)
        body, more = bytearray(), True

        def work() -> InferRequest:
            whole = body if encoding == "identity" else self._unpack(body, encoding)
            return parse(whole, length, self.inputs, self.outputs, self.max_rows, deadline)

        seconds = min(_READING, (deadline - time.monotonic()) / 2)
        late = f"the body did not come within {seconds:.3g} s"
        try:
            async with timeout(seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(499, "disconnected", "the client has gone")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    body += chunk
                    self.left -= len(chunk)
                    if len(body) > self.most:
                        raise _too_large(self.most)
                    if self.left < 0:
                        why = "too many bytes of requests are being read"
                        raise RequestError(503, "queue_full", why)
            if encoding == "identity" and len(body) <= _PIECE:
                return work()
            late = "the body was not parsed within the deadline"
            async with timeout(deadline - time.monotonic()):
                return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        except (TimeoutError, asyncio.TimeoutError):  # two classes in Python 3.10
            raise RequestError(408, "late", late) from None
        except (ValueError, RecursionError) as error:  # JSON may be too deep
            raise RequestError(400, "invalid", str(error)) from None
        finally:
            self.left += len(body)

    def _unpack(self, body: bytearray, encoding: str) -> bytearray:
        most = min(self.most, _UNPACKED + _RATIO * len(body))
        # With 32 added to the largest window, zlib reads from the header if it is gzip or deflate.
        unpacker = zlib.decompressobj(32 + zlib.MAX_WBITS)
        try:
            unpacked = unpacker.decompress(body, most + 1)  # a bomb is not unpacked
        except zlib.error as error:
            raise ValueError(f"the body must be {encoding}, got {error}") from None
        if len(unpacked) > most:
            raise _too_large(most, f" from {len(body)} bytes")
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError(f"the body must be one complete {encoding} stream")
        return bytearray(unpacked)


def _too_large(most: int, where: str = "") -> RequestError:
    return RequestError(413, "too_large", f"the body must be at most {most} bytes, unpacked{where}")


def _lists(head: bytearray) -> tuple[bytes | bytearray, dict[int, bytearray]]:
    """Return JSON with i in place of the list i named "data", and the lists as text.

    A list is found and not read: one of numbers ends before the next string or the end of its
    object, and strings are not nested. Any other list may remain in the JSON, and so do lists of
    bodies that are parsed at once.
    """
    lists = dict[int, bytearray]()

    def aside(found: re.Match[bytes]) -> bytes:
        lists[len(lists)] = bytearray(found[2])
        return b"%b%d" % (found[1], len(lists) - 1)

    shortened = _LIST.sub(aside, head, _MOST_LISTS) if len(head) > _PIECE else head
    must = f"at most {wire.HEADER}"
    require(len(shortened) <= wire.HEADER, "the bytes of JSON beside numbers", must, len(shortened))
    return shortened, lists


def _tensor(text: bytearray, until: float, name: str, spec: TensorSpec, shape: list[int]) -> Any:
    """Return a tensor of the numbers in a list, flat or nested like the shape, or strings."""
    if spec.is_text:
        most = wire.HEADER + wire.TEXT * shape[0]
        require(len(text) <= most, f"the bytes of data of {name}", f"at most {most}", len(text))
        return wire.from_json(name, spec, shape, orjson.loads(text))
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
    for entry in listed if {dict} == {*map(type, listed)} else ():
        data = entry.get("data")
        if type(data) is int and data in lists:  # numbers are read when their shape is known
            entry["data"] = functools.partial(_tensor, lists.pop(data), until)
    given = wire.tensors_of("input", listed, inputs, tail, range(1, max_rows + 1))
    tensors = [given[spec.name] for spec in inputs]
    rows = [tensor.shape[0] for tensor in tensors]
    require(len(set(rows)) == 1, "the numbers of rows of inputs", "equal", rows)
    for spec, tensor in zip(inputs, tensors, strict=True):
        if not (spec.is_text or finite(tensor)):
            row = int((~tensor.isfinite()).reshape(len(tensor), -1).any(1).nonzero()[0])
            raise ValueError(f"input {spec.name!r} must be finite, but row {row} is not")
    wanted = []
    listed = field("the request", message, "outputs", list, [])
    for owner, spec, _, how in wire.entries("output", listed, (*outputs, *ADDED, *FORMER.values())):
        if how.get("classification"):
            raise ValueError(f"{owner} must be asked for without the parameter classification")
        wanted.append((spec, field(owner, how, "binary_data", bool, binary)))
    wanted = wanted or [(spec, binary) for spec in outputs]
    return InferRequest(name, tensors, wanted, microseconds / 1e6 or math.inf, coverage)
