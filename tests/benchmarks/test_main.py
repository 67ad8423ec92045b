"""The command ``python -m benchmarks``."""

import json
import subprocess
import sys
import types

import pytest

from benchmarks import __main__ as command
from benchmarks import lagrange, networks, runs


def test_every_benchmark_is_there_with_what_it_needs():
    import importlib

    for name in runs.ERRORS + runs.TIMES:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        for quick in (False, True):
            assert benchmark.settings(quick)
            assert all(callable(measure) for _, measure in benchmark.measurements(quick))


def test_quick_runs_need_no_data(tmp_path, monkeypatch):
    """The smallest of them as a whole; all of them are run by .ci/run."""

    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr(networks, "load", forbidden)
    path = tmp_path / "lagrange.json"
    assert command.main(["lagrange", "--quick", "--output", str(path)]) == 0
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


def test_one_that_was_stopped(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(lagrange, "measurements", lambda *_: [(("a",), interrupt)])
    assert command.main(["lagrange", "--quick"]) == 130
    assert "what is done is kept" in capsys.readouterr().out


@pytest.fixture
def started(monkeypatch):
    """What is started, as ``{name: arguments}``; ``codes`` are the exit codes."""
    calls, codes = {}, {}

    def run(line):
        assert line[:3] == [sys.executable, "-m", "benchmarks"]
        calls[line[3]] = line[4:]
        return types.SimpleNamespace(returncode=codes.get(line[3], 0))

    monkeypatch.setattr(subprocess, "run", run)
    return types.SimpleNamespace(calls=calls, codes=codes)


def test_several_run_in_processes_of_their_own_those_of_times_last(started):
    assert command.main(["--quick", "latency", "lagrange", "accuracy"]) == 0
    assert list(started.calls) == ["lagrange", "accuracy", "latency"]
    assert set(map(tuple, started.calls.values())) == {("--quick",)}
    assert command.main([]) == 0
    assert set(started.calls) == set(runs.ERRORS + runs.TIMES)


def test_none_begins_after_one_has_failed(started, capsys):
    started.codes["levers"] = 1
    assert command.main([]) == 1
    assert list(started.calls) == ["accuracy", "batches", "levers"]
    assert capsys.readouterr().err == "levers failed with exit code 1\n"


def test_an_interrupt_stops_all(started, capsys):
    started.codes["batches"] = 130
    assert command.main([]) == 130
    assert list(started.calls) == ["accuracy", "batches"]
    assert "what is done is kept" in capsys.readouterr().out


def test_several_at_once_but_those_of_times(started, monkeypatch):
    import threading

    meet, alone = threading.Barrier(2, timeout=60), []
    run = subprocess.run

    def at_once(line):
        if line[3] == "latency":
            alone.append(meet.n_waiting)
        else:
            meet.wait()  # returns when the other one is there
        return run(line)

    monkeypatch.setattr(subprocess, "run", at_once)
    assert command.main(["--jobs", "2", "latency", "accuracy", "batches"]) == 0
    assert alone == [0]
    assert list(started.calls)[-1] == "latency"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("speed", "NAME must be one of accuracy, batches,"),
        ("--jobs 0", "--jobs must be at least 1, got 0"),
        ("lagrange levers --only x", "--only and --output need one NAME"),
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
