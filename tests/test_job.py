"""The command ``coded-torch job``: batches that are kept, and a job that goes on."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from coded_torch.cli.main import main

MODEL = """
import os, time
import torch
from coded_torch import CodedWrapper, Waiting, workers

kept = []

class Logged(torch.nn.Module):
    def __init__(self, pause=0.0):
        super().__init__()
        self.layer, self.pause = torch.nn.Linear(2, 2), pause
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.constant_(self.layer.bias, 1.0)

    def extra_repr(self):
        kept.append(object())
        return repr(kept[-1])  # another address each time

    def forward(self, x):
        time.sleep(self.pause)
        log = os.open("rows.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, "".join(f"{int(row)}\\n" for row in x[:, 0]).encode())
        os.close(log)
        return self.layer(x)

def slow():
    return Logged(0.02).eval()

def here():
    pool = workers.DeviceWorkers(["cpu"] * 2)
    return CodedWrapper(Logged().eval(), workers=pool, waiting=Waiting(predict=False))

def other():
    wrapped = here()
    torch.nn.init.constant_(wrapped.module.layer.bias, 2.0)
    return wrapped

def served():
    return Logged().eval(), torch.zeros(1, 2)

class Sum(torch.nn.Module):
    def forward(self, x, y):
        assert not (x == 13).any(), "thirteen"
        return {"sum": x + y, "x": x}

def sums():
    return Sum().eval(), (torch.zeros(1, 1), torch.zeros(1, 1))

def pair():
    pool = workers.DeviceWorkers(["cpu"] * 2)
    return CodedWrapper(Sum().eval(), workers=pool, waiting=Waiting(predict=False))
"""
ROWS = 200  # rows of the file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make the working directory hold a model and 200 rows, each beginning with its number."""
    (tmp_path / "models.py").write_text(MODEL)
    rows = np.stack([np.arange(ROWS), np.ones(ROWS)], 1).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    return tmp_path


def line(factory="here", *more):
    fixed = ["--inputs", "rows.npy", "--output", "out", "--batch-size", "8"]
    return ["job", f"models:{factory}", *fixed, *more]


def written(folder):
    return sorted(folder.glob("out/batch-*.pt"))


def outputs(folder):
    """Return the outputs of all batches, in order."""
    loaded = [torch.load(path, weights_only=True) for path in written(folder)]
    assert not any(batch["predicted"].any() for batch in loaded)
    return torch.cat([batch["outputs"][0] for batch in loaded])


def computed(folder):
    """Return the rows that were computed since the last time."""
    log = folder / "rows.log"
    rows = [int(row) for row in log.read_text().split()] if log.exists() else []
    log.unlink(missing_ok=True)
    return rows


def exact():
    return (torch.arange(ROWS) * 0.5 + 1.5)[:, None].expand(ROWS, 2)


def test_a_job_writes_all_answers_and_a_summary(folder, capsys):
    assert main(line()) == 0
    assert torch.equal(outputs(folder), exact())
    out = capsys.readouterr().out
    assert re.match(
        r"25 of 25 batches are in out\. This run: 200 exact rows, 0 predicted rows,", out
    )
    assert set(computed(folder)) == set(range(ROWS))  # hedges may compute a row twice
    assert main(line("here", "--resume")) == 0  # nothing is left
    assert computed(folder) == []


def test_a_job_that_ended_as_it_began_can_begin_again(folder):
    (folder / "out").mkdir()
    (folder / "out" / "job.part").write_text("{")
    assert main(line()) == 0
    assert not list((folder / "out").glob("*.part"))


def test_several_inputs(folder):
    x, y = torch.arange(10.0)[:, None], torch.ones(10, 1)
    save_file({"b": y, "a": x}, folder / "rows.safetensors")
    arguments = line("pair", "--inputs", "rows.safetensors")
    assert main(arguments) == 0
    loaded = [torch.load(path, weights_only=True)["outputs"] for path in written(folder)]
    assert torch.cat([x["sum"] for x in loaded]).flatten().tolist() == list(range(1, 11))


def test_columns_of_a_parquet_file_are_inputs_by_their_names(folder):
    x = np.arange(20, dtype=np.float32).reshape(10, 2) / 2
    types = pyarrow.list_(pyarrow.float32(), 2), pyarrow.list_(pyarrow.float32())
    columns = [pyarrow.array(list(x + i), kind) for i, kind in enumerate(types)]
    table = pyarrow.table({"b": columns[0], "a": columns[1]})
    parquet.write_table(table, folder / "rows.parquet", row_group_size=3)  # batches are of 8 rows
    arguments = line("pair", "--inputs", "rows.parquet")
    assert main(arguments) == 0
    loaded = [torch.load(path, weights_only=True)["outputs"] for path in written(folder)]
    assert torch.equal(torch.cat([y["sum"] for y in loaded]), torch.from_numpy(2 * x + 1))
    # "a" is the first input
    assert torch.equal(torch.cat([y["x"] for y in loaded]), torch.from_numpy(x + 1))


def test_a_batch_of_a_parquet_file_is_read_again(folder):
    x = np.arange(10, dtype=np.float32)
    table = pyarrow.table({"a": x, "b": x})
    parquet.write_table(table, folder / "rows.parquet", row_group_size=3)
    arguments = line("pair", "--inputs", "rows.parquet")
    assert main(arguments) == 0
    *_, last = written(folder)
    before = torch.load(last, weights_only=True)["outputs"]["sum"]
    last.unlink()
    assert main([*arguments, "--resume"]) == 0
    assert torch.equal(torch.load(last, weights_only=True)["outputs"]["sum"], before)


@pytest.mark.parametrize("some", [[1.0, None], [[1.0, 2.0], [3.0, None]]])
def test_nulls_of_a_parquet_file_are_refused(folder, some):
    table = pyarrow.table({"a": some, "b": [1.0, 2.0]})
    parquet.write_table(table, folder / "rows.parquet")
    arguments = line("pair", "--inputs", "rows.parquet")
    with pytest.raises(ValueError, match="must have no nulls, got some in the column 'a'"):
        main(arguments)


@pytest.fixture
def thirteen(folder):
    """Return the rows of a file; the model fails on one of them."""
    save_file({name: torch.arange(40.0)[:, None] for name in "ab"}, folder / "rows.safetensors")
    return "--inputs", "rows.safetensors"


def test_an_exception_ends_the_job_and_names_rows_of_the_file(thirteen, capsys):
    for _ in range(2):
        with pytest.raises(AssertionError, match="thirteen") as caught:
            main(line("pair", "--resume", *thirteen))
        assert (caught.value.batch, caught.value.rows) == (1, [13])
        text = "from row 8 of rows.safetensors, failed. The first failing rows of the file: [13]"
        assert text in caught.value.__notes__[-1]
        out = capsys.readouterr().out
        assert "1 of 5 batches are in out" in out
        assert text in out
        assert out.endswith("Go on with --resume.\n")


def test_rows_on_which_the_model_fails_are_predicted_on_demand(thirteen, folder):
    more = "--on-error", "predict", "--num-workers", "2"
    assert main(line("sums", *thirteen, *more)) == 0
    loaded = [torch.load(path, weights_only=True) for path in written(folder)]
    assert torch.cat([x["predicted"] for x in loaded]).nonzero().flatten().tolist() == [13]


def test_a_function_for_serve_is_one_for_job(folder):
    assert main(line("served", "--num-workers", "1")) == 0
    assert torch.equal(outputs(folder), exact())


def test_a_batch_that_was_cut_short_is_computed_again(folder):
    assert main(line()) == 0
    computed(folder)
    os.truncate(written(folder)[3], 700)
    assert main(line("here", "--resume")) == 0
    assert sorted(computed(folder)) == list(range(24, 32))
    assert torch.equal(outputs(folder), exact())


def test_inputs_are_known_by_their_content(folder, capsys):
    assert main(line()) == 0
    os.utime(folder / "rows.npy", (0, 0))
    assert main(line("here", "--resume")) == 0
    np.save(folder / "rows.npy", np.load(folder / "rows.npy") + 1)
    os.utime(folder / "rows.npy", (0, 0))
    assert main(line("here", "--resume")) == 2
    assert "--resume must repeat the job in out: inputs of 200 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "--output out holds a job; --resume goes on with it"),
        (
            "--resume --batch-size 9 --deadline 9",
            "--resume must repeat the job in out: batch-size 8, got 9; deadline None, got 9.0",
        ),
        ("--resume --inputs more.npy", "must repeat the job in out: inputs of 200 rows, digest "),
        ("--resume other", "must repeat the job in out: model models:here, digest "),
        ("--inputs none.npy", "[Errno 2]"),
        (
            "--inputs models.py",
            "--inputs cannot be read: it must be a .npy, .safetensors or .parquet file, got m",
        ),
        ("--inputs words.npy", "--inputs cannot be read: can't convert"),
        ("--output .", "--output must be an empty folder, got ."),
        ("--output new --in-flight 0", "in_flight must be at least 1, got 0"),
        ("--output new --batch-size 0", "batch_size must be at least 1, got 0"),
    ],
)
def test_a_job_refuses_another_jobs_folder_and_bad_values(folder, capsys, change, message):
    assert main(line()) == 0
    np.save(folder / "words.npy", np.array(["one", "two"]))
    np.save(folder / "more.npy", np.ones((ROWS + 1, 2), np.float32))
    *words, last = change.split() or [""]
    changed = line("other", *words) if last == "other" else line("here", *change.split())
    assert main(changed) == 2
    err = capsys.readouterr().err
    assert err.startswith("coded-torch job: ")
    assert message in err


