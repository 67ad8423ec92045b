"""This version beside another: the same questions in turns, whatever their names are."""

import dataclasses
import json
import subprocess
import types
from pathlib import Path

import pytest
import torch

import coded_torch
from benchmarks import __main__ as command
from benchmarks import against, yardstick


@pytest.mark.parametrize(
    "question",
    [
        ["coded calls"],
        pytest.param(["served requests", "1,024 of 64 clients"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_this_version_against_itself(question, tmp_path, capsys):
    path, kind = tmp_path / "against.json", question[0]
    words = ["--only", *question, "--output", str(path)]
    assert command.main(["against", ".", "--quick", *words]) == 0
    results = json.loads(path.read_text())
    assert results["settings"]["this"] == results["settings"]["other"]
    assert results["environment"]["torch"] == torch.__version__
    ((name, found),) = results["measured"][kind].items()
    assert found["rounds"] == 1
    for what in ("wall", "processor"):
        times = found[what]
        assert times["ratio"] == pytest.approx(times["this"] / times["other"], rel=0.01)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.strip().startswith(f"{kind}, {name} ")
    assert f"{found['processor']['this']:.3f}" in last


def test_both_versions_names(monkeypatch):
    for name in ("predict", "estimate"):
        fake = dataclasses.make_dataclass("Waiting", [(name, bool)])
        monkeypatch.setattr(yardstick, "Waiting", fake)
        assert yardstick.waiting(False) == fake(False)
    rows = torch.tensor([True, False, True])
    for name in ("predicted", "estimated"):
        assert yardstick.estimated(types.SimpleNamespace(**{name: rows})) == 2


def git(folder, *arguments):
    who = "-c", "user.name=n", "-c", "user.email=n@localhost", "-c", "commit.gpgsign=false"
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, timeout=60)


def test_a_revision_is_compiled_once_and_anew_if_that_failed(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(against, "ROOT", tmp_path)
    setup = tmp_path / "setup.py"
    for text in ("raise SystemExit(1)", "open('made', 'a').write(open('made').read() + 'x')"):
        setup.write_text(text)
        (tmp_path / "made").write_text("")
        git(tmp_path, "add", "setup.py", "made")
        git(tmp_path, "commit", "-q", "-m", "m")
    setup.write_text("not what was committed")
    for _ in range(2):
        with pytest.raises(ValueError, match="HEAD~1 does not compile"):
            against.installed("HEAD~1")
        assert (against.installed("HEAD") / "made").read_text() == "x"
    assert against.installed(".") == Path(coded_torch.__file__).parents[1]
