"""The HTTP server: uvicorn with connections that no client can hold."""

import asyncio
import contextlib
import ctypes
import math
import resource
import socket
import struct
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bounds, which are not tuned.
_MOST_CONNECTIONS = 2048
_BACKLOG = 2048  # connections that wait to be accepted
_ACCEPTED = 16  # connections per turn of the loop, in which each takes .2 ms
_HEADER_BYTES = 2**14  # of a request
_FRAMING_BYTES = 2**12  # of a body, beside its content and as many bytes again
_SLICE = 2**10  # bytes that are parsed at once
_SLICES = 2  # that are parsed per turn of the loop
_HEADERS_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
_WATCH_SECONDS = 1.0
_LOOK_SECONDS = 0.1  # between two looks whether a client that sends no more reads its answer
_DISCARD_SECONDS = 0.02  # between two reads of a body that is not wanted any more, 256 KB each
_KEEP_ALIVE = 75  # seconds, nginx's default: clients keep connections for longer than uvicorn's 5
# Seconds without a request after which a connection ends with the server: a client that has an
# answer asks again within some milliseconds.
_QUIET = 0.25
_ATTACH_FILTER = 26  # SO_ATTACH_FILTER of Linux, which the module socket does not name
_TO_READ = 5  # seconds after the last deadline in which clients may read answers at the end
_BEGIN = b"HTTP/1.1 "  # of any answer


class _Transport:
    """A transport that sends the head and the body of an answer by one write.

    So the client wakes once. What is written alone is sent in the next turn of the event loop.
    """

    def __init__(self, transport: Any, connection: "_Connection") -> None:
        self._transport = transport
        self._connection = connection
        self._written = list[bytes]()
        self._is_begun = False  # whether the begin of the next answer is sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def begin(self) -> None:
        """Send the begin of the answer: the host of a client that has gone refuses it."""
        if not (self._is_begun or self._written):
            self._is_begun = True
            self._transport.write(_BEGIN)

    def write(self, data: bytes) -> None:
        if self._is_begun and data:
            self._is_begun = False
            data = data[len(_BEGIN) :]
        if not self._written:
            self._connection.loop.call_soon(self._send)
        self._written.append(data)
        if len(self._written) > 1:  # now, as the transport pauses whoever writes faster than it
            self._send()

    def _send(self) -> None:
        written = b"".join(self._written)
        self._written.clear()
        if written and not self._transport.is_closing():  # the client may have gone meanwhile
            self._transport.write(written)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def resume_reading(self) -> None:
        self._connection.go_on()


