"""The command ``coded-torch job``: batches that are kept, and a job that goes on."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

import coded_torch_command
from coded_torch.cli import devices
from coded_torch.cli.main import main

MODEL = """
import enum, os, threading, time
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
        while x[0, 0] >= float(os.environ.get("HOLD", "inf")):
            time.sleep(0.01)
        log = os.open("rows.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, "".join(f"{int(row)}\\n" for row in x[:, 0]).encode())
        os.close(log)
        return self.layer(x)

def slow():
    return Logged(float(os.environ.get("PAUSE", 0.02))).eval()

def here():
    pool = workers.DeviceWorkers(["cpu"] * 2)
    return CodedWrapper(Logged().eval(), workers=pool, waiting=Waiting(estimate=False))

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

class Ends(Sum):
    def forward(self, x, y):
        return os._exit(3) if (x == 13).any() else super().forward(x, y)

def ends():
    return Ends().eval(), (torch.zeros(1, 1), torch.zeros(1, 1))

def wrapped(module):
    pool = workers.DeviceWorkers(["cpu"] * 2)
    return CodedWrapper(module.eval(), workers=pool, waiting=Waiting(estimate=False))

def pair():
    return wrapped(Sum())

class Minus(torch.nn.Module):
    def forward(self, b, a, *, scale=None):
        return b - a if scale is None else (b - a) * scale

def minus():
    return wrapped(Minus())

class Plain(torch.nn.Module):
    def forward(self, b, a):
        return b - a

def script():
    torch.jit.script(Plain()).save("minus.pt")
    return wrapped(torch.jit.load("minus.pt"))

class Any(torch.nn.Module):
    def forward(self, **columns):
        return columns["b"] - columns["a"]

def any_names():
    return wrapped(Any())

def first(outputs, rows):
    assert (outputs[:, 0] == 0.5 * rows + 1.5).all()
    return outputs[:, 0]

def total(outputs, rows):
    return outputs["sum"]

class Kind(enum.Enum):
    SUM = 1

class Odd(torch.nn.Module):
    def forward(self, x):
        return {"kind": Kind.SUM, "x": x}

def odd():
    return wrapped(Odd())

class Threads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return {"x": x / self.by, "threads": torch.full((len(x),), torch.get_num_threads())}

def threads():
    return Threads()

class Features(torch.nn.Module):
    def forward(self, features):
        return 2 * features["b"]

def features():
    return Features(), {"b": torch.ones(2, 1)}

class Words(torch.nn.Module):
    def forward(self, text, number=None):
        lengths = torch.tensor([float(len(each)) for each in text])
        if number is not None:
            lengths = lengths + number
        return {"length": lengths, "upper": [each.upper() for each in text]}

def words():
    return Words()

class Touching(torch.nn.Module):
    def forward(self, x):
        if (x == 80).any():
            os.utime("rows.npy", (0, 0))
        return x

def touching():
    return wrapped(Touching())

class Varied(Logged):
    def __init__(self, change):
        super().__init__()
        self.k = 2.0 if change == "attribute" else 1.0
        self.names = {"set", "of", "names", "in", "another", "order", "each", "time"}
        self.lock, self.function = threading.Lock(), lambda x: x * self.k
        if change == "function":
            self.function = lambda x: x / self.k
        self.register_buffer("shift", torch.full((2,), float(change == "buffer")), persistent=False)

    def forward(self, x):
        return self.function(super().forward(x)) + self.shift

def varied():
    change = os.environ.get("CHANGE", "")
    policy = Waiting(estimate=False, hedge_budget=0.5 if change == "waiting" else 0.25)
    surrogate = torch.nn.Linear(2, 2) if change == "surrogate" else ()
    pool = workers.DeviceWorkers(["cpu"] * (3 if change == "workers" else 2))
    parts = 4 if change == "parts" else None
    model = Varied(change).eval()
    return CodedWrapper(model, workers=pool, waiting=policy, surrogate=surrogate, parts=parts)
"""
CODE = "import coded_torch_command; raise SystemExit(coded_torch_command.main())"
COMMAND = sys.executable, "-c", CODE
PLAIN = """
import os, time
import torch

class Plain(torch.nn.Module):
    def forward(self, x):
        with open("pids", "a") as file:
            print(os.getpid(), file=file)
        time.sleep(0.05)
        return x * 0.3 + 1

def make():
    return Plain()
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
    for name in ("models", "more_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def line(factory="here", *more):
    inputs = () if "--inputs" in more else ("--inputs", "rows.npy")
    return ["job", f"models:{factory}", *inputs, "--output", "out", "--batch-size", "8", *more]


def written(folder):
    return sorted(folder.glob("out/batch-*.pt"))


def outputs(folder):
    """Return the outputs of all batches, in order."""
    loaded = [torch.load(path, weights_only=True) for path in written(folder)]
    assert not any(batch["estimated"].any() for batch in loaded)
    return torch.cat([batch["outputs"][0] for batch in loaded])


def flip(path):
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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
        r"Columns of rows.npy: x=rows\.\n"
        r"25 of 25 batches are in out\. This run: 200 rows computed, 0 estimated, 0 failed; hedg"
        r"es: \d+, workers lost: 0; [\d.]+ s, [\d,]+ rows per second\.\n$",
        out,
    )
    rows = computed(folder)
    assert rows[:4] == [0, 1, 0, 1]  # every worker has run the model before the first batch
    assert set(rows) == set(range(ROWS))  # hedges may compute a row twice
    assert main(line("here", "--resume")) == 0  # nothing is left
    assert computed(folder) == []


def test_a_job_that_ended_as_it_began_can_begin_again(folder):
    (folder / "out").mkdir()
    (folder / "out" / "__job.json.part").write_text("{")
    assert main(line()) == 0
    assert not list((folder / "out").glob("*.part"))


def subtracted(folder, factory, *more):
    """Return the answers of a model to ten rows of b = 1 and a = 0, 1, 2, ..., 9."""
    save_file({"a": torch.arange(10.0)[:, None], "b": torch.ones(10, 1)}, "rows.safetensors")
    assert main(line(factory, "--inputs", "rows.safetensors", *more)) == 0
    return outputs(folder).flatten().tolist()


def test_columns_that_are_no_arguments_are_left(folder, capsys):
    columns = {name: torch.ones(8, 1) for name in ("a", "day", "scale", "b")}
    save_file(columns, "rows.safetensors")
    assert main(line("minus", "--inputs", "rows.safetensors")) == 0
    assert capsys.readouterr().out.startswith("Columns of rows.safetensors: b=b, a=a, scale=scale.")


@pytest.mark.parametrize("factory", ["minus", "any_names"])
def test_columns_are_arguments_of_their_names(folder, capsys, factory):
    assert subtracted(folder, factory) == [1.0 - a for a in range(10)]
    out = capsys.readouterr().out
    expected = "b=b, a=a" if factory == "minus" else "columns={'a': 'a', 'b': 'b'}"
    assert f"Columns of rows.safetensors: {expected}.\n" in out


@pytest.mark.parametrize(
    ("factory", "columns", "sign"),
    [
        ("minus", "b,a", 1.0),
        ("minus", "a,b", -1.0),
        ("minus", "a=b,b=a", -1.0),
        ("script", "b,a", 1.0),
        ("script", "a=a,b=b", 1.0),
    ],
)
def test_columns_are_arguments_as_the_caller_says(folder, factory, columns, sign):
    expected = [sign * (1.0 - a) for a in range(10)]
    assert subtracted(folder, factory, "--columns", columns) == expected


@pytest.mark.parametrize(
    ("factory", "columns", "message"),
    [
        ("pair", None, "for forward(x, y), as a,b or x=a,y=b: the file has ['a', 'b']"),
        ("script", None, "for forward(*input, **kwargs), as a,b or x=a,y=b: the file has"),
        ("minus", "a,c", "as a,b or x=a,y=b: ['c'] are not among ['a', 'b']"),
        ("minus", "a", "as a,b or x=a,y=b: missing a required argument: 'a'"),
        ("minus", "b,a,scale", "as a,b or x=a,y=b: ['scale'] are not among ['a', 'b']"),
        ("minus", "a,b=b", "as a,b or x=a,y=b: multiple values for argument 'b'"),
        ("minus", "a=a,b=b,a=b", "as a,b or x=a,y=b: an argument is named twice, got a=a,b=b,a=b"),
        ("here", "a,b", "for forward(x), as a,b or x=a,y=b: too many positional arguments"),
    ],
)
def test_columns_that_do_not_fit_are_refused(folder, refused, factory, columns, message):
    save_file({name: torch.ones(4, 1) for name in "ab"}, "rows.safetensors")
    more = [] if columns is None else ["--columns", columns]
    said = refused(line(factory, "--inputs", "rows.safetensors", *more))
    assert said.startswith("coded-torch job: --columns must name columns for forward(")
    assert message in said


def test_columns_of_a_parquet_file_may_be_lists(folder):
    x = np.arange(20, dtype=np.float32).reshape(10, 2) / 2
    types = pyarrow.list_(pyarrow.float32(), 2), pyarrow.list_(pyarrow.float32())
    columns = [pyarrow.array(list(x + i), kind) for i, kind in enumerate(types)]
    table = pyarrow.table({"b": columns[0], "a": columns[1], "text": ["other"] * 10})
    parquet.write_table(table, folder / "rows.parquet", row_group_size=3)  # batches are of 8 rows
    assert main(line("pair", "--inputs", "rows.parquet", "--columns", "a,b")) == 0
    loaded = [torch.load(path, weights_only=True)["outputs"] for path in written(folder)]
    assert torch.equal(torch.cat([y["sum"] for y in loaded]), torch.from_numpy(2 * x + 1))
    assert torch.equal(torch.cat([y["x"] for y in loaded]), torch.from_numpy(x + 1))


def test_strings_beside_numbers_are_rows_of_a_job(folder):
    texts = ["a" * (i % 7) for i in range(20)]
    table = pyarrow.table({"text": texts, "number": [*range(20)]})
    parquet.write_table(table, folder / "rows.parquet")
    for batch_size in "8", "2":
        more = "--batch-size", batch_size, "--num-workers", "2", "--output", f"out{batch_size}"
        assert main(line("words", "--inputs", "rows.parquet", *more)) == 0
        paths = sorted((folder / f"out{batch_size}").glob("*.pt"))
        loaded = [torch.load(path, weights_only=True)["outputs"] for path in paths]
        found = torch.cat([each["length"] for each in loaded]).tolist()
        assert found == [len(text) + i for i, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ["torch", "parquet"])
def test_strings_are_rows_of_a_job(folder, kind):
    texts = ["a" * (i % 7) + "ü" for i in range(20)]
    table = pyarrow.table({"text": texts, "number": [*range(20)]})
    parquet.write_table(table, folder / "rows.parquet", row_group_size=3)
    more = "--columns", "text", "--format", kind, "--num-workers", "2", "--keys", "number"
    assert main(line("words", "--inputs", "rows.parquet", *more)) == 0
    assert main(["job", "--check", "out"]) == 0
    lengths = [float(len(text)) for text in texts]
    upper = [text.upper() for text in texts]
    if kind == "parquet":
        files = sorted((folder / "out").glob("*.parquet"))
        found = pyarrow.concat_tables(map(parquet.read_table, files)).to_pydict()
        assert (found["length"], found["upper"]) == (lengths, upper)
        assert found["number"] == [*range(20)]
        return
    loaded = [torch.load(path, weights_only=True)["outputs"] for path in written(folder)]
    assert torch.cat([each["length"] for each in loaded]).tolist() == lengths
    assert [text for each in loaded for text in each["upper"]] == upper


@pytest.mark.parametrize("some", [[1.0, None], [[1.0, 2.0], [3.0, None]]])
def test_nulls_of_a_parquet_file_are_refused(folder, refused, some):
    table = pyarrow.table({"x": some, "y": [1.0, 2.0]})
    parquet.write_table(table, folder / "rows.parquet")
    message = "--inputs cannot be read: its columns must not hold nulls, got some in the column 'x'"
    assert message in refused(line("pair", "--inputs", "rows.parquet"))


@pytest.fixture
def thirteen(folder):
    """Return the rows of a file; the model fails on one of them."""
    save_file({name: torch.arange(40.0)[:, None] for name in "xy"}, folder / "rows.safetensors")
    return "--inputs", "rows.safetensors"


def test_an_exception_ends_the_job_and_names_rows_of_the_file(thirteen, capsys):
    for _ in range(2):
        with pytest.raises(AssertionError, match="thirteen") as caught:
            main(line("pair", "--resume", *thirteen))
        assert (caught.value.batch, caught.value.rows) == (1, [13])
        text = "from row 8 of rows.safetensors, failed. The first failing rows: 13 of rows.safetens"
        assert text in caught.value.__notes__[-1]
        out = capsys.readouterr().out
        assert "1 of 5 batches are in out" in out
        assert text in out
        command = " ".join(["coded-torch", *line("pair", "--resume", *thirteen)])
        assert out.endswith(f"\nGo on with: {command}\n")


def test_inputs_are_known_by_their_content(folder, refused):
    assert main(line()) == 0
    os.utime(folder / "rows.npy", (0, 0))
    assert main(line("here", "--resume")) == 0
    np.save(folder / "rows.npy", np.load(folder / "rows.npy") + 1)
    os.utime(folder / "rows.npy", (0, 0))
    said = refused(line("here", "--resume"))
    assert "--resume must repeat the job in out: inputs of 200 rows" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "--output out holds a job; --resume goes on with it"),
        ("--resume --batch-size 9 --columns x=rows --inputs more.npy", "out: inputs of 200 rows"),
        ("--resume --batch-size 9", "must repeat the job in out: batch-size 8, got 9"),
        ("--resume other", "must repeat the job in out: model models:here, digest "),
        ("--deadline 9", "--deadline and --on-error must be left out, as models:here returns a"),
        ("--inputs none.npy", "--inputs cannot be read: no file matches 'none.npy'"),
        ("--inputs models.py", "cannot be read: it must be a .npy, .safetensors, .parquet or .pt"),
        ("--inputs words.npy", "words.npy must hold numbers, got strings; write strings as a colu"),
        ("--inputs objects.npy", "objects.npy must hold numbers, got objects; write strings as a"),
        ("--output .", "--output must be an empty folder, got ."),
        ("--output new --in-flight 0", "in_flight must be at least 1, got 0"),
        ("--output new --batch-size 0", "batch_size must be at least 1, got 0"),
    ],
)
def test_a_job_refuses_another_jobs_folder_and_bad_values(folder, refused, change, message):
    assert main(line()) == 0
    np.save(folder / "words.npy", np.array(["one", "two"]))
    np.save(folder / "objects.npy", np.array(["one", "two"], object))
    np.save(folder / "more.npy", np.ones((ROWS + 1, 2), np.float32))
    *words, last = change.split() or [""]
    changed = line("other", *words) if last == "other" else line("here", *change.split())
    assert message in refused(changed)


