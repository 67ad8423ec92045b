"""New weights while a server answers: every answer is of one version, which it names."""

import json
import os
import sys
import threading
import weakref
from collections import Counter

import pytest
import torch
import tritonclient.http as triton
from torch import nn

from coded_torch import Waiting
from coded_torch.nn import CodedWrapper
from coded_torch.serve import App, TensorSpec, _model
from coded_torch.surrogates import Memory
from coded_torch.testing.helpers import until
from coded_torch.workers import DeviceWorkers, ProcessWorkers

from ..nn.modules import Call
from .servers import Client, serving, started, tensor

LOAD = "/v2/repository/models/m/load"
UNLOAD = "/v2/repository/models/m/unload"


class Times(nn.Module):
    """Multiplies by its number, and may fail on its first call or return another size."""

    def __init__(self, number, fails=False, width=3):
        super().__init__()
        self.fails, self.width = fails, width
        self.number = nn.Parameter(torch.tensor(float(number)), requires_grad=False)

    def forward(self, x):
        if self.fails and not torch.is_inference_mode_enabled():
            raise RuntimeError("no weights")
        return self.number * x[:, : self.width]


class Factory:
    """Makes modules whose number is their version, unless told otherwise."""

    def __init__(self):
        self.made = 1
        self.next = lambda number: Times(number)

    def __call__(self):
        module = self.next(self.made + 1)
        self.made += 1
        return module


class Held(Factory):
    """Makes a module once it may."""

    def __init__(self):
        super().__init__()
        self.begun = threading.Event()
        self.may_go_on = threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.may_go_on.wait(60)
        return super().__call__()


def post_load(port, found):
    with Client(port) as client:
        found.append(client.send("POST", LOAD))


def built(pool, factory, *, surrogate=(), waiting=None, **options):
    coded = CodedWrapper(Times(1), workers=pool, surrogate=surrogate, waiting=waiting)
    inputs, outputs = [TensorSpec("x", "FP32", (3,))], [TensorSpec("output", "FP32", (3,))]
    examples = torch.arange(6.0).reshape(2, 3)
    how = {"inputs": inputs, "outputs": outputs, "examples": examples, "deadline": 20.0}
    return App(coded, name="m", **how, make=factory, **options)


def ask(client, path="/v2/models/m/infer"):
    return client.infer({"inputs": [tensor([[1.0, 2.0, 4.0]], "x")]}, path)


def test_a_version_replaces_another_for_tritons_client():
    factory = Factory()
    application = built(DeviceWorkers(["cpu"] * 2), factory)
    with serving(application) as port, Client(port) as client:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as theirs:
            assert ask(client)[1]["model_version"] == "1"
            theirs.load_model("m")
            status, answer = ask(client)
            assert (status, answer["model_version"]) == (200, "2")
            assert answer["outputs"][0]["data"] == [2.0, 4.0, 8.0]
            assert theirs.get_model_metadata("m")["versions"] == ["2"]
            assert theirs.get_model_repository_index()[0]["version"] == "2"
            assert theirs.get_inference_statistics("m")["model_stats"][0]["version"] == "2"
            assert theirs.is_model_ready("m", "2")
            assert not theirs.is_model_ready("m", "1")
        assert ask(client, "/v2/models/m/versions/2/infer")[0] == 200
        assert client.get("/v2/models/m/versions/2")[0] == 200
        assert client.get("/v2/models/m/versions/22")[0] == 404
        status, answer = ask(client, "/v2/models/m/versions/1/infer")
        assert status == 404
        assert "the model here is 'm', version 2" in answer["error"]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda number: 1 / 0, "version 1 stays: ZeroDivisionError: division by zero"),
        (lambda number: Times(number, fails=True), "RuntimeError: no weights"),
        (lambda number: Times(number, width=2), "must return tensors [(torch.float32, [2, 3])]"),
        (lambda number: Call(lambda x: x.double()), "got [(torch.float64, [2, 3])]"),
        (lambda number: "no", "the result of make must be of type Module, got str"),
        (lambda number: sys.exit("no weights"), "SystemExit: no weights"),
    ],
)
def test_a_load_that_fails_keeps_the_version(module, message, caplog):
    factory = Factory()
    factory.next = module
    with serving(built(DeviceWorkers(["cpu"] * 2), factory)) as port, Client(port) as client:
        status, _, body = client.send("POST", LOAD)
        assert status == 400
        assert message in body.decode()
        assert "no version of m was loaded, so version 1 stays" in caplog.text
        assert ask(client)[1]["model_version"] == "1"
        factory.next = Times
        assert client.send("POST", LOAD)[0] == 200
        assert ask(client)[1]["outputs"][0]["data"][0] == factory.made


