r"""Workers that are servers of the Open Inference Protocol."""

import asyncio
import concurrent.futures
import dataclasses
import functools
import os
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .. import _tracing
from .._arguments import count, instance, positive, shown
from .._table import Failure, Part
from .._torch import refuse_derivatives
from ..open_inference import EndpointError, RefusedError, _client
from ..open_inference._client import RemoteModule, running_loop
from ._base import InjectedCrash, Request, Task, Workers, compute, logger
from ._dispatch import DispatchedWorkers, Dispatcher, Worker
from ._live import LiveRequest
from ._untuned import (
    ALONE_PROBE_SECONDS,
    CLOSING_SECONDS,
    DOUBTS_OF_REFUSAL,
    MOST_DOUBTS,
    MOST_PROBE_SECONDS,
    PROBE_SECONDS,
)

_STEP = 0.05  # seconds between two looks whether a probe is due


class EndpointWorkers(DispatchedWorkers):
    r"""Servers of the Open Inference Protocol v2, such as Triton, KServe and this package's own.

    Each server is a worker that computes several parts at a time, with its own copy of one model.
    So a wrapper on this pool wraps a :class:`RemoteModule` of that model:
    ``CodedWrapper(RemoteModule(url, "resnet"), workers=EndpointWorkers(urls, model="resnet"))``.

    A server that fails, hangs, or does not keep the protocol gets no parts until a probe succeeds.
    An answer such as 400 is an error of the caller, 500 one of the model: the call raises it if two
    servers answer alike to the same rows. An answer is untrusted: its shapes, dtypes and sizes are
    checked before memory is allocated. The guide to pools has all rules.

    Args:
        endpoints: the servers, such as ``["http://a:8000", "http://b:8000"]``; or a callable that
            returns them, which is asked every ``refresh`` seconds.
        model: the name of the model.
        concurrency: parts that one server computes at a time.
        headers: headers of every request. They are never logged.
        token: a bearer token, sent to the endpoints only, over TLS or to a loopback address.
        context: verifies TLS. Defaults to None, the certificates of the system.
        connect_timeout: seconds to connect to a server.
        timeout: seconds that a part may take, from asking for it to its reply.
        refresh: seconds between two calls of ``endpoints``.

    Opening raises:
        TypeError, ValueError: the module is not a :class:`RemoteModule`, or of another model.
        RuntimeError: the pool is closed, or was started in a process that this one was forked from.
    """

    mixed = True  # servers may have any hardware

    def __init__(
        self,
        endpoints: Iterable[str] | Callable[[], Iterable[str]],
        *,
        model: str,
        concurrency: int = 4,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        context: ssl.SSLContext | None = None,
        connect_timeout: float = 2.0,
        timeout: float = 600.0,
        refresh: float = 5.0,
    ) -> None:
        instance(self, "model", model, str)
        self.model = model
        self.concurrency = count(self, "concurrency", concurrency)
        self.timeout = positive(self, "timeout", timeout)
        self.refresh = positive(self, "refresh", refresh)
        if isinstance(endpoints, str):
            endpoints = (endpoints,)
        self._source = endpoints if callable(endpoints) else tuple(endpoints)
        self._options: Any = {"headers": headers, "token": token, "context": context}
        self._options |= {"connect_timeout": connect_timeout, "timeout": timeout}
        self._open()

    resize = Workers.resize  # :meth:`add` and :meth:`remove` need addresses

    def _make(self) -> Dispatcher:
        return _Endpoints(_client.Client(self, **self._options), self.concurrency)

    def _open(self) -> None:
        super()._open()
        source = None
        if callable(self._source):
            source = self._source
        self._queue.update(source() if source else self._source)
        if source:
            self._queue.follow(source, self.refresh)
        if not (source or self.urls):
            raise ValueError(
                f"{type(self).__name__}: endpoints must not be empty, got {shown(self._source)}"
            )

    urls: Any = property(attrgetter("_queue.urls"), doc="The servers that are in the pool.")
    names: Any = property(lambda self: dict(enumerate(self._queue.known)))

    def add(self, url: str) -> None:
        """Let a server take parts. An excluded server that is added again is restarted."""
        endpoints = self._dispatcher()
        endpoints.join(endpoints.client.checked(url))

    def remove(self, url: str) -> None:
        """Give a server no more parts; the parts that it computes go on."""
        server = url.rstrip("/")
        if server not in self.urls:
            raise ValueError(
                f"{type(self).__name__}: url must be one of {self.urls}, got {shown(url)}"
            )
        self._queue.leave(self._queue.known.index(server))

    def open(self, module: nn.Module, task: Task) -> Request:
        if not isinstance(module, RemoteModule):
            raise TypeError(
                f"{type(self).__name__}: module must be a RemoteModule, as the servers run their "
                f"own model, got {shown(type(module))}"
            )
        if module.model != self.model:
            raise ValueError(
                f"{type(self).__name__}: module must stand for the model {self.model!r}, got "
                f"{shown(module.model)}"
            )
        refuse_derivatives(type(self).__name__, task.leaves, module)
        return _EndpointRequest(task, self.timeout, self._dispatcher(), module)

    def __getstate__(self) -> dict[str, Any]:
        source = self._source if callable(self._source) else self.urls or self._source
        return {**super().__getstate__(), "_source": source}


