"""What another user may leave in the folder or in the inputs of ``coded-torch job``.

Each command ends soon, with one line, and touches nothing outside the folder.
"""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coded_torch.cli.main import main

SECONDS = 5  # in which each command ends, of which a busy machine needs .1 to 2
MODEL = """
import torch
from coded_torch import CodedWrapper, Waiting, workers

class Sum(torch.nn.Module):
    def forward(self, x):
        return x.sum(1)

def make():
    pool = workers.DeviceWorkers(["cpu"] * 2)
    return CodedWrapper(Sum(), workers=pool, waiting=Waiting(estimate=False))

def first(outputs, rows):
    return outputs
"""
START = ["job", "models:make", "--inputs", "rows.npy", "--output", "out", "--batch-size", "8"]
MEAN = [*START, "--mean", "--mean-function", "models:first", "--half-width", "3"]
BATCH = "batch-000000000016.pt"


class Evil:
    """Runs code where it is unpickled, by whoever allows that."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make the working directory hold a model, 64 rows, and files that nothing may touch."""
    (tmp_path / "models.py").write_text(MODEL)
    rows = np.stack([np.arange(64), np.ones(64)], 1).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "victims").mkdir()
    (tmp_path / "victims" / "one").write_text("precious")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    return tmp_path


def outside(folder):
    """Return all that lies beside the job's folder, with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "out" not in path.relative_to(folder).parts:
            about = path.lstat()
            content = b""
            if stat.S_ISREG(about.st_mode) and about.st_size < 2**20:
                content = path.read_bytes()
            links = 0 if path.name == "victim" else about.st_nlink  # the folder may hold one
            found[path] = about.st_mode, about.st_size, about.st_mtime_ns, links, content
    return found


@contextlib.contextmanager
def in_time(seconds):
    def late(*_):
        pytest.fail("it did not end")  # a TimeoutError would be an error of a file

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ended(folder, capsys, line):
    """Run a command that ends soon, in a line if it fails, and touches nothing outside."""
    before = outside(folder)
    capsys.readouterr()
    with in_time(SECONDS):
        code = main(line)
    found = capsys.readouterr()
    assert code in (0, 2)
    errors = [x for x in found.err.splitlines() if x.startswith("coded-torch")]
    assert len(errors) == code / 2
    assert max(map(len, [*found.out.splitlines(), *found.err.splitlines(), ""])) < 2000
    assert "\x1b" not in found.out + found.err
    assert outside(folder) == before
    assert not Path("ran").exists()
    return code, "".join(errors)


def bound_socket(path):
    before = Path.cwd()
    os.chdir(path.parent)  # as addresses of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def sparse(*size):
    return torch.sparse_coo_tensor(size=size, check_invariants=True)


def claimed(**changes):
    """Change the description of a job."""

    def change(out):
        path = out / "_job.json"
        known = json.loads(path.read_text())
        path.write_text(json.dumps(known | {x.replace("_", "-"): y for x, y in changes.items()}))

    return change


def left(name, how):
    """Leave something else in the place of a file of the folder."""

    def leave(out):
        path = out / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        if isinstance(how, bytes):
            path.write_bytes(how)
        elif how == "link":
            path.symlink_to(out.parent / "victim")
        elif how == "hard link":
            path.hardlink_to(out.parent / "victim")
        elif how == "link to a folder":
            path.symlink_to(out.parent / "victims")
        elif how == "zero":
            path.symlink_to("/dev/zero")
        elif how == "device":
            with contextlib.suppress(PermissionError):  # only root makes one
                os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "socket":
            bound_socket(path)
        elif how == "folder":
            (path / "more").mkdir(parents=True)
        else:
            with path.open("wb") as file:
                file.truncate(2**40)

    return leave


def twice(out):
    """Claim a batch twice, and batches that overlap or have other names."""
    manifest = out / "_manifest.sha256"
    text = manifest.read_text()
    more = [text, text.replace("016.pt", "017.pt"), f"{'0' * 64}  ../victim\n"]
    manifest.write_text("".join(more))
    for name in ("batch-000000000017.pt", "batch-16.pt", "batch--00000000016.pt"):
        shutil.copy(out / BATCH, out / name)


def many(out):
    for number in range(3_000):
        (out / f"batch-{number}").touch()


CHANGES_OF_CLAIMS = [
    {"rows": 10**12, "batch_size": 1},
    {"rows": 10**30},
    {"rows": 0},
    {"rows": -200},
    {"rows": True},
    {"rows": 200.0},
    {"batch_size": -1},
    {"batch_size": 0},
    {"batch_size": 10**30},
    {"parts": -1},
    {"parts": [2]},
    {"bounds": "other"},
    {"written": 5},
    {"model": {"a": 1}},
    {"model": "x" * 2**21},
    {"inputs": "a\nb\x1b[31m"},
]
CONTENTS = {
    "cut short": b'{"rows": 64, "batch-si',
    "nothing": b"",
    "not UTF-8": b'{"rows": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "many digits": b'{"rows": ' + b"9" * 100_000 + b"}",
    "a huge text": b'{"rows": "' + b"x" * 10**7,
}
WAYS = {
    "_job.json": ["link", "hard link", "zero", "device", "pipe", "socket", "folder", "hollow"],
    "_job.lock": ["link", "hard link", "zero", "device", "pipe", "socket", "folder"],
    "_manifest.sha256": ["link", "zero", "device", "pipe", "socket", "folder", "hollow"],
    BATCH: ["link", "hard link", "zero", "device", "pipe", "socket", "folder", "hollow"],
    f"_{BATCH}.part": ["link", "hard link", "zero", "pipe", "socket", "folder"],
    "__job.json.part": ["link", "hard link", "pipe", "socket", "folder"],
    "__manifest.sha256.part": ["link", "pipe"],
    "__summary.json.part": ["link", "hard link"],
    "_summary.json": ["link", "pipe", "folder"],
    "batch-\n\x1b[31m": ["link", "pipe"],
    "more": ["link to a folder"],
}
#: By the name of a kind: what leaves it in the folder of a job of which a batch is missing.
FOLDERS = {str(x)[:60]: claimed(**x) for x in CHANGES_OF_CLAIMS}
FOLDERS |= {f"_job.json, {name}": left("_job.json", x) for name, x in CONTENTS.items()}
FOLDERS |= {
    f"_manifest.sha256, {name}": left("_manifest.sha256", x) for name, x in CONTENTS.items()
}
FOLDERS |= {f"{name}, {how}": left(name, how) for name, ways in WAYS.items() for how in ways}
FOLDERS |= {"batches that overlap": twice, "3,000 names": many}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_folder_ends_a_job_soon_and_leads_nowhere(folder, capsys, kind):
    assert main(START) == 0
    out = folder / "out"
    (out / "batch-000000000008.pt").unlink()
    FOLDERS[kind](out)
    code, said = ended(folder, capsys, ["job", "--check", "out"])
    assert code == 2
    code, said = ended(folder, capsys, START)
    assert code == 2
    assert "holds a job" in said or "must be" in said
    ended(folder, capsys, [*START, "--resume"])


@pytest.mark.parametrize("how", ["link", "zero", "device", "pipe", "socket", "folder", "hollow"])
@pytest.mark.parametrize("name", ["_job.lock", "__job.json.part", "_job.json"])
def test_a_hostile_folder_that_is_new_is_not_begun_in(folder, capsys, how, name):
    (folder / "out").mkdir()
    left(name, how)(folder / "out")
    ended(folder, capsys, START)


@pytest.mark.parametrize("how", ["zero", "device", "pipe", "socket", "hollow", "link"])
def test_what_is_no_folder_is_no_job(folder, capsys, how):
    left("out", how)(folder)
    for line in (["job", "--check", "out"], START, [*START, "--resume"]):
        code, _ = ended(folder, capsys, line)
        assert code == 2


def packed(path, *, more=0):
    """Pack the parts of a file of torch.save, of which one gets some more MB of zeros."""
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for name, content in parts.items():
            with target.open(name, "w", force_zip64=True) as file:
                file.write(content)
                for _ in range(more if name.endswith("data.pkl") else 0):
                    file.write(bytes(2**20))


def nested(path):
    """Replace the objects of a file of torch.save by a deep one."""
    torch.save(torch.zeros(2, 2), path)
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in parts.items():
            deep = b"\x80\x02" + b"(" * 10**7 + b"K\x01" + b"t" * 10**7 + b"."
            target.writestr(name, deep if name.endswith("data.pkl") else content)


def numpy_file(shape, content=b"", kind="'<f4'", size=128):
    """Return a file of NumPy's format that claims a shape."""
    head = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head = head.ljust(size - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + content


def claiming(head, content=b"", size=None):
    """Return a file of safetensors whose head claims tensors."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def cut(path, save, value):
    save(value, path)
    path.write_bytes(path.read_bytes()[:-500])


def with_holes(path):
    with path.open("wb") as file:
        file.write(numpy_file("(125000000000, 2)"))
        file.truncate(128 + 10**12)


FLOATS = {"dtype": "F32", "shape": [10**12, 4], "data_offsets": [0, 16]}
#: By the name of a file of inputs: what writes it, and what its refusal says.
INPUTS = {
    "repeated.pt": (lambda x: torch.save(torch.zeros(1, 2).expand(10**11, 2), x), "each of its"),
    "shared.pt": (lambda x: torch.save(torch.zeros(99).as_strided((50, 50), (1, 1)), x), "each of"),
    "sparse.pt": (lambda x: torch.save(sparse(9, 10**11), x), "dense"),
    "meta.pt": (lambda x: torch.save(torch.zeros(9, 10**9, device="meta"), x), "dense"),
    "pickle.pt": (lambda x: torch.save({"a": Evil()}, x), "tensors, numbers and strings only"),
    "bare.pt": (lambda x: x.write_bytes(pickle.dumps(Evil())), "not a zip file"),
    "packed.pt": (lambda x: (torch.save(torch.zeros(9), x), packed(x)), "not packed"),
    "bomb.pt": (lambda x: (torch.save(torch.zeros(9), x), packed(x, more=200)), "not packed"),
    "deep.pt": (nested, "not packed"),
    "list.pt": (lambda x: torch.save([torch.zeros(9)], x), "a dict of tensors"),
    "short.pt": (lambda x: cut(x, torch.save, torch.zeros(9, 9)), "not a zip file"),
    "empty.pt": (lambda x: x.touch(), "not a zip file"),
    "rows.npy": (lambda x: x.write_bytes(numpy_file("(1000000000000, 0)")), "1000000000000 rows"),
    "large.npy": (lambda x: x.write_bytes(numpy_file("(1000000000000, 4)")), "greater than file"),
    "minus.npy": (lambda x: x.write_bytes(numpy_file("(-4, 2)", bytes(64))), "negative"),
    "objects.npy": (lambda x: np.save(x, np.array([Evil()], object)), "got objects"),
    "deep.npy": (lambda x: x.write_bytes(numpy_file("(" * 9999 + ")" * 9999, size=20480)), "large"),
    "kind.npy": (lambda x: x.write_bytes(numpy_file("(4,)", bytes(9), "'\\xff'")), "descr"),
    "short.npy": (lambda x: cut(x, lambda y, to: np.save(to, y), np.zeros(999)), "file size"),
    "holes.npy": (with_holes, "with content"),
    "head.safetensors": (lambda x: x.write_bytes(claiming(b"{}", size=2**62)), "too large"),
    "rows.safetensors": (
        lambda x: x.write_bytes(claiming({"a": FLOATS}, bytes(16))),
        "shape",
    ),
    "deep.safetensors": (
        lambda x: x.write_bytes(claiming(b'{"a":' + b"[" * 9999)),
        "limit",
    ),
    "short.safetensors": (
        lambda x: cut(x, lambda y, to: save_file({"a": y}, to), torch.zeros(999)),
        "header",
    ),
    "words.parquet": (lambda x: x.write_bytes(b"PAR1" + b"\xff" * 900 + b"PAR1"), "cannot be read"),
    "zero.npy": (lambda x: x.symlink_to("/dev/zero"), "regular file"),
    "pipe.npy": (os.mkfifo, "regular file"),
    "socket.npy": (bound_socket, "regular file"),
    "folder.npy": (os.mkdir, "regular file"),
    "gone.npy": (lambda x: x.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_hostile_inputs_end_a_job_soon(folder, capsys, name):
    (folder / "more").mkdir()
    write, message = INPUTS[name]
    write(Path("more", name))
    line = [*START, "--inputs", f"more/{name}"]
    for more in ([], ["--resume"]):
        code, said = ended(folder, capsys, [*line, *more])
        assert code == 2
        assert message in said
    assert not Path("out").exists()


def kept_mean(content):
    """Replace what a mean goes on with."""

    def leave(path):
        path.unlink()
        if callable(content):
            content(path)
        else:
            torch.save(content, path)

    return leave


def of_a_mean(**changes):
    def leave(path):
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return leave


MEANS = {
    "a pickle": kept_mean({"digest": Evil(), "seed": 1}),
    "a bare pickle": kept_mean(lambda x: x.write_bytes(pickle.dumps(Evil()))),
    "packed": lambda path: packed(path, more=200),
    "repeated": of_a_mean(numbers=torch.zeros(1, 1).expand(10**11, 1), rows=10**11),
    "sparse": of_a_mean(numbers=sparse(10**11, 1), rows=10**11),
    "no numbers": of_a_mean(numbers="numbers"),
    "more rows": of_a_mean(rows=10**12),
    "a link": kept_mean(lambda x: x.symlink_to("../victim")),
    "a pipe": kept_mean(os.mkfifo),
    "zero": kept_mean(lambda x: x.symlink_to("/dev/zero")),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
}


@pytest.mark.parametrize("kind", MEANS)
def test_a_hostile_mean_is_not_gone_on_with(folder, capsys, kind):
    assert main(MEAN) == 0
    MEANS[kind](folder / "out" / "mean.pt")
    code, said = ended(folder, capsys, [*MEAN, "--resume"])
    assert code == 2
    assert "mean.pt cannot be read" in said
