"""A client of servers of the Open Inference Protocol, version 2, and the module for a model."""

import asyncio
import contextlib
import functools
import os
import re
import ssl
import sys
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from torch import nn

from .. import _tracing
from .. import open_inference as wire
from .._arguments import check, instance, positive, shown
from .._torch import is_texts, refuse_derivatives
from . import ADDED, FORMER, EndpointError, Model, RefusedError, TensorSpec

_MESSAGE = 2**20  # bytes of metadata and of an error's text, at most; not tuned
_BUSY = (429, 503)
_RETRY_SECONDS = 0.1  # the pause of a busy server that does not name one; not tuned
_MOST_RETRY_SECONDS = 30.0  # the longest pause that a server may ask for; not tuned
_PROBE = 5.0  # seconds to say that a server is ready; not tuned
_CALLERS = (400, 405, 406, 413, 415, 422)  # the request is wrong, says the server
_VERSION = 80  # characters of a model's version that are kept; not tuned
# By all these outputs a server of this package is known, whatever its version.
_OF_ALL_VERSIONS = {spec for spec in ADDED if spec.name in ("source", "verified")}
# Outputs that such servers list beside the model's own. Those of 0.4 list two under older names.
_LISTED = {*ADDED, *FORMER.values()}
_LISTED |= {TensorSpec("predicted", "BOOL", ()), TensorSpec("label_risk", "FP32", ())}
_HEAD = 2**14  # bytes before the final status of an answer, at most; not tuned


class BusyError(RuntimeError):
    """A server takes no request for ``seconds``, or was late and estimated rows."""

    def __init__(self, seconds: float, why: str = "the server is busy") -> None:
        super().__init__(f"{why}; it may be asked again after {seconds:g} s")
        self.seconds = seconds


class RemoteError(RuntimeError):
    """The model of a server failed on a request; the message has the server's words."""


class _Connection(ResponseHandler):
    """A connection that breaks if a status comes too late, or an answer unasked."""

    left = 0  # bytes that may come before the status of the answer

    def set_response_params(self, **options: Any) -> None:  # a request begins
        self.left = _HEAD
        super().set_response_params(**options)

    def feed_data(self, message: Any, size: int = 0) -> None:
        if self.left > _HEAD:
            self.close()
        if message[0].code >= 200:
            self.left = sys.maxsize
        super().feed_data(message, size)

    def data_received(self, data: bytes) -> None:
        left = self.left
        self.left = self.left - len(data)
        super().data_received(data[:left])
        if self.left <= 0:
            self.close()
            self.set_exception(aiohttp.ServerDisconnectedError())
        elif len(data) > left:
            super().data_received(data[left:])


