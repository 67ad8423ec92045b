"""The application under uvicorn: routes, bodies, refusals, disconnects and the end."""

import contextlib
import functools
import gzip
import json
import math
import os
import re
import resource
import socket
import statistics
import threading
import time
import types
import zlib

import pytest
import torch
from torch import nn

from coded_torch import Waiting
from coded_torch.nn import CodedWrapper
from coded_torch.serve import App, TensorSpec, _protocol, specs
from coded_torch.serve import _application as application_module
from coded_torch.stragglers import Trace
from coded_torch.testing.helpers import until
from coded_torch.workers import DeviceWorkers, LocalWorkers, ProcessWorkers, WorkerError

from ..nn.modules import Call
from .servers import INPUTS, OUTPUTS, Client, built, linear, serving, started, tensor

ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
ONE = {"inputs": [tensor(ROWS)]}
PATH = "/v2/models/m/infer"


@pytest.fixture(scope="module")
def port():
    with serving(built()) as port:
        yield port


@pytest.fixture
def client(port):
    with Client(port) as client:
        yield client


class Held(nn.Module):
    """Computes rows of zeros at once, and others when it may."""

    def __init__(self):
        super().__init__()
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def forward(self, x):
        if x.any():
            self.begun.release()
            assert self.go.wait(30)
        return x[:, :2]


@pytest.fixture
def held():
    """Yield a model that computes when it may, and lets it go at the end."""
    module = Held()
    yield module
    module.go.set()


def holding(held, num_workers=2, **options):
    """Return an application that computes one request of two rows at a time."""
    options = {"deadline": 30.0} | options
    return built(held, workers=DeviceWorkers(["cpu"] * num_workers), **options)


def test_metadata(client):
    assert "binary_tensor_data" in client.get("/v2")[1]["extensions"]
    assert client.get("/v2/health/live") == (200, {"live": True})
    ready = 200, {"name": "m", "ready": True}
    assert client.get("/v2/health/ready") == ready
    for version in ("", "/versions/1"):
        assert client.get(f"/v2/models/m{version}/ready") == ready
        status, found = client.get(f"/v2/models/m{version}")
        assert (status, found["name"], found["versions"]) == (200, "m", ["1"])
        assert found["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}]
        names = [spec["name"] for spec in found["outputs"]]
        # An older client takes an output that it does not know for one of the model's own.
        assert names == [
            "output",
            "estimated",
            "radius",
            "label_p_value",
            "source",
            "verified",
            "corrected",
        ]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/m/versions/2", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/m/versions/2/infer", 404),
        ("GET", "/v2/models/m/infer", 405),
        ("GET", "/nowhere", 404),
    ],
)
def test_unknown_paths(client, method, path, status):
    found, headers, body = client.send(method, path, b"{}" if method == "POST" else None)
    assert (found, headers["content-type"]) == (status, "application/json")
    error = json.loads(body)["error"]
    if status == 404:  # it names what was asked for, and what is there
        assert error == f"there is no {path!r}; the model here is 'm', version 1"


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({}, None),
        ({"Host": "[::1]:80"}, None),
        ({"Origin": "http://localhost:3000"}, None),
        ({"Host": "evil.example"}, "Host of a request must be one of 127.0.0.1, localhost, ::1"),
        ({"Host": ""}, "Host"),
        ({"Host": "[::1"}, "Host"),
        ({"Host": "127.0.0.1.evil.example"}, "Host"),
        ({"Origin": "http://evil.example", "Content_Type": "text/plain"}, "Origin"),
        ({"Origin": "null"}, "Origin"),
    ],
    ids=str,
)
def test_only_allowed_hosts_may_use_any_route(headers, named):
    hosts = ("127.0.0.1", "localhost", "::1")
    with serving(built(allowed_hosts=hosts)) as port, Client(port) as client:
        for method, path in (("POST", PATH), ("GET", "/v2"), ("GET", "/metrics"), ("GET", "/no")):
            body = json.dumps(ONE) if method == "POST" else None
            status, _, answer = client.send(method, path, body, **headers)
            assert (status == 403) == (named is not None)
            assert named is None or named in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("encoding", "squeeze"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)],
)
def test_packed_bodies(client, encoding, squeeze):
    many = {"id": "a", "inputs": [tensor(torch.arange(192.0).reshape(64, 3).tolist())]}
    body = squeeze(json.dumps(many).encode())
    headers = {"Content_Encoding": encoding, "Accept_Encoding": "gzip"}
    status, found, answer = client.send("POST", PATH, body, **headers)
    assert (status, found["content-encoding"]) == (200, None)
    answer = json.loads(answer)
    assert answer.pop("outputs")[0]["shape"] == [64, 2]
    head = {"model_name": "m", "model_version": "1", "id": "a"}
    assert answer == head | {"parameters": {"estimated_rows": 0, "coverage": 0.95}}


