"""The short versions of what ``benchmarks/resilience.py`` runs at length, and that at length."""

import pytest
import torch

from benchmarks import resilience

# Bars on times are for the long runs: a few requests on a busy machine have no 99th percentile.
EXACT = ("failed", "wrong", "estimated")
SHORT = [name for name in resilience.SCENARIOS if name not in ("overhead", "ray")]


def run(scenario, quick):
    with torch.no_grad():
        return resilience.SCENARIOS[scenario](quick)


@pytest.mark.parametrize("scenario", [*SHORT, "overhead"])
def test_short(scenario):
    found = run(scenario, quick=True)
    for name in EXACT:
        if name in found["bars"]:
            value, most = found["bars"][name]
            assert value <= most, f"{name}: {value}, at most {most}"
    assert found.get("kills", 1) > 0, "no kills: nothing was tested"
    assert all(value >= 0 for value, _ in found["bars"].values())


@pytest.mark.slow  # a cluster starts, and actors restart; tests/workers/test_ray.py kills one, too
@pytest.mark.ray
def test_short_on_ray():
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    try:
        found = run("ray", quick=True)
    finally:
        ray.shutdown()  # other tests start clusters of their own
    assert found["failed"] == 0
    assert found["kills"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SHORT)
def test_long(scenario):
    found = run(scenario, quick=False)
    missed = {name: bar for name, bar in found["bars"].items() if not bar[0] <= bar[1]}
    assert not missed