OLD = {"inputs": "of 200 rows, digest 0", "model": "models:here, digest 0", "batch-size": 8}
DAMAGED = [b"[]", b"null", b'{"rows": 20', b"\xff\x00", b"[" * 9999, b"", json.dumps(OLD).encode()]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_description_of_a_job_is_refused_in_one_line(folder, refused, content):
    assert main(line()) == 0
    (folder / "out" / "_job.json").write_bytes(content)
    for arguments in (line("here", "--resume"), ["job", "--check", "out"]):
        said = refused(arguments)
        assert "out/_job.json must describe a job, but it is damaged or of another version" in said


def test_a_wrong_batch_is_found_and_computed_again(folder, capsys, caplog):
    assert main(line()) == 0
    assert main(["job", "--check", "out"]) == 0
    assert "25 of 25 batches in out match their digests." in capsys.readouterr().out
    batches = written(folder)
    flip(batches[2])
    shutil.copy(batches[5], batches[4])  # its digest is right, but of other rows
    batches[7].unlink()
    shutil.copy(batches[9], folder / "out" / "batch-000000000003.pt")
    manifest = folder / "out" / "_manifest.sha256"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:-1]) + lines[-1][:70])  # cut short with its last batch
    wrong = {16: "has no matching digest", 32: "has no matching digest", 56: "is missing"}
    wrong |= {192: "has no matching digest", 3: "does not belong to this job"}
    for _ in range(2):
        assert main(["job", "--check", "out"]) == 2
        found = capsys.readouterr()
        expected = [f"out/batch-{start:012}.pt {why}." for start, why in wrong.items()]
        assert sorted(found.out.splitlines()) == sorted(expected)
        assert found.err.endswith("21 of 25 batches in out match their digests\n")
    (folder / "out" / "batch-000000000003.pt").unlink()
    computed(folder)
    assert main(line("here", "--resume")) == 0
    assert set(computed(folder)) == {start + i for start in (16, 32, 56, 192) for i in range(8)}
    assert "batch-000000000016.pt" in caplog.text
    assert torch.equal(outputs(folder), exact())
    assert main(["job", "--check", "out"]) == 0
    # Coreutils agree.
    agree = ["sha256sum", "--check", "--strict", "--quiet", manifest.name]
    subprocess.run(agree, cwd=folder / "out", check=True)