@pytest.mark.parametrize(
    ("body", "headers", "status", "why"),
    [
        (b"x", {"Content_Encoding": "br"}, 415, "gzip or deflate, got 'br'"),
        (b"[" * 1020 + b"]" * 1020, {}, 400, ""),  # its repr is too deep for Python 3.11
        (b"x", {"Content_Encoding": "gzip"}, 400, "must be one complete gzip"),
        (gzip.compress(b"{}")[:-4], {"Content_Encoding": "gzip"}, 400, "one complete gzip stream"),
        (gzip.compress(b"{}") * 2, {"Content_Encoding": "gzip"}, 400, "one complete gzip stream"),
        (gzip.compress(bytes(2**27)), {"Content_Encoding": "gzip"}, 413, "at most 163840 bytes"),
        (zlib.compress(bytes(2**27)), {"Content_Encoding": "deflate"}, 413, "at most 163840 bytes"),
        (bytes(163841), {}, 413, "at most 163840 bytes"),
        (b"{}", {"Inference_Header_Content_Length": "3"}, 400, "at most the length of the body"),
    ],
)
def test_bad_bodies(port, body, headers, status, why):
    with Client(port) as client:
        found, answer = client.infer(body, **headers)
    assert found == status
    assert why in answer["error"]


def test_a_bad_request_leaves_the_connection_usable_and_no_label_in_the_metrics(client):
    bad = {"inputs": [tensor(ROWS) | {"data": [1, 2, 3, 4, 1e39, 6]}]}
    status, answer = client.infer(bad)
    assert (status, answer) == (400, {"error": "input 'input' must be finite, but row 1 is not"})
    assert client.infer(ONE)[0] == 200
    client.infer({"inputs": [tensor(ROWS, "secret")]})
    refusals = [line for line in client.metrics().splitlines() if 'reason="invalid"' in line]
    assert refusals
    client.send("POST", "/v2/models/secret/infer", b"{}")
    text = client.metrics()
    assert set(refusals) <= set(text.splitlines())  # another path is no invalid request
    assert "secret" not in text