class _Connection(HttpToolsProtocol):
    """A connection whose client gets an answer, or an end, in time.

    The headers of a request have at most 16 KB. They end within some 5 s of the connection, or of
    the first byte after an answer, and so does a body that the answer did not wait for. The answer
    is read within some 30 s. Of a body, framing takes at most as many bytes as its content, and
    4 KB. A client that sends no more gets its answer, unless it has gone. At most half of the
    process's file descriptors are connections: a further one ends the one that is idle the longest,
    or gets 503.
    """

    # Without a limit, the number of descriptors is -1.
    most = min(_MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**63 // 2)
    since = 0.0  # the time of the last answer
    limit = 0.0  # seconds that the client may take
    begun = 0.0  # the time since which it may
    framing_left = _HEADER_BYTES  # bytes beside the content that may still come
    content_left = 0  # bytes of the content that are still to come
    is_incomplete = False  # whether a message has begun and is not complete
    has_head = False  # whether its headers are complete
    has_ended = False  # whether the client sends no more
    turn: asyncio.Handle | None = None  # the next one in which bytes are parsed

    @property
    def is_idle(self) -> bool:
        """Whether no request waits for an answer."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_awaited(self) -> bool:
        """Whether one request waits for an answer, of which nothing is sent."""
        return not (self.is_idle or self.pipeline or self.cycle.response_started)

    def connection_made(self, transport: Any) -> None:
        self.waiting = bytearray()  # bytes that are not parsed
        wrapped: Any = _Transport(transport, self)
        super().connection_made(wrapped)
        self.since = time.monotonic()
        self._watch()
        others = [each for each in self.connections if not each.transport.is_closing()]
        if len(others) > self.most:
            idle = [each for each in others if isinstance(each, _Connection) and each.is_idle]
            first = min(idle, key=lambda each: each.since)
            first.end(b"503 Service Unavailable" if first is self else b"")

    # Reading: framing costs Python's time per byte, so each turn of the loop takes little of it.

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        if self.turn is None:
            self._parse()

    def go_on(self) -> None:
        """Parse what waits, and then read more."""
        if self.turn is None:
            self.turn = self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        """Parse at most two slices of the bytes that wait, and decide when to read more."""
        self.turn = None
        for _ in range(_SLICES):
            if not self.waiting or self.flow.read_paused or self.transport.is_closing():
                break
            size = self.content_left or _SLICE
            piece = bytes(self.waiting[:size])
            del self.waiting[:size]
            self.framing_left -= len(piece)  # `on_body` adds the bytes of content again
            super().data_received(piece)
            if self.framing_left < 0:
                self.end(b"431 Request Header Fields Too Large")
        transport: Any = self.transport
        if transport.is_closing():  # nobody parses the rest
            self.waiting.clear()
        elif self.waiting:  # the rest is parsed in the next turn, or when uvicorn reads again
            transport.pause_reading()
            if not self.flow.read_paused:
                self.go_on()
        elif self.is_idle and self.has_head:  # the answer was sent before the body had arrived
            transport.pause_reading()
            self.loop.call_later(_DISCARD_SECONDS, transport._transport.resume_reading)
        elif not (self.flow.read_paused or transport.is_reading()):
            transport._transport.resume_reading()

    def on_message_begin(self) -> None:
        self.is_incomplete = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.has_head = True
        self.framing_left = _FRAMING_BYTES
        self.content_left = int(dict(self.headers).get(b"content-length", 0))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.content_left = max(0, self.content_left - len(body))
        self.framing_left += 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.is_incomplete = False
        self.has_head = False
        self.content_left = 0
        self.framing_left = _HEADER_BYTES
        super().on_message_complete()

    # asyncio takes a bool; uvicorn's own says that it returns None.
    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection until the answer is sent; return whether there will be one."""
        if not self.has_ended:
            self.has_ended = True
            self.loop.call_later(_LOOK_SECONDS, self._look)
        return bool(self.waiting) or not (self.is_idle or self.is_incomplete)

    def _look(self) -> None:
        """End a connection whose client has gone: it refuses the begin of the answer."""
        transport: Any = self.transport
        if transport.is_closing():
            return
        owner = transport.get_extra_info("socket")
        if owner.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            transport.abort()
            return
        if self.is_awaited:
            transport.begin()
        self.loop.call_later(_LOOK_SECONDS, self._look)

    # Answers.

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()
        if self.has_ended and self.is_idle and not self.waiting:
            self.transport.close()

    def end(self, status: bytes) -> None:
        """Close the connection, after an answer without a body if there is a status."""
        if status and (self.is_idle or self.is_awaited):
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n" % status)
        self.transport.close()

    def _watch(self) -> None:
        """Abort the connection if the client takes too long to send headers or to read."""
        now = time.monotonic()
        limit = _ANSWER_SECONDS if self.flow.write_paused else math.inf
        if self.is_idle and (self.cycle is None or self.is_incomplete):
            limit = _HEADERS_SECONDS
        if limit != self.limit:
            self.limit = limit
            self.begun = now
        if now - self.begun >= limit:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(_WATCH_SECONDS, self._watch)


class _Server(uvicorn.Server):
    """Answers all requests that have reached it before it ends.

    It accepts the connections that wait. A connection ends with its next answer, which says so, or
    once it has been idle for a while.
    """

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for each in [each for server in self.servers for each in server.sockets]:
            with each.dup() as listening:  # asyncio has one number for both
                listening.listen(_BACKLOG)

    async def shutdown(self, sockets: Any = None) -> None:
        loop = asyncio.get_running_loop()
        self.server_state.default_headers.append((b"connection", b"close"))
        listeners = [each.dup() for server in self.servers for each in server.sockets]
        waiting = list[socket.socket]()
        for listening in listeners:
            if self.config.fd is None:  # else whoever opened it may go on to listen
                _drop_new(listening)
            listening.setblocking(False)
            with contextlib.suppress(OSError):  # none waits any more
                while True:
                    waiting.append(listening.accept()[0])
        for server in self.servers:
            server.close()
        for listening in listeners:
            listening.close()
        for accepted in waiting:
            accepted.setblocking(False)
            await loop.connect_accepted_socket(self._connection, accepted)
        end = loop.time() + (self.config.timeout_graceful_shutdown or 0)
        quiet_since = loop.time()
        connections: Any = self.server_state.connections
        while not self.force_exit and loop.time() < min(end, quiet_since + _QUIET):
            if not all(x.is_idle and not x.is_incomplete for x in connections):
                quiet_since = loop.time()
            await asyncio.sleep(_QUIET / 10)
        await super().shutdown(sockets)

    def _connection(self) -> Any:
        made: Any = self.config.http_protocol_class
        return made(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _drop_new(listening: socket.socket) -> None:
    """Let the kernel ignore whoever wants to connect, until the socket is closed.

    A connection that came after the last one was accepted would be reset, although its client may
    have sent a request. Ignored, the client asks the kernel again and is refused.
    """
    instruction = struct.pack("HBBI", 0x06, 0, 0, 0)  # of the socket filter: return, take 0 bytes
    kept = ctypes.create_string_buffer(instruction, len(instruction))
    program = struct.pack("HP", 1, ctypes.addressof(kept))
    with contextlib.suppress(OSError):  # no such filter here: the time without one is short
        listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def server(application: Any, **options: Any) -> uvicorn.Server:
    """Return uvicorn's server of an application: ``serve.server(application, port=8000).run()``.

    No client can hold it: headers, framing, answers that nobody reads and connections are bounded,
    as [Serving](../guides/serving.md) says. At SIGTERM it answers whatever has reached it.

    Args:
        application: an :class:`~coded_torch.serve.App`, or any other ASGI application.
        options: options of ``uvicorn.Config``, such as ``host``, ``port`` and ``ssl_certfile``.
    """
    deadline = getattr(application, "deadline", 0.0)
    usual: dict[str, Any] = {
        "ws": "none",
        "lifespan": "on",
        "log_level": "warning",
        "access_log": False,
        "backlog": _ACCEPTED,
        "timeout_keep_alive": _KEEP_ALIVE,
        "timeout_graceful_shutdown": math.ceil(deadline) + _TO_READ,
    }
    return _Server(uvicorn.Config(application, http=_Connection, **usual | options))