def started(folder):
    code = "from coded_torch.cli.main import main; raise SystemExit(main())"
    arguments = [*line("slow", "--resume"), "--num-workers", "2"]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder)


def test_a_folder_holds_one_job_at_a_time(folder, capsys):
    process = started(folder)
    until = time.monotonic() + 120
    while not written(folder) and time.monotonic() < until:
        time.sleep(0.01)
    assert main(line("slow", "--resume")) == 2
    message = "coded-torch job: --output out must not be in use by another job"
    assert capsys.readouterr().err.startswith(message)
    process.kill()
    process.wait(60)
    assert main(line("slow", "--resume", "--num-workers", "2")) == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_job_goes_on_without_computing_a_batch_again(folder, end, capfd):
    generator, done = random.Random(0), []
    for _ in range(2):
        process = started(folder)
        until = time.monotonic() + 120
        least = len(written(folder)) + generator.randint(1, 5)
        while len(written(folder)) < least and time.monotonic() < until:
            time.sleep(generator.uniform(0.001, 0.01))
        process.send_signal(end)
        process.wait(60)
        assert ("Go on with --resume." in capfd.readouterr().out) == (end == signal.SIGINT)
        assert not set(computed(folder)) & set(done)
        done = [int(path.stem[-12:]) + i for path in written(folder) for i in range(8)]
    assert 0 < len(done) < ROWS
    process = started(folder)
    assert process.wait(240) == 0
    assert not set(computed(folder)) & set(done)
    assert torch.equal(outputs(folder), exact())
    assert not list(folder.glob("out/*.part"))
