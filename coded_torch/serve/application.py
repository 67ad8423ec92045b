"""The ASGI application: one model behind the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import orjson
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor
from torch.utils import _pytree as pytree

import coded_torch

from .._arguments import count, instance, positive
from .._heap import frozen_heap
from .._logging import sparing_logger
from .._weights import device_of
from ..codes import ReplicationCode
from ..nn import CodedWrapper, Report, Waiting
from .batcher import Answer, Batcher
from .bodies import read_body
from .errors import RequestError
from .metrics import Metrics
from .protocol import (
    EXPECTED_ERROR,
    PREDICTED,
    VERSION,
    InferRequest,
    format_answer,
    header_timeout,
    largest_body,
    parse,
)
from .tensors import TensorSpec

__all__ = ["Service", "app"]

logger = sparing_logger("coded_torch.serve")

_LOADING = 120.0  # seconds, that machines may take to load the model
_PROGRESS = 2.0  # seconds from one line of progress to the next, while workers load
_PATIENCE = 0.01  # seconds after a deadline, for what ended at it to be written


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
    max_ongoing_batches: int = 1,
) -> Starlette:
    """An ASGI application that serves a model by the Open Inference Protocol (KServe v2) over HTTP.

    Requests that wait are computed together. Each is answered by its deadline: exactly where the
    machines did, else predicted from the results that are there, of its batch and of a
    :class:`~coded_torch.surrogates.Memory` if the wrapper has one. Which rows were predicted, and
    the error to expect, come as the outputs ``predicted`` and ``expected_error`` where they are
    asked for; their number as the parameter ``predicted_rows`` of every answer.

    Its lifespan starts the machines and ends them; meanwhile, Python's full collections leave out
    what the process had set up before. It runs under any ASGI server, as one process:
    ``uvicorn.run(app(...))``. A request that is not answered gets ``{"error": ...}`` and

    - 4xx: its own mistake; a row that is not finite, or of a wrong shape, is named;
    - 503, with ``Retry-After``: too many requests are waiting, it would probably be late, no worker
      is left that could compute it, or workers hang: until a batch is answered again, one request
      at a time is tried;
    - 504: its deadline is over, and there was too little to predict from, or predictions are not
      wanted, ``Waiting(predict=False)``;
    - 500: the model failed on it. Requests beside it are answered.

    Args:
        coded: the model on its machines. The application closes its pool. Of the wrapper's
            ``waiting`` the deadline is replaced, so that ``patience`` does not count.
        name: of the model, in URLs.
        inputs: of the model, its positional arguments; the batch is the first dimension of each.
        outputs: of the model: what it returns, leaf by leaf, ``[B, ...]``.
        deadline: seconds from the arrival of a request to its answer. A request may ask for less,
            by its parameter ``timeout`` or the header ``Coded-Torch-Timeout``, in microseconds.
        examples: of the inputs, with rows. Every machine runs the model on one before the
            application is ready; else the first requests wait while machines load the model.
        max_batch_size: rows of a batch, and of a request.
        max_queued_requests: that may wait.
        max_ongoing_batches: that may run at once: more than one where machines wait for something
            else than this one's processors.

    Raises:
        TypeError, ValueError: an argument is of another kind than said, or out of range.
    """
    service = Service(
        coded,
        name=name,
        inputs=inputs,
        outputs=outputs,
        deadline=deadline,
        examples=examples,
        max_batch_size=max_batch_size,
        max_queued_requests=max_queued_requests,
        max_ongoing_batches=max_ongoing_batches,
    )
    model = "/v2/models/{model}"
    routes = [
        Route("/metrics", service.metrics_text),
        Route("/v2", service.server_metadata),
        Route("/v2/health/live", service.live),
        Route("/v2/health/ready", service.server_ready),
    ]
    for path in (model, f"{model}/versions/{{version}}"):
        routes += [
            Route(path, service.model_metadata),
            Route(f"{path}/ready", service.model_ready),
            Route(f"{path}/infer", service.infer, methods=["POST"]),
        ]
    built = Starlette(
        routes=routes,
        middleware=[Middleware(GZipMiddleware, compresslevel=1)],
        lifespan=service.lifespan,
        exception_handlers={
            RequestError: service.refuse,
            HTTPException: _http_error,
            Exception: _server_error,
        },
    )
    built.state.service = service
    return built


class Service:
    """A model that is served: what :func:`app` is made of."""

    def __init__(
        self,
        coded: CodedWrapper,
        *,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        deadline: float,
        examples: Sequence[Tensor] | None,
        max_batch_size: int,
        max_queued_requests: int,
        max_ongoing_batches: int,
    ) -> None:
        instance("app", "coded", coded, CodedWrapper)
        instance("app", "name", name, str)
        self.coded, self.name = coded, name
        self.inputs, self.outputs = _specs("inputs", inputs), _specs("outputs", outputs)
        if {spec.name for spec in self.outputs} & {PREDICTED.name, EXPECTED_ERROR.name}:
            raise ValueError("app: outputs must not be named predicted or expected_error")
        self.deadline = positive("app", "deadline", deadline)
        self._examples = None if examples is None else _checked(examples, self.inputs)
        self.max_batch_size = count("app", "max_batch_size", max_batch_size)
        self.max_queued_requests = count("app", "max_queued_requests", max_queued_requests)
        self.metrics = Metrics()
        self.ready = False
        self._most_bytes = largest_body(self.inputs, self.max_batch_size)
        self._batcher = Batcher(
            self._call,
            max_batch_size=self.max_batch_size,
            max_queued_requests=self.max_queued_requests,
            max_ongoing_batches=count("app", "max_ongoing_batches", max_ongoing_batches),
            on_batch=self._count,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Start the machines; answer what was accepted; end them."""
        try:
            loading = asyncio.ensure_future(asyncio.to_thread(self._load))
            while not (await asyncio.wait([loading], timeout=_PROGRESS))[0]:
                pool = self.coded.workers
                logger.info("%s of %s workers are up", pool.num_ready, pool.num_machines)
            loading.result()
            with frozen_heap():
                self.ready = True
                yield
        finally:
            self.ready = False
            await self._batcher.close(self.deadline + _PATIENCE)
            await asyncio.to_thread(self.coded.workers.close)

    def _load(self) -> None:
        """Have every machine load the model and run it once: all are idle, each gets one part."""
        start = time.monotonic()
        self.coded.workers.start()
        if self._examples is None or self.coded.workers.simulated:
            return
        machines = self.coded.workers.num_machines or 1
        each = self.coded.replace(
            code=ReplicationCode(1, machines),
            waiting=Waiting.first(0, deadline=_LOADING),
            surrogate=(),
        )
        with torch.no_grad():
            _, report = each.run(*(x[:1] for x in self._examples))
        loaded, seconds = len(report.received), time.monotonic() - start
        level = logging.INFO if loaded == machines else logging.WARNING
        said = "%d of %d workers have run the model, after %.1f s"
        logger.log(level, said, loaded, machines, seconds)

    async def server_metadata(self, _: Request) -> Response:
        return _json(
            {
                "name": "coded_torch",
                "version": coded_torch.__version__,
                "extensions": ["binary_tensor_data"],
            }
        )

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def server_ready(self, _: Request) -> Response:
        return _json({"ready": self.ready}, 200 if self.ready else 503)

    async def model_ready(self, request: Request) -> Response:
        self._check(request)
        return _json({"name": self.name, "ready": self.ready}, 200 if self.ready else 503)

    async def model_metadata(self, request: Request) -> Response:
        self._check(request)
        outputs = [*self.outputs, PREDICTED, EXPECTED_ERROR]
        return _json(
            {
                "name": self.name,
                "versions": [VERSION],
                "platform": "coded_torch",
                "inputs": [spec.metadata() for spec in self.inputs],
                "outputs": [spec.metadata() for spec in outputs],
            }
        )

    async def metrics_text(self, _: Request) -> Response:
        self.metrics.workers(self.coded.workers)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def infer(self, request: Request) -> Response:
        arrived = time.monotonic()
        self._check(request)
        said = header_timeout(request.headers.get("coded-torch-timeout"))
        deadline = arrived + min(self.deadline, said or self.deadline)
        try:
            with self._batcher.reading(deadline):
                message = await self._read(request, deadline)
                if message.timeout is not None:
                    deadline = min(deadline, arrived + message.timeout)
                future, leave = self._batcher.put(message.inputs, arrived, deadline)
            try:
                answer = await _first(future, request, deadline + _PATIENCE - time.monotonic())
            finally:
                leave()
        except ClientDisconnect:
            raise RequestError(499, "disconnected", "the client has gone") from None
        return self._format(message, answer)

    async def refuse(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        self.metrics.refused(error.reason)
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        return _json({"error": error.message}, error.status, headers)

    async def _read(self, request: Request, deadline: float) -> InferRequest:
        try:
            with anyio.fail_after(deadline - time.monotonic()):  # makes no task
                body = await read_body(request, self._most_bytes)
        except TimeoutError:
            raise RequestError(408, "late", "the body did not come within the deadline") from None
        length = request.headers.get("inference-header-content-length")
        return parse(body, length, self.inputs, self.outputs, self.max_batch_size)

    def _format(self, message: InferRequest, answer: Answer) -> Response:
        specs = (*self.outputs, PREDICTED, EXPECTED_ERROR)
        answers = {spec.name: x for spec, x in zip(specs, answer.outputs, strict=True)}
        parameters = {
            "predicted_rows": int(answers[PREDICTED.name].sum()),
            "late_workers": ",".join(map(str, answer.report.missing)),
        }
        body, length = format_answer(self.name, message, answers, parameters)
        headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
        kind = "application/json" if length is None else "application/octet-stream"
        return Response(body, headers=headers, media_type=kind)

    def _call(self, inputs: list[Tensor], seconds: float) -> tuple[list[Tensor], Report]:
        """Compute a batch. Few rows predict little, so it waits for its deadline, never less.

        Where the report says that the call failed, only rows that are not missing have answers;
        where none has, there are no outputs.
        """
        own = self.coded.waiting or Waiting()
        # A row on which the model fails is no reason not to predict others; the batcher refuses it.
        waiting = dataclasses.replace(own, deadline=seconds, on_error="predict")
        if self.coded.workers.simulated:  # other pools move what they get
            device = device_of(self.coded.module)
            inputs = [x.to(device or x.device) for x in inputs]
        try:
            with torch.no_grad():
                answers, report = self.coded.run(*inputs, waiting=waiting)
        except Exception as error:
            answers, held = getattr(error, "answers", None), getattr(error, "report", None)
            if not isinstance(held, Report) or not held.missing_rows:
                raise
            report = held
            if answers is None:
                return [], report
            report.predicted = torch.zeros(len(inputs[0]), dtype=torch.bool)
        if own.on_error == "predict" and not report.failed:
            report.refused = ()
        rows, leaves = len(inputs[0]), pytree.tree_leaves(answers)
        if len(leaves) != len(self.outputs):
            raise TypeError(f"the model must return {len(self.outputs)} tensors, got {len(leaves)}")
        for spec, leaf in zip(self.outputs, leaves, strict=True):
            whole = isinstance(leaf, Tensor) and leaf.dtype is spec.dtype and len(leaf) == rows
            if not (whole and spec.fits(leaf.shape[1:])):
                got = f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf
                must = f"{spec.datatype} {[rows, *spec.shape]}"
                raise TypeError(f"output {spec.name!r} of the model must be {must}, got {got}")
        predicted, errors = report.predicted, report.expected_errors
        assert predicted is not None  # it has answered
        if errors is None:
            errors = torch.zeros(rows).masked_fill(predicted, torch.nan)
        return [*leaves, predicted, errors.float()], report

    def _count(self, report: Report, rows: int, queued: Sequence[float]) -> None:
        self.metrics.batch(report, rows, queued)
        self.metrics.workers(self.coded.workers)

    def _check(self, request: Request) -> None:
        model, version = request.path_params["model"], request.path_params.get("version", VERSION)
        if (model, version) != (self.name, VERSION):
            raise RequestError(
                404,
                "invalid",
                f"there is model {self.name!r}, version {VERSION}, got {model!r:.80}, "
                f"version {version:.20}",
            )


async def _first(future: asyncio.Future[Answer], request: Request, seconds: float) -> Answer:
    """The answer, unless the client goes or time is over before."""
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        both: set[asyncio.Future[Any]] = {future, gone}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            raise ClientDisconnect
        raise RequestError(504, "late", "too few results came within the deadline")
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _specs(argument: str, given: Any) -> tuple[TensorSpec, ...]:
    instance("app", argument, given, Sequence)
    for spec in given:
        instance("app", f"an entry of {argument}", spec, TensorSpec)
    if not given or len({spec.name for spec in given}) < len(given):
        raise ValueError(f"app: {argument} must have names of their own, at least one, got {given}")
    return tuple(given)


def _checked(examples: Any, inputs: Sequence[TensorSpec]) -> Sequence[Tensor]:
    instance("app", "examples", examples, Sequence)
    if len(examples) != len(inputs):
        raise ValueError(f"app: examples must be {len(inputs)}, one an input, got {len(examples)}")
    for spec, x in zip(inputs, examples, strict=True):
        instance("app", f"the example of {spec.name!r}", x, Tensor)
        if not (x.dim() and len(x) and spec.fits(x.shape[1:])):
            raise ValueError(
                f"app: the example of {spec.name!r} must have rows of shape {list(spec.shape)}, "
                f"got shape {list(x.shape)}"
            )
    return tuple(examples)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _server_error(_: Request, error: Exception) -> Response:
    return _json({"error": f"the server failed: {type(error).__name__}"}, 500)