CHANGES = ["attribute", "buffer", "waiting", "surrogate", "parts", "code", "function"]


def change(folder, monkeypatch, name):
    """Change what the factory ``varied`` returns; "code" changes the file of its class."""
    monkeypatch.delitem(sys.modules, "models", raising=False)
    monkeypatch.setenv("CHANGE", name)
    if name == "code":
        (folder / "models.py").write_text(MODEL.replace("+ self.shift", "+ self.shift * 1.0"))


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_or_call_is_refused(folder, monkeypatch, refused, name):
    assert main(line("varied")) == 0
    written(folder)[-1].unlink()
    change(folder, monkeypatch, name)
    err = refused(line("varied", "--resume"))
    key = {"attribute": "model", "buffer": "model", "code": "source", "function": "source"}
    key = key.get(name, name)
    assert f"--resume must repeat the job in out: {key} " in err
    is_model = key in ("model", "source")
    assert ("(--trust-model goes on)" in err) == is_model
    assert main(line("varied", "--resume", "--trust-model")) == (0 if is_model else 2)
    if is_model:  # from now on the job is that of the changed model
        assert main(line("varied", "--resume")) == 0


def test_a_job_is_the_same_in_another_process(folder, monkeypatch):
    # In one of them, a library has added a function to torch's classes, as TorchScript does.
    monkeypatch.setattr(torch.nn.Module, "added", lambda self: None, raising=False)
    assert main(line("varied")) == 0
    written(folder)[-1].unlink()
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    command = [*COMMAND, *line("varied", "--resume")]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=240)


