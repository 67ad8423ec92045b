"""Workers in processes: the inherited tests, and what only processes do."""

import asyncio
import contextlib
import gc
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from coded_torch import DeadlineExceeded
from coded_torch.codes import ReplicationCode, SplineCode
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.testing.workers import (
    WAIT,
    WorkersTests,
    by_part,
    numbered,
    replies_of,
    run,
    task_of,
    until,
)
from coded_torch.workers import (
    Began,
    LocalWorkers,
    Part,
    ProcessWorkers,
    WorkerError,
    _processes,
    _worker_main,
)

from . import modules
from .modules import Exits, FailsOn, Heavy, Raises, Scale, Sleepy, Unpicklable, Unreadable


class TestProcessWorkers(WorkersTests):
    differentiable = False

    def make(self) -> ProcessWorkers:
        return ProcessWorkers(3)  # fewer than units

    @pytest.fixture
    def pool(self, pool):  # processes take a second to start
        return pool


@pytest.fixture(scope="module")
def pool():
    with ProcessWorkers(3, hang_timeout=WAIT).start(timeout=WAIT) as pool:
        yield pool


def answers(pool, module, values, deadline=WAIT):
    with torch.no_grad():
        return list(run(pool, module, task_of(values), deadline=deadline))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 1, 0), (3, 2, 70_001)], ids=str)
def test_tensors_pass_bit_for_bit(pool, dtype, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for x in (values, values.movedim(0, 1).contiguous().movedim(0, 1), values[:, :1].expand(shape)):
        for reply in answers(pool, nn.Identity(), x):
            assert reply.error is None
            assert reply.value.dtype == dtype
            assert torch.equal(reply.value, x[reply.part.number])


def test_the_default_device_of_the_caller_moves_no_result(pool):
    values = torch.arange(3.0).reshape(3, 1, 1)
    with torch.device("meta"):
        replies = answers(pool, nn.Identity(), values)
    for reply in replies:
        assert torch.equal(reply.value, values[reply.part.number])


def test_modules_keep_their_inputs_and_weights_to_themselves(pool):
    remembers, tied, values = modules.Remembers(), modules.Tied(), torch.zeros(3, 1, 3)
    before = tied.first.weight.detach().clone()
    for i in range(5):
        assert all((reply.value == 0).all() for reply in answers(pool, tied, values))
        for reply in answers(pool, remembers, torch.full((3, 1, 1000), float(i))):
            last, now = reply.value
            assert set(last.unique().tolist()) <= set(range(i + 1))  # of one earlier call
            assert len(last.unique()) == 1
            assert (now == i).all()
    assert torch.equal(tied.first.weight, before)


def test_buffers_that_share_storage_share_it_in_processes(pool):
    module = modules.Views()
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        expected = module(x.flatten(0, 1)).unflatten(0, (3, 2))
    for reply in answers(pool, module, x):
        assert torch.equal(reply.value, expected[list(reply.part.units)].flatten(0, 1))


def test_answers_that_a_forked_child_keeps_stay_as_they_are():
    with ProcessWorkers(1).start(timeout=WAIT) as pool, torch.no_grad():
        coded = CodedWrapper(modules.Call(torch.neg), workers=pool)
        x = torch.ones(4, 50_000)
        kept = coded(x)
        begin, go = os.pipe()
        if not (child := os.fork()):
            signal.alarm(60)
            os.read(begin, 1)
            os._exit(0 if bool((kept == -1).all()) else 1)
        del kept
        coded.last_run = None
        for factor in range(2, 8):
            coded(x * factor)
        os.write(go, b"!")
        assert os.waitpid(child, 0)[1] == 0
        os.close(begin)
        os.close(go)


def test_changes_of_the_module_are_noticed(pool):
    module, one = Scale(2.0), torch.ones(3, 1, 1)

    def got() -> set[float]:
        return {float(reply.value) for reply in answers(pool, module, one)}

    assert got() == {2.0}
    with torch.no_grad():
        module.factor.fill_(3.0)
    assert got() == {3.0}
    module.offset.add_(10)
    assert got() == {13.0}
    module.eval()
    assert got() == {13.5}
    module.factor = nn.Parameter(torch.tensor([1.0]))
    assert got() == {11.5}
    module.attribute = 2.0
    assert got() == {12.5}
    pool.forget(module)
    assert got() == {12.5}


def test_weights_in_memory_that_others_were_in_are_noticed(pool):
    module, one = Scale(0.0), torch.ones(3, 1, 1)
    for i in range(1, 8):
        answers(pool, module, one)
        module.factor.data = torch.tensor([-1.0])
        module.factor.data = torch.tensor([float(i)])  # often where the first one was
        assert {float(reply.value) for reply in answers(pool, module, one)} == {float(i)}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux knows")
def test_modules_that_are_gone_are_forgotten(pool):
    def mapped() -> int:
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (os.getpid(), *pool.pids)]
        return sum(text.count("memfd:coded_torch") for text in maps)

    answers(pool, Scale(1.0), torch.ones(3, 1, 1))
    before = mapped()
    for _ in range(12):
        answers(pool, Scale(1.0), torch.ones(3, 1, 1))
    assert mapped() - before <= 4  # one for each, as it was before


