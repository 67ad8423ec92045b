"""The command ``coded-torch serve``: on worker processes that are delayed and killed."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from coded_torch.cli.main import main
from coded_torch.testing.helpers import until

from .forks import Command
from .servers import Client, tensor

SLOW = 6  # the factor of a busy host: the bars hold on an idle one
MODEL = """
import re

import torch

class Double(torch.nn.Module):
    def forward(self, x, scale):
        return 2 * x, x.sum(1) * scale

class Of(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward

class Scaled(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * self.by

def make():
    return Double(), (torch.ones(3, 4), torch.tensor([1.0, 2.0, 3.0]))

def bare():
    return Double()

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def read():
    if (text := open("weights").read()) == "again":  # holds the interpreter's lock, for ever
        re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "odd":
        raise Odd("one", "another")
    return Scaled(float(text)), torch.ones(2, 3)

def pair():
    return "no", torch.ones(2, 1)

def small():
    return torch.nn.Linear(3, 2), torch.ones(2, 3)

def labels():
    return Of(lambda x: {"scores": x, "label": x.argmax(1)}), torch.ones(2, 3)

def estimated():
    return Of(lambda x: {"estimated": x}), torch.ones(2, 3)

def wordy():
    return Of(lambda x: (x, "words")), torch.ones(2, 1)

def broken():
    return {}["weights"]

def local():
    class Local(torch.nn.Identity):
        pass
    return Local(), torch.ones(2, 3)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Make the working directory hold the module ``mine``."""
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@contextlib.contextmanager
def running(*arguments, cwd=None, first=""):
    """Run the command; yield its process, with its output and log so far, and its port."""
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as log:
        line = ["serve", "--port", "0", *arguments]
        process = Command(line, cwd or folder, log, first)
        process.log, process.head = Path(log.name), ""
        try:
            while not (found := re.search(r"http://[\d.:\[\]]+:(\d+)/", process.head)):
                process.head += (line := process.stdout.readline())
                assert line, process.log.read_text()
            yield process, int(found[1])
        finally:
            process.end()


def family(pid):
    """The process ids of a process and of all that it has started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(stat[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids):
    """The addresses at which processes listen for TCP, as the kernel writes them."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor))
    lines = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes}


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists()]


def example(capsys, *arguments):
    assert main(["serve", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_answer_comes_soon_although_workers_are_delayed_and_killed(capsys):
    request = example(capsys, "--example", "7")
    start = time.monotonic()
    with (
        running("--chaos", "--seed", "1", "--deadline", "2") as (process, port),
        Client(port) as client,
    ):
        assert "Privacy" not in process.head
        assert "Loading lenet5 on 6 processes" in process.head
        status, answer = client.infer(request, "/v2/models/lenet5/infer")
        assert status == 200
        assert time.monotonic() - start < 10 * SLOW
        assert torch.tensor(answer["outputs"][0]["data"]).argmax() == 7
        (address,) = listening(family(process.pid))
        assert address.startswith("0100007F:")  # 127.0.0.1

        def killed():
            assert client.infer(request, "/v2/models/lenet5/infer")[0] == 200
            return "was killed by SIGKILL" in process.log.read_text()

        until(killed)
        text = client.metrics()
        assert float(re.search(r'results_total{state="missing"} (.*)', text)[1]) >= 1
        assert float(re.search(r"worker_restarts_total (\d.*)", text)[1]) >= 1
        assert 1 <= float(re.search(r"workers_up (\d.*)", text)[1]) <= 6
        assert "workers that have run the model: 6" in process.log.read_text()
        workers = family(process.pid)
        process.terminate()
        process.wait(180)
        assert process.returncode == -signal.SIGTERM
        until(lambda: not alive(workers))


def test_a_model_of_ones_own(mine, capsys):
    request = example(capsys, "mine:make", "--example", "2")
    assert [entry["name"] for entry in request["inputs"]] == ["x", "scale"]
    options = ["--name", "double", "--deadline", "5", "--memory", "--fixed-shapes"]
    with running("mine:make", *options, cwd=mine) as (process, port), Client(port) as client:
        assert "answers of earlier requests, of any client" in process.head
        metadata = client.get("/v2/models/double")[1]
        assert [entry["shape"] for entry in metadata["inputs"]] == [[-1, 4], [-1]]
        status, answer = client.infer(request, "/v2/models/double/infer")
    assert status == 200
    found = {entry["name"]: entry["data"] for entry in answer["outputs"]}
    assert found == {"output0": [2.0] * 4, "output1": [12.0]}


def ask_until_the_end(port, is_kept, outcomes):
    """Send requests, over one connection or many, until nobody listens; count what becomes of them.

    A connection is refused only after the listener has closed.
    """
    body = json.dumps({"inputs": [tensor([[1.0, 2.0, 3.0]], "x")]})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while True:
        try:
            connection.request("POST", "/v2/models/read/infer", body)
            answer = connection.getresponse()
            answer.read()
        except ConnectionRefusedError:
            return
        except Exception as error:  # whatever becomes of a request is counted
            outcomes[type(error).__name__] += 1
            return
        outcomes[answer.status] += 1
        if not is_kept:
            connection.close()


@pytest.mark.parametrize("signals", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_sigterm_answers_all_that_has_reached_the_server(signals, mine):
    (mine / "weights").write_text("2")
    options = "--num-workers", "1", "--deadline", "10"
    for _ in range(signals):
        outcomes = Counter()
        with running("mine:read", *options, cwd=mine) as (process, port), Client(port) as client:
            until(lambda ask=client: ask.get("/v2/health/ready")[0] == 200)
            kept = [i % 4 > 0 for i in range(32)]
            threads = [
                threading.Thread(target=ask_until_the_end, args=(port, x, outcomes)) for x in kept
            ]
            for thread in threads:
                thread.start()
            until(lambda counts=outcomes: counts[200] > 100)
            process.terminate()
            for thread in threads:
                thread.join(60)
            assert process.wait(60) == -signal.SIGTERM
        assert outcomes.keys() == {200}, outcomes


def test_a_signal_loads_new_weights_and_keeps_the_old_ones_if_that_fails(mine):
    weights, body = mine / "weights", {"inputs": [tensor([[1.0, 2.0, 3.0]], "x")]}
    weights.write_text("2")
    options = ["--num-workers", "2", "--deadline", "20"]
    with running("mine:read", *options, cwd=mine) as (process, port), Client(port) as client:

        def answer():
            status, found = client.infer(body, "/v2/models/read/infer")
            assert status == 200
            return found["model_version"], found["outputs"][0]["data"][0]

        assert answer() == ("1", 2.0)
        for content, said, wanted in (
            ("many", "no version of read was loaded, so version 1 stays: ValueError", ("1", 2.0)),
            ("odd", "so version 1 stays: RuntimeError: Odd: one and another", ("1", 2.0)),
            ("5", "version 2 of read answers", ("2", 5.0)),
        ):
            weights.write_text(content)
            process.send_signal(signal.SIGHUP)
            until(lambda said=said: said in process.log.read_text())
            assert answer() == wanted


def test_a_factory_that_holds_the_interpreters_lock_stops_nothing(mine):
    (mine / "weights").write_text("2")
    body = {"inputs": [tensor([[1.0, 2.0, 3.0]], "x")]}
    options = "--num-workers", "2", "--deadline", "20"
    with running("mine:read", *options, cwd=mine) as (process, port), Client(port) as client:
        until(lambda: client.get("/v2/health/ready")[0] == 200)
        (mine / "weights").write_text("again")
        process.send_signal(signal.SIGHUP)
        until(lambda: len(client.send("POST", "/v2/repository/index")[2].split(b"LOADING")) == 2)
        until(lambda: any("spawn_main" in x for x in command_lines(process.pid)))
        time.sleep(2)  # the regular expression runs
        begin = time.monotonic()
        assert client.infer(body, "/v2/models/read/infer")[1]["model_version"] == "1"
        assert time.monotonic() - begin < 5
        assert client.send("POST", "/v2/repository/models/read/unload")[0] == 200
        until(lambda: "the load was cancelled" in process.log.read_text())
        assert not any("spawn_main" in x for x in command_lines(process.pid))


def command_lines(pid):
    """Return the command lines of a process and of all that it has started."""
    found = []
    for each in family(pid):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{each}/cmdline").read_text())
    return found


def test_ctrl_c_does_not_wait_for_a_load(mine):
    weights = mine / "weights"
    weights.write_text("2")
    load = b"POST /v2/repository/models/read/load HTTP/1.1\r\nHost: localhost\r\n\r\n"
    options = "--num-workers", "1", "--deadline", "1"
    soon = "from coded_torch.serve import _connections; _connections._TO_READ = 0\n"
    with (
        running("mine:read", *options, cwd=mine, first=soon) as (process, port),
        Client(port) as client,
    ):
        until(lambda: client.get("/v2/health/ready")[0] == 200)
        weights.unlink()
        os.mkfifo(weights)  # to read it takes until someone writes to it
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(load)
            assert client.get("/v2/health/ready")[0] == 200
            process.send_signal(signal.SIGINT)
            process.wait(180)


@pytest.mark.parametrize("command", ["serve", "compare --inputs x.pt"])
def test_exceptions_of_the_users_code_keep_their_traceback(command, mine):
    (mine / "theirs.py").write_text("import nothing_of_that_name")
    torch.save(torch.ones(240, 3), mine / "x.pt")
    with pytest.raises(KeyError, match="weights"):
        main([*command.split(), "mine:broken"])
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        main([*command.split(), "theirs:make"])


def test_a_kept_connection_does_not_wait_for_acknowledgements(mine):
    body = json.dumps({"inputs": [tensor([[1.0, 2.0, 3.0]])]}).encode()
    took = []
    options = "--num-workers", "1", "--parts", "1", "--deadline", "20"
    with running("mine:small", *options, cwd=mine) as (_, port), Client(port) as client:
        for _ in range(40):
            start = time.monotonic()
            assert client.infer(body, "/v2/models/small/infer")[0] == 200
            took.append(time.monotonic() - start)
    # Nagle's algorithm delays each by 40 ms, but for the first; a busy machine does not delay all.
    assert min(took[20:]) < 0.03


def test_clients_name_a_loopback_host_or_an_allowed_one(mine, monkeypatch):
    built = []
    monkeypatch.setattr("coded_torch.cli._serve._listen", lambda app, *_: built.append(app))
    assert main(["serve", "mine:make"]) == 0
    assert [spec.shape for spec in built.pop().inputs] == [(-1,), ()]
    for host in ("127.0.0.1", "0.0.0.0"):
        for more in ((), ("--allowed-hosts", "a.example", "b.example")):
            assert main(["serve", "mine:small", "--host", host, *more]) == 0
    loopback, named = ["127.0.0.1", "localhost", "::1"], ["a.example", "b.example"]
    assert main(["serve", "mine:small", "--host", "127.0.0.2"]) == 0
    more = [*loopback, "127.0.0.2"]
    assert [app.allowed_hosts for app in built] == [
        loopback,
        [*loopback, *named],
        None,
        named,
        more,
    ]


@pytest.mark.skipif(not socket.has_ipv6, reason="Python has no IPv6")
def test_a_server_may_listen_at_an_address_of_ipv6(mine):
    line = "mine:small", "--num-workers", "1", "--host", "::1"
    with running(*line, cwd=mine) as (process, port), socket.create_connection(("::1", port)):
        assert f"at http://[::1]:{port}/v2/models/small/infer" in process.head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-workers 0", "num_workers must be at least 1, got 0"),
        ("--deadline 0", "deadline must be positive and finite, got 0.0"),
        ("--memory --no-estimates", "--memory must be left out with --no-estimates"),
        ("--port 65536", "--port must be free: bind(): port must be 0-65535"),
        ("--port 1 --host 203.0.113.1", "--port must be free: [Errno"),
        ("--allowed-hosts a.example:80", "names or addresses, without ports, got 'a.example:80'"),
        ("--max-batch-size 0", "max_batch_size must be at least 1"),
        ("--example 63", "--example must be from 0 to 62, got 63"),
        ("mine:nothing", "must name a function or a class in a Python module, got no 'nothing' in"),
        ("mine:bare", "mine:bare must come with examples of its inputs, a tensor, a tuple or a"),
        ("mine:pair", "must return a module, or a module and examples of its inputs, got (str, T"),
        ("mine:local --port 0", "or be made there, by coded_torch.nn.FromFactory, got Local: "),
        ("mine:small --endpoints http://127.0.0.1:1", "MODEL must be left out with --e"),
        ("mine:wordy", "'output1' among outputs of the module must be strings, or a tensor with"),
        ("mine:estimated", "source, verified, corrected, radius, got ['"),
    ],
)
def test_bad_values_get_one_line_and_exit_code_2(arguments, message, mine, refused):
    assert message in refused(["serve", *arguments.split()])


def test_outputs_that_cannot_be_estimated_are_named_at_the_start(mine, monkeypatch, capsys):
    monkeypatch.setattr("coded_torch.cli._serve._listen", lambda *args: None)
    with warnings.catch_warnings(record=True) as caught:
        for name, said in {"small": False, "labels": True}.items():
            assert main(["serve", f"mine:{name}"]) == 0
            out = capsys.readouterr().out
            late = "Late requests get 504: integers and strings cannot be estimated (label)"
            assert (late in out) == said
        warnings.warn("CodedWrapper: output['label'] cannot be estimated", stacklevel=1)
    assert not caught


def test_estimates_can_be_forbidden(mine, monkeypatch):
    served = []
    monkeypatch.setattr("coded_torch.cli._serve._listen", lambda built, *_: served.append(built))
    for arguments in ([], ["--no-estimates"]):
        assert main(["serve", "mine:small", *arguments]) == 0
    assert [built.coded.waiting.estimate for built in served] == [True, False]


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "orjson", "prometheus_client"])
def test_a_missing_extra_says_how_to_get_it(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == (
        f"coded-torch serve: {package} must be installed: pip install 'coded_torch[serve]'\n"
    )