def test_the_parts_of_a_job_stay_as_many(folder, monkeypatch):
    assert main(line("varied")) == 0
    change(folder, monkeypatch, "workers")
    assert main(line("varied", "--resume")) == 0
    assert json.loads((folder / "out" / "_job.json").read_text())["parts"] == 2


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (
            "total",
            "output must have one row per row of its part, got a scalar that differs between parts",
        ),
        ("cached", r"output\['cache'\] must be a tensor, .* got Cache; leave it out .*use_cache=F"),
        ("unpicklable", "picklable .*, or be made there, by coded_torch.nn.FromFactory, got Of: "),
    ],
)
def test_what_no_job_computes_is_refused_in_one_line(folder, capsys, factory, said):
    (folder / "more_models.py").write_text(MORE_MODELS)
    arguments = line("here", "--num-workers", "2")
    arguments = [x.replace("models:here", f"more_models:{factory}") for x in arguments]
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert re.search(said, errors[0])
    remedy = [x.replace(f":{factory}", f":{factory}_remedy") for x in arguments]
    assert main([*remedy, "--output", "again"]) == 0


MORE_MODELS = """
import torch
from coded_torch import CodedWrapper, workers
from coded_torch.nn import FromFactory

class Of(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)

class Cache:
    pass

def sum_of(x):
    return x.sum()

def with_cache(x):
    return {"y": 2 * x, "cache": Cache()}

def sum_of_rows(x):
    return x.sum(1)

def without_cache(x):
    return {"y": 2 * x}

def total():
    return Of(sum_of)

def total_remedy():
    return Of(sum_of_rows)

def cached():
    return Of(with_cache)

def cached_remedy():
    return Of(without_cache)

def unpicklable():
    return Of(lambda x: 2 * x)

def unpicklable_remedy():
    return FromFactory(unpicklable)
"""


def test_a_job_without_a_batch_may_begin_in_another_way(folder, capsys, monkeypatch):
    monkeypatch.setenv("PAUSE", "0.5")  # no busy host lets a batch be in time
    assert main(line("slow", "--num-workers", "1", "--deadline", "1e-6")) == 2
    found = capsys.readouterr()
    (err,) = found.err.splitlines()
    assert "at least 4 of 8 results are needed" in err
    assert "within the deadline of 1e-06 s" in err
    assert err.endswith("Batch 0, from row 0 of rows.npy, failed.")
    assert "none" not in found.out
    assert main(line("served", "--num-workers", "1", "--resume")) == 0
    assert torch.equal(outputs(folder), exact())


