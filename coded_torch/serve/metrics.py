"""What is counted, by one set of names, for Prometheus or for Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import prometheus_client

from ..nn import Report
from ..workers import Workers

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_NUMBERS: dict[str, tuple[str, ...]] = {  # their texts, and the label; "_total": only grow
    "results_total": (
        "Machines whose results counted (received); that began a part and lost its result "
        "(missing), of which it failed or did not count before the end (rejected).",
        "state",
    ),
    "answers_total": (
        "Rows that were answered: by the model itself (exact), from others' results (predicted).",
        "kind",
    ),
    "refusals_total": ("Requests that were not answered.", "reason"),
    "rows_computed_total": ("Rows that machines began to compute.",),
    "extra_rows_total": ("Those of them beyond one computation of every row.",),
    "hedges_total": ("Parts that were asked again, and answered so first (won) or not.", "outcome"),
    "workers_up": ("Workers that are up.",),
    "worker_restarts_total": ("Workers that ended and were replaced.",),
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


class Metrics:
    """Counts what became of batches and requests.

    Args:
        ray: whether Ray collects the numbers from its replicas, where it puts ``ray_`` in front of
            their names. Otherwise :meth:`text` has them.
    """

    def __init__(self, *, ray: bool = False) -> None:
        self._ray, self._registry = ray, prometheus_client.CollectorRegistry()
        self._restarts = 0
        kinds: Any = prometheus_client
        where: dict[str, Any] = {"registry": self._registry}
        if ray:
            from ray.util import metrics

            kinds, where = metrics, {}
        self._numbers: dict[str, Any] = {
            name: (kinds.Counter if name.endswith("_total") else kinds.Gauge)(
                f"coded_torch_{name}", text, tuple(labels), **where
            )
            for name, (text, *labels) in _NUMBERS.items()
        }
        for name, (text, bounds) in _HISTOGRAMS.items():
            where["boundaries" if ray else "buckets"] = list(bounds)
            self._numbers[name] = kinds.Histogram(f"coded_torch_{name}", text, **where)

    def text(self) -> bytes:
        """Return all numbers as Prometheus reads them."""
        return prometheus_client.generate_latest(self._registry)

    def refused(self, reason: str) -> None:
        """Count a request that was not answered."""
        self._count("refusals_total", 1, reason)

    def workers(self, pool: Workers) -> None:
        """Note how many workers of a pool are up, and how many have been replaced."""
        if (up := pool.num_ready) is not None:
            self._numbers["workers_up"].set(up)
        restarts = pool.num_restarts
        self._count("worker_restarts_total", restarts - self._restarts)
        self._restarts = restarts

    def batch(self, report: Report, rows: int, queued: Sequence[float]) -> None:
        """A batch was answered.

        Args:
            report: of its call.
            rows: B
            queued: seconds, of its requests.
        """
        count = self._count
        lost = set(report.missing) | set(report.rejected)
        count("results_total", len(report.received), "received")
        count("results_total", len(lost), "missing")
        count("results_total", len(report.rejected), "rejected")
        predicted = 0 if report.predicted is None else int(report.predicted.sum())
        count("answers_total", rows - predicted, "exact")
        count("answers_total", predicted, "predicted")
        count("rows_computed_total", report.work * rows)
        count("extra_rows_total", max(0.0, report.work - 1) * rows)
        won = sum(hedge.won for hedge in report.hedges)
        count("hedges_total", won, "won")
        count("hedges_total", len(report.hedges) - won, "lost")
        for seconds in queued:
            self._numbers["queued_seconds"].observe(seconds)
        self._numbers["encode_seconds"].observe(report.encode_seconds)
        self._numbers["compute_seconds"].observe(report.compute_seconds)
        self._numbers["decode_seconds"].observe(report.decode_seconds)
        if predicted and report.expected_rmse is not None:
            self._numbers["expected_error"].observe(
                report.expected_rmse * (rows / predicted) ** 0.5
            )

    def _count(self, name: str, amount: float, label: str | None = None) -> None:
        counter = self._numbers[name]
        if self._ray:
            if amount > 0:  # Ray takes no other
                counter.inc(amount, dict.fromkeys(_NUMBERS[name][1:], label))
        else:
            (counter.labels(label) if label else counter).inc(amount)
