"""Rows that hang or end workers: others are answered, and such rows are refused."""

import asyncio
import contextlib
import itertools
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
HANG_TIMEOUT = 2.0
# Hung workers must have been replaced; one that ends is replaced at once.
ATTACK = {HANGS: 2 * HANG_TIMEOUT, ENDS: HANG_TIMEOUT}  # seconds


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


@pytest.fixture(params=[2, pytest.param(6, marks=pytest.mark.slow)])
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
    ends = time.monotonic() + ATTACK[value]

    def attack():
        with Client(port) as client:
            while time.monotonic() < ends:
                refused.append(client.infer(row(value, 0.0, 0.0)))

    with Client(port) as client:
        assert asked(client, 0.0, 5) == [200] * 5
        (attacker,) = started([attack])
        while attacker.is_alive():
            answers += asked(client, 1.0, 1)
    assert {*answers} == {200}, Counter(answers)
    assert refused[0][0] in (500, 504)

    def is_refused():
        with Client(port) as client:
            status, answer = client.infer(row(value, 0.0, 0.0))
        return status == 500 and "row 0 hung or ended" in answer["error"]

    until(is_refused)
    # Each of the attacks that reached workers took one of them, or one and its hedges.
    reached = sum("row 0 hung or" not in answer["error"] and s != 503 for s, answer in refused)
    assert reached <= 2
    assert application.pool.num_restarts <= 6


@pytest.mark.parametrize("value", [HANGS, ENDS])
def test_one_row_of_many_clients_at_once_costs_others_nothing(served, value):
    _, port = served
    answers, over = [], time.monotonic() + ATTACK[value]

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


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("value", [HANGS, ENDS])
def test_rows_that_all_differ_leave_workers_for_a_client_with_answers(served, value, number):
    _, port = served
    answers, refused, over = [], [], time.monotonic() + ATTACK[value]
    different = itertools.count(1)

    def attack():
        with contextlib.suppress(OSError), Client(port) as client:  # another client each time
            rows = [[value, float(next(different)), 0.0] for _ in range(number)]
            refused.append(client.infer({"inputs": [tensor(rows)]}))

    with Client(port) as client:
        assert asked(client, 0.0, 2) == [200] * 2
        threads = []
        while time.monotonic() < over:
            threads += started([attack] * 3)
            answers += asked(client, 1.0, 3)
            time.sleep(0.1)
        for thread in threads:
            thread.join()
    assert {*answers} == {200}, Counter(answers)
    assert any("clients without an answer" in answer["error"] for _, answer in refused)


LONG = 60.0  # a hang timeout that ends no worker of a test


def stopped(pids):
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def continued(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def served_long(num_workers):
    """Yield an application whose workers end by no hang timeout, its port, and a known client."""
    workers = ProcessWorkers(num_workers, hang_timeout=LONG)
    examples = torch.randn(2, 3)
    application = built(Hostile(), workers=workers, deadline=1.5, examples=examples, **SPECS)
    with serving(application) as port, Client(port) as client:
        assert asked(client, 0.0, 40) == [200] * 40
        yield application, port, client


def test_one_stopped_worker_of_two_costs_a_client_one_answer():
    with served_long(2) as (application, _, client):
        pid = application.pool.states[0][1]
        stopped([pid])
        answers = [client.infer(row(1.0, float(i), 0.0))[0] for i in range(40)]
        continued([pid])
    assert answers.count(200) >= 39, Counter(answers)


@pytest.mark.parametrize("num_workers", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_known_client_is_answered_beside_stopped_workers_and_rows_that_hang(num_workers):
    numbers = itertools.count(1)
    with served_long(num_workers) as (application, port, client):

        def attack():
            with contextlib.suppress(OSError), Client(port) as stranger:
                stranger.infer(row(HANGS, float(next(numbers)), 0.0))

        def states():
            return [state for state, _ in application.pool.states.values()]

        for thread in started([attack] * 3):
            thread.join()
        held = states().count("busy")
        assert held
        pids = [pid for state, pid in application.pool.states.values() if state == "idle"]
        stopped(pids)
        threads, answers, ends = [], [], time.monotonic() + 4
        while time.monotonic() < ends:
            threads += started([attack])
            answers.append(client.infer(row(1.0, float(next(numbers)), 0.0))[0])
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        until(lambda: "down" not in states())
        continued(pids)
    # A row that is at a stopped worker when all others are held is lost.
    assert len(answers) - answers.count(200) <= 1, Counter(answers)


def test_workers_that_are_killed_together_are_replaced_at_once():
    with served_long(4) as (application, _, client):
        pids = [pid for _, pid in application.pool.states.values()]
        for pid in pids[:3]:
            os.kill(pid, signal.SIGKILL)
        answers = asked(client, 1.0, 20)
        until(lambda: application.pool.num_ready == 4)
        assert not {*pids[:3]} & {pid for _, pid in application.pool.states.values()}
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


def test_clients_are_addresses_unless_these_may_be_anybodys():
    application = built(Hostile(), examples=torch.randn(2, 3), **SPECS)
    known = application.batcher.suspects

    async def ask(client, **headers):
        messages = [{"type": "http.request", "body": json.dumps(row(0.0, 0.0, 0.0)).encode()}]
        statuses = []

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message):
            statuses.append(message.get("status"))

        lines = [(x.replace("_", "-").encode(), y.encode()) for x, y in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": lines}
        await application(scope | {"client": client}, receive, send)
        assert statuses[0] == 200

    async def run():
        async with application.router.lifespan_context(application):
            await ask(("192.0.2.1", 1))
            assert known.knows("192.0.2.1")
            await ask(("127.0.0.1", 2))
            assert known.knows("127.0.0.1:2")
            await ask(("192.0.2.3", 3), via="a proxy")
            assert known.knows("192.0.2.3:3")
            await ask(("192.0.2.4", 0), x_forwarded_for="198.51.100.1, 192.0.2.4")
            assert known.knows("192.0.2.4")  # the server believes the proxy
            await ask(("192.0.2.5", 5), x_forwarded_for="192.0.2.6")
            assert known.knows("192.0.2.5:5")

    asyncio.run(run())


def test_a_client_whose_row_hung_is_not_known_until_a_worker_returns_it(served):
    application, port = served
    suspects = application.batcher.suspects
    pids = [pid for _, pid in application.pool.states.values()]
    with Client(port) as client:
        assert asked(client, 0.0, 1) == [200]
        name = "{}:{}".format(*client.connection.sock.getsockname())
        assert suspects.knows(name)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        assert asked(client, 1.0, 1) == [504]
        assert not suspects.knows(name)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        until(lambda: asked(client, 1.0, 1) == [200])
        assert suspects.knows(name)
