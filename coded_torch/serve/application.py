"""The ASGI application: one model behind the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
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
from .._heap import frozen_heap
from ..nn import CodedWrapper, Report
from .batcher import Answer, Batcher
from .errors import RequestError
from .metrics import Metrics
from .model import Model
from .protocol import (
    EXPECTED_ERROR,
    PREDICTED,
    VERIFIED,
    VERSION,
    InferRequest,
    format_answer,
    largest_body,
    parse,
    read_body,
)
from .tensors import TensorSpec

__all__ = ["Service", "app"]

# Seconds after a deadline in which an answer that ended at the deadline is still written. It trades
# late answers against refused ones and was not tuned.
_WRITING = 0.01


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
    """Make an ASGI application that serves a model by the Open Inference Protocol (KServe v2).

    Waiting requests are computed together. Each is answered by its deadline: with the model's own
    results where workers replied, else with predictions. The outputs ``predicted`` and
    ``expected_error`` say which rows were predicted and how far off they may be, and ``verified``
    which rows two workers computed alike, for clients that ask for them. The parameter
    ``predicted_rows`` of every answer is the number of predicted rows.

    The lifespan starts the workers and closes them. Meanwhile Python's full collections skip the
    objects that existed before. The application runs under any ASGI server, in one process:
    ``uvicorn.run(app(...))``. A refused request gets ``{"error": ...}`` and

    - 4xx if the request is wrong; the message names a row that is not finite or misshapen;
    - 503 with ``Retry-After`` if too many requests wait, the answer would probably be late, no
      worker is left, or workers hang: then one request at a time is tried;
    - 504 if the deadline has passed and nothing could be predicted;
    - 500 if the model fails on the request. Requests beside it are answered.

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
        max_ongoing_batches: the number of batches that may run at once. More than one pays if the
            workers do not compute on this machine's processors.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """
    instance("app", "coded", coded, CodedWrapper)
    instance("app", "name", name, str)
    inputs, outputs = _specs("inputs", inputs), _specs("outputs", outputs)
    if {spec.name for spec in outputs} & {PREDICTED.name, EXPECTED_ERROR.name, VERIFIED.name}:
        raise ValueError("app: outputs must not be named predicted, expected_error or verified")
    if examples is not None:
        _check_examples(examples, inputs)
    return Service(
        coded,
        name,
        inputs,
        outputs,
        positive("app", "deadline", deadline),
        examples,
        count("app", "max_batch_size", max_batch_size),
        count("app", "max_queued_requests", max_queued_requests),
        count("app", "max_ongoing_batches", max_ongoing_batches),
    ).application()


