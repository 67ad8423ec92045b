"""What a program that uses OpenTelemetry sees of calls, parts and requests."""

import sys
import threading
import time

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from torch import nn

from coded_torch import CodedWrapper, Waiting, _tracing
from coded_torch.workers import DeviceWorkers, EndpointWorkers, RemoteModule

from .serve.servers import built, linear, serving


@pytest.fixture
def spans(monkeypatch):
    """Return a function that returns the ended spans of a name."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)

    def named(name):
        found = [x for x in exporter.get_finished_spans() if x.name == f"coded_torch.{name}"]
        return sorted(found, key=lambda x: (x.attributes.get("coded_torch.part", 0), x.start_time))

    return named


def values(span):
    return {name.removeprefix("coded_torch."): x for name, x in span.attributes.items()}


class Late(nn.Module):
    """Waits with the row 0 until it may go, when it is first asked for after ``next`` is set."""

    next, go = threading.Event(), threading.Event()

    def forward(self, x):
        if self.next.is_set() and x[0] == 0:
            self.next.clear()
            self.go.wait(60)
        time.sleep(0.02)
        return 2 * x


def test_a_call_with_a_hedge_is_seen_as_such(spans):
    x = torch.arange(6.0).reshape(6, 1)
    with DeviceWorkers(["cpu"] * 3) as pool, torch.no_grad():
        coded = CodedWrapper(Late(), workers=pool, parts=2, waiting=Waiting(hedge_budget=1.0))
        for _ in range(20):  # usual latencies
            coded(x)
        begin = time.time_ns()
        Late.next.set()
        assert torch.equal(coded(x), 2 * x)
        Late.go.set()
    call = spans("call")[-1]
    assert begin <= call.start_time < call.end_time <= time.time_ns()
    about, report = values(call), coded.last_run
    assert about.pop("hedges") == len(report.hedges) >= 1
    assert about == {
        "rows": 6,
        "estimated": 0,
        "ended": "complete",
        "work_ratio": report.work_ratio,
    }
    parts = [x for x in spans("part") if x.parent.span_id == call.context.span_id]
    assert [values(x)["part"] for x in parts] == [*range(2 + len(report.hedges))]
    late = parts[0]
    about = values(late)
    worker = about.pop("worker")
    assert about == {"part": 0, "why": "first", "units": 3, "outcome": "unfinished"}
    hedge = next(x for x in parts if values(x)["why"] == "hedge" and values(x)["of"] == 0)
    assert values(hedge)["outcome"] == "good"
    assert values(hedge)["worker"] != worker
    assert [link.context.span_id for link in hedge.links] == [late.context.span_id]
    assert call.start_time <= late.start_time < hedge.start_time < hedge.end_time
    assert max(late.end_time, hedge.end_time) <= call.end_time


def test_an_error_is_one_of_the_call_and_of_the_part(spans):
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        coded = CodedWrapper(nn.Linear(2, 1), workers=pool)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            coded(torch.ones(4, 3))
    (call,) = spans("call")
    assert call.status.status_code is trace.StatusCode.ERROR
    assert [event.name for event in call.events] == ["exception"]
    failed = [x for x in spans("part") if values(x)["outcome"] == "failed"]
    assert "shapes cannot be multiplied" in failed[0].status.description


def test_the_spans_of_a_client_and_of_its_server_are_one_trace(spans):
    with serving(built()) as port:
        url, x = f"http://127.0.0.1:{port}", torch.ones(4, 3)
        with EndpointWorkers([url], model="m") as pool, torch.no_grad():
            answers = CodedWrapper(RemoteModule(url, "m"), workers=pool)(x)
    torch.testing.assert_close(answers, linear()(x))
    own, (request,) = spans("call"), spans("infer")
    client, served = sorted(own, key=lambda x: x.start_time)
    assert client.parent is None
    assert request.parent.span_id == client.context.span_id
    assert request.kind is trace.SpanKind.SERVER
    assert served.parent.span_id == request.context.span_id
    assert {x.context.trace_id for x in (client, request, served)} == {client.context.trace_id}
    (part,) = [x for x in spans("part") if x.parent.span_id == client.context.span_id]
    assert values(part)["worker_name"] == url


def test_the_call_of_a_batch_is_linked_to_its_requests(spans):
    contexts = []
    for _ in range(3):
        with _tracing.span("infer", {}):
            contexts.append(_tracing.here())

    def call():
        with _tracing.span("call"):
            pass

    _tracing.within([None, *contexts], call)()
    (found,), requests = spans("call"), [x.context.span_id for x in spans("infer")]
    assert [found.parent.span_id, *(link.context.span_id for link in found.links)] == requests


def test_without_opentelemetry_there_is_nothing(spans, monkeypatch):
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # an import would fail
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        CodedWrapper(nn.Linear(3, 1), workers=pool)(torch.ones(4, 3))
    assert _tracing.headers() == {}
    assert _tracing.here() is None
    assert spans("call") == []


def test_without_a_provider_there_is_nothing(monkeypatch):
    """An import of OpenTelemetry, by whatever library, costs no call anything."""
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    monkeypatch.setattr(trace, "get_tracer", None)
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        CodedWrapper(nn.Linear(3, 1), workers=pool)(torch.ones(4, 3))
    assert _tracing.headers() == {}
    assert _tracing.here() is None


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_without_a_provider_a_clients_trace_does_not_go_on(monkeypatch):
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    with _tracing.span("infer", {"traceparent": PARENT, "tracestate": "a=b"}):
        assert _tracing.headers() == {}
        assert _tracing.here() is None


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize(("size", "goes_on"), [(100, True), (600, False)])
def test_a_long_state_of_a_clients_trace_does_not_go_on(size, goes_on):
    state = ",".join(f"a{i}=bcdefghi" for i in range(size // 12))
    with _tracing.span("infer", {"traceparent": PARENT, "tracestate": state}):
        sent = _tracing.headers()
    assert sent["traceparent"].split("-")[1] == PARENT.split("-")[1]
    assert ("tracestate" in sent) == goes_on


def test_an_error_of_opentelemetry_fails_no_call(monkeypatch, caplog):
    class Broken(SpanProcessor):
        def on_start(self, *_, **__):
            raise OSError("no collector")

        on_end = on_start

    provider = TracerProvider()
    provider.add_span_processor(Broken())
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        coded = CodedWrapper(nn.Linear(3, 1), workers=pool)
        assert coded(torch.ones(4, 3)).shape == (4, 1)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            coded(torch.ones(4, 2))
    assert "spans are missing or incomplete: OSError: no collector" in caplog.text


def test_without_a_propagator_calls_have_spans(spans, monkeypatch):
    # An unknown name in OTEL_PROPAGATORS prevents the import.
    monkeypatch.setitem(sys.modules, "opentelemetry.propagate", None)
    monkeypatch.delattr("opentelemetry.propagate", raising=False)
    _tracing._propagate.cache_clear()
    try:
        with _tracing.span("infer", {}):
            assert _tracing.headers() == {}
    finally:
        _tracing._propagate.cache_clear()
    assert len(spans("infer")) == 1
