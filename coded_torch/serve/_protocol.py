"""Reads requests of the Open Inference Protocol, version 2. ``open_inference`` writes answers.

KServe and Triton implement this protocol, too. Binary tensors are its extension
``binary_tensor_data``:
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from starlette.exceptions import HTTPException
from starlette.types import Receive

from .. import open_inference as wire
from ..nn._finite import finite
from ..open_inference import ADDED, FORMER, TensorSpec, field, require

if sys.version_info >= (3, 11):
    from asyncio import timeout as timeout
else:
    from async_timeout import timeout as timeout

# Bounds of bodies, which are not tuned.
_TOGETHER = 2**27  # bytes of all bodies that are being read, unless four of one model are more
_DIVIDED = 2**26  # bytes of a body of several batches
_READING = 5.0  # seconds in which a body must come
_UNPACKED = 2**20  # bytes that any packed body may have
_RATIO = 32  # further such bytes per packed one
_AT_ONCE = 2**16  # bytes of a body that are parsed in the event loop: 1 ms
_PIECE = 2**14  # bytes that are parsed at once in a thread: .3 ms, for which the loop may wait

_MOST_LISTS = 1000  # lists of numbers that are set aside; a further list is JSON like any other
# Whatever the text, a match takes time linear in it.
_INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # of a string
_STRINGS = re.compile(rb'(?:\s*"%b"\s*,)*' % _INSIDE.pattern, re.DOTALL)
_SPACES = re.compile(rb"\s*")
_LIST = re.compile(rb'"data"\s*:\s*(?=\[)')
_END = re.compile(rb'["{}]')
_ALL_BUT_BRACKETS_AND_COMMAS = bytes(set(range(256)) - set(b"[,]"))
_NO_BRACKETS = bytes.maketrans(b"[]", b"  ")


class RequestError(HTTPException):
    """A request gets no answer. Metrics count requests by ``reason``, such as "queue_full"."""

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

    Packed bodies, and bodies of more than 64 KB, are parsed in one thread, in pieces.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Any,
        max_rows: int,
        batches: int = 1,
        examples: Any = (),
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.max_rows = batches * max_rows
        shown = [TensorSpec.of("", x) for x in examples]  # may be larger than any of an open size
        # Bytes of one body, packed and unpacked.
        self.most = max(
            max(wire.most_bytes(x, max_rows), min(_DIVIDED, wire.most_bytes(x, self.max_rows)))
            for x in (inputs, shown)
        )
        self.left = max(_TOGETHER, 4 * self.most)
        self.thread = ThreadPoolExecutor(1, "coded_torch parse")

    async def read(self, headers: Any, receive: Receive, deadline: float) -> InferRequest:
        """Return a request. Its body must come within half of the time to its deadline, or 5 s."""
        length = headers.get("inference-header-content-length")
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "deflate"):
            requirement = f"Content-Encoding must be gzip or deflate, got {encoding!r:.80}"
            raise RequestError(415, "invalid", requirement)
        body = bytearray()
        more = True

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
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    body += chunk
                    self.left -= len(chunk)
                    if len(body) > self.most:
                        raise _too_large(self.most)
                    if self.left < 0:
                        why = "too many bytes of requests are being read"
                        raise RequestError(503, "queue_full", why)
            if encoding == "identity" and len(body) <= _AT_ONCE:
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


def _yield(until: float) -> None:
    """Release the interpreter's lock for the event loop. Raise a TimeoutError after ``until``."""
    time.sleep(0)
    if time.monotonic() > until:
        raise TimeoutError


def _past(pattern: re.Pattern[bytes], body: bytearray, place: int, until: float) -> int:
    """Return the end of the repetitions of a pattern from a place on, matched piece by piece."""
    while True:
        end = _end_of(pattern, body, place)
        if end == place:
            return place
        place = end
        _yield(until)


def _end_of(pattern: re.Pattern[bytes], body: bytearray, place: int) -> int:
    """Return where a match in the next piece of a body ends."""
    found = pattern.match(body, place, place + _PIECE + 1)
    return found.end() if found else place


def _strings(body: bytearray, begin: int, until: float) -> Iterator[slice]:
    """Yield the pieces of a list of strings that begins at a place: strings with commas between.

    If the byte behind the pieces is not the closing bracket, the list does not hold strings alone.
    """
    place = begin + 1
    while True:
        end = _end_of(_STRINGS, body, place)
        if end > place:
            yield slice(place, end - 1)
            _yield(until)
            place = end
            continue
        # The next string is long, or the last one, or spaces are many.
        end = _past(_SPACES, body, place, until)
        if body[end : end + 1] != b'"':
            return
        end = _past(_INSIDE, body, end + 1, until) + 1
        end = _past(_SPACES, body, end, until)
        mark = bytes(body[end : end + 1])
        if mark not in (b",", b"]"):
            return
        yield slice(place, end)
        if mark == b"]":
            return
        place = end + 1