@dataclasses.dataclass
class Service:
    """The handlers of one application, see :func:`app`."""

    coded: CodedWrapper
    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    deadline: float
    examples: Sequence[Tensor] | None
    max_batch_size: int
    max_queued_requests: int
    max_ongoing_batches: int
    ready: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.model = Model(self.coded, self.outputs, self.examples)
        self.batcher = Batcher(
            self.model.compute,
            max_batch_size=self.max_batch_size,
            max_queued_requests=self.max_queued_requests,
            max_ongoing_batches=self.max_ongoing_batches,
            on_batch=self._count,
        )

    def application(self) -> Starlette:
        """Make the application; its ``state.service`` is this service."""
        routes = [
            Route("/metrics", self.metrics_text),
            Route("/v2", self.server_metadata),
            Route("/v2/health/live", lambda _: _json({"live": True})),
            Route("/v2/health/ready", self.is_ready),
        ]
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route(path, self.model_metadata),
                Route(f"{path}/ready", self.is_ready),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        built = Starlette(
            routes=routes,
            middleware=[Middleware(GZipMiddleware, compresslevel=1)],
            lifespan=self.lifespan,
            exception_handlers={
                RequestError: self.refuse,
                HTTPException: _http_error,
                Exception: _server_error,
            },
        )
        built.state.service = self
        return built

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Start the workers, answer every accepted request, and close the workers."""
        try:
            await asyncio.to_thread(self.model.load)
            with frozen_heap():
                self.ready = True
                yield
        finally:
            self.ready = False
            await self.batcher.close(self.deadline + _WRITING)
            await asyncio.to_thread(self.coded.workers.close)

    async def server_metadata(self, _: Request) -> Response:
        said = {"name": "coded_torch", "version": coded_torch.__version__}
        return _json({**said, "extensions": ["binary_tensor_data"]})

    async def is_ready(self, request: Request) -> Response:
        said: dict[str, Any] = {"ready": self.ready}
        if "model" in request.path_params:
            self._check(request)
            said["name"] = self.name
        return _json(said, 200 if self.ready else 503)

    async def model_metadata(self, request: Request) -> Response:
        self._check(request)
        said = {"name": self.name, "versions": [VERSION], "platform": "coded_torch"}
        inputs = [spec.metadata() for spec in self.inputs]
        outputs = [spec.metadata() for spec in self._all_outputs]
        return _json({**said, "inputs": inputs, "outputs": outputs})

    async def metrics_text(self, _: Request) -> Response:
        self.metrics.workers(self.coded.workers)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def infer(self, request: Request) -> Response:
        arrived = time.monotonic()
        self._check(request)
        deadline = arrived + self.deadline
        try:
            with self.batcher.reading(deadline):
                message = await self._read(request, deadline)
                if message.timeout is not None:
                    deadline = min(deadline, arrived + message.timeout)
                future, leave = self.batcher.put(message.inputs, arrived, deadline)
            try:
                answer = await _first(future, request, deadline + _WRITING - time.monotonic())
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

    @property
    def _all_outputs(self) -> tuple[TensorSpec, ...]:
        return (*self.outputs, PREDICTED, EXPECTED_ERROR, VERIFIED)

    async def _read(self, request: Request, deadline: float) -> InferRequest:
        try:
            with anyio.fail_after(deadline - time.monotonic()):  # unlike asyncio's, makes no task
                body = await read_body(request, largest_body(self.inputs, self.max_batch_size))
        except TimeoutError:
            raise RequestError(408, "late", "the body did not come within the deadline") from None
        length = request.headers.get("inference-header-content-length")
        return parse(body, length, self.inputs, self.outputs, self.max_batch_size)

    def _format(self, message: InferRequest, answer: Answer) -> Response:
        pairs = zip(self._all_outputs, answer.outputs, strict=True)
        answers = {spec.name: x for spec, x in pairs}
        parameters = {
            "predicted_rows": int(answers[PREDICTED.name].sum()),
            "late_workers": ",".join(map(str, answer.report.missing)),
        }
        body, length = format_answer(self.name, message, answers, parameters)
        headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
        kind = "application/json" if length is None else "application/octet-stream"
        return Response(body, headers=headers, media_type=kind)

    def _count(self, report: Report, rows: int, queued: Sequence[float]) -> None:
        self.metrics.batch(report, rows, queued)
        self.metrics.workers(self.coded.workers)

    def _check(self, request: Request) -> None:
        model, version = request.path_params["model"], request.path_params.get("version", VERSION)
        if (model, version) != (self.name, VERSION):
            must = f"there is model {self.name!r}, version {VERSION}"
            got = f"got {model!r:.80}, version {version:.20}"
            raise RequestError(404, "invalid", f"{must}, {got}")


async def _first(future: asyncio.Future[Answer], request: Request, seconds: float) -> Answer:
    """Return the answer, unless the client disconnects or time runs out first."""
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


def _check_examples(examples: Any, inputs: Sequence[TensorSpec]) -> None:
    instance("app", "examples", examples, Sequence)
    if len(examples) != len(inputs):
        raise ValueError(f"app: examples must be {len(inputs)}, one an input, got {len(examples)}")
    for spec, x in zip(inputs, examples, strict=True):
        instance("app", f"the example of {spec.name!r}", x, Tensor)
        if not (x.dim() and len(x) and spec.fits(x.shape[1:])):
            must = f"must have rows of shape {list(spec.shape)}, got shape {list(x.shape)}"
            raise ValueError(f"app: the example of {spec.name!r} {must}")


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _server_error(_: Request, error: Exception) -> Response:
    return _json({"error": f"the server failed: {type(error).__name__}"}, 500)
