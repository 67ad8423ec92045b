"""What is counted, by one set of names, for Prometheus or for Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from ..nn import Report

__all__ = ["Metrics", "Prometheus", "Ray", "Sink"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_COUNTERS: dict[str, tuple[str, ...]] = {  # what is counted, and the label
    "results_total": (
        "Machines whose results counted (received); that began a part and lost its result "
        "(missing), of which it failed or did not count before the end (rejected).",
        "state",
    ),
    "answers_total": (
        "Rows that were answered: by the model itself (exact), from others' results (predicted), "
        "or by their mean (degraded).",
        "kind",
    ),
    "refusals_total": ("Requests that were not answered.", "reason"),
    "rows_computed_total": ("Rows that machines began to compute.",),
    "extra_rows_total": ("Those of them beyond one computation of every row.",),
    "hedges_total": ("Parts that were asked again, and answered so first (won) or not.", "outcome"),
}
_HISTOGRAMS = {
    "queued_seconds": ("From the arrival of a request to the begin of its batch.", _SECONDS),
    "encode_seconds": ("Of a batch, before its parts are asked.", _SECONDS),
    "compute_seconds": ("Of a batch, waiting for machines.", _SECONDS),
    "decode_seconds": ("Of a batch, making answers from results.", _SECONDS),
    "expected_error": (
        "Root mean squared error to expect of the predicted rows of a batch.",
        _ERRORS,
    ),
}


class Sink(Protocol):
    """Where numbers go."""

    def count(self, name: str, amount: float, value: str | None) -> None:
        """Add to a counter, under a value of its label."""

    def observe(self, name: str, number: float) -> None:
        """Add to a histogram."""

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""


class Prometheus:
    """Numbers that ``/metrics`` shows."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"coded_torch_{name}", text, labels, registry=self._registry)
            for name, (text, *labels) in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"coded_torch_{name}", text, buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }

    def count(self, name: str, amount: float, value: str | None) -> None:
        counter = self._counters[name]
        (counter.labels(value) if value else counter).inc(amount)

    def observe(self, name: str, number: float) -> None:
        self._histograms[name].observe(number)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Ray:
    """Numbers that Ray collects from its replicas, where ``ray_`` goes before their names."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._counters: dict[str, Any] = {
            name: metrics.Counter(f"coded_torch_{name}", text, tuple(labels))
            for name, (text, *labels) in _COUNTERS.items()
        }
        self._histograms: dict[str, Any] = {
            name: metrics.Histogram(f"coded_torch_{name}", text, list(buckets))
            for name, (text, buckets) in _HISTOGRAMS.items()
        }

    def count(self, name: str, amount: float, value: str | None) -> None:
        if amount > 0:  # Ray takes no other
            labels = _COUNTERS[name][1:]
            self._counters[name].inc(amount, dict.fromkeys(labels, value))

    def observe(self, name: str, number: float) -> None:
        self._histograms[name].observe(number)

    def text(self) -> bytes:
        return b"# collected by Ray: see the metrics port of its nodes\n"


class Metrics:
    """Counts what became of batches and requests.

    Args:
        sink: where to.
    """

    def __init__(self, sink: Sink | None = None) -> None:
        self.sink = sink or Prometheus()

    def refused(self, reason: str) -> None:
        """A request was not answered."""
        self.sink.count("refusals_total", 1, reason)

    def batch(self, report: Report, rows: int, queued: Sequence[float]) -> None:
        """A batch was answered.

        Args:
            report: of its call.
            rows: B
            queued: seconds, of its requests.
        """
        count, observe = self.sink.count, self.sink.observe
        lost = set(report.missing) | set(report.rejected)
        count("results_total", len(report.received), "received")
        count("results_total", len(lost), "missing")
        count("results_total", len(report.rejected), "rejected")
        predicted = 0 if report.predicted is None else int(report.predicted.sum())
        count("answers_total", rows - predicted, "exact")
        count("answers_total", predicted, "degraded" if report.degraded else "predicted")
        count("rows_computed_total", report.work * rows, None)
        count("extra_rows_total", max(0.0, report.work - 1) * rows, None)
        won = sum(hedge.won for hedge in report.hedges)
        count("hedges_total", won, "won")
        count("hedges_total", len(report.hedges) - won, "lost")
        for seconds in queued:
            observe("queued_seconds", seconds)
        observe("encode_seconds", report.encode_seconds)
        observe("compute_seconds", report.compute_seconds)
        observe("decode_seconds", report.decode_seconds)
        if predicted and report.expected_rmse is not None:
            observe("expected_error", report.expected_rmse * (rows / predicted) ** 0.5)