def _lists(head: bytearray, until: float) -> tuple[bytes | bytearray, dict[int, slice]]:
    """Return JSON with i in place of the list i named "data", and where the lists are.

    A list is found and not read: one of numbers ends before the next string or the end of its
    object, and strings are not nested. Any other list may remain in the JSON, and so do lists of
    bodies that are parsed at once.
    """
    lists = dict[int, slice]()
    kept = bytearray()
    at = 0
    while len(head) > _AT_ONCE and len(lists) < _MOST_LISTS:
        found = _LIST.search(head, at, at + wire.HEADER - len(kept))
        if found is None:
            break
        begin = found.end()
        place = begin
        strings = [*_strings(head, begin, until)]
        stop = _END.search(head, place, place + _PIECE)
        while stop is None and place < len(head):
            place += _PIECE
            _yield(until)
            stop = _END.search(head, place, place + _PIECE)
        end = head.rfind(b"]", begin, stop.start() if stop else len(head)) + 1
        if strings and head[strings[-1].stop : strings[-1].stop + 1] == b"]":
            end = strings[-1].stop + 1
        if not end:  # it is no list of numbers
            kept += head[at : begin + 1]
            at = begin + 1
            continue
        kept += head[at:begin] + b"%d" % len(lists)
        lists[len(lists)] = slice(begin, end)
        at = end
    size = len(kept) + len(head) - at
    require(size <= wire.HEADER, "the bytes of JSON beside numbers", f"at most {wire.HEADER}", size)
    return kept + head[at:] if kept else head, lists


def _texts(
    body: bytearray, begin: int, until: float, name: str, spec: TensorSpec, shape: list[int]
) -> Any:
    """Return the strings of a list, of which :func:`_lists` found the end."""
    found = list[Any]()
    left = shape[0]
    for piece in _strings(body, begin, until):
        values = orjson.loads(b"[%b]" % bytes(body[piece]))
        left -= len(values)
        if left < 0:
            break
        found.append(wire.from_json(name, spec, [len(values)], values))
    shown = str(body[begin : begin + 80], errors="replace")
    require(left == 0, f"data of {name}", f"{shape[0]} strings, in one list", shown)
    return np.concatenate(found)


def _tensor(
    body: bytearray, place: slice, until: float, name: str, spec: TensorSpec, shape: list[int]
) -> Any:
    """Return a tensor of the numbers in a list, flat or nested like the shape, or strings."""
    at = place.start
    end = place.stop
    if spec.is_text:
        most = wire.HEADER + wire.TEXT * shape[0]
        require(end - at <= most, f"the bytes of data of {name}", f"at most {most}", end - at)
        return _texts(body, at, until, name, spec, shape)
    count = math.prod(shape)
    requirement = f"{count} numbers of {spec.datatype}, in one list or nested as the shape {shape}"
    shown = str(body[at : min(end, at + 80)], errors="replace")
    wrong = ValueError(f"data of {name} must be {requirement}, got {shown}")
    most = wire.HEADER + wire.NUMBER * count
    require(end - at <= most, f"the bytes of data of {name}", f"at most {most}", end - at)
    if end - at <= 2 * count:
        raise wrong
    nested = b""
    for size in reversed(shape):
        nested = b"[%b]" % ((nested + b",") * size)[:-1]
    flat = b"[%b]" % (b"," * (count - 1))
    matched = {nested: 0, flat: 0}  # patterns of brackets and commas, and how much of each is read
    numbers = torch.empty(count, dtype=spec.dtype)
    filled = 0
    while at < end:
        comma = body.find(b",", at + _PIECE, end)
        stop = comma + 1 or end
        piece = bytes(body[at:stop])
        at = stop
        marks = piece.translate(None, _ALL_BUT_BRACKETS_AND_COMMAS)
        matched = {
            pattern: read + len(marks)
            for pattern, read in matched.items()
            if pattern[read : read + len(marks)] == marks
        }
        text = piece.translate(_NO_BRACKETS)
        if comma >= 0:
            text = text[:-1]
        size = text.count(b",") + 1
        if not matched or filled + size > count:
            raise wrong
        try:
            values = wire.from_json(name, spec, [size], orjson.loads(b"[%b]" % text))
        except ValueError:
            raise wrong from None
        numbers[filled : filled + size] = values
        filled += size
        if at < end:
            _yield(until)
    if filled != count or not any(len(pattern) == read for pattern, read in matched.items()):
        raise wrong
    return numbers.reshape(shape)


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
    text = bytearray(head) if tail else body
    shortened, lists = _lists(text, until)
    try:
        message = orjson.loads(shortened)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the request must be JSON, got {error}") from None
    require(type(message) is dict, "the request", "an object", message)
    parameters = field("the request", message, "parameters", dict, {})
    microseconds = field("the request", parameters, "timeout", int, 0)
    requirement = "a number of microseconds, or 0 for none"
    require(0 <= microseconds < 2**63, "timeout of the request", requirement, microseconds)
    coverage = field("the request", parameters, "coverage", float, 0.0)
    require(0 <= coverage < 1, "coverage of the request", "between 0 and 1", coverage)
    binary = field("the request", parameters, "binary_data_output", bool, False)
    name = field("the request", message, "id", str, "")
    listed = field("the request", message, "inputs", list)
    for entry in listed if {dict} == {*map(type, listed)} else ():
        data = entry.get("data")
        if type(data) is int and data in lists:  # numbers are read when their shape is known
            entry["data"] = functools.partial(_tensor, text, lists.pop(data), until)
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
