"""The command ``python -m benchmarks``."""

import json
import subprocess
import sys
import types

import pytest

from benchmarks import __main__ as command
from benchmarks import convergence, networks, runs


def test_every_benchmark_is_there_with_what_it_needs():
    import importlib

    for name in runs.QUESTIONS:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        for quick in (False, True):
            assert benchmark.settings(quick)
            assert all(callable(measure) for _, measure in benchmark.measurements(quick))


def test_quick_runs_need_no_data(tmp_path, monkeypatch):
    """Run the smallest of them as a whole; .ci/run runs all of them.

    The theorem of the paper's code: its error is O(S^3 N^-3) without noise. Berrut's is larger.
    """

    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr(networks, "load", forbidden)
    path = tmp_path / "convergence.json"
    words = ["--only", "x sin x", "S fixed"]
    assert command.main(["convergence", "--quick", *words, "--output", str(path)]) == 0
    (found,) = json.loads(path.read_text())["measured"]["x sin x"].values()
    spline, berrut = (found["no noise"][name] for name in ("spline", "Berrut"))
    assert spline["slope"][0] < -3
    for (own, _), (other, _) in zip(spline["mse"], berrut["mse"], strict=True):
        assert own < other
    assert len(spline["local slopes"]) == len(found["no noise"]["workers"]) - 1
    assert found["no noise"]["floor"] == 0


def test_one_that_was_stopped(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(convergence, "measurements", lambda *_: [(("a",), interrupt)])
    assert command.main(["convergence", "--quick"]) == 130
    assert "finished measurements are kept" in capsys.readouterr().out


@pytest.fixture
def started(monkeypatch):
    """What is started, as ``{name: arguments}``; ``codes`` are the exit codes."""
    calls, codes = {}, {}

    def run(line):
        assert line[:3] == [sys.executable, "-m", "benchmarks"]
        calls[line[3]] = line[4:]
        return types.SimpleNamespace(returncode=codes.get(line[3], 0))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(command, "expected_seconds", {"accuracy": 3725.0}.get)
    return types.SimpleNamespace(calls=calls, codes=codes)


def test_several_run_in_processes_of_their_own(started, capsys):
    assert command.main(["latency", "convergence", "accuracy"]) == 0
    assert list(started.calls) == ["accuracy", "convergence", "latency"]
    assert set(map(tuple, started.calls.values())) == {()}
    for words in ([], ["all"]):
        started.calls.clear()
        capsys.readouterr()
        assert command.main(words) == 0
        assert tuple(started.calls) == runs.QUESTIONS
        expected, table = capsys.readouterr().out.split(
            "\nIn order, with hours, minutes and seconds:\n"
        )
        lines = expected.splitlines()[1 : 1 + len(runs.QUESTIONS)]
        assert [line.split()[0] for line in lines] == [*runs.QUESTIONS]
        assert lines[0].split()[1:] == ["1:02:05"]
        assert {line.split()[1] for line in lines[1:]} == {"unknown"}
        names = [line.split()[0] for line in table.splitlines()]
        assert names == [*runs.QUESTIONS, "all"]
        assert all(line.endswith(" 0:00:00") for line in table.splitlines())


def test_quick_ones_run_in_this_process(started, monkeypatch, capsys):
    kept = []

    def keep(name, benchmark, *, quick, path, **_):
        kept.append((name, benchmark.__name__, quick, path))

    monkeypatch.setattr(command, "keep", keep)
    assert command.main(["--quick", "latency", "convergence"]) == 0
    names = ["convergence", "latency"]
    assert kept == [(name, f"benchmarks.{name}", True, None) for name in names]
    assert not started.calls
    assert "latency took 0:00:00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "said"),
    [(1, "distances failed with exit code 1\n"), (130, "finished measurements are kept")],
)
def test_none_begins_after_one_has_failed_or_was_interrupted(started, capsys, code, said):
    started.codes["distances"] = code
    assert command.main([]) == code
    assert list(started.calls) == ["accuracy", "distances"]
    assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("speed", "NAME must be one of accuracy, distances,"),
        ("accuracy distances --only x", "--only, --output and --rows need one NAME"),
        ("accuracy --again", "--again needs --only"),
        ("against", "against needs one REVISION, got []"),
        ("against . --only nothing", "against . measures, got nothing; one of\n  estimates"),
        ("against no-such-revision", "no-such-revision"),
        ("accuracy --quick --only vit", "--quick measures, got vit; one of\n  lenet5 table"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_installed_package_goes_before_the_checkout():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import benchmarks; "
        "print(sys.path[-1] == sys.argv[1], sys.argv[1] in sys.path[:-1])"
    )
    root = str(runs.RESULTS.parents[1])
    line = [sys.executable, "-I", "-c", code, root]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True False\n"
