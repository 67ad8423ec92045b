"""A client of servers of the Open Inference Protocol, version 2."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import ssl as tls
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
from torch import Tensor

from .messages import EndpointError, Model, answer_bytes, outputs_of, parsed, request, specs_of

__all__ = [
    "BusyError",
    "Client",
    "EndpointError",
    "Model",
    "RefusedError",
    "RemoteError",
    "run",
    "running_loop",
]

_MESSAGE = 2**20  # bytes of metadata and of an error's text, at most; not tuned
_BUSY = (429, 503)
_RETRY_SECONDS = 0.1  # the pause of a busy server that does not name one; not tuned
_MOST_RETRY_SECONDS = 30.0  # the longest pause that a server may ask for; not tuned
# The request is wrong, whichever server is asked.
_PROBE = 5.0  # seconds to say that a server is ready; not tuned
_CALLERS = (400, 405, 406, 413, 415, 422)
_T = TypeVar("_T")


class BusyError(RuntimeError):
    """A server takes no request for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the server is busy for {seconds:g} s")
        self.seconds = seconds


class RemoteError(RuntimeError):
    """The model of a server failed on a request; the message is the server's."""


class RefusedError(ValueError):
    """A server refused a request as wrong; the message is the server's."""


class Client:
    """Asks servers, over connections that are kept. Redirects and proxies are not followed.

    Args:
        owner: the object that error messages name.
        headers: headers of every request.
        token: a bearer token. It is sent over TLS, or to a loopback address, only.
        context: verifies TLS. Defaults to None, the certificates of the system.
        connect_timeout: seconds to connect.
        timeout: seconds for a whole request.

    Raises:
        ValueError: a header holds a line break.
    """

    def __init__(
        self,
        owner: object,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        context: tls.SSLContext | None = None,
        connect_timeout: float = 2.0,
        timeout: float = 30.0,
    ) -> None:
        name = type(owner).__name__
        self.headers = {**(headers or {}), "Accept-Encoding": "identity"}
        if token is not None:
            self.headers["Authorization"] = f"Bearer {token}"
        for header, value in self.headers.items():
            if not f"{header}{value}".isprintable():
                raise ValueError(f"{name}: headers must be printable, got one named {header!r}")
        self._name, self._secret = name, token is not None
        self._context = context if context is not None else True
        # Seconds between two reads are bounded by the whole request.
        self._limits = aiohttp.ClientTimeout(total=timeout, sock_connect=connect_timeout)
        least = min(timeout, connect_timeout + _PROBE)
        self._probe = aiohttp.ClientTimeout(total=least, sock_connect=connect_timeout)
        self._session: aiohttp.ClientSession | None = None
        self._process = 0  # the process whose loop the session belongs to

    def checked(self, url: Any) -> str:
        """Return the origin of a server's URL, if the token may be sent there."""
        server, scheme, host = _origin(self._name, url)
        if self._secret and scheme != "https" and not _is_loopback(host):
            raise ValueError(
                f"{self._name}: a token needs https, or a loopback address, got {server}"
            )
        return server

    async def model(self, server: str, name: str, outputs: Sequence[str] | None) -> Model:
        """Return the model of a server, by its metadata, with some of its outputs or all."""
        path = f"/v2/models/{quote(name, safe='')}"
        try:
            about = parsed(await self._get(server, "/v2"), "the server's metadata")
            found = parsed(await self._get(server, path), "the model's metadata")
        except EndpointError as error:
            raise EndpointError(f"{self._name}: {server} {error}") from None
        extensions = about.get("extensions")
        binary = isinstance(extensions, list) and "binary_tensor_data" in extensions
        given = {spec.name: spec for spec in specs_of(found, "outputs")}
        names = given if outputs is None else outputs
        if unknown := [each for each in names if each not in given]:
            raise ValueError(
                f"{self._name}: outputs must be some of {', '.join(given)}, got {unknown}"
            )
        chosen = tuple(given[each] for each in names)
        return Model(name, specs_of(found, "inputs"), chosen, binary)

    async def is_ready(self, server: str, path: str = "/v2/health/ready") -> bool:
        """Return whether a server, or a model at its path, is ready."""
        try:
            probe = self._open().get(server + path, timeout=self._probe, **self._options())
            async with probe as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    async def infer(
        self, server: str, model: Model, inputs: Sequence[Tensor], rows: int
    ) -> list[Tensor]:
        """Return the outputs, ``[rows, ...]`` each, in the order of the model.

        Raises:
            RemoteError: the model failed on the request.
            RefusedError: the request is wrong.
            BusyError: the server takes no request now.
            EndpointError: anything else: no connection, an answer that breaks the protocol.
        """
        body, length = request(model, inputs)
        headers = {"Content-Type": "application/octet-stream" if length else "application/json"}
        if length:
            headers["Inference-Header-Content-Length"] = str(length)
        most = answer_bytes(model, rows)
        post = self._open().post(f"{server}{model.path}/infer", data=body, **self._options(headers))
        with _translated():
            async with post as answer:
                if answer.status != 200:
                    raise _failure(answer, await _read(answer, _MESSAGE))
                data = await _read(answer, most)
                size = answer.headers.get("Inference-Header-Content-Length")
        try:
            return outputs_of(model, data, size, rows)
        except ValueError as error:
            raise EndpointError(f"answered against the protocol: {error}") from None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def _get(self, server: str, path: str) -> bytes:
        with _translated():
            async with self._open().get(server + path, **self._options()) as answer:
                body = await _read(answer, _MESSAGE)
                if answer.status != 200:
                    raise _failure(answer, body)
                return body

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._process != os.getpid():
            self._process = os.getpid()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._context),
                timeout=self._limits,
                headers=self.headers,
                auto_decompress=False,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            weakref.finalize(self, _end, self._session, self._process)
        return self._session

    @staticmethod
    def _options(headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        return {"allow_redirects": False, "headers": headers}


def _end(session: aiohttp.ClientSession, process: int) -> None:
    """Close the session of a client that nothing holds any more, in the process that opened it."""
    if process == os.getpid() and not session.closed:
        loop = _LOOP.get()
        loop.call_soon_threadsafe(lambda: loop.create_task(session.close()))


def _origin(owner: str, url: Any) -> tuple[str, str, str]:
    """Return the origin of a URL, its scheme and its host.

    Raises:
        ValueError: the URL is not one of http or https with nothing but a host and a port.
    """
    parts = urlsplit(url) if isinstance(url, str) else None
    with contextlib.suppress(ValueError):
        if parts and parts.scheme in ("http", "https") and parts.hostname:
            plain = f"{parts.scheme}://{parts.netloc}"
            if parts.port != 0 and "@" not in parts.netloc and url.rstrip("/") == plain:
                return plain, parts.scheme, parts.hostname
    raise ValueError(
        f"{owner}: an endpoint must be a URL such as 'http://host:8000', got {url!r:.200}"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _translated() -> Any:
    """Raise an EndpointError for every error of a connection."""
    try:
        yield
    except aiohttp.ServerTimeoutError:  # connecting took too long
        raise EndpointError("could not be reached in time") from None
    except (asyncio.TimeoutError, TimeoutError):
        raise EndpointError("did not answer in time", lost=True) from None
    except aiohttp.ClientConnectorError as error:
        raise EndpointError(f"could not be reached: {error.strerror or error}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise EndpointError(f"broke the connection: {error!r}", lost=True) from None


async def _read(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body of an answer; an EndpointError if it is packed, or larger than ``most``."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise EndpointError("sent a packed answer, which was not asked for")
    if (answer.content_length or 0) > most:
        raise EndpointError(f"sent {answer.content_length} bytes, more than {most}")
    parts, size = [], 0
    async for part in answer.content.iter_any():
        size += len(part)
        if size > most:
            raise EndpointError(f"sent more than {most} bytes")
        parts.append(part)
    return b"".join(parts)


def _failure(answer: aiohttp.ClientResponse, body: bytes) -> Exception:
    """Return the exception for an answer that is not 200."""
    try:
        said = json.loads(body)
        message = said["error"] if isinstance(said["error"], str) else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        message = ""
    if answer.status in _BUSY:
        text = answer.headers.get("Retry-After", "")
        seconds = float(text) if text.isdecimal() else _RETRY_SECONDS
        return BusyError(min(max(seconds, _RETRY_SECONDS), _MOST_RETRY_SECONDS))
    if answer.status in _CALLERS:
        return RefusedError(message or f"the server answered {answer.status}")
    if answer.status == 500 and message:
        return RemoteError(message)
    return EndpointError(f"answered {answer.status}{message and f': {message:.200}'}")


class _Loop:
    """An event loop in a thread of its own, one for all clients of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name="coded_torch endpoints", daemon=True
                ).start()
            return self._loop

    def forget(self) -> None:
        """Forget the thread, which does not live on in a forked process."""
        self.__init__()  # type: ignore[misc]


_LOOP = _Loop()
os.register_at_fork(after_in_child=_LOOP.forget)


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all clients, started if it was not."""
    return _LOOP.get()


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine on the loop of all clients, and wait for it."""
    return asyncio.run_coroutine_threadsafe(coroutine, running_loop()).result()