def test_inputs_must_not_change_meanwhile(folder, refused):
    said = refused(line("touching", "--in-flight", "1"))
    assert "--inputs cannot be read: rows.npy has changed since" in said
    assert len(written(folder)) == 11  # the batch of the change was read before it
    assert main(line("here", "--check", "out")) == 2


def test_outputs_must_be_readable(folder, refused):
    assert " outputs must be what torch.load can read: " in refused(line("odd"))
    assert written(folder) == []


def test_options_of_workers_are_passed_on(folder, monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    pool = "coded_torch.cli.ProcessWorkers"
    monkeypatch.setattr(pool, lambda *how, **named: given.append((how, named)))
    for more in (
        "",
        "--hang-timeout 77 --threads 2 --device cuda:2,0",
        "--device auto",
        "--device cuda --num-workers 5",
    ):
        assert main(line("served", *more.split())) == 2  # a pool must be one
    three = ["cuda:0", "cuda:1", "cuda:2"]
    assert given == [
        ((6,), {"devices": ["cpu"], "hang_timeout": 30.0, "threads": 1}),
        ((2,), {"devices": ["cuda:2", "cuda:0"], "hang_timeout": 77.0, "threads": 2}),
        ((3,), {"devices": three, "hang_timeout": 30.0, "threads": 1}),
        ((5,), {"devices": three, "hang_timeout": 30.0, "threads": 1}),
    ]


@pytest.mark.parametrize("text", ["cuda:2", "cuda:", "cuda:-1", "gpu", "cuda:0,", "cpu:0"])
def test_devices_that_are_not_there_are_refused(folder, monkeypatch, capsys, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        main(line("served", "--device", text))
    assert f"of 2 CUDA devices here, got {text!r}" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices("auto") == devices("cpu") == ["cpu"]


def test_workers_compute_in_the_type_and_with_the_threads_of_the_options(folder):
    more = ["--dtype", "bfloat16", "--threads", "2", "--num-workers", "1", "--device", "cpu"]
    assert main(line("threads", *more)) == 0
    found = torch.load(folder / "out" / "batch-000000000000.pt")["outputs"]
    assert found["x"].dtype is torch.float32
    rows = torch.from_numpy(np.load(folder / "rows.npy"))[: len(found["x"])]
    assert found["x"].equal((rows.bfloat16() / 3).float())
    assert not found["x"].equal(rows / 3)
    assert (found["threads"] == 2).all()


@pytest.mark.parametrize(
    ("kind", "before", "now"),
    [("torch", "radii", "error_bounds"), ("parquet", "radius", "error_bound")],
)
def test_a_folder_of_version_0_4_keeps_its_name_of_error_bounds(folder, kind, before, now):
    """Readers of one folder meet one name, whichever version wrote a batch."""
    arguments = line("here", "--format", kind)
    claim = folder / "out" / "_job.json"

    def names():
        file = sorted((folder / "out").glob("batch-*"))[-1]
        if kind == "parquet":
            return parquet.read_schema(file).names
        return [*torch.load(file, weights_only=True)]

    assert main(arguments) == 0
    assert now in names()
    assert before not in names()
    known = json.loads(claim.read_bytes())
    del known["bounds"]  # 0.4 did not write it
    known["versions"] = known["versions"].replace("coded_torch ", "coded_torch 0.4.0, not ")
    claim.write_text(json.dumps(known))
    for _ in range(2):  # the folder stays one of 0.4
        sorted((folder / "out").glob("batch-*"))[-1].unlink()
        assert main(["job", "--check", "out"]) == 2
        assert main([*arguments, "--resume", "--trust-model"]) == 0
        assert before in names()
        assert now not in names()
        assert main(["job", "--check", "out"]) == 0


def test_options_of_workers_are_refused_where_they_would_do_nothing(folder, refused):
    for flag, value in (("--threads", "2"), ("--dtype", "float16"), ("--num-workers", "2")):
        said = refused(line("here", flag, value))
        assert f"{flag} must be left out, as models:here returns" in said


def test_columns_are_named_by_a_dict_of_examples(folder, capsys):
    save_file({"b": torch.ones(9, 1), "a": torch.zeros(9, 1)}, folder / "rows.safetensors")
    more = ["--inputs", "rows.safetensors", "--num-workers", "1"]
    assert main(line("features", *more)) == 0
    assert "Columns of rows.safetensors: features={'b': 'b'}." in capsys.readouterr().out
    assert (torch.load(folder / "out" / "batch-000000000000.pt")["outputs"][0] == 2).all()


def started(folder, least=ROWS):
    """Start a job that waits with more than so many batches, and some."""
    environment = os.environ | {"HOLD": str(8 * (least + 3))}
    command = [*COMMAND, *line("slow", "--resume", "--num-workers", "2")]
    return subprocess.Popen(command, cwd=folder, env=environment)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_job_goes_on_without_computing_a_batch_again(folder, capfd, monkeypatch):
    """A folder holds one job at a time."""
    generator, done = random.Random(0), []
    for end in (signal.SIGKILL, signal.SIGINT):
        least = len(written(folder)) + generator.randint(1, 5)
        process = started(folder, least)
        until = time.monotonic() + 240
        while len(written(folder)) < least and time.monotonic() < until:
            time.sleep(generator.uniform(0.001, 0.01))
        if end == signal.SIGKILL:
            assert main(line("slow", "--resume")) == 2
            said = capfd.readouterr().err
            assert " --output out must not be in use by another job" in said
        process.send_signal(end)
        process.wait(60)
        out = capfd.readouterr().out
        assert ("\nGo on with: coded-torch job " in out) == (end == signal.SIGINT)
        assert (" workers lost: 0; " in out) == (end == signal.SIGINT)
        assert not set(computed(folder)) & set(done)
        # A batch may have been written whose digest was not.
        first, *others = re.findall("batch-.*", (folder / "out" / "_manifest.sha256").read_text())
        flip(folder / "out" / first)
        done = [int(name[6:18]) + i for name in others for i in range(8)]
        monkeypatch.setenv("PAUSE", "0.01")  # an attribute of the model
        assert main(line("slow", "--resume")) == 2
        monkeypatch.delenv("PAUSE")
    assert 0 < len(done) < ROWS
    process = started(folder)
    assert process.wait(240) == 0
    assert not set(computed(folder)) & set(done)
    assert torch.equal(outputs(folder), exact())
    assert not list(folder.glob("out/*.part"))


def test_a_mean_ends_by_its_half_width_and_goes_on_with_resume(
    folder, capsys, refused, monkeypatch
):
    monkeypatch.setattr("coded_torch.cli._EVERY", 0.0)  # seconds between lines
    arguments = line("here", "--mean", "--mean-function", "models:first")
    assert main([*arguments, "--half-width", "0.01"]) == 0
    out, lines = capsys.readouterr()
    left = re.findall(r"^rows: (\d+) of (\d+), \d:\d\d:\d\d left$", lines, re.M)
    assert left[0] == ("60", "200")
    assert all(60 < int(total) < ROWS for _, total in left[1:])  # expected by the half width
    found = re.findall(r"^(\d+) of 200 rows: ([\d.]+) ± ([\d.]+)$", out, re.M)
    few = {*computed(folder)}
    assert int(found[-1][0]) < ROWS
    assert float(found[-1][2]) <= 0.01
    assert int(found[-1][0]) <= len(few) <= int(found[-1][0]) + 2  # workers start on two rows
    assert main([*arguments, "--resume"]) == 0
    again = computed(folder)
    assert not few & ({*again} - {0, 1})
    assert len({*again} | few) == ROWS
    assert capsys.readouterr().out.endswith("200 of 200 rows: 51.25 ± 0\n")
    state = torch.load(folder / "out" / "mean.pt", weights_only=True)
    assert state["rows"] == state["total"] == ROWS
    assert state["value"].tolist() == [51.25]
    said = refused([*arguments[:-1], "models:total", "--resume"])
    assert "--resume must repeat the job in out: mean digest " in said


def test_a_damaged_mean_is_not_gone_on_with(folder, refused):
    arguments = line("here", "--mean", "--mean-function", "models:first")
    path = folder / "out" / "mean.pt"
    assert main([*arguments, "--half-width", "3.0"]) == 0
    numbers = torch.load(path, weights_only=True)["numbers"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.find(numbers) + 6] ^= 0x40
    path.write_bytes(content)
    said = refused([*arguments, "--resume"])
    assert "mean.pt cannot be read: it is damaged; remove it" in said
    path.unlink()
    assert main([*arguments, "--resume"]) == 0


def test_a_job_of_a_version_without_means_goes_on(folder):
    assert main(line("here")) == 0
    path = folder / "out" / "_job.json"
    before = json.loads(path.read_text())
    del before["mean"]
    path.write_text(json.dumps(before))
    assert main(line("here", "--resume")) == 0


def test_a_row_on_which_the_model_fails_ends_a_mean(thirteen):
    with pytest.raises(AssertionError, match="thirteen") as caught:
        main(line("pair", "--mean", *thirteen))
    assert caught.value.rows == (13,)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--half-width", "0.1"], "--half-width and --bounds must be left out without --mean"),
        (["--mean-function", "models:here"], "--bounds must be left out without --mean"),
        (["--bounds", "0,1"], "--bounds must be left out without --mean"),
        (["--mean", "--bounds", "3,1"], "bounds must be (low, high), finite and low < high"),
        (["--mean", "--deadline", "1"], "left out, as a mean without some rows is biased"),
        (["--mean", "--half-width", "-1"], "half_width must be positive, one or per column, got"),
        (
            ["--mean", "--mean-function", "models:nothing"],
            "MODULE:FACTORY must name a function or a class in",
        ),
    ],
)
def test_options_of_means_are_checked(folder, refused, more, message):
    assert message in refused(line("here", *more))


