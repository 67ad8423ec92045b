"""The benchmarks: runs that go on where they were stopped, and what they compare."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from coded_torch import codes, stragglers
from coded_torch.nn import CodedWrapper

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def load():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture
def measure(load, tmp_path):
    """Run these measurements of a script; its exit code and its file."""
    common, path = load("common"), tmp_path / "thing.json"

    def run(measurements, *arguments, settings=None):
        code = common.run_measurements(
            "thing.py",
            lambda quick: settings or {"seed": 0},
            lambda quick, device: measurements,
            ["--output", str(path), *arguments],
        )
        return code, json.loads(path.read_text()) if path.exists() else None

    return run


def interrupt():
    raise KeyboardInterrupt


def forbidden():
    raise AssertionError("measured again")


def test_a_run_that_was_stopped_is_gone_on_with(measure, capsys):
    first, second, third = ("net", "a"), ("net", "b"), ("other", "a")
    jobs = [(first, lambda: {"value": 1}), (second, interrupt), (third, forbidden)]
    code, results = measure(jobs)
    assert code == 130
    assert "what is done is kept" in capsys.readouterr().out
    assert results["measured"] == {"net": {"a": {"value": 1, "seconds": 0.0}}}
    assert results["environment"]["torch"] == torch.__version__
    jobs = [(first, forbidden), (second, lambda: {"value": 2}), (third, lambda: {"value": 3})]
    code, results = measure(jobs)
    assert code == 0
    values = [results["measured"][x][y]["value"] for x, y in (first, second, third)]
    assert values == [1, 2, 3]


def test_other_settings_do_not_mix(measure, capsys):
    measure([(("a",), lambda: {"value": 1})])
    with pytest.raises(SystemExit):
        measure([(("a",), forbidden)], settings={"seed": 1})
    assert "measured with other settings" in capsys.readouterr().err


def test_other_environments_do_not_mix(measure, load, monkeypatch, capsys):
    measure([(("a",), lambda: {"value": 1})])
    monkeypatch.setattr(load("common"), "environment", lambda device: {"threads": 99})
    with pytest.raises(SystemExit):
        measure([(("b",), forbidden)])
    assert "measured with other environment" in capsys.readouterr().err


def test_only_what_is_asked_for_is_measured(measure):
    _, results = measure([(("a", "x"), forbidden), (("b", "x"), dict)], "--only", "b")
    assert list(results["measured"]) == ["b"]


def test_what_has_no_data_is_left_out(measure, load, capsys):
    def no_data():
        raise load("data").MissingDataError("get it with: pip install it")

    code, results = measure([(("a",), no_data), (("b",), dict)])
    assert code == 0
    assert list(results["measured"]) == ["b"]
    assert "a: left out. get it with: pip install it" in capsys.readouterr().err


@pytest.fixture
def of(load):
    return load("subjects").subject("lenet5", quick=True)


@pytest.mark.parametrize("name", ["paper", "fill", "default", "spread"])
@torch.no_grad()
def test_a_scheme_answers_as_the_wrapper_does(load, of, name):
    schemes = load("schemes")
    scheme = {
        "paper": schemes.Scheme(codes.SplineCode(8, 10), "arrival"),
        "fill": schemes.unmixed((10, 8, 3))["replication + fill"]._replace(num_stragglers=None),
        "default": schemes.Scheme(codes.KernelCode(8, 10)),
        "spread": schemes.Scheme(codes.KernelCode(8, 10, placement=1.0)),
    }[name]
    batch = next(of.batches("held_out", 40, 1))
    received = schemes.received_by(stragglers.Uniform(3, seed=5), 10)
    answers, _ = schemes.Round(of.model, batch, {"law": received}).answers(scheme, 3, "law")
    wrapper = CodedWrapper(
        of.model,
        scheme.code,
        stragglers=stragglers.Uniform(3, seed=5),
        ordering=scheme.ordering,
        shuffle=False,
    )
    scale = batch.exact.abs().max()
    torch.testing.assert_close(answers, wrapper(batch.images), rtol=0, atol=1e-4 * scale)


def test_uncoded_answers_are_the_models_own_or_missing(load, of):
    schemes = load("schemes")
    batch = next(of.batches("held_out", 24, 1))
    trial = schemes.Round(of.model, batch, {"law": [0, 2, 9, 11]})
    answers, _ = trial.answers(schemes.Scheme(schemes.Uncoded(8, 12), "arrival"), 8, "law")
    answered = torch.arange(24) % 8 < 3
    answered &= torch.arange(24) % 8 != 1
    torch.testing.assert_close(answers[answered], batch.exact[answered])
    assert answers[~answered].isnan().all()
    scores = schemes.Scores()
    scores.add(answers, batch.exact, batch.labels, None)
    assert scores.summary()["agreement"][0] == 0.25
    assert scores.summary()["rmse"] == [None, None]


def test_the_network_runs_once_for_all_codes_with_one_encoder(load, of):
    schemes = load("schemes")
    images = []

    class Watched(torch.nn.Module):
        def forward(self, x):
            images.append(len(x))
            return of.model(x)

    batch = next(of.batches("held_out", 16, 1))
    sets = {"few": [0, 3, 4, 7, 9], "many": [0, 1, 3, 4, 5, 7, 8, 9]}
    trial = schemes.Round(Watched(), batch, sets)
    unmixed = [*schemes.unmixed((10, 8, 2)).values()]
    splines = [codes.SplineCode(8, 10, decoder_smoothing=x) for x in (0.0, 1e-6, 1e-3)]
    smoothed = codes.SplineCode(8, 10, encoder_smoothing=1e-3)
    for scheme in (*unmixed, *(schemes.Scheme(code, "arrival") for code in (*splines, smoothed))):
        for law in sets:
            trial.answers(scheme, 2, law, lambda x: x.softmax(-1))
    assert images == [16, 16]  # the eight workers that are in a set, two groups; two encoders


def test_fidelity_is_the_gain_over_berrut_averaged_over_stragglers(load, generator):
    accuracy, schemes = load("accuracy"), load("schemes")
    exact = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    labels = exact.argmax(1)
    scores = {
        ("softmax", "uniform", s, code, aim): schemes.Scores()
        for s in (1, 2)
        for code in ("spline", "Berrut")
        for aim in accuracy.AIMS
    }
    for _ in range(6):
        error = 0.01 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        for (_, _, s, code, _), of_code in scores.items():
            answers = exact + error * (1 if code == "Berrut" else {1: 0.9, 2: 0.7}[s])
            if code == "Berrut":
                answers[:s] = answers[:s].roll(1, dims=1)  # wrong classes
            of_code.add(answers, exact, labels, None)
    found = accuracy.fidelity(scores, (1, 2))
    points, half = found["relative accuracy higher by points"]["averaged"]
    assert points == pytest.approx(100 * 1.5 / 20)
    assert half == pytest.approx(0, abs=1e-9)
    for measure, column, power in (("rmse", 3, 0.5), ("rmse_mean", 4, 1)):
        errors = {
            (s, code): of_code.columns[column].mean() ** power
            for (_, _, s, code, aim), of_code in scores.items()
            if aim == "squared error"
        }
        gains = [100 * (1 - errors[s, "spline"] / errors[s, "Berrut"]) for s in (1, 2)]
        value, half = found[f"{measure} lower by %"]["averaged"]
        assert value == pytest.approx(np.mean(gains), rel=1e-3)
        assert half > 0


def test_received_sets_are_nested_and_of_the_right_size(load, generator):
    accuracy = load("accuracy")
    sets = accuracy.received_sets(12, (2, 5, 9), generator)
    for law in accuracy.LAWS:
        two, five, nine = (set(sets[law, s]) for s in (2, 5, 9))
        assert nine < five < two
        assert [len(x) for x in (two, five, nine)] == [10, 7, 3]
    lost = np.setdiff1d(np.arange(12), sets["contiguous", 5])
    shifted = [sorted((lost + i) % 12) for i in range(12)]
    assert list(range(5)) in shifted


def test_intervals_of_scores_are_those_of_a_ratio(load):
    schemes = load("schemes")
    a, b = np.array([3.0, 5.0, 4.0, 8.0]), np.array([4.0, 5.0, 5.0, 6.0])
    value, half = schemes.ratio(a, b)
    assert value == 1.0
    assert half == pytest.approx(schemes.student(4) * (a - b).std(ddof=1) / 2 / 5, rel=1e-3)
    assert schemes.rounded(math.nan, 1.23456) == [None, 1.235]


def test_quick_runs_need_no_data(load, tmp_path, monkeypatch):
    """The smallest of them as a whole; all of them are run by the command."""
    monkeypatch.setattr(load("networks"), "load", forbidden)
    lagrange, path = load("lagrange"), tmp_path / "lagrange.json"
    arguments = ["--quick", "--output", str(path)]
    common = load("common")
    script = str(BENCHMARKS / "lagrange.py")
    assert common.run_measurements(script, lagrange.settings, lagrange.measurements, arguments) == 0
    for kinds in json.loads(path.read_text())["measured"].values():
        for found in kinds.values():
            exact = dict(zip(found["received"], found["median error"]["Lagrange"], strict=True))
            for count, (error, *_) in exact.items():
                if count < found["threshold"]:
                    assert error is None
                else:
                    assert error < 1e-9
            spline = [error for error, *_ in found["median error"]["spline"]]
            assert spline[-1] < 0.1 * spline[0]
