"""The ASGI application: one model behind the Open Inference Protocol, also in Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import anyio
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

import coded_torch

from .._arguments import count, instance, positive
from ..nn import CodedWrapper, Report
from ..open_inference.tensors import ADDED, TensorSpec
from .batcher import Batch, Batcher, compute, load
from .metrics import Metrics
from .protocol import (
    VERSION,
    InferRequest,
    RequestError,
    format_answer,
    largest_body,
    parse,
    read_body,
)

__all__ = ["Service", "app", "deployment"]

# Seconds after a deadline in which an answer that ended at the deadline is still written. It trades
# late answers against refused ones and was not tuned.
_WRITING = 0.01
# The number of requests that Ray lets into a replica; a bound, not tuned. Ray's default of 5 would
# refuse before the application's own bound of 256 does.
_MOST_REQUESTS = 1024


def app(
    coded: CodedWrapper,
    *,
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    deadline: float,
    examples: Sequence[Tensor] | None = None,
    max_batch_size: int = 64,
    max_queued_requests: int = 256,
    max_ongoing_batches: int | None = None,
) -> Starlette:
    """Make an ASGI application that serves a model by the Open Inference Protocol (KServe v2).

    Waiting requests are computed together. Each is answered by its deadline: with the model's own
    results where workers replied, else with predictions. The parameter ``predicted_rows`` of an
    answer is their number. Clients may ask for further outputs, a number a row: ``predicted``,
    ``source``, ``verified``, and ``radius`` and ``label_risk`` at the level of the request's
    parameter ``coverage``.

    The lifespan starts the workers and closes them. Meanwhile Python's full collections skip the
    objects that existed before. The application runs under any ASGI server, in one process. A
    refused request gets ``{"error": ...}`` and

    - 4xx if the request is wrong; the message names a row that is not finite or misshapen;
    - 503 with ``Retry-After`` if too many requests wait, the answer would probably be late, no
      worker is left, or all workers hang: then one request at a time is tried;
    - 504 if the deadline has passed and nothing could be predicted;
    - 500 if the model fails on the request. Requests in the same batch are answered.

    Args:
        coded: the model on its workers. Its ``waiting`` gets the deadline of each batch.
        name: the model's name in URLs.
        inputs: the specs of the module's positional arguments, each with the batch first.
        outputs: the specs of the tensors that the module returns, leaf by leaf, ``[B, ...]``.
        deadline: seconds from the arrival of a request to its answer. A request may ask for less
            by its parameter ``timeout``, in microseconds.
        examples: some rows of each input. Every worker runs the model on one row before the
            application is ready. Defaults to None: the first requests wait for the loading.
        max_batch_size: the number of rows of a batch, and of a request.
        max_queued_requests: the number of requests that may wait.
        max_ongoing_batches: the number of batches that may run at once. Defaults to None: a batch
            starts while a worker is idle, or one at a time under a code.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """
    instance("app", "coded", coded, CodedWrapper)
    instance("app", "name", name, str)
    if not name or set(name) & set("{}/?#%"):
        raise ValueError(
            f"app: name must be a part of a URL, without any of {{}}/?#%, got {name!r}"
        )
    for argument, given, reserved in (("inputs", inputs, ()), ("outputs", outputs, ADDED)):
        instance("app", argument, given, Sequence)
        for spec in given:
            instance("app", f"an entry of {argument}", spec, TensorSpec)
        names, taken = [spec.name for spec in given], [spec.name for spec in reserved]
        if not given or len({*names, *taken}) < len(names) + len(taken):
            but = f", none of {', '.join(taken)}" if taken else ""
            raise ValueError(f"app: {argument} must be named, each once{but}, got {names}")
    if examples is not None:
        instance("app", "examples", examples, Sequence)
        for x in examples:
            instance("app", "an entry of examples", x, Tensor)
        shapes = [list(x.shape) for x in examples]
        if len(shapes) != len(inputs) or not all(
            shape[:1] > [0] and spec.fits(shape[1:])
            for spec, shape in zip(inputs, shapes, strict=True)
        ):
            must = [spec.metadata()["shape"] for spec in inputs]
            raise ValueError(f"app: examples must be batches of shapes {must}, got {shapes}")
    limits = {
        "max_batch_size": count("app", "max_batch_size", max_batch_size),
        "max_queued_requests": count("app", "max_queued_requests", max_queued_requests),
        "slots": 1,
        "parts": 1,
    }
    if max_ongoing_batches is not None:
        limits["slots"] = count("app", "max_ongoing_batches", max_ongoing_batches)
    elif (size := coded.workers.num_workers) and coded.code is None:
        at_once = getattr(coded.workers, "concurrency", 1)  # parts of one worker
        limits |= {"slots": size * at_once, "parts": coded.parts or size}
    seconds = positive("app", "deadline", deadline)
    return Service(coded, name, inputs, outputs, seconds, examples, limits).application()


class Service:
    """The handlers of one application, see :func:`app`."""

    def __init__(
        self,
        coded: CodedWrapper,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        deadline: float,
        examples: Sequence[Tensor] | None,
        limits: Mapping[str, int],
    ) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.deadline, self.max_rows = deadline, limits["max_batch_size"]
        self.pool, self.metrics, self.ready = coded.workers, Metrics(), False
        self.load = functools.partial(load, coded, examples)
        run = functools.partial(compute, coded, outputs)
        self.batcher = Batcher(run, on_batch=self._count, has_idle=self._has_idle, **limits)
        # Called with the seconds, the rows and the predicted rows of every answer.
        self.on_answer: Callable[[float, int, int], None] = lambda *_: None

    def application(self) -> Starlette:
        """Make the application; its ``state.service`` is this service."""
        server = {"name": "coded_torch", "version": coded_torch.__version__}
        model = {
            "name": self.name,
            "versions": [VERSION],
            "platform": "coded_torch",
            "inputs": [spec.metadata() for spec in self.inputs],
            "outputs": [spec.metadata() for spec in (*self.outputs, *ADDED)],
        }
        routes = [
            Route("/metrics", self.metrics_text),
            Route("/v2", lambda _: _json(server | {"extensions": ["binary_tensor_data"]})),
            Route("/v2/health/live", lambda _: _json({"live": True})),
            Route("/v2/health/ready", self.is_ready),
        ]
        for path in (f"/v2/models/{self.name}", f"/v2/models/{self.name}/versions/{VERSION}"):
            routes += [
                Route(path, lambda _: _json(model)),
                Route(f"{path}/ready", self.is_ready),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        built = Starlette(
            routes=routes,
            middleware=[Middleware(GZipMiddleware, compresslevel=1)],
            lifespan=self.lifespan,
            exception_handlers={HTTPException: self.refuse, Exception: self.refuse},
        )
        built.state.service = self
        return built

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Start the workers, answer every accepted request, and close the workers."""
        try:
            await asyncio.to_thread(self.load)
            with _frozen_heap():
                self.ready = True
                yield
        finally:
            self.ready = False
            await self.batcher.close(self.deadline + _WRITING)
            await asyncio.to_thread(self.pool.close)

    async def is_ready(self, _: Request) -> Response:
        """Say whether the model is loaded, and a worker is up if the pool has workers."""
        ready = self.ready and self.pool.num_ready != 0
        return _json({"name": self.name, "ready": ready}, 200 if ready else 503)

    async def metrics_text(self, _: Request) -> Response:
        """Return the metrics for Prometheus."""
        self.metrics.workers(self.pool)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def infer(self, request: Request) -> Response:
        """Read a request, queue it, and return its answer by its deadline."""
        arrived = time.monotonic()
        deadline = arrived + self.deadline
        try:
            with self.batcher.reading(deadline):
                message = await self._read(request, deadline)
                deadline = min(deadline, arrived + message.timeout)
                future = self.batcher.put(message.inputs, arrived, deadline)
            answer = await _first(future, request, deadline + _WRITING - time.monotonic())
        except ClientDisconnect:
            raise RequestError(499, "disconnected", "the client has gone") from None
        pairs = zip((*self.outputs, *ADDED), answer.outputs, strict=True)
        answers = {spec.name: tensor for spec, tensor in pairs}
        coverage = answer.report.coverage
        if message.coverage and coverage is not None:
            coverage = message.coverage
            radii = answer.report.radii_at(coverage)
            if radii is not None:
                answers["radius"] = radii[answer.rows].float()
        parameters: dict[str, Any] = {
            "predicted_rows": int(answers["predicted"].sum()),
            "late_workers": ",".join(map(str, answer.report.missing)),
            **({} if coverage is None else {"coverage": coverage}),
        }
        body, length = format_answer(self.name, message, answers, parameters)
        rows = len(answers["predicted"])
        self.on_answer(time.monotonic() - arrived, rows, parameters["predicted_rows"])
        if length is None:
            return Response(body, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(length)}
        return Response(body, headers=headers, media_type="application/octet-stream")

    async def refuse(self, _: Request, error: Exception) -> Response:
        """Answer a request that failed or is refused, and count why."""
        if not isinstance(error, HTTPException):
            error = RequestError(500, "failed", f"the server failed: {type(error).__name__}")
        if error.status_code != 404:  # another path is no request of this model
            self.metrics.refused(getattr(error, "reason", "invalid"))
        return _json({"error": error.detail}, error.status_code, error.headers)

    async def _read(self, request: Request, deadline: float) -> InferRequest:
        length = request.headers.get("inference-header-content-length")
        try:
            with anyio.fail_after(deadline - time.monotonic()):  # unlike asyncio's, makes no task
                body = await read_body(request, largest_body(self.inputs, self.max_rows))
            return parse(body, length, self.inputs, self.outputs, self.max_rows)
        except TimeoutError:
            raise RequestError(408, "late", "the body did not come within the deadline") from None
        except ValueError as error:
            raise RequestError(400, "invalid", str(error)) from None

    def _has_idle(self) -> bool:
        states: Mapping[int, tuple[str, int]] = getattr(self.pool, "states", {})
        return any(state == "idle" for state, _ in states.values())

    def _count(self, report: Report, rows: int, queued: Sequence[float]) -> None:
        self.metrics.batch(report, rows, queued)
        self.metrics.workers(self.pool)