def test_who_may_load():
    factory = Factory()
    pool = DeviceWorkers(["cpu"])
    with serving(built(pool, factory, token="secret")) as port, Client(port) as client:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            status, _, body = client.send("POST", LOAD, **headers)
            assert status == 403
            assert b"a load needs the server's token" in body
        assert client.send("POST", LOAD, Authorization="Bearer secret")[0] == 200
    with serving(built(DeviceWorkers(["cpu"]), factory)) as port, Client(port) as client:
        # A page of the web, and a proxy before strangers.
        names = ["X_Forwarded_For", "X_Forwarded_Proto", "X_Real_IP", "X_Envoy_Internal"]
        names += ["X_Request_ID", "X_HAProxy_Reload_ID", "CF_Connecting_IP", "True_Client_IP"]
        names += ["X_Client_IP", "X_Cluster_Client_Ip"]
        assert client.send("POST", LOAD, Sec_Fetch_Site="cross-site")[0] == 403
        assert client.send("POST", LOAD.replace("/load", "%2Fload"))[0] == 404
        for headers in ({"Origin": "http://a.example"}, *({name: "127.0.0.1"} for name in names)):
            assert client.send("POST", LOAD, **headers)[0] == 403
        assert client.send("GET", LOAD)[0] == 405
        assert client.send("POST", LOAD)[0] == 200
    with serving(built(DeviceWorkers(["cpu"]), None)) as port, Client(port) as client:
        assert b"as it has no make" in client.send("POST", LOAD)[2]


def test_one_version_is_loaded_at_a_time():
    factory = Held()
    found = []
    with serving(built(DeviceWorkers(["cpu"]), factory)) as port, Client(port) as client:
        (thread,) = started([lambda: post_load(port, found)])
        assert factory.begun.wait(60)
        status, _, body = client.send("POST", LOAD)
        factory.may_go_on.set()
        thread.join()
    assert (status, found[0][0]) == (400, 200)
    assert b"one is being loaded" in body


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_a_load_that_hangs_is_shown_and_ends(how, monkeypatch):
    factory = Held()
    found = []
    monkeypatch.setattr(_model, "_LOAD_SECONDS", 600.0 if how == "cancelled" else 0.5)
    with serving(built(DeviceWorkers(["cpu"]), factory)) as port, Client(port) as client:
        assert client.send("POST", UNLOAD)[0] == 400  # nothing is loaded
        (thread,) = started([lambda: post_load(port, found)])
        assert factory.begun.wait(60)
        if how == "cancelled":
            listed = json.loads(client.send("POST", "/v2/repository/index")[2])
            assert [(x["version"], x["state"]) for x in listed] == [
                ("1", "READY"),
                ("2", "LOADING"),
            ]
            assert ask(client)[1]["model_version"] == "1"
            assert client.send("POST", UNLOAD, Origin="http://a.example")[0] == 403
            assert client.send("POST", UNLOAD)[0] == 200
        thread.join(60)
        factory.may_go_on.set()
        until(lambda: client.send("POST", LOAD)[0] == 200)
        assert ask(client)[1]["model_version"] == "2"
    ((status, _, body),) = found
    assert status == 400
    why = "the load was cancelled" if how == "cancelled" else "a load must end within 0.5 s"
    assert why in body.decode()


class Cancellable(Held):
    """The first cancel comes before it can be ended."""

    cancels = 0

    def cancel(self):
        self.cancels += 1
        if self.cancels > 1:
            self.may_go_on.set()


def test_a_load_is_cancelled_though_its_factory_begins_later():
    factory = Cancellable()
    with serving(built(DeviceWorkers(["cpu"]), factory)) as port, Client(port) as client:
        (thread,) = started([lambda: post_load(port, [])])
        assert factory.begun.wait(60)
        assert client.send("POST", UNLOAD)[0] == 200
        thread.join(60)
        assert factory.may_go_on.is_set()


