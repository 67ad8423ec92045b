"""The ASGI application: one model behind the Open Inference Protocol, also in Ray Serve."""

import asyncio
import contextlib
import gc
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import nn
from torch.utils import _pytree as pytree

import coded_torch

from .. import _tracing
from .._arguments import bound, count, instance, positive, shown
from .._torch import positional
from ..nn import CodedWrapper
from ..open_inference import ADDED, FORMER, LISTED, TensorSpec, flatten, listed, written
from ..workers._supervisor import SupervisedWorkers
from ._batcher import TO_ANSWER, Batch, Batcher, compute
from ._model import Versions, bind, in_order, is_forwarded, is_loopback
from ._protocol import Reader, RequestError
from .metrics import Metrics

# The number of requests that Ray lets into a replica; a bound, not tuned. Ray's default of 5 would
# refuse before the application's own bound of 256 does.
_MOST_REQUESTS = 1024
_EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
_MOST_ANSWERS = 20_000  # answers that are remembered; a bound, not tuned
_MOST_BATCHES = 16  # in which a request is computed; a bound, not tuned
_NUMBER_BYTES = 16  # of a number in an answer, about
_AT_ONCE = 2**16  # bytes of an answer that are written in the event loop, and sent at once: 1 ms
_UNREAD = 2**28  # bytes of answers that wait to be read, together; a bound, not tuned
_WATCH = 0.1  # seconds, after which a request begins to watch if its client has gone; not tuned