@pytest.mark.parametrize(
    ("module", "how"),
    [(Exits(), "ended with exit code 7"), (FailsOn(1.0, "segfault"), "was killed by SIGSEGV")],
    ids=["exit", "segfault"],
)
def test_a_dead_process_is_named_and_replaced_at_once(module, how):
    with ProcessWorkers(3, hang_timeout=WAIT).start(module, timeout=WAIT) as pool:
        victims, start = set(pool.pids), time.monotonic()
        replies = answers(pool, module, torch.tensor([[[0.0]], [[1.0]], [[2.0]]]))
        (error,) = [reply.error for reply in replies if reply.error is not None]
        assert (error.part, error.kind) == (1, "died")
        assert re.fullmatch(rf"worker [012] was lost: process \d+ {how}", str(error))
        until(lambda: pool.num_ready == 3)
        assert time.monotonic() - start < WAIT / 3  # 1 s on a machine that has nothing else to do
        assert len(set(pool.pids) - victims) == pool.num_restarts == 1
        got = by_part(answers(pool, modules.Pid(), torch.zeros(12, 1, 1)))
        assert len(got) == 12
        assert {int(pid) for _, pid in got.values()} <= set(pool.pids)


def pair(x):
    return x.abs(), x[:, 0] * 3


@pytest.mark.parametrize(
    ("code", "waiting"),
    [
        (SplineCode(2, 3), None),
        (SplineCode(2, 4, shuffle=False), Waiting(num_stragglers=1)),
        (ReplicationCode(2, 4, shuffle=False), Waiting(num_stragglers=1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", [nn.ReLU(), modules.Call(pair)], ids=type)
def test_columns_that_are_joined_are_decoded_as_others(pool, monkeypatch, module, code, waiting):
    joined = _processes.joined
    values = list[Any]()
    calls = list[Any]()

    def spied(*args):
        values.append(joined(*args))
        return values[-1]

    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    others = CodedWrapper(module, code, workers=LocalWorkers(), waiting=waiting)
    coded = CodedWrapper(module, code, workers=pool, waiting=waiting)
    with torch.no_grad():
        wanted = others(x)
        for _ in range(12):  # then it is known when columns are late
            coded(x)
        monkeypatch.setattr(_processes, "joined", spied)

        def is_joined():  # no column was late
            values.clear()
            calls.append(coded.run(x))
            return values and values[0] is not None

        until(is_joined)
    found, report = calls[-1]
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert torch.equal(one, other)
    assert {len(leaf) for leaf in pytree.tree_leaves(values)} == {12}
    assert torch.equal(report.source, others.last_run.source)
    assert (report.work_ratio, report.ended) == (12 / 7, "complete")


def doze(x):
    time.sleep(0.05)  # so that each process gets a column
    return x


def test_a_call_of_columns_ends_without_a_process_that_is_stopped(pool):
    waiting = Waiting.first(1)
    coded = CodedWrapper(modules.Call(doze), SplineCode(2, 3), workers=pool, waiting=waiting)
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(3):
            _, report = coded.run(x)
            assert len(report.received) == 2  # even if all have replied
            until(lambda: {state for state, _ in pool.states.values()} == {"idle"})
        stopped = pool.pids[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            _, report = coded.run(x)
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert report.ended == "enough_results"
    assert report.asked == (0, 1, 2)
    assert report.received == (1, 2)
    until(lambda: pool.states[0] == ("idle", stopped))


def test_a_module_is_new_to_each_process_once_and_again_when_it_has_changed():
    module = Scale(2.0).requires_grad_(False)
    pool = ProcessWorkers(3)
    assert (pool.num_ready, pool.pids) == (0, [])

    def fresh() -> list[bool]:
        with pool.open(module, task_of(torch.ones(3, 1, 1))) as request:
            request.ask([Part(n, (n,), avoid=frozenset({0, 1, 2} - {n})) for n in range(3)])
            events = [request.wait(WAIT) for _ in range(6)]
        return [event.fresh for event in events if isinstance(event, Began)]

    with pool.start(timeout=WAIT):
        pids = pool.pids
        assert fresh() == 3 * [True]
        assert fresh() == 3 * [False]
        for example in (None, torch.ones(1, 1)):
            module.offset.add_(1)
            pool.start(module, example, timeout=WAIT)
            assert fresh() == 3 * [False]
        module.offset.add_(1)
        assert fresh() == 3 * [True]
        with pytest.raises(WorkerError, match="mat1 and mat2 shapes cannot be multiplied"):
            pool.start(nn.Linear(3, 2), torch.ones(1, 1))
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    with pytest.raises(RuntimeError, match="the pool is closed"):
        answers(pool, nn.Identity(), torch.ones(2, 1, 1))


def test_starting_takes_its_own_time_not_that_of_a_part():
    with ProcessWorkers(1, timeout=0.001).start(nn.Identity(), timeout=WAIT) as pool:
        assert pool.num_ready == 1


@pytest.mark.parametrize("module", [modules.Random(), modules.Seeds()])
def test_every_process_has_random_numbers_of_its_own_and_so_has_its_successor(module):
    before, seen = torch.get_rng_state(), []
    with ProcessWorkers(6).start(module) as pool:
        for _ in range(2):
            replies = answers(pool, module, torch.zeros(64, 1, 1))
            seen += [tuple(number.tolist()) for reply in replies for number in reply.value.T]
            for place in range(6):
                pool.restart(place)
            gone = set(pool.pids)
            until(lambda gone=gone: pool.num_ready == 6 and not gone & set(pool.pids))
    assert len(seen) == 3 * 128
    assert len(set(seen)) == 3 * 128
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_broken_process_sends_ends_that_process_alone():
    with ProcessWorkers(2, hang_timeout=WAIT, timeout=WAIT).start(timeout=WAIT) as pool:
        (reply,) = answers(pool, modules.Garbles(), torch.zeros(1, 1, 1))
        assert "nothing could be exchanged with it: a message" in reply.error.reason
        until(lambda: pool.num_ready == 2)
        assert len(answers(pool, nn.Identity(), torch.zeros(4, 1, 1))) == 4


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize(
    "call", [lambda coded, x: coded(x), lambda coded, x: list(coded.map([x] * 2, in_flight=2))]
)
def test_an_interrupted_call_leaves_nothing_that_the_next_one_waits_for(call):
    with (
        ProcessWorkers(2, hang_timeout=WAIT).start(Sleepy(), timeout=WAIT) as pool,
        torch.no_grad(),
    ):
        coded = CodedWrapper(Sleepy(), workers=pool, parts=2, waiting=Waiting(estimate=False))
        pids = set(pool.pids)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            call(coded, torch.full((2, 1), 3600.0))
        assert len(answers(pool, Sleepy(), torch.zeros(2, 1, 1), deadline=WAIT / 2)) == 2
        assert not pids & set(pool.pids)


def test_a_hung_process_is_killed_after_its_grace():
    module = modules.Stuck()
    with ProcessWorkers(3, hang_timeout=2.0).start(module, timeout=WAIT) as pool:
        os.kill(pool.pids[0], signal.SIGSTOP)
        # The stopped process gets one of the first three parts, whichever that is.
        replies = answers(pool, module, torch.tensor([[[3600.0]]] * 3 + [[[0.0]]]))
        reasons = {reply.part.number: reply.error and reply.error.reason for reply in replies}
        assert len(reasons) == 4
        assert reasons[3] is None
        hung = [reason for reason in reasons.values() if reason is not None]
        assert len(hung) == 3
        for reason in hung:
            assert "for more than 2 s without a sign of life, and was ended; hang_timeout" in reason


@pytest.mark.parametrize("module", [Sleepy(), modules.Greedy()], ids=["sleeps", "computes"])
def test_a_slow_part_is_not_taken_for_a_hang(module):
    with ProcessWorkers(2, hang_timeout=1.0).start(timeout=WAIT) as pool:
        replies = answers(pool, module, torch.full((2, 1, 1), 2.5))
        assert [reply.error for reply in replies] == [None, None]
        assert pool.num_restarts == 0


@pytest.mark.parametrize("when", ["loaded", "packed"])
def test_another_module_that_is_loaded_stops_no_calls(when, tmp_path):
    sleepy = Sleepy()
    with ProcessWorkers(3).start(sleepy, timeout=WAIT) as pool, torch.no_grad():
        first = CodedWrapper(sleepy, workers=pool)
        first(torch.zeros(12, 1))
        second, x = CodedWrapper(Heavy(tmp_path, when), workers=pool), torch.zeros(12, 1)
        with ThreadPoolExecutor(1) as threads:
            loading = threads.submit(second, x)
            until(lambda: any(tmp_path.iterdir()))
            for _ in range(4):
                first(x)
            assert not loading.done()
            (tmp_path / "open").touch()
        assert torch.equal(loading.result(), x)


def test_processes_load_modules_before_they_replace_others(tmp_path):
    (tmp_path / "open").touch()
    with ProcessWorkers(2).start(module := Heavy(tmp_path), timeout=WAIT) as pool:
        values = torch.zeros(2, 1, 1)
        os.kill(victim := pool.pids[0], signal.SIGKILL)
        until(lambda: victim not in pool.pids and pool.num_ready == 2)
        loaded = {path.name for path in tmp_path.iterdir()} - {"open"}
        assert len(loaded) == 3  # two at the start, and the new process
        assert all(reply.error is None for reply in answers(pool, module, values))
        assert {path.name for path in tmp_path.iterdir()} == {"open", *loaded}


def test_a_module_that_ends_processes_spoils_no_other():
    with ProcessWorkers(1, hang_timeout=WAIT, timeout=WAIT).start(timeout=WAIT) as pool:
        bad = modules.Poison()
        (reply,) = answers(pool, bad, torch.zeros(1, 1, 1))
        assert "ended with exit code 3" in reply.error.reason
        for _ in range(2):
            (reply,) = answers(pool, nn.Identity(), torch.zeros(1, 1, 1))
            assert reply.error is None


def test_processes_outlive_their_server():
    with ProcessWorkers(2, hang_timeout=WAIT).start(timeout=WAIT) as pool:
        before = pool.pids
        server = _parent(before[0])
        os.kill(server, signal.SIGKILL)
        until(lambda: not any(_parent(pid) == server for pid in before))
        assert len(answers(pool, nn.Identity(), torch.zeros(4, 1, 1))) == 4
        assert (pool.pids, pool.num_restarts) == (before, 0)
        os.kill(before[0], signal.SIGKILL)  # nobody tells how it ended
        until(lambda: pool.num_ready == 2 and before[0] not in pool.pids)
        assert before[1] in pool.pids
        assert _parent(pool.pids[0]) != _parent(before[1])
        assert len(answers(pool, nn.Identity(), torch.zeros(4, 1, 1))) == 4


def test_a_server_that_is_stopped_is_replaced_while_its_processes_go_on():
    with ProcessWorkers(2, hang_timeout=WAIT).start(timeout=WAIT) as pool:
        before = pool.pids
        server = _parent(before[0])
        os.kill(server, signal.SIGSTOP)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: before[0] not in pool.pids)
        while pool.num_ready < 2:
            start = time.monotonic()
            assert len(answers(pool, nn.Identity(), torch.zeros(4, 1, 1))) == 4
            assert time.monotonic() - start < WAIT / 4
        assert before[1] in pool.pids
        assert _parent(server) == 0


def test_a_server_ends_in_silence_whose_caller_has_not_heard_that_it_is_up(tmp_path):
    requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with requests, theirs, open(os.pidfd_open(os.getpid()), "rb") as caller:
        ends = theirs.fileno(), caller.fileno()
        program = f"from coded_torch.workers import _worker_main as main; main.serve(*{ends}, [])"
        command = [sys.executable, "-c", program]
        # Not in the checkout, whose package may not be built: Python looks there first.
        how = {"pass_fds": ends, "stderr": subprocess.PIPE, "cwd": tmp_path}
        server = subprocess.Popen(command, **how)
        theirs.close()  # so that its end is seen, too
        assert select.select([requests], [], [], WAIT)[0]
    said = server.communicate(timeout=WAIT)[1]
    assert (server.returncode, said) == (0, b"")


@pytest.mark.slow
def test_no_call_fails_while_servers_are_killed_and_stopped_and_one_process_lives():
    over, wrong, counts = threading.Event(), [], [0] * 8
    with ProcessWorkers(4, hang_timeout=WAIT).start(Sleepy(), timeout=WAIT) as pool:
        coded = CodedWrapper(Sleepy(), workers=pool, parts=2)

        @torch.no_grad()
        def calls(i):
            x = torch.full((4, 1), 0.001 * (i + 1))
            while not over.is_set():
                try:
                    if not torch.equal(coded(x), x):
                        wrong.append(x)
                except Exception as error:
                    wrong.append(error)
                counts[i] += 1

        threads = [threading.Thread(target=calls, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for fault in range(20):
            for server in [*_worker_main._servers.values()]:
                if not server.has_ended():
                    os.kill(server.pid, (signal.SIGKILL, signal.SIGSTOP)[fault % 2])
            os.kill(pool.pids[-1], signal.SIGKILL)
            until(lambda: pool.num_ready > 1)  # the other one may be of an earlier server
            time.sleep(0.2)
        over.set()
        for thread in threads:
            thread.join(WAIT)
    assert not wrong
    assert min(counts) > 20


def test_a_request_asks_again_with_its_own_module_after_a_newer_one():
    module, task = Scale(2.0).requires_grad_(False), task_of(torch.ones(2, 1, 1))
    with ProcessWorkers(1).start(timeout=WAIT) as pool, pool.open(module, task) as request:
        request.ask(numbered((0,)))
        assert [float(reply.value) for reply in replies_of(request)] == [2.0]
        module.factor.fill_(3.0)
        assert {float(reply.value) for reply in run(pool, module, task)} == {3.0}
        request.ask(numbered((1,), first=1))
        (reply,) = replies_of(request)
        assert reply.error is None


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Unreadable(), "the trap is sprung"),
        (Unpicklable(), "Can't (pickle|get) local object"),
    ],
    ids=["unreadable", "unpicklable"],
)
def test_results_that_cannot_travel_are_named(pool, module, match):
    replies = answers(pool, module, torch.ones(3, 1, 1))
    assert len(replies) == 3
    for reply in replies:
        assert reply.error is not None
        with pytest.raises(Exception, match=match):
            raise reply.error


def test_exceptions_travel_without_their_constructors(pool):
    (reply,) = answers(pool, Raises(), torch.zeros(1, 1, 1))
    error = reply.error.__cause__
    assert type(error) is modules.TwoPartsError
    assert (str(error), error.second) == ("first second", "second")
    assert "in forward" in str(error.__cause__)  # the traceback
    (reply,) = answers(pool, Raises(), torch.ones(1, 1, 1))
    assert type(reply.error.__cause__) is modules.TwoPartsError
    assert vars(reply.error.__cause__) == {}


def test_a_class_that_workers_do_not_define_is_named_with_its_remedy(pool, monkeypatch):
    class Mean(nn.Identity):  # as under ``if __name__ == "__main__"``
        __module__, __qualname__ = "__main__", "Mean"

    monkeypatch.setattr(sys.modules["__main__"], "Mean", Mean, raising=False)
    (reply,) = answers(pool, Mean(), torch.ones(1, 1, 1))
    assert str(reply.error).endswith(
        "AttributeError: Mean is not defined when a worker imports the main script; move it out "
        "of the `if`, to the top level of the script, or into a module"
    )


def test_modules_that_cannot_travel_are_named(pool):
    module, trapped, texts = nn.Identity(), nn.Identity(), set()
    module.hook = lambda x: x
    with pytest.raises(TypeError, match=r"module must be picklable .* got Identity"):
        answers(pool, module, torch.ones(3, 1, 1))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"must be picklable (.|\n)*\.remove_parametrizations"):
        answers(pool, parametrized, torch.ones(3, 1, 1))
    trapped.trap = modules.Trap()  # it cannot be read there
    for _ in range(3):
        for reply in answers(pool, trapped, torch.ones(3, 1, 1)):
            assert "the trap is sprung" in reply.error.reason
            texts.add(str(reply.error.__cause__.__cause__))
    assert len(texts) == 1  # of the same length every time


@pytest.mark.parametrize("is_started", [True, False])
def test_packing_a_module_keeps_to_the_deadline_and_is_not_begun_again(is_started):
    module, x = modules.PacksLate(), torch.ones(4, 1)
    module.gate = threading.Event()
    with ProcessWorkers(1) as pool, torch.no_grad():
        if is_started:
            pool.start(timeout=WAIT)
        coded = CodedWrapper(module, workers=pool, waiting=Waiting(deadline=0.3), parts=2)
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="the module is being packed"):
                coded(x)
            assert time.monotonic() - began < WAIT / 2
        packing = [t for t in threading.enumerate() if t.name == "coded_torch packs"]
        assert len(packing) == 1
        module.gate.set()
        packing[0].join(WAIT)
        assert torch.equal(coded.run(x, waiting=Waiting())[0], 2 * x)


def test_a_call_can_be_cancelled_while_its_module_is_packed(pool):
    def threads():
        return [t.name for t in threading.enumerate() if t.name.startswith("coded_torch ")]

    async def main():
        call = asyncio.ensure_future(coded.arun(torch.ones(4, 1)))
        while "coded_torch packs" not in threads():
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        end = time.monotonic() + WAIT
        while "coded_torch arun" in threads():
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    module = modules.PacksLate()
    module.gate = threading.Event()
    coded = CodedWrapper(module, workers=pool)
    with torch.no_grad():
        asyncio.run(main())
    module.gate.set()


def test_gradients_are_refused_and_warned_of_once():
    with ProcessWorkers(1).start(timeout=WAIT) as pool:
        task = task_of(torch.ones(1, 1, 1, requires_grad=True))
        with pytest.raises(RuntimeError, match="inputs must not require gradients"):
            pool.open(nn.Identity(), task)
        coded, one = CodedWrapper(Scale(1.0), workers=pool), torch.ones(1)
        with forward_ad.dual_level():
            weights = {"module.factor": forward_ad.make_dual(one, one)}
            with pytest.raises(RuntimeError, match="nor weights have tangents"):
                torch.func.functional_call(coded, weights, torch.ones(2, 1))
        with torch.no_grad():
            assert len(list(run(pool, nn.Identity(), task))) == 1
        task = task_of(torch.ones(1, 1, 1))
        with torch.no_grad():
            list(run(pool, Scale(1.0), task))
        list(run(pool, Scale(1.0).requires_grad_(False), task))
        with pytest.warns(UserWarning, match="ProcessWorkers: answers have no gradients") as seen:
            list(run(pool, Scale(1.0), task))
        assert [warning.filename for warning in seen] == [__file__]
        assert len(list(run(pool, Scale(1.0), task))) == 1  # a warning would be an error


def test_a_drained_process_ends_its_part_takes_no_other_and_leaves():
    with (
        ProcessWorkers(2, hang_timeout=WAIT).start(Sleepy(), timeout=WAIT) as pool,
        torch.no_grad(),
    ):
        pids, values = pool.pids, torch.tensor([[[1.0]], [[0.0]]])
        with pool.open(Sleepy(), task_of(values)) as request:
            request.ask(numbered((0,), (1,), (1,), (1,)))
            began = request.wait(WAIT)
            pool.drain(began.worker)
            assert pool.num_workers == 1
            replies = replies_of(request)
            assert [r.part.number for r in replies if r.worker == began.worker] == [0]
            assert all(reply.error is None for reply in replies)
            until(lambda: sum(Path(f"/proc/{pid}").exists() for pid in pids) == 1)
            pool.drain(1 - began.worker)
            request.ask(numbered((1,), first=4))
            assert request.wait(request.now() + 0.1) is None
            assert request.status() == "all processes have left"
            pool.resize(1)
            assert [reply.worker for reply in replies_of(request)] == [0]
        assert pool.num_restarts == 0
    not_started = ProcessWorkers(2)
    not_started.resize(3)
    assert not_started.num_workers == 3
    with pytest.raises(ValueError, match="ProcessWorkers: num_workers must be at least 1, got 0"):
        not_started.resize(0)


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state == "Z" else int(parent)


_UNGUARDED = """
import torch
from coded_torch.workers import ProcessWorkers

class Net(torch.nn.Module):
    pass

ProcessWorkers(2).start(Net())
"""


_AT_EXIT = """
import subprocess
import torch
from coded_torch.codes import ReplicationCode
from coded_torch.nn import CodedWrapper
from coded_torch.workers import ProcessWorkers

# The main script may start threads and processes when it is imported, and ask for GPUs.
device = "cuda" if torch.cuda.is_available() else "cpu"
child = subprocess.Popen(["true"])
torch.ones(4_000_000).exp()

class Net(torch.nn.Module):
    def forward(self, x):
        return x * torch.ones(4_000_000).exp().min().log().round() + torch.get_num_threads()

if __name__ == "__main__":
    child.wait()
    pool = ProcessWorkers(2, threads=2, devices=[device], hang_timeout=20.0).start()
    coded = CodedWrapper(Net(), ReplicationCode(2, 2), workers=pool)
    with torch.no_grad():
        print(coded(torch.tensor([[-2.0], [1.0]])).flatten().tolist(), *pool.pids, flush=True)
    {end}
"""


def _script(tmp_path, text: str, timeout: float = WAIT, **options: Any) -> Any:
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [sys.executable, "-W", "error", str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


def test_a_script_without_a_guard_gets_to_know(tmp_path):
    done = _script(tmp_path, _UNGUARDED)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "RuntimeError: ProcessWorkers: workers import the main script" in last
    assert last.endswith('put its main part under: if __name__ == "__main__":')


_PACKAGE = """
import os, threading
from pathlib import Path
import torch

log = Path(__file__).parent / (__name__ + ".log")
with log.open("a") as file:
    print(os.getpid(), file=file)
if __name__ == "threaded":
    threading.Thread(target=threading.Event().wait, daemon=True).start()

class Net(torch.nn.Module):
    def forward(self, x):
        return x + 0.5
"""

_PRELOADS = """
import os, signal, sys, time
from pathlib import Path
import torch
from coded_torch.codes import ReplicationCode
from coded_torch.nn import CodedWrapper
from coded_torch.workers import ProcessWorkers

if __name__ == "__main__":
    sys.path.insert(0, {folder!r})
    from plain import Net as Plain
    from threaded import Net as Threaded
    servers = set()
    for net in (Plain(), Threaded()):
        with ProcessWorkers(2).start(net) as pool, torch.no_grad():
            coded = CodedWrapper(net, ReplicationCode(2, 2), workers=pool)
            print(*coded(torch.tensor([[1.0], [2.0]])).flatten().tolist())
            victim = pool.pids[0]
            os.kill(victim, signal.SIGKILL)
            while victim in pool.pids or pool.num_ready < 2:
                time.sleep(0.002)
            print(*coded(torch.tensor([[1.0], [2.0]])).flatten().tolist())
            if isinstance(net, Plain):
                print(len({{os.getpid()}} & set(pool.pids)))
"""


def test_sigterm_to_the_whole_group_is_for_the_callers_process():
    with ProcessWorkers(2).start() as pool, torch.no_grad():
        coded, pids = CodedWrapper(nn.Identity(), workers=pool), pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert torch.equal(coded(torch.ones(4, 1)), torch.ones(4, 1))
        assert pool.pids == pids


def test_packages_of_a_module_are_imported_once_for_all_processes(tmp_path):
    """Also in a folder with a package of the same name, as in a checkout without compiled parts."""
    for name in ("plain", "threaded"):
        (tmp_path / f"{name}.py").write_text(_PACKAGE)
    (folder := tmp_path / "checkout" / "coded_torch").mkdir(parents=True)
    if sys.version_info >= (3, 11):  # Python 3.10 always imports from the working directory
        (folder / "__init__.py").write_text("raise ImportError")
    text = _PRELOADS.format(folder=str(tmp_path))
    done = _script(tmp_path, text, 2 * WAIT, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines() == ["1.5 2.5", "1.5 2.5", "0", "1.5 2.5", "1.5 2.5"]
    imports = {p.stem: len(p.read_text().split()) for p in tmp_path.glob("*.log")}
    assert imports["plain"] == 2  # by this process, and by the server
    assert imports["threaded"] == 2 + 3  # by the server that is given up, and by each process


_INTERACTIVE = """
import torch
from coded_torch.codes import ReplicationCode
from coded_torch.nn import CodedWrapper
from coded_torch.testing.helpers import run
from coded_torch.workers import ProcessWorkers, Task
from torch.utils._pytree import tree_structure
from dataclasses import dataclass
@dataclass
class Pair:
    x: torch.Tensor
class Net(torch.nn.Module):
    def forward(self, x):
        return Pair(2 * x) if x.dim() == 1 else 2 * x

with ProcessWorkers(1) as pool, torch.no_grad():
    print(CodedWrapper(Net(), ReplicationCode(2, 2), workers=pool)(torch.ones(2, 1)).max().item())
    task = Task([torch.ones(1)], [0], tree_structure(((0,), {})), 1, 1, torch.device("cpu"))
    (reply,) = run(pool, Net(), task)
    print(isinstance(reply.value, Pair))

"""


def _session(text: str) -> subprocess.CompletedProcess[str]:
    how = {"capture_output": True, "text": True, "timeout": WAIT}
    # Not in the checkout, whose package is not built.
    return subprocess.run([sys.executable, "-"], input=text, cwd="/", **how)


_CHANGES = """
import torch
from coded_torch.workers import ProcessWorkers
with ProcessWorkers(1) as pool:
    for mode in torch.no_grad, torch.inference_mode:
        for module in torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2).eval():
            with mode():
                pool.start(module, torch.eye(3, 2)).start(module, torch.eye(3, 2))
"""


def test_a_module_that_changes_its_buffers_says_so():
    done = _session(_CHANGES)
    assert done.stderr.count("BatchNorm1d changes num_batches_tracked in its calls. ") == 1


def test_classes_of_an_interactive_session_go_by_value():
    done = _session(_INTERACTIVE)
    assert (done.stdout.split(), done.stderr) == (["2.0", "True"], "")


def test_without_cloudpickle_a_class_of_an_interactive_session_is_refused():
    done = _session("import sys; sys.modules['cloudpickle'] = None\n" + _INTERACTIVE)
    assert done.stderr.strip().splitlines()[-1] == (
        "TypeError: Workers: the module must be picklable to be sent to another process, or be "
        "made there, by coded_torch.nn.FromFactory, got Net: "
        "a class or function of an interactive session cannot be sent by name; install "
        "cloudpickle, or define it in a file that can be imported"
    )


@contextlib.contextmanager
def _started(folder, *texts: str, **options: Any) -> Any:
    """Yield processes that run scripts beside each other, and kill them at the end."""
    with contextlib.ExitStack() as stack:
        processes = []
        for number, text in enumerate(texts):
            (script := folder / f"script{number}.py").write_text(text)
            command = [sys.executable, "-W", "error", script]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def test_exit_is_clean(tmp_path):
    """While a process is stopped, after the pool is deleted, and when it is interrupted."""
    stopped = "import os, signal; os.kill(pool.pids[0], signal.SIGSTOP)"
    ends = stopped, "del pool, coded", "import time; time.sleep(3600)"
    # What runs in the background of a shell ignores interrupts, and so does all that it starts. A
    # finalizer stands before those of multiprocessing.
    first = "import signal, weakref; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    first += "weakref.finalize(weakref.WeakSet, int)\n"
    texts = [first + _AT_EXIT.format(end=end) for end in ends]
    pipe = {"stderr": subprocess.PIPE, "start_new_session": True}
    with _started(tmp_path, *texts, **pipe) as processes:
        for end, process in zip(ends, processes, strict=True):
            answer, pids = process.stdout.readline().strip().rsplit("]", 1)
            if "sleep" in end:
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
            _, errors = process.communicate(timeout=WAIT)
            assert answer == "[0.0, 3.0"
            if "sleep" in end:
                assert errors.count("Traceback") == 1
                assert errors.rstrip().endswith("KeyboardInterrupt")
            else:
                assert (process.returncode, errors) == (0, "")
            until(lambda pids=pids: not any(Path(f"/proc/{pid}").exists() for pid in pids.split()))


_KILLED = """
import os, signal, time
from coded_torch.workers import ProcessWorkers

if __name__ == "__main__":
    pool = ProcessWorkers(2).start()
    assert not os.listdir(os.environ["TMPDIR"])
    os.kill(pool.pids[0], signal.SIGSTOP)
    if not (child := os.fork()):
        time.sleep(3600)
    print(child, *pool.pids, flush=True)
    time.sleep(3600)
"""


def _of(folder):
    """Return the processes in whose environment a folder is."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended
            if str(folder).encode() in file.read_bytes():
                found.add(int(file.parent.name))
    return found


def test_a_killed_caller_leaves_no_stopped_worker_though_a_fork_lives(tmp_path):
    """Also without its server, and in a folder whose name is too long for a socket's address."""
    (folder := tmp_path / (100 * "x")).mkdir()
    variables, children = os.environ | {"TMPDIR": str(folder)}, set()
    with _started(tmp_path, _KILLED, _KILLED, env=variables) as callers:
        try:
            for server_lives, caller in zip((True, False), callers, strict=True):
                child, *workers = map(int, caller.stdout.readline().split())
                children.add(child)
                server = _parent(workers[1])
                assert server not in (0, 1, caller.pid)
                if not server_lives:
                    os.kill(server, signal.SIGKILL)
                    until(lambda server=server: not _parent(server))
                    assert all(map(_parent, workers))
                caller.kill()
                gone = *workers, server
                until(lambda gone=gone: not any(map(_parent, gone)))
            until(lambda: _of(folder) == children)
            assert not list(folder.iterdir())
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux knows")
def test_nothing_is_left():
    def inventory() -> tuple[int, int, int]:
        gc.collect()
        threads = threading.active_count()
        children = [Path(f"/proc/{pid}") for pid in _children()]
        return len(os.listdir("/proc/self/fd")), threads, len(children)

    def session() -> None:
        with ProcessWorkers(3).start(timeout=WAIT) as pool:
            for _ in range(30):
                answers(pool, Scale(2.0), torch.ones(3, 1, 1000))
            os.kill(pool.pids[0], signal.SIGKILL)
            until(lambda: pool.num_ready == 3)

    session()  # the server that processes are forked from stays
    before, files = inventory(), set(os.listdir("/dev/shm"))
    for _ in range(3):
        session()
    for now, then in zip(inventory(), before, strict=True):
        assert now <= then  # fewer, if what an earlier test left is collected meanwhile
    assert set(os.listdir("/dev/shm")) <= files


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