NAMES = [f"row {i}" for i in range(25)]


@pytest.fixture
def keyed(folder):
    """Return the arguments of a job on three files of 10, 0 and 15 rows x = y = 100, 101, ..."""
    x = np.arange(100, 125, dtype=np.float32).reshape(-1, 1)
    every = pyarrow.table({"name": NAMES, "x": list(x), "y": list(x)})
    for number, table in enumerate((every[:10], every[:0], every[10:])):
        parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=4)
    return line("pair", "--inputs", "part-*.parquet", "--keys", "name")


def test_batches_for_pandas_hold_keys_of_files_outputs_and_bounds(folder, keyed, capsys, refused):
    assert main([*keyed, "--format", "parquet"]) == 0
    assert capsys.readouterr().out.startswith("Columns of part-0.parquet and 2 more: x=x, y=")
    (folder / "out" / "_batch-000000000024.parquet.part").write_bytes(b"PAR")  # as while it writes
    frame = pandas.read_parquet("out")
    assert [*frame] == ["name", "sum", "x", "estimated", "error_bound"]
    assert [*frame["name"]] == NAMES
    assert np.stack(frame["sum"]).tolist() == [[200.0 + 2 * i] for i in range(25)]
    assert not frame["estimated"].any()
    assert (frame["error_bound"] == 0).all()
    batches = sorted(folder.glob("out/*.parquet"))
    assert [parquet.read_metadata(path).num_rows for path in batches] == [8, 8, 8, 1]
    batches[1].unlink()
    flip(batches[2])
    assert main(["job", "--check", "out"]) == 2
    assert main([*keyed, "--format", "parquet", "--resume"]) == 0
    assert pandas.read_parquet("out").equals(frame)
    said = refused([*keyed, "--resume"])
    assert said.endswith("in out: written format parquet; keys name, got keys name")


