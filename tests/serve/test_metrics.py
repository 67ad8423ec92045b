"""The metrics of a batch, and a dashboard that shows all of them."""

import importlib.resources
import json
import re

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from coded_torch._table import Hedge
from coded_torch.nn import Report
from coded_torch.serve._batcher import Batch
from coded_torch.serve.metrics import Metrics
from coded_torch.workers import LocalWorkers


def values(metrics):
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def hedge(number, won):
    return Hedge(number, 0, (0,), 0.01, won)


def test_a_batch():
    metrics = Metrics()
    report = Report(
        asked=(0, 1, 2, 3),
        received=(0, 1, 3),
        rejected={3: "was killed by SIGKILL"},  # the next worker at its place answered
        work_ratio=1.5,
        hedges=(hedge(4, True), hedge(5, False), hedge(6, False)),
        source=torch.tensor([2, 0, 1, 2]),
        verified=torch.tensor([False, True, True, False]),
        unverified=torch.tensor([True, False, False, False]),
        corrected=(1,),
        wrong_results={2: 4},
        excluded=(2,),
        missing_not_at_random=True,
        encode_seconds=0.002,
        compute_seconds=0.03,
        decode_seconds=0.004,
    )
    report.error_bounds = torch.tensor([0.3, 0.0, 0.0, 0.4], dtype=torch.float64)
    metrics.batch(
        Shaky(), Batch({}, report, set(), slice(4), report.estimated.tolist()), 4, [0.1, 0.2]
    )
    metrics.refused("late")
    metrics.answered(0.25)
    found, totals = values(metrics), metrics.statistics()
    times = {name: (x["count"], x["ns"]) for name, x in totals.pop("inference_stats").items()}
    assert times.pop("success") == (1, 250_000_000)
    assert times.pop("fail") == (1, 0)
    assert times.pop("queue") == (2, pytest.approx(300_000_000))
    assert [*times] == ["compute_input", "compute_infer", "compute_output"]
    assert [*times.values()] == [(1, 2_000_000), (1, 30_000_000), (1, 4_000_000)]
    assert (totals["inference_count"], totals["execution_count"]) == (4, 1)
    for key, value in {
        "results_total received": 3,
        "results_total missing": 2,
        "results_total rejected": 1,
        "answers_total computed": 2,
        "answers_total estimated": 2,
        "refusals_total late": 1,
        "rows_computed_total": 6,
        "extra_rows_total": 2,
        "hedges_total won": 1,
        "hedges_total lost": 2,
        "checks_total verified": 2,
        "checks_total unverified": 1,
        "checks_total corrected": 1,
        "wrong_results_total http://a": 4,
        "excluded_total": 1,
        "missing_not_at_random": 1,
        "queued_seconds_sum": 0.3,
        "queued_seconds_count": 2,
        "encode_seconds_sum": 0.002,
        "compute_seconds_sum": 0.03,
        "decode_seconds_sum": 0.004,
        "error_bound_sum": 0.7,
    }.items():
        assert found[f"coded_torch_{key}"] == pytest.approx(value), key


class Shaky(LocalWorkers):
    """A pool of four, of which some have died, and one has a name."""

    num_ready, num_restarts, names = 3, 2, {2: "http://a"}


def test_workers():
    metrics, pool = Metrics(), Shaky()
    for restarts in (2, 2, 5):
        pool.num_restarts = restarts
        metrics.workers(pool)
    assert values(metrics)["coded_torch_workers_up"] == 3
    assert values(metrics)["coded_torch_worker_restarts_total"] == 5


def test_the_dashboard_shows_every_number():
    folder = importlib.resources.files("coded_torch.serve") / "dashboards"
    dashboard = json.loads((folder / "grafana.json").read_text())
    shown = set(re.findall(r"\$\{prefix\}coded_torch_(\w+)", json.dumps(dashboard)))
    metrics = Metrics()
    true = torch.tensor([True])
    report = Report(source=torch.tensor([2]), verified=true, unverified=~true)
    report.wrong_results = {2: 1}
    metrics.batch(
        LocalWorkers(), Batch({}, report, set(), slice(4), report.estimated.tolist()), 1, [0.1]
    )
    metrics.refused("late")
    families = text_string_to_metric_families(metrics.text().decode())
    counted = {
        family.name.removeprefix("coded_torch_")
        + {"counter": "_total", "histogram": "_bucket", "gauge": ""}[family.type]
        for family in families
        if not family.name.endswith("_created")
    }
    assert shown == counted - {"rows_computed_total"}  # the extra ones are shown
    (prefix,) = [x for x in dashboard["templating"]["list"] if x["name"] == "prefix"]
    assert [option["value"] for option in prefix["options"]] == ["", "ray_"]


def test_rows_without_an_answer_are_no_answers():
    metrics, report = Metrics(), Report(source=torch.tensor([2, 2, 0, 0]))
    metrics.batch(
        LocalWorkers(), Batch({}, report, {0, 3}, slice(4), report.estimated.tolist()), 4, [0.1]
    )
    assert values(metrics)["coded_torch_answers_total computed"] == 1
    assert values(metrics)["coded_torch_answers_total estimated"] == 1