async def _first(future: asyncio.Future[Batch], request: Request, seconds: float) -> Batch:
    """Return the answer, unless the client disconnects or time runs out first."""
    gone = asyncio.ensure_future(_disconnected(request))
    both: set[asyncio.Future[Any]] = {future, gone}
    try:
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            raise ClientDisconnect
        raise RequestError(504, "late", "too few results came within the deadline")
    finally:
        gone.cancel()
        future.cancel()  # takes the request off the queue


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def deployment(factory: Callable[[], Starlette], **options: Any) -> Any:
    r"""Make a deployment for Ray Serve, each of whose replicas serves its own application.

    ``serve.run(deployment(make).bind())`` deploys it. Ray gets the metrics, with ``ray_`` in front
    of their names. The workers of a replica are processes of its host with
    :class:`~coded_torch.workers.ProcessWorkers`, or actors with
    :class:`~coded_torch.workers.RayWorkers`. For six such actors of ``num_cpus=1`` on other hosts,
    ``placement_group_bundles=[{"CPU": 1}] * 7, placement_group_strategy="SPREAD"`` reserves places.
    Needs the extra ``serve-ray``: ``pip install 'coded_torch[serve-ray]'``.

    Args:
        factory: makes the application by :func:`~coded_torch.serve.app`. The replica calls it.
        options: options of ``ray.serve.deployment``. By default Ray lets 1,024 requests into a
            replica, and as many wait, so that the application refuses and not Ray. Keep
            ``max_ongoing_requests`` above the application's ``max_queued_requests``.

    Raises:
        ImportError: Ray Serve is not installed.

    Warning:
        Ray binds one port of each replica to every interface and reads pickles from it: use it in
        a trusted network only. Nothing of the HTTP side is ever unpickled.

    Note:
        Ray's proxy costs 12 to 17 ms of a processor a request. If that counts, set
        ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1`` before Ray starts: the replicas serve HTTP themselves.
    """
    from ray import serve

    def build() -> Starlette:
        application = factory()
        instance("deployment", "the result of factory", application, Starlette)
        application.state.service.metrics = Metrics(ray=True)
        return application

    bounds = {"max_ongoing_requests": _MOST_REQUESTS, "max_queued_requests": _MOST_REQUESTS}
    return serve.deployment(**bounds | options)(serve.ingress(build)())


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep full collections from visiting the objects that exist already, in the whole process.

    A full collection stops all threads while it visits every object: some 100 ms with torch
    imported. If the host has frozen objects itself, all stay frozen: Python unfreezes all or none.
    """
    by_host = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not by_host:
            gc.unfreeze()
