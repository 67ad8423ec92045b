"""Runs that go on where they were stopped, and results that are kept one record a line."""

import json
import subprocess
import types

import pytest
import torch

from benchmarks import runs
from benchmarks.runs import MissingDataError


@pytest.fixture
def measure(tmp_path):
    """Run these measurements of a benchmark; its file."""
    path = tmp_path / "thing.json"

    def run(measurements, only=(), settings=None, **options):
        benchmark = types.SimpleNamespace(
            settings=lambda quick: settings or {"seed": 0}, measurements=lambda quick: measurements
        )
        runs.keep("thing", benchmark, quick=False, only=only, path=path, **options)
        return json.loads(path.read_text())

    return run


def interrupt():
    raise KeyboardInterrupt


def forbidden():
    raise AssertionError("measured again")


def test_a_run_that_was_stopped_is_gone_on_with(measure, tmp_path):
    first, second, third = ("net", "a"), ("net", "b"), ("other", "a")
    with pytest.raises(KeyboardInterrupt):
        measure([(first, lambda: {"value": 1}), (second, interrupt), (third, forbidden)])
    results = json.loads((tmp_path / "thing.json").read_text())
    assert results["measured"] == {"net": {"a": {"value": 1, "seconds": 0.0}}}
    assert results["environment"]["torch"] == torch.__version__
    assert results["command"] == "python -m benchmarks thing"
    results = measure(
        [(first, forbidden), (second, lambda: {"value": 2}), (third, lambda: {"value": 3})]
    )
    assert [results["measured"][x][y]["value"] for x, y in (first, second, third)] == [1, 2, 3]


def test_other_settings_and_environments_do_not_mix(measure, monkeypatch):
    measure([(("a",), lambda: {"value": 1})])
    with pytest.raises(ValueError, match="measured with other settings"):
        measure([(("a",), forbidden)], settings={"seed": 1})
    monkeypatch.setattr(runs, "environment", lambda: {"threads": 99})
    with pytest.raises(ValueError, match="measured with other environment"):
        measure([(("b",), forbidden)])


def test_only_what_is_asked_for_is_measured(measure):
    results = measure([(("a", "x"), forbidden), (("b", "x"), dict)], only=["b"])
    assert list(results["measured"]) == ["b"]
    with pytest.raises(ValueError, match=r"of what thing measures, got c; one of\n  a 'x y'$"):
        measure([(("a", "x y"), forbidden)], only=["c"])


def test_what_is_there_is_measured_again_only_if_asked_for(measure, capsys):
    old = [(("a",), lambda: {"value": 1, "gone": 0}), (("b",), lambda: {"value": 2})]
    measure(old)
    assert measure([(("a",), forbidden)])["measured"]["a"]["gone"] == 0
    assert "already measured: a; with --only, --again measures anew" in capsys.readouterr().out
    found = measure([(("a",), lambda: {"value": 3}), old[1]], only=["a"], again=True)["measured"]
    assert (found["a"], found["b"]["value"]) == ({"value": 3, "seconds": 0.0}, 2)


def test_expected_seconds_are_those_of_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    assert runs.expected_seconds("thing") is None  # there is no repository
    measured = {"a": {"x": {"seconds": 2.5}, "y": {"seconds": 1}}, "b": {"seconds": 4.0, "n": {}}}
    runs.write_results(tmp_path / "thing.json", {"measured": measured})
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "results"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "thing.json").unlink()
    assert runs.expected_seconds("thing") == 7.5
    assert runs.expected_seconds("other") is None


def test_what_has_no_data_is_left_out(measure, capsys):
    def no_data():
        raise MissingDataError("get it with: pip install it")

    results = measure([(("a",), no_data), (("b",), dict)])
    assert list(results["measured"]) == ["b"]
    assert "a: left out. get it with: pip install it" in capsys.readouterr().err


def test_results_are_one_record_a_line(tmp_path):
    path = tmp_path / "there" / "results.json"
    record = {"rmse": [0.1, 1e-7], "name": "é"}
    results = {"measured": {str(i): {"codes": {"a": record, "b": record}} for i in range(30)}}
    results |= {"empty": {}, "none": None, "numbers": {1: list(range(500))}}
    runs.write_results(path, results)
    text = path.read_text()
    assert json.loads(text) == json.loads(json.dumps(results))
    assert runs.read_results(path) == json.loads(text)
    assert text.count(json.dumps(record)) == 60
    assert max(map(len, text.splitlines())) <= 1000
    assert text.count("\n") <= 30 + 500 + 10
    assert list(path.parent.iterdir()) == [path]
    assert runs.read_results(tmp_path / "nowhere.json") == {}


@pytest.mark.parametrize("path", sorted(runs.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_kept_results_are_in_that_form(path, tmp_path):
    runs.write_results(tmp_path / "again.json", runs.read_results(path))
    assert (tmp_path / "again.json").read_text() == path.read_text()