class _EndpointRequest(LiveRequest):
    """A request whose running parts are cancelled when it is closed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.versions: dict[int, str] = {}
        self.headers = _tracing.headers()
        self.answered = set[str]()  # the URLs of servers
        self.failures: list[tuple[str, set[int], Exception]] = []  # URL, rows that nobody computed

    def close(self) -> None:
        super().close()
        self.dispatcher.loop.call_soon_threadsafe(self.dispatcher.cancel, self)


class _Endpoints(Dispatcher):
    """The servers of a pool. :meth:`cancel` and the private methods run on the loop.

    Each part that a server computes at a time has a Worker. The Workers of a server have one place.
    """

    kind = "servers"

    def __init__(self, asking: _client.Client, concurrency: int) -> None:
        super().__init__(0)
        self.client = asking
        self.concurrency = concurrency
        self.loop = running_loop()
        self.process = os.getpid()
        self.known: list[str] = []  # the URL of each place, also after its removal
        self._pauses: dict[str, float] = {}  # to the next probe, of servers without an answer
        self._doubts = Counter[str]()  # the doubts about each server since its last answer
        self._tasks: dict[asyncio.Task[Any], LiveRequest | None] = {}

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(url for place, url in enumerate(self.known) if place in self.places)

    def join(self, url: str) -> None:
        """Add a server, or give one that was excluded parts again."""
        with self.lock:
            if url not in self.known:
                self.known += [url]
            place = self.known.index(url)
            if place not in self.places:
                self.places.add(place)
                for _ in range(self.concurrency):
                    self.add(Worker(place))
        self.restart(place)

    def update(self, urls: Iterable[str]) -> None:
        """Have these servers in the pool, and no others."""
        wanted = dict.fromkeys(map(self.client.checked, urls))
        for url in set(self.urls) - wanted.keys():
            self.leave(self.known.index(url))
        for url in filter(lambda url: url not in self.urls, wanted):
            self.join(url)

    def follow(self, source: Callable[[], Iterable[str]], seconds: float) -> None:
        """Ask every few seconds which servers are to be in the pool."""

        async def refresh() -> None:
            while not self.closed:
                await asyncio.sleep(seconds)
                try:
                    self.update(await self.loop.run_in_executor(None, lambda: list(source())))
                except Exception:  # the caller's code failed: the servers stay as they are
                    if not threading.main_thread().is_alive():  # no: the interpreter ends
                        return
                    logger.warning("EndpointWorkers: endpoints() failed", exc_info=True)

        self.loop.call_soon_threadsafe(lambda: self._spawn(refresh()))

    def send(self, worker: Worker, part: Part) -> None:
        self.loop.call_soon_threadsafe(self._begin_at, worker, part)

    def cancel(self, request: LiveRequest) -> None:
        for task, asking in self._tasks.items():
            if asking is request:
                task.cancel()

    def close(self) -> None:
        self.stop()
        ended = asyncio.run_coroutine_threadsafe(self._close(), self.loop)
        if asyncio._get_running_loop() is self.loop:  # garbage was collected in its thread
            return
        if concurrent.futures.wait([ended], CLOSING_SECONDS).not_done:
            logger.warning("EndpointWorkers: connections did not close in time")

    def _begin_at(self, slot: Worker, part: Part) -> None:
        """Begin to ask a server for a part, on the loop."""
        if not part.request.awaits(part):  # cancelled before it started
            self.settle(slot, part, Failure("was cancelled"))
            return
        task = self._spawn(self._ask(slot, part), part.request)
        task.add_done_callback(functools.partial(self._report, slot, part))

    def _spawn(
        self, coroutine: Coroutine[Any, Any, Any], asking: LiveRequest | None = None
    ) -> asyncio.Task[Any]:
        """Return a task of a coroutine, which ends with the pool or with the request."""
        task = self.loop.create_task(coroutine)
        self._tasks[task] = asking  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.pop)
        return task

    async def _close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.close()

    def _report(self, slot: Worker, part: Any, task: asyncio.Task[Any]) -> None:
        """Report the result or the error of a part, which may not even have begun."""
        url = self.known[slot.index]
        if task.cancelled():
            if part.request.answered - {url}:
                self._doubt(url, 1, "left parts unanswered while others answered")
            self.settle(slot, part, Failure("was cancelled"))
        elif (error := task.exception()) is None:
            self._pauses.pop(url, None)
            self._doubts.pop(url, None)
            part.request.answered.add(url)
            self._compare(url, part)
            self.settle(slot, part, task.result())
        elif isinstance(error, _client.BusyError):
            self._pause(url, error.seconds)
            self.hand_back(slot, part)
        elif isinstance(error, EndpointError):
            self.trouble = f"{url} {error}"
            self._pause(url, why=str(error))
            self._compare(url, part, error)
            kind = "died" if error.lost else ""
            self.settle(slot, part, Failure(f"({url}) {error}", kind, error))
        else:  # the model failed, or the arguments are wrong
            raised = isinstance(error, _client.RemoteError | TypeError | ValueError)
            if isinstance(error, _client.RemoteError | RefusedError):
                self._compare(url, part, error)
            kind = "raised" if raised else "died" if isinstance(error, InjectedCrash) else ""
            self.settle(slot, part, Failure(f"({url}) raised {shown(error)}", kind, error))

    def _compare(self, url: str, part: Any, error: Exception | None = None) -> None:
        """Blame rows that several servers fail on, or a server whose rows another one computes."""
        units = {*part.units}
        failures = part.request.failures
        others = [each for each in failures if each[0] != url and not units.isdisjoint(each[1])]
        if error is not None:
            failures.append((url, units, error))
            for each in [url, *(other for other, *_ in others)] if others else ():
                self._pauses.pop(each, None)  # if it failed, it is probed at once
            return
        for other, missing, failure in others:
            missing -= units
            if not missing and not isinstance(failure, EndpointError):
                why = f"refused what others computed: {shown(failure)}"
                self._doubt(other, DOUBTS_OF_REFUSAL, why)

    def _doubt(self, url: str, doubts: int, why: str) -> None:
        self._doubts[url] += doubts
        if self._doubts[url] >= MOST_DOUBTS:
            del self._doubts[url]
            self._pause(url, why=why)

    async def _ask(self, slot: Worker, part: Any) -> Any:
        """Return the output of a server for a part, with the fault of the part."""
        module: RemoteModule = part.request.module
        url = self.known[slot.index]
        task = part.request.task
        with torch.inference_mode():
            arguments = task.payload(part.units)
        if arguments is None:  # the pool loads the module
            if not await self.client.is_ready(url, f"{module.metadata.path}/ready"):
                raise EndpointError("is not ready")
            return None
        inputs = module.inputs(*arguments)
        rows = len(part.units) * task.unit_rows
        if all(dim is None for dim in task.dims):  # the example of `start`
            rows = len(inputs[0])
        asked = self.client.infer(url, module.metadata, inputs, rows, part.request.headers)
        outputs, version = await asked
        if version:
            part.request.versions[slot.index] = version
        found = {version, *part.request.versions.values()} - {""}
        if len(found) > 1:
            text = "EndpointWorkers: one call got answers of versions %s of %s"
            logger.warning(text, sorted(found), module.model)
        answer: Any = functools.partial(module.outputs, outputs)
        if part.fault is None:
            return answer()
        await asyncio.sleep(part.fault.delay)  # a sleeping thread would outlive the pool
        return compute(answer, ((), {}), dataclasses.replace(part.fault, delay=0.0))

    def _pause(self, url: str, seconds: float = 0.0, why: str = "") -> None:
        """Give a server no parts for a time, and if it failed until a probe of it succeeds."""
        with self.lock:
            slots = [slot for slot in self.at(self.known.index(url)) if not slot.left]
            if self.closed or not slots or not slots[0].ready:
                return
            for slot in slots:
                slot.ready = False
        if why:
            self._pauses[url] = max(PROBE_SECONDS, 2 * self._pauses.get(url, 0.0))
            text = "EndpointWorkers: %s failed, and is probed until it is ready: it %s"
            logger.warning(text, url, why, extra={"cause": url})
        self._spawn(self._resume(url, slots, seconds, bool(why)))

    async def _resume(
        self, url: str, slots: Sequence[Worker], seconds: float, failed: bool = False
    ) -> None:
        """Let a server take parts after some seconds and, if it failed, when a probe succeeds."""
        await asyncio.sleep(seconds)
        waited = 0.0
        while failed and not all(slot.left for slot in slots):
            if waited < self._pause_of(url):
                await asyncio.sleep(_STEP)
                waited += _STEP
            elif failed := not await self.client.is_ready(url):
                self._pauses[url] = max(PROBE_SECONDS, 2 * self._pause_of(url))
                waited = 0.0
            else:
                logger.warning("EndpointWorkers: %s is ready again", url, extra={"cause": url})
        for slot in slots:
            self.ready(slot)

    def _pause_of(self, url: str) -> float:
        """Return the seconds to the next probe: a server that others stand in for may wait."""
        is_up = any(each.is_wanted for each in self._workers)
        most = MOST_PROBE_SECONDS if is_up else ALONE_PROBE_SECONDS
        return min(self._pauses.get(url, 0.0), most)