class App(Starlette):
    """An ASGI application that serves a model by the Open Inference Protocol (KServe v2).

    Waiting requests are computed together. Each is answered by its deadline: with the model's own
    results where workers replied, else with estimates. The guide to serving lists the outputs that
    clients may ask for, and the codes of refused requests. The lifespan of the application starts
    the workers and closes them. With ``make``, :meth:`renew` loads the next version of the model
    while the present one answers. Each answer is of one version, its ``model_version``.

    Args:
        coded: the model on its workers. Its ``waiting`` gets the deadline of each batch.
        name: the model's name in URLs.
        inputs: the specs of the module's inputs, in the order of the parameters of ``forward``, or
            with their names and examples. Each has the batch first.
        outputs: the specs of the tensors that the module returns, leaf by leaf, ``[B, ...]``.
        deadline: seconds from the arrival of a request to its answer.
        examples: some rows of each input: a tensor or strings, several in a list or tuple, or a
            mapping of keyword arguments. Every worker runs the model on two of the rows before the
            application is ready. Defaults to None: the first requests wait for the loading.
        max_batch_size: the number of rows of a batch. A request may have 16 times as many.
        max_queued_requests: the number of requests that may wait.
        allowed_hosts: the names that a request's ``Host``, and its ``Origin`` if it has one, may
            have. Without them, any page of the web can use a server on a loopback address. Defaults
            to None: any name.
        make: returns a new module with other weights, in the same mode. It must not change the
            module that is being served. Defaults to None: the weights cannot be renewed.
        token: lets whoever sends it as ``Authorization: Bearer TOKEN`` ask for :meth:`renew`.
            Defaults to None: whoever asks from a loopback address.
    """

    def __init__(
        self,
        coded: CodedWrapper,
        *,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        deadline: float,
        examples: Any = None,
        max_batch_size: int = 64,
        max_queued_requests: int = 256,
        allowed_hosts: Sequence[str] | None = None,
        make: Callable[[], nn.Module] | None = None,
        token: str | None = None,
    ) -> None:
        instance(self, "coded", coded, CodedWrapper)
        instance(self, "name", name, str)
        if not (name and {*name}.isdisjoint("{}/?#%")):
            raise ValueError(
                f"{type(self).__name__}: name must be a part of a URL, without any of {{}}/?#%, "
                f"got {shown(name)}"
            )
        for argument, given in (("inputs", inputs), ("outputs", outputs)):
            instance(self, argument, given, Sequence)
            for spec in given:
                instance(self, f"an entry of {argument}", spec, TensorSpec)
            names = [spec.name for spec in given]
            added = [spec.name for spec in (*ADDED, *FORMER.values()) if argument == "outputs"]
            but = ""
            if added:
                but = f", none of {', '.join(added)}"
            differ = len({*names, *added}) == len(names) + len(added)
            if not (given and differ):
                raise ValueError(
                    f"{type(self).__name__}: {argument} must be named, each once{but}, got "
                    f"{shown(names)}"
                )
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self._versions = Versions(self, coded, make, token)
        self.examples: list[Any] = []
        self.form = positional(len(inputs))[0]  # of the arguments of a call
        if examples is not None:
            call = bind(self, coded.module, examples)
            self.examples, self.form = flatten((call.args, call.kwargs))
            held = len(self.examples)
            if held != len(inputs):
                raise ValueError(
                    f"{type(self).__name__}: examples must hold {len(inputs)} tensors, as inputs, "
                    f"got {shown(held)}"
                )
            self.inputs = inputs = in_order(inputs, call)
        self.allowed_hosts = None
        if allowed_hosts is not None:
            self.allowed_hosts = [x.lower() for x in allowed_hosts]
        for host in self.allowed_hosts or ():
            holds = {*host}.isdisjoint("/*[]@") and host.count(":") != 1
            if not holds:
                raise ValueError(
                    f"{type(self).__name__}: allowed_hosts must be names or addresses, without "
                    f"ports, got {shown(host)}"
                )
        if len(inputs) > 1 and any(spec.is_text for spec in inputs) and coded.in_dims == 0:
            raise ValueError(
                f"{type(self).__name__}: coded must have in_dims, such as (0, 0), as strings are "
                f"one of {len(inputs)} inputs, got {shown(coded.in_dims)}"
            )
        strings = [spec.name for spec in outputs if spec.is_text]
        if strings and coded.verify:
            raise ValueError(
                f"{type(self).__name__}: coded must have verify=None, as strings are not compared "
                f"({', '.join(strings)}), got {coded.verify}"
            )
        if not (make is None or self.examples):
            raise ValueError(
                f"{type(self).__name__}: make must come with examples, got {shown(examples)}"
            )
        self.deadline = positive(self, "deadline", deadline)
        self.max_rows = count(self, "max_batch_size", max_batch_size)
        self.pool = coded.workers
        self.metrics = Metrics()
        self.ready = False
        #: The time, the seconds, the rows and the estimated rows of the last answers.
        self.answers: deque[tuple[float, float, int, int]] = deque(maxlen=_MOST_ANSWERS)

        def slots() -> tuple[int, int]:
            """Return the number of slots, and how many a batch takes."""
            size = self.pool.num_workers
            present = self.coded
            if size and present.code is None:
                return size * self.pool.concurrency, present.parts or size
            return 1, 1

        def end_at(place: int) -> None:
            """Replace the worker at a place, unless it has left or was excluded meanwhile."""
            restart: Any = self.pool.restart
            if self.pool.states.get(place, ("down", 0))[0] == "busy":
                restart(place)

        def run(*batch: Any) -> Batch:
            present, version = self._versions.present
            return compute(present, outputs, self.form, *batch)._replace(version=version)

        self.batcher = Batcher(
            run,
            max_batch_size=self.max_rows,
            max_queued_requests=count(self, "max_queued_requests", max_queued_requests),
            slots=slots,
            on_batch=lambda *batch: self.metrics.batch(self.pool, *batch),
            states=lambda: [state for state, _ in self.pool.states.values()],
            end=end_at if isinstance(self.pool, SupervisedWorkers) else None,
        )
        batches = min(_MOST_BATCHES, self.batcher.max_queued)
        self.reader = Reader(inputs, outputs, self.max_rows, batches, self.examples)
        self.writer = ThreadPoolExecutor(1, "coded_torch write")
        self.unread = 0  # bytes of wide answers that are being sent
        server = {"name": "coded_torch", "version": coded_torch.__version__}
        model: dict[str, Any] = {"name": name, "platform": "coded_torch"}
        config: dict[str, Any] = model | {"backend": "coded_torch", "max_batch_size": self.max_rows}
        for key, specs in (("input", inputs), ("output", [*outputs, *LISTED])):
            model[f"{key}s"] = [spec.metadata() for spec in specs]
            config[key] = [
                {"name": x.name, "data_type": f"TYPE_{x.datatype}", "dims": [*x.shape]}
                for x in specs
            ]
        routes = [
            Route("/metrics", self._metrics_text),
            Route("/v2", lambda _: JSONResponse(server | {"extensions": _EXTENSIONS})),
            Route("/v2/health/live", lambda _: JSONResponse({"live": True})),
            Route("/v2/health/ready", self._is_ready),
            Route("/v2/models/stats", self._statistics),
            Route("/v2/repository/index", self._index, methods=["POST"]),
            Route(f"/v2/repository/models/{name}/load", self._versions.load, methods=["POST"]),
            Route(f"/v2/repository/models/{name}/unload", self._versions.cancel, methods=["POST"]),
        ]
        self._path = f"/v2/models/{name}"
        for path in (self._path, f"{self._path}/versions/{{version}}"):
            routes += [
                Route(path, lambda _: JSONResponse(model | {"versions": [self.version]})),
                Route(f"{path}/config", lambda _: JSONResponse(config)),
                Route(f"{path}/ready", self._is_ready),
                Route(f"{path}/stats", self._statistics),
            ]
        super().__init__(
            routes=routes,
            lifespan=self._run_workers,
            exception_handlers=dict.fromkeys((HTTPException, Exception), self._refuse),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, unless it comes under a name that is not allowed."""
        answer: ASGIApp = super().__call__  # which would take long for an inference
        if scope["type"] == "http":
            headers = {x.decode("latin-1"): y.decode("latin-1") for x, y in scope["headers"]}
            try:
                self._check_names(headers)
                if b"%2f" in scope.get("raw_path", b"").lower():  # a slash that no proxy sees
                    raise HTTPException(404)
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                version = ""
                versions = f"{self._path}/versions/"
                if path.startswith(versions):
                    version, _, rest = path.removeprefix(versions).partition("/")
                    if version != self.version:
                        raise HTTPException(404)
                    path = f"{self._path}/{rest}"
                if path == f"{self._path}/infer":
                    with _tracing.span("infer", headers):
                        answer = await self._infer(scope, headers, receive, version)
            except Exception as error:  # answered here, and raised for the log of the server
                await (await self._refuse(Request(scope), error))(scope, receive, send)
                if isinstance(error, HTTPException):
                    return
                raise
        await answer(scope, receive, send)

    def _check_names(self, headers: dict[str, str]) -> None:
        host = "//" + headers.get("host", "")
        for name, url in (("Host", host), ("Origin", headers.get("origin", host))):
            allowed = self.allowed_hosts
            if allowed is not None:
                found = None
                with contextlib.suppress(ValueError):
                    found = urlsplit(url).hostname
                if found not in allowed:
                    requirement = f"the {name} of a request must be one of {', '.join(allowed)}"
                    raise RequestError(
                        403, "invalid", f"{requirement}, got {url.lstrip('/')!r:.80}"
                    )

    @property
    def coded(self) -> CodedWrapper:
        """The present version of the model."""
        return self._versions.present[0]

    @property
    def version(self) -> str:
        """The number of the present version: 1, and one more after each :meth:`renew`."""
        return self._versions.present[1]

    def load(self) -> None:
        """Start the workers. With examples, each runs the model on two rows; it must not fail."""
        if self.examples:
            self.pool.start_on(self.coded.module, bound(*self.call(self.max_rows)))
        else:
            self.pool.start()

    def renew(self) -> str:
        """Load what ``make`` returns, and return its version, which answers all later batches.

        Workers load it one by one while they are used, and the present version answers meanwhile.
        Memories begin anew. If anything fails, the present version stays, and the error is raised.

        Raises:
            RuntimeError: the application is not ready, has no ``make``, or loads a version already;
                or not all workers loaded it in time; or ``POST /v2/repository/models/NAME/unload``
                cancelled the load.
            TimeoutError: the load did not end within 15 minutes.
            TypeError, ValueError: it is the present module, or its outputs are others.
            Exception: of ``make``, or as :class:`~coded_torch.workers.WorkerError` of the module.
        """
        return self._versions.renew()

    def call(self, rows: int) -> Any:
        """Return ``(args, kwargs)`` of the first examples."""
        leaves = [x[:rows] for x in self.examples]
        return pytree.tree_unflatten(listed(leaves), self.form)

    @contextlib.asynccontextmanager
    async def _run_workers(self, _: Starlette) -> AsyncIterator[None]:
        """Start the workers, answer every accepted request, and close the workers."""
        # A full collection stops all threads while it visits every object that is not frozen: some
        # 100 ms with torch imported. Python unfreezes all or none, so not if the host froze some.
        by_host = True
        try:
            await asyncio.to_thread(self.load)
            by_host = gc.get_freeze_count() > 0
            gc.collect()
            gc.freeze()
            self.ready = True
            yield
        finally:
            if not by_host:
                gc.unfreeze()
            self.ready = False
            await self.batcher.close(self.deadline + TO_ANSWER)
            for each in (self.reader.thread, self.writer):
                each.shutdown(wait=False)
            await asyncio.to_thread(self.pool.close)

    async def _is_ready(self, _: Request) -> Response:
        """Say whether the model is loaded, and a worker is up if the pool has workers."""
        ready = self.ready and self.pool.num_ready != 0
        return JSONResponse({"name": self.name, "ready": ready}, 200 if ready else 503)

    async def _index(self, _: Request) -> Response:
        """List the model, as Triton lists its repository."""
        state = "READY" if self.ready else "UNAVAILABLE"
        found = [{"name": self.name, "version": self.version, "state": state, "reason": ""}]
        if self._versions.is_loading:
            following = str(int(self.version) + 1)
            found.append(found[0] | {"version": following, "state": "LOADING"})
        return JSONResponse(found)

    async def _statistics(self, _: Request) -> Response:
        """Return the numbers and the times of requests and batches, as Triton does."""
        found = {"name": self.name, "version": self.version, "batch_stats": []}
        return JSONResponse({"model_stats": [found | self.metrics.statistics()]})

    async def _metrics_text(self, _: Request) -> Response:
        """Answer with all numbers in Prometheus's format."""
        self.metrics.workers(self.pool)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _infer(
        self, scope: Scope, headers: dict[str, str], receive: Receive, version: str
    ) -> Response:
        """Read a request, queue it, and return its answer by its deadline."""
        if scope["method"] != "POST":
            raise HTTPException(405, headers={"Allow": "POST"})
        arrived = time.monotonic()
        deadline = arrived + self.deadline
        self.batcher.check(1, deadline)  # before the body is read
        message = await self.reader.read(headers, receive, deadline)
        deadline = min(deadline, arrived + message.timeout)
        client, port = scope.get("client") or ("", 0)
        is_named = client in headers.get("x-forwarded-for", "")  # by a proxy that uvicorn trusts
        if is_loopback(client) or (is_forwarded(headers) and not is_named):
            client = f"{client}:{port}"  # the address may be anybody's
        rows = message.inputs[0].shape[0]
        futures = list[asyncio.Future[Any]]()
        try:
            for at in range(0, rows, self.max_rows):
                inputs = message.inputs
                if rows > self.max_rows:
                    inputs = [x[at : at + self.max_rows] for x in inputs]
                futures.append(self.batcher.put(inputs, arrived, deadline, client))
            left = deadline + TO_ANSWER - time.monotonic()
            answers = await _first(futures, receive, left, self.batcher.expire)
        finally:
            for future in futures:
                future.cancel()
        if answers is None and self.pool.num_ready == 0:
            raise RequestError(503, "unavailable", "no worker computed it: no worker is up")
        if answers is None:
            raise RequestError(504, "late", "too few results arrived within the deadline")
        versions = {answer.version for answer in answers}
        if len(versions) > 1 or version not in ("", *versions):
            why = f"version {version or min(versions)} was replaced meanwhile"
            raise RequestError(503, "unavailable", why)
        level = answers[0].report.coverage
        coverage = level and (message.coverage or level)
        estimated = sum(sum(answer.estimated[answer.rows]) for answer in answers)
        parameters = {}
        if coverage:
            parameters = {"coverage": coverage}
        parameters["estimated_rows"] = estimated
        about: dict[str, Any] = {"model_name": self.name, "model_version": answers[0].version}
        about |= {"parameters": parameters} | ({"id": message.id} if message.id else {})
        wanted = message.outputs

        def write() -> Any:
            tensors = list[tuple[TensorSpec, Any, bool]]()
            for spec, is_binary in wanted:
                found = [answer.output(spec, message.coverage) for answer in answers]
                join = np.concatenate if spec.is_text else torch.cat
                tensors.append((spec, found[0] if len(found) == 1 else join(found), is_binary))
            return written(about, "outputs", tensors)

        numbers = 0
        for spec, _ in wanted:
            values = answers[0].outputs.get(spec.name)
            if values is not None:
                numbers += rows * math.prod(values.shape[1:])
        response = await self._written(write, numbers)
        now = time.monotonic()
        self.answers.append((now, now - arrived, rows, estimated))
        self.metrics.answered(now - arrived)
        return response

    async def _written(self, write: Callable[[], Any], numbers: int) -> Response:
        """Return an answer. One of many numbers is written in a thread, and sent as it is read."""
        size = numbers * _NUMBER_BYTES
        is_wide = size > _AT_ONCE
        if not is_wide:
            pieces, length = write()
        elif self.unread and self.unread + size > _UNREAD:
            raise RequestError(503, "queue_full", "too many bytes of answers are not read")
        else:
            self.unread += size
            try:
                loop = asyncio.get_running_loop()
                pieces, length = await loop.run_in_executor(self.writer, write)
            except BaseException:
                self.unread -= size
                raise
        headers = {"content-length": str(sum(map(len, pieces)))}
        if length is not None:
            headers["Inference-Header-Content-Length"] = str(length)
        kind = "application/json" if length is None else "application/octet-stream"
        if is_wide:
            return _Wide(self, size, pieces, headers, kind)
        return Response(b"".join(pieces), headers=headers, media_type=kind)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Answer a request that failed or is refused, and count why."""
        if not isinstance(error, HTTPException):
            error = RequestError(500, "failed", f"the server failed: {type(error).__name__}")
        path = request.url.path
        why = error.detail
        if error.status_code != 404 and path.endswith("/infer"):
            self.metrics.refused(getattr(error, "reason", "invalid"))
        if error.status_code == 404:
            has = f"the model here is {self.name!r}, version {self.version}"
            why = f"there is no {path!r:.120}; {has}"
        return JSONResponse({"error": why}, error.status_code, error.headers)


async def _first(
    futures: Sequence[Any],
    receive: Receive,
    seconds: float,
    expire: Callable[[Sequence[Any]], None],
) -> list[Batch] | None:
    """Return all answers, None if time runs out first, or raise if the client disconnects."""
    loop = asyncio.get_running_loop()
    tasks = list[asyncio.Task[None]]()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for future in futures:
            if not future.done():
                future.set_exception(RequestError(499, "disconnected", "the client has gone"))

    begin = loop.call_later(_WATCH, lambda: tasks.append(loop.create_task(watch())))
    end = loop.call_later(seconds, expire, futures)
    try:  # once a future is done, no queue has its request
        found = [await futures[0]] if len(futures) == 1 else await asyncio.gather(*futures)
        return None if None in found else found
    finally:
        begin.cancel()
        end.cancel()
        for task in tasks:
            task.cancel()


class _Wide(Response):
    """An answer that is sent as its client reads it, piece by piece."""

    def __init__(
        self, owner: App, size: int, pieces: Sequence[Any], headers: dict[str, str], media_type: str
    ) -> None:
        self._owner = owner
        self._size = size
        self._pieces = deque(pieces)
        super().__init__(headers=headers, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            while self._pieces:
                piece = self._pieces.popleft()
                for at in range(0, len(piece), _AT_ONCE):
                    body = bytes(piece[at : at + _AT_ONCE])
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._owner.unread -= self._size


def deployment(factory: Callable[[], App], **options: Any) -> Any:
    r"""Make a deployment for Ray Serve: ``serve.run(deployment(make).bind())``.

    Each replica serves its own application. Ray gets the metrics, with ``ray_`` in front of their
    names. It binds one port of each replica to every interface and reads pickles from it: use it
    in a trusted network only.

    Args:
        factory: makes the application by :class:`~coded_torch.serve.App`. The replica calls it.
        options: options of ``ray.serve.deployment``. By default Ray lets 1,024 requests into a
            replica, and as many wait, so that the application refuses and not Ray.
    """
    from ray import serve

    def build() -> App:
        application = factory()
        instance("deployment", "the result of factory", application, App)
        application.metrics = Metrics(ray=True)
        return application

    bounds = {"max_ongoing_requests": _MOST_REQUESTS, "max_queued_requests": _MOST_REQUESTS}
    return serve.deployment(**bounds | options)(serve.ingress(build)())