class _Answer(aiohttp.ClientResponse):
    """An answer that knows its connection."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        self.protocol = connection.protocol
        if self.request_info.headers["Connection"] == "close":  # even if the server keeps it open
            self.protocol.force_close()
        return await super().start(connection)


class Client:
    """Asks servers. Redirects and proxies are not followed.

    A connection is kept only if its server answers with the ids of requests. Errors name ``owner``.
    See :class:`~coded_torch.workers.EndpointWorkers` for the other arguments.
    """

    def __init__(
        self,
        owner: object,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        context: ssl.SSLContext | None = None,
        connect_timeout: float = 2.0,
        timeout: float = 30.0,
    ) -> None:
        self._name = type(owner).__name__
        self.headers = {**(headers or {}), "Accept-Encoding": "identity"}
        if token is not None:
            self.headers["Authorization"] = f"Bearer {token}"
        self._secret = "authorization" in map(str.lower, self.headers)
        for header, value in self.headers.items():  # an error must not show the value
            requirement = "the name and the value of each header must be printable"
            check(owner, f"{header}{value}".isprintable(), requirement, header)
        self._context = context if context is not None else True
        timeout = positive(owner, "timeout", timeout)
        connect_timeout = positive(owner, "connect_timeout", connect_timeout)
        # Seconds between two reads are bounded by the whole request.
        self._limits = aiohttp.ClientTimeout(total=timeout, sock_connect=connect_timeout)
        total = connect_timeout + _PROBE
        self._probe = aiohttp.ClientTimeout(total=total, sock_connect=connect_timeout)
        self._echoing = set[str]()  # the servers whose last answer had the id of its request
        self._binary = dict[str, bool]()  # whether a server takes and sends binary tensors
        self._session: aiohttp.ClientSession | None = None
        self._process = 0  # the process whose loop the session belongs to

    def checked(self, url: Any) -> str:
        """Return the origin of a server's URL; a ValueError if the token must not be sent there."""
        match = re.fullmatch(r"(https?)://([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?/*", str(url))
        if match is None or not 0 < int((match[3] or ":1")[1:]) < 2**16:
            requirement = "an endpoint must be a URL such as 'http://host:8000'"
            raise ValueError(f"{self._name}: {requirement}, got {url!r:.200}")
        server = match[0].rstrip("/")
        is_loopback = re.fullmatch(r"localhost|\[::1\]|127(\.\d+){3}", match[2]) is not None
        is_safe = not self._secret or match[1] == "https" or is_loopback
        check(self._name, is_safe, "a token needs https, or a loopback address", server)
        return server

    async def model(self, server: str, name: str, outputs: Sequence[str] | None) -> Model:
        """Return the model of a server, by its metadata, with some of its outputs or all."""
        try:
            body, _ = await self._ask("GET", server + Model(name, (), ()).path, _MESSAGE)
            found = wire.parsed(body)
            inputs, given = (wire.specs_of(found, each) for each in ("inputs", "outputs"))
        except (EndpointError, ValueError) as error:
            raise EndpointError(f"{self._name}: {server} {error}") from None
        known = {spec.name: spec for spec in given}
        is_ours = {*given} >= _OF_ALL_VERSIONS
        added = _LISTED if is_ours else ()
        names = [x for x in known if known[x] not in added] if outputs is None else outputs
        if is_ours:
            known = {spec.name: spec for spec in ADDED} | FORMER | known
        unknown = [each for each in names if each not in known]
        check(self._name, not unknown, f"outputs must be some of {', '.join(known)}", unknown)
        return Model(name, inputs, tuple(known[each] for each in names))

    async def is_ready(self, server: str, path: str = "/v2/health/ready") -> bool:
        """Return whether a server, or a model at its path, is ready."""
        with contextlib.suppress(RuntimeError, ValueError):
            await self._ask("GET", server + path, _MESSAGE, timeout=self._probe)
            return True
        return False

    async def infer(
        self, server: str, model: Model, inputs: Sequence[Any], rows: int, more: Any = ()
    ) -> tuple[list[Any], str]:
        """Return the outputs, ``[rows, ...]`` each, in the order of the model, and its version.

        ``more`` are headers of this request. Each exception of this file stands for one failure; an
        EndpointError for all others.
        """
        is_binary = await self._takes_binary(server)
        name = os.urandom(16).hex()
        kept = server in self._echoing
        body, length = wire.request(model, inputs, is_binary, name)
        headers = {"Content-Type": "application/json", **dict(more)}
        if length is not None:
            headers["Content-Type"] = "application/octet-stream"
            headers["Inference-Header-Content-Length"] = str(length)
        if kept:
            headers["Connection"] = "keep-alive"
        url = f"{server}{model.path}/infer"
        most = wire.most_bytes(model.outputs, rows)
        try:
            data, answer = await self._ask("POST", url, most, data=body, headers=headers)
        except (EndpointError, RefusedError, RemoteError):
            self._binary.pop(server, None)  # another server may have its address by now
            raise
        self._echoing.discard(server)
        try:
            size = answer.headers.get("Inference-Header-Content-Length")
            outputs, message = wire.outputs_of(model, data, size, rows)
            echoed = message.get("id") or ""
            if echoed != name and (kept or echoed):
                raise ValueError("the answer must have the id of the request")
        except (OverflowError, ValueError) as error:  # an integer beyond all floats
            answer.protocol.close()  # the next answer may not be the next request's
            raise EndpointError(f"violated the protocol: {wire.cleaned(str(error))}") from None
        if echoed:
            self._echoing.add(server)
        estimated = message["estimated_rows"]
        if estimated and ADDED[0] not in model.outputs:
            why = f"the server estimated {estimated} of {rows} rows"
            raise BusyError(_RETRY_SECONDS, f"{why}; ask for the output 'estimated' to get them")
        return outputs, str(message.get("model_version") or "")[:_VERSION]

    async def _takes_binary(self, server: str) -> bool:
        """Return whether a server takes and sends binary tensors, for which it is asked once."""
        if server not in self._binary:
            try:
                body, _ = await self._ask("GET", f"{server}/v2", _MESSAGE, timeout=self._probe)
            except EndpointError as error:
                if error.status != 404:
                    raise
                body = b"{}"  # a gateway may know the paths of models only; JSON needs no extension
            try:
                extensions = wire.parsed(body).get("extensions")
            except ValueError as error:
                raise EndpointError(f"violated the protocol: {error}") from None
            self._binary[server] = "binary_tensor_data" in str(extensions)
        return self._binary[server]

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask(self, method: str, url: str, most: int, **options: Any) -> tuple[bytes, Any]:
        """Return the body of an answer, and the answer."""
        try:
            asked = self._open().request(method, url, allow_redirects=False, **options)
            async with asked as answer:
                if answer.status != 200:
                    raise _failure(answer, await _read(answer, _MESSAGE))
                return await _read(answer, most), answer
        except (aiohttp.ServerTimeoutError, aiohttp.ClientConnectorError) as error:
            failure = EndpointError(f"could not be reached: {error}")
        except asyncio.TimeoutError:
            failure = EndpointError("did not answer in time", lost=True)
        except (aiohttp.ClientError, OSError) as error:  # the text may quote an answer
            failure = EndpointError(f"broke the connection: {type(error).__name__}", lost=True)
        raise failure  # here, as those errors hold the headers of the request

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._process != os.getpid():
            self._process = os.getpid()
            connector: Any = aiohttp.TCPConnector(limit=0, ssl=self._context)
            connector._factory = functools.partial(_Connection, loop=running_loop())
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=self._limits,
                headers={"Connection": "close"} | self.headers,
                response_class=_Answer,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            weakref.finalize(self, _end, self._session, self._process)
        return self._session