def test_integers_of_one_file_are_not_rounded_to_the_type_of_another(folder, keyed, refused):
    table = parquet.read_table(folder / "part-0.parquet")
    x = pyarrow.array([[2**60 + 1]] * 10)
    parquet.write_table(table.set_column(1, "x", x), folder / "part-0.parquet")
    assert "'x' must hold integers in all files, or in none, got" in refused(keyed)


def test_keys_may_be_strings_of_several_types(folder, keyed):
    table = parquet.read_table(folder / "part-0.parquet")
    names = table["name"].cast(pyarrow.large_string()).dictionary_encode()
    parquet.write_table(table.set_column(0, "name", names), folder / "part-0.parquet")
    assert main([*keyed, "--format", "parquet"]) == 0
    assert [*pandas.read_parquet("out")["name"]] == NAMES


def test_a_job_goes_on_from_the_batches_of_another_one(folder, keyed):
    assert main([*keyed, "--format", "parquet"]) == 0
    more = "--inputs", "out/batch-*.parquet", "--keys", "name", "--columns", "x=sum,y=x"
    assert main([*line("pair", *more, "--select", "sum"), "--output", "again"]) == 0
    batches = [torch.load(x, weights_only=True) for x in sorted(folder.glob("again/*.pt"))]
    assert [name for batch in batches for name in batch["keys"]["name"]] == NAMES
    assert {*batches[0]["outputs"]} == {"sum"}
    sums = torch.cat([batch["outputs"]["sum"] for batch in batches])
    assert sums.flatten().tolist() == [300.0 + 3 * i for i in range(25)]


@pytest.mark.ray
@pytest.mark.slow  # a cluster starts
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_data_reads_batches(folder, keyed, monkeypatch):
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")  # Ray listens on the loopback interface only
    pytest.importorskip("ray.data", reason="needs the extra 'ray-data'")
    import ray

    assert main([*keyed, "--format", "parquet"]) == 0
    (folder / "out" / "_batch-000000000024.parquet.part").write_bytes(b"PAR")  # as while it writes
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False}
    ray.init("local", num_cpus=1, **local)
    try:
        rows = ray.data.read_parquet(str(folder / "out")).take_all()
    finally:
        ray.shutdown()
    found = {row["name"]: [*row["sum"]] for row in rows}
    assert found == {name: [200.0 + 2 * i] for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keys", "id"], "--keys must be names of columns out of ['name', 'x', 'y'], got ['id']"),
        (["--select", "z"], "--select must be names of outputs out of ['sum', 'x'], got ['z']"),
        (["--mean"], "--select must be left out with --mean, got keys name"),
        (["--inputs", "empty.parquet"], "--inputs cannot be read: empty.parquet must hold rows"),
        (["--inputs", "other.parquet"], "all files must have the columns ['name', 'x', 'y'], got "),
        (["--inputs", "uneven.parquet", "--keys", "name"], "column 'x' must be equally long, got"),
        (
            ["--keys", "x", "--format", "parquet", "--columns", "x,y"],
            "job: the columns sum, x, estimated, error_bound, which are added, must be new, got",
        ),
    ],
)
def test_what_does_not_fit_several_files_is_refused(folder, keyed, refused, more, message):
    x = pyarrow.array([[1.0], [1.0, 2.0]])
    parquet.write_table(pyarrow.table({"x": x}), folder / "other.parquet")
    table = pyarrow.table({"name": ["a", "b"], "x": x, "y": [1.0, 2.0]})
    parquet.write_table(table, folder / "uneven.parquet")
    parquet.write_table(table[:0], folder / "empty.parquet")
    is_alone = "--inputs" in more and "other.parquet" not in more
    assert message in refused(line("pair", *more) if is_alone else [*keyed, *more])


def test_a_mean_is_over_several_files(folder, keyed):
    assert main([*keyed[:-2], "--columns", "x,y", "--mean", "--mean-function", "models:total"]) == 0
    state = torch.load(folder / "out" / "mean.pt", weights_only=True)
    assert state["value"].tolist() == [224.0]


@pytest.mark.parametrize(("factory", "lost"), [("sums", [0]), ("ends", range(2, 7))])
def test_the_summary_is_there_as_json(thirteen, folder, factory, lost):
    more = "--on-error", "estimate", "--num-workers", "2"
    assert main(line(factory, *thirteen, *more)) == 0
    summary = json.loads((folder / "out" / "_summary.json").read_text())
    assert summary.pop("seconds") > 0
    assert summary.pop("hedges") >= 1
    assert summary.pop("workers_lost") in lost
    assert summary.pop("failed") == 1 or factory == "ends"  # too few workers to tell whose fault
    assert summary == {"batches": 5, "of": 5, "computed": 39, "estimated": 1}