def test_a_version_that_was_replaced_is_freed():
    application = built(pool := ProcessWorkers(1), Factory())
    with serving(application) as port, Client(port) as client:
        seen = [weakref.ref(application.coded.module)]
        for _ in range(2):
            ask(client)
            assert client.send("POST", LOAD)[0] == 200
            seen.append(weakref.ref(application.coded.module))
        ask(client)
        until(lambda: [each() is None for each in seen] == [True, True, False])
        assert pool.num_restarts == 0


class Elsewhere(Times):
    """Fails in other processes than the one that made it."""

    def __init__(self, number):
        super().__init__(number)
        self.pid = os.getpid()

    def forward(self, x):
        if os.getpid() != self.pid:
            raise RuntimeError("not here")
        return super().forward(x)


def test_workers_forget_a_version_that_fails():
    factory = Factory()
    factory.next = Elsewhere
    with serving(built(pool := ProcessWorkers(1), factory)) as port, Client(port) as client:
        ask(client)
        number, _ = pool._queue.modules.last()
        assert b"RuntimeError: not here" in client.send("POST", LOAD)[2]
        assert pool._queue.modules.last()[0] == number


class Dropped(Times):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), training=self.training)


def test_a_version_is_in_evaluation_mode_if_the_one_before_is():
    factory = Factory()
    factory.next = Dropped
    application = built(DeviceWorkers(["cpu"]), factory)
    application.coded.eval()
    with serving(application) as port, Client(port) as client:
        for version in ("2", "3"):
            assert client.send("POST", LOAD)[0] == 200
            answer = ask(client)[1]
            data = [float(version) * x for x in (1.0, 2.0, 4.0)]
            assert (answer["model_version"], answer["outputs"][0]["data"]) == (version, data)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_that_are_changed_in_place_are_another_version(wrapped):
    factory = Factory()
    application = built(DeviceWorkers(["cpu"]), factory)
    module = application.coded.module

    def change(number):
        module.number.fill_(number)
        return nn.Sequential(module) if wrapped else module

    factory.next = change
    with serving(application) as port, Client(port) as client:
        status, _, body = client.send("POST", LOAD)
        assert status == 400
        assert b"version 2 stays: ValueError: App: make must return another module" in body
        assert b"got the present one with other weights" in body
        answer = ask(client)[1]
        assert (answer["model_version"], answer["outputs"][0]["data"]) == ("2", [2.0, 4.0, 8.0])


def test_a_memory_begins_anew():
    memory, factory = Memory(), Factory()
    waiting = Waiting(deadline=5.0)
    application = built(DeviceWorkers(["cpu"]), factory, surrogate=[memory], waiting=waiting)
    with serving(application) as port, Client(port) as client:
        ask(client)
        assert client.send("POST", LOAD)[0] == 200
        (new,) = application.coded.surrogate
        assert new is not memory
        assert application.coded.waiting == waiting


def under_load(pool, clients, reloads, failing):
    """Return the statuses and the wrong answers of clients while versions are loaded."""
    factory = Factory()
    application = built(pool, factory, max_queued_requests=clients)
    counts, wrong, over = Counter(), [], threading.Event()

    def client(number, port):
        with Client(port) as client:
            while not over.is_set():
                x = [[float(number), 2.0, 4.0]]
                status, answer = client.infer({"inputs": [tensor(x, "x")]})
                version = answer.get("model_version")
                counts[status, version] += 1
                data = answer["outputs"][0]["data"] if status == 200 else None
                if data != [float(version or 0) * each for each in x[0]]:
                    wrong.append((status, answer))

    with serving(application) as port, Client(port) as loader:
        ask(loader)
        threads = started([lambda i=i: client(i, port) for i in range(clients)])
        try:
            for number in range(reloads):
                factory.next = lambda x, n=number: Times(x, fails=n == failing)
                status = loader.send("POST", LOAD)[0]
                assert status == (400 if number == failing else 200)
                if number == failing:
                    factory.made -= 1
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert ask(loader)[1]["model_version"] == str(reloads)
    return counts, wrong


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_every_answer_is_of_the_version_that_it_names(kind):
    pool = DeviceWorkers(["cpu"] * 2) if kind == "threads" else ProcessWorkers(2)
    counts, wrong = under_load(pool, clients=8, reloads=5, failing=2)
    assert wrong == []
    assert len(counts) >= 4  # several versions answered


@pytest.mark.slow
def test_no_request_is_lost_by_twenty_loads_under_32_connections():
    counts, wrong = under_load(ProcessWorkers(4), clients=32, reloads=20, failing=11)
    print(counts)
    assert wrong == []
    assert len(counts) >= 15