def _end(session: aiohttp.ClientSession, process: int) -> None:
    """Close the session of a client that nothing holds any more, in the process that opened it."""
    if process == os.getpid() and not session.closed:
        loop = running_loop()
        loop.call_soon_threadsafe(lambda: loop.create_task(session.close()))


async def _read(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body of an answer; an EndpointError if it is larger than ``most``."""
    try:
        await answer.content.readexactly(most + 1)
    except asyncio.IncompleteReadError as ended:
        return ended.partial
    raise EndpointError(f"sent more than {most} bytes")


def _failure(answer: aiohttp.ClientResponse, body: bytes) -> Exception:
    """Return the exception for an answer that is not 200."""
    message = ""
    with contextlib.suppress(EndpointError, ValueError):
        message = wire.cleaned(wire.field("an answer", wire.parsed(body), "error", str, ""))
    if answer.status in _BUSY:
        text = answer.headers.get("Retry-After", "")
        seconds = float(text) if text.isdecimal() else _RETRY_SECONDS
        return BusyError(min(max(seconds, _RETRY_SECONDS), _MOST_RETRY_SECONDS))
    if answer.status == 500 or answer.status in _CALLERS:
        kind = RemoteError if answer.status == 500 else RefusedError
        return kind(message or f"the server answered {answer.status}")
    text = f"answered {answer.status}{message and f': {message}'}"
    return EndpointError(text, status=answer.status)


_loops: dict[int, asyncio.AbstractEventLoop] = {}  # a loop each process: no thread outlives a fork


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all clients of this process, in a thread of its own."""
    loop = _loops.get(os.getpid())
    if loop is None:
        made = asyncio.new_event_loop()
        loop = _loops.setdefault(os.getpid(), made)
        if loop is made:  # no other thread was faster
            name = "coded_torch endpoints"
            threading.Thread(target=loop.run_forever, name=name, daemon=True).start()
    return loop


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on the loop of all clients, and wait for it."""
    return asyncio.run_coroutine_threadsafe(coroutine, running_loop()).result()


class RemoteModule(nn.Module):
    r"""A module without parameters that stands for the model of a server.

    Calling it asks one server. :class:`~coded_torch.workers.EndpointWorkers` runs it on many.

    Args:
        url: the server, such as ``"http://a:8000"``.
        model: the name of the model. Its inputs and outputs come from the server's metadata.
        outputs: the names of the outputs to ask for. Defaults to None, all that the model has. A
            server of this package has further ones, such as ``"error_bound"``, which must be named.
        headers, token, context, connect_timeout, timeout: as in
            :class:`~coded_torch.workers.EndpointWorkers`.

    Calling takes a tensor for each input, or strings for one of BYTES, by position or by name. It
    returns the output ``[B, ...]``, or a dict of several by name, on the CPU; strings are a list.
    A server of this package that estimated rows counts as busy, unless ``outputs`` name
    "estimated".

    Raises:
        ValueError: the server refuses the inputs of a call.
        RuntimeError: the model failed, or the server cannot be reached or breaks the protocol.
    """

    def __init__(
        self, url: str, model: str, *, outputs: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__()
        client = Client(self, **options)
        instance(self, "model", model, str)
        self.url = client.checked(url)
        self.model = model
        self._options = options
        self.metadata: Model = run(client.model(self.url, model, outputs))
        #: The names of a call's outputs; a server may have another name for "estimated".
        self.names = tuple(outputs or (spec.name for spec in self.metadata.outputs))
        self._client: Client | None = client

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.inputs(args, kwargs)
        refuse_derivatives("RemoteModule", inputs, self)
        if not any(map(len, inputs)):  # no server answers requests without rows
            shapes = [(x, [0, *map(abs, x.shape)]) for x in self.metadata.outputs]
            return self.outputs([wire.from_bytes(*each, memoryview(b"")) for each in shapes])
        self._client = self._client or Client(self, **self._options)
        rows = len(inputs[0])
        more = _tracing.headers()
        asked = self._client.infer(self.url, self.metadata, inputs, rows, more)
        return self.outputs(run(asked)[0])

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the arguments of a call in the order of the model's inputs."""
        specs = self.metadata.inputs
        names = [spec.name for spec in specs]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        if len(args) + len(kwargs) != len(names) or given.keys() != set(names):
            what = f"{len(args)} by position and {sorted(kwargs)}"
            raise TypeError(f"RemoteModule: inputs must be {', '.join(names)}, got {what}")
        for spec in specs:
            tensor = given[spec.name]
            if spec.is_text and is_texts(tensor):
                given[spec.name] = wire.texts(tensor)
                continue
            kind = getattr(tensor, "dtype", type(tensor))
            if kind != spec.dtype or spec.is_text:
                requirement = "strings, one per row" if spec.is_text else f"of {spec.dtype}"
                raise TypeError(
                    f"{type(self).__name__}: {spec.name} must be {requirement}, got {shown(kind)}"
                )
            is_fit = tensor.dim() > 0 and spec.fits(tensor.shape[1:])
            if not is_fit:
                raise ValueError(
                    f"{type(self).__name__}: the shape of {spec.name} must be {[-1, *spec.shape]}, "
                    f"got {shown([*tensor.shape])}"
                )
        return [given[name] for name in names]

    def outputs(self, tensors: Sequence[Any]) -> Any:
        """Return the outputs of the model as a call does."""
        leaves = wire.listed(tensors)
        return leaves[0] if len(leaves) == 1 else dict(zip(self.names, leaves, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def extra_repr(self) -> str:
        return f"{self.url!r}, {self.model!r}"
