"""The numbers of a server, under one set of names for Prometheus and for Ray.

Numbers about one call, such as how many rows were verified, come from its report.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import prometheus_client

from ..workers import Workers
from ._batcher import Batch

# Upper bounds of histograms' buckets, in seconds and in units of the outputs; not tuned.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# Each number's help, then its label if it has one. Names that end in "_total" are counters, the
# others gauges.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "results_total": ("Workers whose result was received, missing or rejected.", "state"),
    "answers_total": ("Answered rows: computed or estimated.", "kind"),
    "refusals_total": ("Requests that were not answered.", "reason"),
    "rows_computed_total": ("Rows that workers began to compute.",),
    "extra_rows_total": ("Rows that workers began beyond one computation of every row.",),
    "hedges_total": ("Hedges that replied first (won) or not (lost).", "outcome"),
    "checks_total": ("Rows verified, unverified, or corrected by a check.", "outcome"),
    "missing_not_at_random": ("1 if late parts look odder: error bounds may not hold.",),
    "wrong_results_total": ("Wrong results that workers were found to return.", "worker"),
    "excluded_total": ("Workers that were excluded for wrong results.",),
    "workers_up": ("Workers that are up.",),
    "worker_restarts_total": ("Workers that were lost and replaced.",),
}
_HISTOGRAMS = {
    "queued_seconds": ("Seconds from a request's arrival to the start of its batch.", _SECONDS),
    "encode_seconds": ("Seconds of a batch before its parts are asked.", _SECONDS),
    "compute_seconds": ("Seconds of a batch that wait for workers.", _SECONDS),
    "decode_seconds": ("Seconds of a batch that make answers from results.", _SECONDS),
    "error_bound": ("Of estimated rows, if finite: their error is at most as large.", _ERRORS),
}
# The names of histograms by Triton's names.
_TRITONS = {"queue": "queued_seconds", "compute_input": "encode_seconds"}
_TRITONS |= {"compute_infer": "compute_seconds", "compute_output": "decode_seconds"}


class Metrics:
    """Counts the outcomes of batches and requests, which :meth:`text` returns, or Ray collects."""

    def __init__(self, *, ray: bool = False) -> None:
        self._ray = ray
        self._registry = prometheus_client.CollectorRegistry()
        self._restarts = 0
        self._numbers = dict[str, Any]()
        self._labelled = dict[tuple[str, str | None], Any]()  # a look costs a tenth of labels()
        # By the names of Triton's extension ``statistics``; times in ns, and the last in ms.
        self._times = {name: {"count": 0, "ns": 0} for name in ("success", "fail", *_TRITONS)}
        self._totals = {"last_inference": 0, "inference_count": 0, "execution_count": 0}
        kinds: Any = prometheus_client
        where: dict[str, Any] = {"registry": self._registry}
        if ray:
            from ray.util import metrics

            kinds = metrics
            where = {}
        for name, (text, *labels) in _NUMBERS.items():
            kind = kinds.Counter if name.endswith("_total") else kinds.Gauge
            self._numbers[name] = kind(f"coded_torch_{name}", text, tuple(labels), **where)
        for name, (text, bounds) in _HISTOGRAMS.items():
            where["boundaries" if ray else "buckets"] = list(bounds)
            self._numbers[name] = kinds.Histogram(f"coded_torch_{name}", text, **where)

    def text(self) -> bytes:
        """Return all numbers in Prometheus's format."""
        return prometheus_client.generate_latest(self._registry)

    def refused(self, reason: str) -> None:
        """Count a request that was not answered."""
        self._count("refusals_total", 1, reason)
        self._time("fail", 0.0)

    def answered(self, seconds: float) -> None:
        """Count a request that was answered within so many seconds of its arrival."""
        self._totals["last_inference"] = time.time_ns() // 10**6
        self._time("success", seconds)

    def statistics(self) -> dict[str, Any]:
        """Return totals by the names of Triton's extension ``statistics``."""
        return {**self._totals, "inference_stats": self._times}

    def _time(self, name: str, seconds: float) -> None:
        self._times[name]["count"] += 1
        self._times[name]["ns"] += round(seconds * 1e9)
        if name in _TRITONS:
            self._numbers[_TRITONS[name]].observe(seconds)

    def workers(self, pool: Workers) -> None:
        """Note how many workers of a pool are up, and how many were replaced."""
        up = pool.num_ready
        if up is not None:
            self._numbers["workers_up"].set(up)
        restarts = pool.num_restarts  # read once, as it may grow
        self._count("worker_restarts_total", restarts - self._restarts)
        self._restarts = restarts

    def batch(self, pool: Workers, done: Batch, rows: int, queued: Sequence[float]) -> None:
        """Count a pool's batch, whose requests waited so many seconds."""
        if self._ray:  # which asks nobody for them
            self.workers(pool)
        report = done.report
        count = self._count
        names = pool.names
        flags = done.estimated
        estimated = sum(flag and row not in done.unanswered for row, flag in enumerate(flags))
        won = sum(hedge.won for hedge in report.hedges)
        count("results_total", len(report.received), "received")
        count("results_total", len({*report.missing_workers, *report.rejected}), "missing")
        count("results_total", len(report.rejected), "rejected")
        count("answers_total", rows - len(done.unanswered) - estimated, "computed")
        count("answers_total", estimated, "estimated")
        count("rows_computed_total", report.work_ratio * rows)
        count("extra_rows_total", max(0.0, report.work_ratio - 1) * rows)
        count("hedges_total", won, "won")
        count("hedges_total", len(report.hedges) - won, "lost")
        self._numbers["missing_not_at_random"].set(int(report.missing_not_at_random))
        count("excluded_total", len(report.excluded))
        count("checks_total", len(report.corrected), "corrected")
        for worker, number in report.wrong_results.items():
            count("wrong_results_total", number, names.get(worker, str(worker)))
        for outcome in ("verified", "unverified"):
            found = getattr(report, outcome)
            if found is not None:
                count("checks_total", int(found.sum()), outcome)
        self._totals["inference_count"] += rows
        self._totals["execution_count"] += 1
        for seconds in queued:
            self._time("queue", seconds)
        self._time("compute_input", report.encode_seconds)
        self._time("compute_infer", report.compute_seconds)
        self._time("compute_output", report.decode_seconds)
        if flags and report.error_bounds is not None:
            for bound in itertools.compress(report.error_bounds.tolist(), flags):
                if bound < math.inf:  # an infinite sum would stay infinite
                    self._numbers["error_bound"].observe(bound)

    def _count(self, name: str, amount: float, label: str | None = None) -> None:
        counter = self._numbers[name]
        key = (name, label)
        if self._ray and amount > 0:  # Ray refuses 0
            counter.inc(amount, dict.fromkeys(_NUMBERS[name][1:], label))
        elif not self._ray:
            if key not in self._labelled:  # from now on it is shown, even if it is 0
                self._labelled[key] = counter.labels(label) if label else counter
            if amount:
                self._labelled[key].inc(amount)
