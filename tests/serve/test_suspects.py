"""Rows that hang or end workers: others are answered, and such rows are refused."""

import asyncio
import json
import os
import signal
import time
from collections import Counter

import pytest
import torch
from torch import nn

from coded_torch.serve import TensorSpec
from coded_torch.testing.helpers import until
from coded_torch.workers import ProcessWorkers

from .servers import Client, built, serving, started, tensor

SPECS = {"inputs": [TensorSpec("input", "FP32", (3,))]}
SPECS["outputs"] = [TensorSpec("output", "FP32", (3,))]
HANGS, ENDS = 668.0, 666.0
HANG_TIMEOUT = 3.0


class Hostile(nn.Module):
    """Returns its rows, unless one of them hangs or ends the worker."""

    def forward(self, x):
        if bool((x == HANGS).any()):
            time.sleep(3600)
        if bool((x == ENDS).any()):
            os.kill(os.getpid(), signal.SIGSEGV)
        return x.clone()


def row(*values):
    return {"inputs": [tensor([[*values]])]}


@pytest.fixture(params=[2, 6])
def served(request):
    workers = ProcessWorkers(request.param, hang_timeout=HANG_TIMEOUT)
    examples = torch.randn(2, 3)
    application = built(Hostile(), workers=workers, deadline=1.5, examples=examples, **SPECS)
    with serving(application) as port:
        yield application, port


def asked(client, value, number):
    return [client.infer(row(value, float(i), 0.0))[0] for i in range(number)]


@pytest.mark.parametrize("value", [HANGS, ENDS])
def test_one_row_again_and_again_costs_others_nothing(served, value):
    application, port = served
    answers, refused = [], []
    ends = time.monotonic() + 3 * HANG_TIMEOUT

    def attack():
        with Client(port) as client:
            while time.monotonic() < ends:
                refused.append(client.infer(row(value, 0.0, 0.0)))

    with Client(port) as client:
        assert asked(client, 0.0, 5) == [200] * 5
        (attacker,) = started([attack])
        while attacker.is_alive():
            answers += asked(client, 1.0, 1)
        status, answer = client.infer(row(value, 0.0, 0.0))
    assert {*answers} == {200}, Counter(answers)
    assert refused[0][0] in (500, 504)
    assert status == 500
    assert "row 0 hung or ended" in answer["error"]
    # Each of the attacks that reached workers took one of them, or one and its hedges.
    reached = sum("row 0 hung or" not in a["error"] and s != 503 for s, a in refused)
    assert reached <= 2
    assert application.pool.num_restarts <= 6


@pytest.mark.parametrize("value", [HANGS, ENDS])
def test_one_row_of_many_clients_at_once_costs_others_nothing(served, value):
    _, port = served
    answers, over = [], time.monotonic() + 2 * HANG_TIMEOUT

    def attack(number):
        time.sleep(number / 20)  # until now nothing is known of the row
        with Client(port) as client:
            while time.monotonic() < over:
                client.infer(row(value, 0.0, 0.0))

    with Client(port) as client:
        assert asked(client, 0.0, 40) == [200] * 40  # usual times are known
        threads = started([lambda i=i: attack(i) for i in range(8)])
        while any(thread.is_alive() for thread in threads):
            answers += asked(client, 1.0, 1)
    assert {*answers} == {200}, Counter(answers)


def test_a_row_that_was_only_late_is_computed_again(served):
    application, port = served
    pids = [pid for _, pid in application.pool.states.values()]
    with Client(port) as client:
        assert asked(client, 0.0, 3) == [200] * 3
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        assert client.infer(row(1.0, 2.0, 3.0))[0] == 504
        status, answer = client.infer(row(1.0, 2.0, 3.0))
        assert (status, "still at row 0" in answer["error"]) == (503, True)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        until(lambda: client.infer(row(1.0, 2.0, 3.0))[0] == 200)
    assert not application.batcher.suspects


def test_a_client_of_a_known_address_hangs_a_third_of_the_workers_at_most():
    how = SPECS | {"examples": torch.randn(2, 3), "deadline": 0.5}
    application = built(Hostile(), workers=ProcessWorkers(6), **how)
    far, other = ("192.0.2.1", 1), ("192.0.2.2", 1)

    async def ask(client, value, other=0.0, **headers):
        messages = [{"type": "http.request", "body": json.dumps(row(value, other, 0.0)).encode()}]
        sent = []

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        lines = [(x.encode(), y.encode()) for x, y in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": lines}
        await application(scope | {"client": client}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    async def run():
        async with application.router.lifespan_context(application):
            assert (await ask(far, 0.0))[0] == 200
            assert (await ask(far, HANGS, 1.0))[0] == 504
            status, answer = await ask(far, HANGS, 2.0)
            assert status == 503
            assert "workers are still at rows of your earlier requests" in answer["error"]
            assert (await ask(far, 0.0, via="a proxy"))[0] == 200  # anybody's
            assert (await ask(other, 0.0))[0] == 200

    asyncio.run(run())