def chunked(port, chunks):
    """Send a body without its length, and return the beginning of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        with contextlib.suppress(OSError):  # the server may refuse before all is sent
            for chunk in chunks:
                connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            connection.sendall(b"0\r\n\r\n")
        return connection.recv(65536)


def test_chunked_bodies(port):
    body = json.dumps(ONE).encode()
    assert b" 200 " in chunked(port, [body[:10], body[10:]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert b" 413 " in chunked(port, (bytes(2**16) for _ in range(2**12)))  # 256 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # kB


def without_body(port, seconds=0.2):
    """Return the answer to a request whose body never comes; status 0 if there is none in time."""
    with Client(port) as client:
        connection = client.connection
        connection.putrequest("POST", PATH)
        connection.putheader("Content-Length", "100")
        connection.endheaders()
        connection.sock.settimeout(seconds)
        try:
            answer = connection.getresponse()
        except TimeoutError:
            return 0, {}, b""
        return answer.status, answer.headers, answer.read()


@pytest.fixture
def patient(monkeypatch):
    """Let servers wait for bodies longer than a busy machine takes for anything."""
    monkeypatch.setattr(_protocol, "_READING", 120.0)
    return {"deadline": 240.0}


def test_bodies_that_do_not_come_take_no_slots(patient):
    application = built(max_queued_requests=2, **patient)
    with serving(application) as port, contextlib.ExitStack() as stack:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
        for _ in range(40):
            address = "127.0.0.1", port
            stack.enter_context(socket.create_connection(address, timeout=30)).sendall(head)
        until(lambda: application.reader.left == 2**27 - 40)
        with Client(port) as client:
            assert [client.infer(ONE)[0] for _ in range(5)] == [200] * 5
    assert application.reader.left == 2**27  # given back


def test_all_bodies_together_are_bounded(monkeypatch, patient):
    monkeypatch.setattr(_protocol, "_TOGETHER", 0)
    application = built(**patient, max_batch_size=60)
    most = application.reader.left
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {2**16}\r\n\r\n".encode()
    with serving(application) as port, Client(port) as client, contextlib.ExitStack() as stack:
        for _ in range(most // 2**16):
            part = socket.create_connection(("127.0.0.1", port), timeout=30)
            stack.enter_context(part).sendall(head + bytes(2**16 - 1))
        until(lambda: application.reader.left == most % 2**16 + most // 2**16)
        status, headers, body = client.send("POST", PATH, bytes(2**16))
        assert (status, headers["retry-after"]) == (503, "1")
        assert "too many bytes of requests are being read" in json.loads(body)["error"]
        assert client.infer(ONE)[0] == 200  # few bytes still fit


def test_bombs_are_refused_and_do_not_hold_up_others():
    """The bodies are small, and would be 67 MB of JSON, or a million lists or objects."""
    spec = [TensorSpec("input", "FP32", (-1,))]
    head = b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3], "data": ['
    bombs = [head + b"[]," * 2**24, head + b"[]," * 300_000, head + b"0.123456789," * 80_000 + b"x"]
    bombs += [b'{"inputs": [' + b'{"a":[{}]},' * 150_000, head + b"0," * 1_000_000]
    bombs, found, took = [gzip.compress(bomb) for bomb in bombs], [], []
    with serving(built(nn.Identity(), inputs=spec, outputs=spec)) as port, Client(port) as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def throw():
            with Client(port) as mine:
                found.extend(mine.infer(bomb, Content_Encoding="gzip")[0] for bomb in bombs * 3)

        threads, stop = started([throw] * 2), time.monotonic() + 60
        while any(thread.is_alive() for thread in threads) and time.monotonic() < stop:
            begin = time.monotonic()
            assert client.infer(ONE)[0] == 200
            took.append(time.monotonic() - begin)
        for thread in threads:
            thread.join(30)
    assert {*found} == {400, 413}
    assert len(found) == 30
    assert statistics.median(took) < 0.5  # of which a busy machine makes some slow
    assert max(took) < 10  # a bomb that is parsed at once stops the event loop for as long
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB


def test_a_full_queue_is_noticed_before_the_body_is_read(held):
    with serving(holding(held, max_queued_requests=1)) as port, Client(port) as client:
        answers = []

        def ask():
            with Client(port) as mine:
                answers.append(mine.infer(ONE)[0])

        threads = started([ask])
        assert held.begun.acquire(timeout=30)
        threads += started([ask])
        found = []
        until(lambda: found.append(without_body(port)) or found[-1][0] == 503)
        _, headers, body = found[-1]
        assert headers["retry-after"] == "1"
        assert "1 requests are waiting" in json.loads(body)["error"]
        assert 'refusals_total{reason="queue_full"}' in client.metrics()
        held.go.set()
        for thread in threads:
            thread.join(30)
    assert answers == [200, 200]


def test_a_body_that_does_not_come_within_half_the_deadline_is_408():
    with serving(built(deadline=0.1)) as port:
        status, _, body = without_body(port, 30.0)
    assert status == 408
    assert re.search(r"the body did not come within 0\.0\d+ s", json.loads(body)["error"])


def test_a_client_that_disconnects_leaves_the_queue(held):
    application = holding(held)
    batcher = application.batcher
    with serving(application) as port:
        with Client(port) as first, Client(port) as second:
            for client in first, second:
                client.connection.request("POST", PATH, json.dumps(ONE))
            assert held.begun.acquire(timeout=30)
            until(lambda: len(batcher._queue) == 1)
        until(lambda: len(batcher._queue) == 0)
        with Client(port) as client:
            until(lambda: 'refusals_total{reason="disconnected"} 2.0' in client.metrics())
            held.go.set()
            assert client.infer(ONE)[0] == 200


@pytest.mark.parametrize(("said", "seconds"), [({}, 0.2), ({"timeout": 50_000}, 0.05)], ids=str)
def test_a_deadline_without_results_is_504_and_in_time(held, said, seconds):
    with serving(holding(held, deadline=0.2)) as port, Client(port) as client:
        start = time.monotonic()
        status, answer = client.infer(ONE | {"parameters": said})
        took = time.monotonic() - start
        held.go.set()
    assert status == 504
    assert re.match("too few results (arrived )?within the deadline", answer["error"])
    assert seconds - 0.02 <= took < seconds + 10  # the model would take 30 s


def test_two_slow_rows_do_not_take_all_workers():
    pool, answers, over = DeviceWorkers(["cpu"] * 6), [], threading.Event()

    def slow(x):
        # The second slow row comes, on a busy machine too, before the first one is hedged thrice.
        over.wait(60 if (x == 9).any() else 0.03)
        return x[:, :2]

    with serving(built(Call(slow), workers=pool, deadline=30.0)) as port:

        def ask(row, microseconds=30_000_000):
            request = {"inputs": [tensor([[row] * 3])], "parameters": {"timeout": microseconds}}
            with Client(port) as client:
                answers.append((row, client.infer(request)[0]))

        for _ in range(40):  # latencies become known
            ask(0.0)
        threads = started([functools.partial(ask, 9.0, 1_000_000)] * 2)
        while any(thread.is_alive() for thread in threads):
            ask(1.0)
        for _ in range(10):
            ask(1.0)
        over.set()
    assert {status for row, status in answers if row < 9} == {200}
    assert [status for row, status in answers if row == 9] == [504] * 2


def test_while_workers_compute_rows_of_requests_that_have_ended_others_are_told_so(held):
    application = holding(held)
    malformed = {"inputs": [tensor(ROWS, "other")]}
    with serving(application) as port, Client(port) as client, Client(port) as other:
        assert client.infer(ONE | {"parameters": {"timeout": 500_000}})[0] == 504
        others = {"inputs": [tensor([[7.0, 8.0, 9.0]])]}
        other.connection.request("POST", PATH, json.dumps(others))  # is tried
        until(lambda: application.batcher._ongoing)
        status, answer = client.infer({"inputs": [tensor([[8.0, 8.0, 9.0]])]})
        assert client.infer(malformed)[0] == 400
        held.go.set()
    assert status == 503
    assert "no worker is idle" in answer["error"]
    assert "1 or more workers are at rows of requests that have ended" in answer["error"]


def test_late_requests_get_504_where_estimates_are_forbidden():
    workers = LocalWorkers(Trace([[math.inf] + [0.0] * 3]))
    application = built(workers=workers, waiting=Waiting(hedge_budget=0, estimate=False))
    with serving(application) as port, Client(port) as client:
        status, answer = client.infer({"inputs": [tensor(torch.ones(64, 3))]})
    assert status == 504
    assert "within the deadline" in answer["error"]


@pytest.mark.parametrize("lost", [1, 2])
def test_missing_rows_are_estimated_and_flagged(lost):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 3, generator=generator)
    names = ("output", "estimated", "error_bound", "label_p_value", "source", "radius")
    outputs = [{"name": name} for name in names]
    workers = LocalWorkers(Trace([[math.inf] * lost + [0.0] * (4 - lost)]))
    application = built(workers=workers, waiting=Waiting(hedge_budget=0))
    with serving(application) as port, Client(port) as client:
        request = {"inputs": [tensor(rows)], "outputs": outputs}
        status, answer = client.infer(request)
        text = client.metrics()
        _, low = client.infer(request | {"parameters": {"coverage": 0.5}})
        _, high = client.infer(request | {"parameters": {"coverage": 0.999}})
    assert status == 200
    found = (
        torch.tensor([math.inf if x is None else x for x in entry["data"]])
        for entry in answer["outputs"]
    )
    output, estimated, errors, p_values, source, radius = found
    output, exact = output.reshape(64, 2), linear()(rows).detach()
    assert int(estimated.sum()) == answer["parameters"]["estimated_rows"] == 16 * lost
    assert torch.equal(errors, radius)  # the name of version 0.4
    assert torch.allclose(output[~estimated], exact[~estimated], atol=1e-5)
    assert not torch.allclose(output[estimated], exact[estimated], atol=1e-5)
    assert (errors[~estimated] == 0).all()
    assert (errors[estimated] > 0).all()
    for other, holds in ((low, lambda x: x < errors[estimated].median()), (high, math.isinf)):
        marks, bounds = (entry["data"] for entry in other["outputs"][1:3])
        bounds = [
            math.inf if x is None else x for x, mark in zip(bounds, marks, strict=True) if mark
        ]
        assert holds(statistics.median(bounds))
    assert [x["parameters"]["coverage"] for x in (answer, low, high)] == [0.95, 0.5, 0.999]
    assert (source == torch.where(estimated, 2, 0)).all()
    assert (p_values[~estimated] == 0).all()
    assert (p_values[estimated] > 0).all()
    assert f'coded_torch_answers_total{{kind="estimated"}} {16.0 * lost}' in text
    assert f'coded_torch_answers_total{{kind="computed"}} {64 - 16.0 * lost}' in text


def test_outputs_are_named_by_the_keys_of_a_dict():
    named = Call(lambda x: {"sum": x.sum(1), "double": 2 * x})
    inputs, outputs = specs(named, (torch.ones(2, 3),))
    with serving(built(named, inputs=inputs, outputs=outputs)) as port, Client(port) as client:
        _, answer = client.infer({"inputs": [tensor([[1, 2, 3], [4, 5, 6]], inputs[0].name)]})
    found = {entry["name"]: entry["data"] for entry in answer["outputs"]}
    assert found == {"sum": [6.0, 15.0], "double": [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]}


@pytest.mark.filterwarnings("ignore:.*there are no distances")
def test_a_request_that_makes_the_module_fail_fails_alone():
    embed = Call(lambda ids: nn.functional.embedding(ids, torch.arange(8.0).view(4, 2)).sum(1))
    inputs = [TensorSpec("ids", "INT64", (-1,))]
    workers = DeviceWorkers(["cpu"] * 6)
    with serving(built(embed, workers=workers, inputs=inputs)) as port:
        answers = {}

        def ask(name, ids):
            with Client(port) as client:
                answers[name] = client.infer({"inputs": [tensor(ids, "ids", "INT64")]})

        asked = {i: [[i, 1]] for i in range(4)} | {"bad": [[0, 9]]}
        for thread in started(functools.partial(ask, *item) for item in asked.items()):
            thread.join(30)
    status, answer = answers.pop("bad")
    assert status == 500
    assert "index out of range" in answer["error"]
    for i, (status, answer) in answers.items():
        assert (status, answer["parameters"]["estimated_rows"]) == (200, 0)
        assert answer["outputs"][0]["data"] == [2.0 * i + 2, 2.0 * i + 4]


def test_a_model_that_returns_other_tensors_than_its_specs_is_500(caplog):
    outputs = [TensorSpec("output", "FP32", (3,))]
    with serving(built(outputs=outputs)) as port, Client(port) as client:
        assert client.infer(ONE) == (500, {"error": "the model failed: TypeError"})
    assert "must return tensors [(torch.float32, [2, 3])], got [(torch.float32, [2" in caplog.text


def test_accepted_requests_are_answered_at_the_end(held):
    answers, application = [], holding(held)
    with serving(application) as port:

        def ask():
            with Client(port) as client:
                answers.append(client.infer(ONE)[0])

        threads = started([ask] * 5)
        assert held.begun.acquire(timeout=30)
        until(lambda: len(application.batcher._queue) == 4)
        threading.Timer(0.3, held.go.set).start()
    for thread in threads:
        thread.join(30)
    assert answers == [200] * 5


def test_objects_that_the_host_has_frozen_stay_frozen(monkeypatch):
    for frozen, more in ((1, []), (0, ["unfreeze"])):
        called = []
        calls = {x: functools.partial(called.append, x) for x in ("collect", "freeze", "unfreeze")}
        fake = types.SimpleNamespace(get_freeze_count=lambda frozen=frozen: frozen, **calls)
        monkeypatch.setattr("coded_torch.serve._application.gc", fake)
        with serving(built()):
            pass
        assert called == ["collect", "freeze", *more]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coded": linear()}, "App: coded must be of type CodedWrapper, got Linear"),
        ({"name": 3}, "App: name must be of type str"),
        ({"name": "a/b"}, "App: name must be a part of a URL, without any of {}/?#%, got 'a/b'"),
        ({"inputs": []}, "App: inputs must be named, each once, got []"),
        ({"inputs": INPUTS * 2}, "App: inputs must be named, each once, got ['input', 'input']"),
        ({"outputs": ["output"]}, "App: an entry of outputs must be of type TensorSpec, got str"),
        (
            {"outputs": [TensorSpec("radius", "FP32", ())]},
            "verified, corrected, radius",
        ),
        ({"deadline": 0}, "App: deadline must be positive and finite, got 0"),
        ({"max_batch_size": 0}, "App: max_batch_size must be at least 1, got 0"),
        ({"max_queued_requests": 0}, "App: max_queued_requests must be at least 1"),
    ],
)
def test_bad_arguments(changes, message):
    options = {"name": "m", "inputs": INPUTS, "outputs": OUTPUTS, "deadline": 1.0}
    coded = CodedWrapper(linear(), workers=LocalWorkers(), parts=4)
    with pytest.raises((TypeError, ValueError)) as caught:
        App(**{"coded": coded} | options | changes)
    assert message in str(caught.value)


def test_a_worker_starts_on_two_rows_that_differ():
    started = []
    noted = Call(lambda x: started.append(x.tolist()) or x[:, :2])
    examples = torch.tensor([[1.0, 2.0, 3.0]] * 2 + [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    application = built(noted.eval(), workers=DeviceWorkers(["cpu"]), examples=[examples])
    application.load()
    application.pool.close()
    assert started[0] == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


class Ends(nn.Module):
    """Ends the process that runs it."""

    def forward(self, x):
        os._exit(3)


def test_a_module_that_ends_its_workers_does_not_become_ready():
    application = built(Ends().eval(), workers=ProcessWorkers(2), examples=[torch.zeros(2, 3)])
    with pytest.raises(WorkerError, match="exit code 3"):
        application.load()
    application.pool.close()


class Widened(nn.Module):
    """Returns each number of a row many times."""

    def forward(self, x):
        return x.repeat_interleave(20_000, 1)


WIDE = [TensorSpec("output", "FP32", (60_000,))]


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_wide_answer_is_sent_in_pieces(is_binary):
    body = ONE | {"parameters": {"binary_data_output": is_binary}}
    with serving(built(Widened(), outputs=WIDE)) as port, Client(port) as client:
        status, headers, answer = client.send("POST", PATH, json.dumps(body))
        assert client.get("/v2")[0] == 200  # over the same connection
    length = int(headers["Inference-Header-Content-Length"] or len(answer))
    (output,) = json.loads(answer[:length])["outputs"]
    data = (
        output["data"]
        if "data" in output
        else torch.frombuffer(bytearray(answer[length:]), dtype=torch.float32)
    )
    assert status == 200
    assert torch.equal(torch.as_tensor(data).reshape(2, -1), Widened()(torch.tensor(ROWS)))


def test_answers_that_nobody_reads_are_bounded_together(monkeypatch):
    monkeypatch.setattr(application_module, "_UNREAD", 2**22)
    application = built(Widened(), outputs=WIDE, max_batch_size=16)
    many = {"inputs": [tensor([[0.123456, 2.0, 3.0]] * 16)]}  # 960,000 numbers, some 10 MB
    content = json.dumps(many).encode()
    asked = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (
        PATH.encode(),
        len(content),
    )
    with serving(application) as port, Client(port) as client:
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(asked + content)
            until(lambda: application.unread)
            status, answer = client.infer(many)
            assert (status, "answers are not read" in answer["error"]) == (503, True)
            assert (
                client.infer({"inputs": [tensor(ROWS)], "outputs": [{"name": "source"}]})[0] == 200
            )
        until(lambda: not application.unread)
        assert client.infer(many)[0] == 200


def test_a_request_of_more_rows_than_a_batch_is_divided():
    sizes = []

    class Noting(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return 2 * x[:, :2]

    rows = torch.arange(30.0).reshape(10, 3)
    wanted = [{"name": "output"}, {"name": "source"}]
    with serving(built(Noting(), max_batch_size=4)) as port, Client(port) as client:
        status, answer = client.infer({"inputs": [tensor(rows)], "outputs": wanted, "id": "a"})
        (output, source) = answer["outputs"]
        many = {"inputs": [tensor(torch.zeros(65, 3))]}
        assert "must be from 1 to 64, got 65" in client.infer(many)[1]["error"]
    assert (status, answer["id"], output["shape"]) == (200, "a", [10, 2])
    assert output["data"] == (2 * rows[:, :2]).flatten().tolist()
    assert source["data"] == [0] * 10
    assert max(sizes) <= 4


def test_a_divided_request_is_refused_as_a_whole(held):
    application = holding(held, max_batch_size=2, max_queued_requests=4)
    with serving(application) as port, Client(port) as client, Client(port) as other:
        other.connection.request(
            "POST", PATH, json.dumps({"inputs": [tensor([[1.0, 1.0, 1.0]] * 8)]})
        )
        until(lambda: len(application.batcher._queue) >= 2)
        status, _ = client.infer({"inputs": [tensor([[2.0, 1.0, 1.0]] * 8)]})
        queued = len(application.batcher._queue)
        held.go.set()
        assert other.connection.getresponse().status == 200
    assert status == 503
    assert queued <= 4