@pytest.mark.parametrize(("select", "has_bounds"), [("sum", True), ("x", False)])
def test_bounds_are_of_the_first_output_only(thirteen, select, has_bounds):
    more = "--on-error", "estimate", "--num-workers", "2", "--select", select
    assert main(line("sums", *thirteen, *more, "--format", "parquet")) == 0
    frame = pandas.read_parquet("out")
    assert [*frame.index[frame["estimated"]]] == [13]
    assert [*frame] == [select, "estimated", "error_bound"]
    assert (frame["error_bound"] >= 0).all() == frame["error_bound"].notna().any() == has_bounds


@pytest.mark.parametrize("suffix", ["pt", "npy", "safetensors"])
def test_rows_of_all_kinds_of_files_are_keys(folder, suffix):
    x = torch.arange(100.0, 120.0).reshape(10, 2)
    torch.save({"x": x, "y": x}, "rows.pt")
    save_file({"x": x, "y": x.clone()}, "rows.safetensors")
    np.save("rows.npy", x.numpy())
    given = line("pair" if suffix != "npy" else "here", "--inputs", f"rows.{suffix}")
    name = "x" if suffix != "npy" else "rows"
    assert main([*given, "--keys", name]) == 0
    keys = [torch.load(path, weights_only=True)["keys"][name] for path in written(folder)]
    assert [row for batch in keys for row in batch] == x.tolist()


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_ends_imports_that_catch_it(tmp_path):
    (tmp_path / "coded_torch").mkdir()
    text = "import time\nprint('importing', flush=True)\n"
    text += "try: time.sleep(60)\nfinally: time.sleep(60)"
    (tmp_path / "coded_torch" / "__init__.py").write_text(text)
    (tmp_path / "coded_torch_command.py").write_text(Path(coded_torch_command.__file__).read_text())
    arguments = [*COMMAND, "job", "my models:f", "--inputs", "a"]
    environment = {x: y for x, y in os.environ.items() if x != "PYTHONPATH"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    err = process.communicate(timeout=60)[1]
    assert time.monotonic() - begin < 30  # the import would sleep for a minute
    expected = "Go on with: coded-torch job 'my models:f' --inputs a --resume\ninterrupted\n"
    assert (process.returncode, err) == (130, expected)


@pytest.mark.usefixtures("interrupts")
def test_nothing_of_an_interrupted_job_holds_its_output_open(folder):
    # The process that workers are forked from imports the model, too.
    text = "import sys, time\nif sys.argv == ['-c']: time.sleep(120)\n"
    (folder / "models.py").write_text(text + MODEL)
    arguments = [*COMMAND, *line("slow", "--num-workers", "1")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(arguments, cwd=folder, start_new_session=True, **pipes)
    assert process.stdout.readline() == "Columns of rows.npy: x=rows.\n"
    time.sleep(0.5)  # it waits for its worker
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "workers lost: 0; " in out
    assert out.endswith(" --num-workers 1 --resume\ninterrupted\n")


@pytest.mark.slow
def test_fifty_thousand_rows_of_two_files_survive_twenty_kills(folder):
    """The output is read by pandas while workers are killed."""
    rows, kills, read = 50_000, 0, []
    x = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    names = [f"{i:x}" for i in range(rows)]
    for number, some in enumerate((slice(0, 20_001), slice(20_001, rows))):
        table = pyarrow.table({"name": names[some], "x": list(x[some])})
        parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=3000)
    (folder / "plain.py").write_text(PLAIN)
    code = "from coded_torch.cli.main import main; raise SystemExit(main())"
    more = ["--inputs", "part-*.parquet", "--keys", "name", "--format", "parquet"]
    more += ["--num-workers", "3", "--batch-size", "64"]
    arguments = [sys.executable, "-c", code, *line("", *more)]
    arguments[arguments.index("models:")] = "plain:make"
    process = subprocess.Popen(arguments, cwd=folder)
    generator, until = random.Random(0), time.monotonic() + 900
    while process.poll() is None and time.monotonic() < until:
        time.sleep(generator.uniform(0.1, 0.4))
        if (folder / "pids").exists() and kills < 20:
            pids = (folder / "pids").read_text().split() or [process.pid * 10**6]  # none is known
            (folder / "pids").unlink()
            with contextlib.suppress(OverflowError, ProcessLookupError):
                os.kill(int(pids[-1]), signal.SIGKILL)
                kills += 1
        if any(folder.glob("out/*.parquet")) and len(read) < kills:
            read.append(len(pandas.read_parquet(folder / "out")))
    assert process.wait(60) == 0
    assert kills == 20
    assert len({*read}) > 5
    frame = pandas.read_parquet(folder / "out")
    assert [*frame["name"]] == names
    assert np.array_equal(np.stack(frame["output"]), (torch.from_numpy(x) * 0.3 + 1).numpy())
    assert not frame["estimated"].any()
    summary = json.loads((folder / "out" / "_summary.json").read_text())
    assert summary["computed"] == rows
    assert 15 <= summary["workers_lost"] <= 20  # a victim may have been replaced before
