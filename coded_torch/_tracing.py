"""Spans of OpenTelemetry: of requests, calls and parts, if the program has a tracer provider.

A program without one does not pay for spans. An error of
OpenTelemetry, or of what the program adds to it, is logged, and fails no call.
"""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ._arguments import sparing_logger
from ._table import OPEN, Table

logger = sparing_logger("coded_torch.tracing")
_NOTHING = contextlib.nullcontext()
_MOST_CHARACTERS = 512  # of a header of a trace that goes on; W3C's own bound of a tracestate
_LINKS = "coded_torch.links"  # in a context: the spans of other requests of the same batch


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """Log an error of a block instead of raising it."""
    try:
        yield
    except Exception as error:
        logger.warning(
            "OpenTelemetry: spans are missing or incomplete: %s: %s", type(error).__name__, error
        )


def _api() -> Any:
    """Return OpenTelemetry's module; None if there is nothing to record, or to carry on."""
    api = sys.modules.get("opentelemetry.trace")
    if api is not None:
        with harmless():
            is_set = type(api.get_tracer_provider()) is not api.ProxyTracerProvider
            if is_set or api.get_current_span().get_span_context().is_valid:
                return api
    return None


@functools.cache
def _propagate() -> Any:
    """Return what carries traces in headers; None if ``OTEL_PROPAGATORS`` names unknown ones."""
    with harmless():
        from opentelemetry import propagate

        return propagate


def span(name: str, headers: Mapping[str, str] | None = None) -> Any:
    """Return a context with a span, the parent of those inside; None if nothing is recorded.

    With the headers of a request, the span is the server's, and its parent may be the client's.
    """
    api = _api()
    if api is None:
        return _NOTHING
    return _span(api, name, headers)


@contextlib.contextmanager
def _span(api: Any, name: str, headers: Mapping[str, str] | None) -> Iterator[Any]:
    made = token = None
    with harmless():
        from opentelemetry import context

        how: dict[str, Any] = {"links": context.get_value(_LINKS) or ()}
        if headers is not None and not api.get_current_span().get_span_context().is_valid:
            how["kind"] = api.SpanKind.SERVER
            sent = {name: x for name, x in headers.items() if len(x) <= _MOST_CHARACTERS}
            how["context"] = _propagate() and _propagate().extract(sent)
        made = api.get_tracer("coded_torch").start_span(f"coded_torch.{name}", **how)
        token = context.attach(api.set_span_in_context(made))
    try:
        yield made if made is not None and made.is_recording() else None
    except Exception as error:
        with harmless():
            if made is not None:
                made.record_exception(error)
                what = f"{type(error).__name__}: {error}"
                made.set_status(api.Status(api.StatusCode.ERROR, what))
        raise
    finally:
        with harmless():
            if token is not None:
                context.detach(token)
            if made is not None:
                made.end()


def note_parts(table: Table, now: float, names: Mapping[int, str]) -> None:
    """Make a span of each part, in the present span, at the time ``now`` of the table's clock."""
    api = _api()
    if api is not None:
        _note_parts(api, table, now, names)


@harmless()
def _note_parts(api: Any, table: Table, now: float, names: Mapping[int, str]) -> None:
    if not api.get_current_span().is_recording():
        return
    tracer = api.get_tracer("coded_torch")
    contexts = list[Any]()
    zero = time.time_ns() - 1e9 * now
    for part in table.parts:
        about: dict[str, Any] = {"part": part.number, "why": part.why, "units": len(part.units)}
        about["outcome"] = "unfinished" if part.outcome is OPEN else part.outcome
        if part.worker >= 0:
            about |= {"worker": part.worker}
        if part.worker in names:
            about |= {"worker_name": names[part.worker]}
        if part.of is not None:
            about |= {"of": part.of.number}
        begin = part.began if part.began < math.inf else part.asked
        made = tracer.start_span(
            "coded_torch.part",
            start_time=int(zero + 1e9 * begin),
            attributes={f"coded_torch.{key}": value for key, value in about.items()},
            links=[] if part.of is None else [api.Link(contexts[part.of.number])],
        )
        if part.error is not None:
            made.set_status(api.Status(api.StatusCode.ERROR, str(part.error)))
        contexts.append(made.get_span_context())
        made.end(int(zero + 1e9 * max(begin, min(part.ended, now))))


def headers() -> dict[str, str]:
    """Return the headers by which a server makes its spans children of the present span."""
    found: dict[str, str] = {}
    propagate = None if _api() is None else _propagate()
    if propagate is not None:
        with harmless():
            propagate.inject(found)
    return found


@harmless()
def here() -> Any:
    """Return the present context, for :func:`within`; None if there is no span."""
    api = _api()
    if api is None or not api.get_current_span().get_span_context().is_valid:
        return None
    from opentelemetry import context

    return context.get_current()


def within(contexts: Sequence[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for another thread, whose spans are in the first context.

    Its first one is linked to the spans of the others.
    """
    known = [x for x in contexts if x is not None]
    if not known:
        return function
    from opentelemetry import context, trace

    others = [trace.Link(trace.get_current_span(x).get_span_context()) for x in known[1:]]

    def run(*args: Any) -> Any:
        token = context.attach(context.set_value(_LINKS, others, known[0]))
        try:
            return function(*args)
        finally:
            context.detach(token)

    return run
