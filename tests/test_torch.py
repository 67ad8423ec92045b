"""Torch's state around a call: the host as the device, changed modules, dependent rows."""

import copy
import math
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from coded_torch import Waiting, codes
from coded_torch._layout import dependent_output
from coded_torch._torch import random_numbers_kept
from coded_torch.demo import digits, lenet5
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import DeviceWorkers, LocalWorkers

from .nn.modules import Call

CODES = {
    "spline": lambda: codes.SplineCode(4, 8),
    "berrut": lambda: codes.BerrutCode(4, 8),
    "lagrange": lambda: codes.LagrangeCode(2, 8),
    "replication": lambda: codes.ReplicationCode(4, 8),
    "kernel": lambda: codes.RegressionCode(4, 8),
    "features": lambda: codes.RegressionCode(4, 8, metric=torch.abs),
}
ELSEWHERE = torch.device("meta")  # where a tensor has no numbers, so that every mistake shows


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unchanged(make):
    """Whether what is made is the same under a default device."""
    want = make()
    with ELSEWHERE:
        return torch.equal(make(), want)


# Made anew for each call, as delays go on from one to the next.
WAYS = {
    name: lambda make=make: {"code": make().replace(shuffle=False)} for name, make in CODES.items()
}
WAYS["rows"] = lambda: {"parts": 4, "waiting": Waiting(estimate_after=3.0)}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_answers_under_a_default_device(way):
    x = randn(32, 3)
    pool = LocalWorkers(Uniform(2, seed=0))
    assert unchanged(lambda: CodedWrapper(nn.Tanh(), **way(), workers=copy.deepcopy(pool))(x))


def test_the_callers_own_code_sees_its_default_device():
    seen, x = set(), randn(24, 3)

    def see(name, result=None):
        seen.add((name, torch.get_default_device()))
        return result

    module = Call(lambda x: see("module", x.sin()))
    coded = CodedWrapper(
        module,
        codes.RegressionCode(4, 8, metric=lambda x: see("metric", x)),
        workers=LocalWorkers(Uniform(6, seed=0)),
        surrogate=lambda x: see("surrogate", x),
    )
    torch.set_default_device(ELSEWHERE)
    try:
        coded(x)
        with DeviceWorkers(["cpu"]) as pool:  # a default device becomes the replica's own
            CodedWrapper(module, codes.SplineCode(4, 8), workers=pool)(x)
    finally:
        torch.set_default_device(None)
    names = ("module", "metric", "surrogate")
    assert seen == {*((name, ELSEWHERE) for name in names), ("module", torch.device("cpu"))}


X00 = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))[0, 0]

LIN = nn.Linear(8, 5)


def dependent(module, *inputs):
    asked = []

    def compute(rows, batches):
        asked.extend(each for batch in batches for each in batch)
        with torch.no_grad():
            return [module(*[x[[*batch]] for x in rows]) for batch in batches]

    found = dependent_output(inputs, compute)
    assert len(asked) in (4, 10)  # rows
    return found


def x(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        *((lambda x: x - x.mean(0), x(3, 8, dtype=d)) for d in (torch.half, torch.bfloat16)),
        (lambda x: x + 1e-4 * x.mean(0), x(3, 8)),
        (lambda x: 1e-9 * (x - x.mean(0)), x(3, 8)),
        (lambda x: torch.stack([1e6 * x[:, 0], x[:, 1] - x[:, 1].mean()], 1), x(3, 8)),
        (lambda x: x - x[0], x(3, 8)),
        (lambda x: x - x[-1], x(3, 8)),
        (lambda x: x / x.amax(0), torch.tensor([[1.0], [2.0]])),
        (lambda x: x / x.amax(0), torch.tensor([[2.0], [1.0]])),
        (lambda x: x / len(x), x(3, 8)),
        (lambda x: x + torch.arange(len(x))[:, None], x(3, 8)),
        (lambda x: torch.fft.fft(x, dim=0), x(3, 8)),
        (lambda x: x > x.mean(0), x(3, 8)),
        (lambda x: x.argsort(0), x(3, 8)),
        (lambda x: x[:, 0].argsort().argsort(), torch.tensor([[1.0], [3.0]])),
        (nn.BatchNorm2d(3).train(), x(2, 3, 4, 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=False).eval(), x(3, 4, 8)),
    ],
)
def test_rows_that_depend_on_each_other_are_found(module, inputs):
    found = dependent(module, inputs)
    assert found.startswith("output of a row depends on the other rows of its batch, by ")


def test_the_output_that_depends_is_named_with_its_difference():
    found = dependent(lambda x: {"a": x, "b": (x, x - x.mean(0))}, torch.tensor([[0.0], [2.0]]))
    assert found == "output['b'][1] of a row depends on the other rows of its batch, by 1"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda x: {"n": len(x)}, "output['n'] depends on the number of rows: 1 for one, 2"),
        (lambda x: x @ x.T, "the shape of a row of output depends on the number of rows: (1,) for"),
        (lambda x: (x, ["ok"] * (len(x) + 1)), "the form of the output depends on the rows: "),
        (lambda x: (x, x) if len(x) == 1 and x[0, 0] != X00 else x, "the form of the output depe"),
    ],
)
def test_outputs_whose_form_depends_on_the_number_of_rows_are_found(module, said):
    assert dependent(module, x(3, 8)).startswith(said)


@pytest.mark.parametrize("other", [lambda x: torch.ones(2), lambda x: x[:, :0]])
def test_outputs_without_rows_or_numbers_are_left_out(other):
    assert dependent(lambda x: (other(x), x - x.mean(0)), x(2, 8)).startswith("output[1]")


def stack(dtype):
    torch.manual_seed(0)
    layers = (
        layer for _ in range(30) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())
    )
    return nn.Sequential(*layers).to(dtype)


def mixed(module, dtype):
    return lambda x: module(x.to(dtype)).float()


def encoder(dtype):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval().to(dtype)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        *((stack(d), x(2, 64, dtype=d)) for d in (torch.double, torch.float, torch.bfloat16)),
        (mixed(stack(torch.bfloat16), torch.bfloat16), x(2, 64)),
        *((encoder(d), x(2, 17, 64, dtype=d)) for d in (torch.float, torch.half)),
        (lambda x: encoder(torch.bfloat16)(x).argmax(-1), x(2, 17, 64, dtype=torch.bfloat16)),
        (nn.Linear(1024, 100), x(2, 1024) * 1e6),
        (lambda x: 1e3 * LIN(x) - functional.linear(x, 1e3 * LIN.weight, 1e3 * LIN.bias), x(3, 8)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), x(2, 3, 8, 8)),
        (nn.LSTM(8, 16, 2, batch_first=True), x(2, 5, 8)),
        (nn.Embedding(10, 4), torch.tensor([[1, 2], [1, 3]])),
        (lambda x: torch.where(x > 0, x, -math.inf), x(3, 8)),
        (lambda x: x.log(), x(3, 8)),
        (lambda x: x * 2, torch.tensor([1.0, 2.0])),
        (lenet5(), digits()[0][:4]),
    ],
)
def test_rounding_is_no_dependence(module, inputs):
    assert dependent(module, inputs) is None


@pytest.mark.parametrize(
    ("module", "inputs", "why"),
    [
        (nn.Dropout(), [x(3, 8)], "the outputs differ from call to call"),
        (torch.bernoulli, [torch.full((2, 99), 0.5) + x(2, 1) / 100], "differ from call to call"),
        (torch.mean, [x(3, 8)], "no output has a row for each row of the example"),
    ],
)
def test_rows_are_not_compared_where_that_tells_nothing(module, inputs, why):
    with pytest.raises(RuntimeError, match=why):
        dependent(module, *inputs)


def test_threads_keep_random_numbers_while_garbage_is_collected(tmp_path):
    """As torch.random.fork_rng does not: such threads wait for each other for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import faulthandler, gc, sys, threading, torch
from coded_torch._torch import random_numbers_kept

faulthandler.dump_traceback_later(60, exit=True)
sys.setswitchinterval(1e-6)
gc.set_threshold(20)

class Cycle:
    def __init__(self):
        self.itself = self
        self.data = torch.frombuffer(bytearray(8), dtype=torch.uint8)

def run():
    for _ in range(300):
        cycles = Cycle(), Cycle(), Cycle()
        with random_numbers_kept(seed=1):
            cycles = Cycle()

threads = [threading.Thread(target=run) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    )
    subprocess.run([sys.executable, script], check=True, timeout=90)


def test_a_caller_that_draws_batches_draws_none_twice():
    """The first call of the module is proved while the next batches are drawn."""
    drawn = []

    def batches():
        for _ in range(8):
            drawn.append(torch.rand(8, 3))
            yield drawn[-1]

    def slow(x):
        time.sleep(0.02)
        return x + 1

    with DeviceWorkers(["cpu"] * 3) as pool, torch.no_grad():
        list(CodedWrapper(Call(slow), workers=pool, parts=2).map(batches(), in_flight=4))
    assert len({tuple(batch.flatten().tolist()) for batch in drawn}) == 8


def test_no_batch_is_drawn_while_this_process_computes():
    """The proof of a module's rows sets the random numbers back, which batches may be drawn of."""
    drawn = []
    drawn_meanwhile = []

    def batches():
        for _ in range(8):
            drawn.append(torch.rand(8, 3))
            yield drawn[-1]

    def slow(x):
        before = len(drawn)
        time.sleep(0.02)
        drawn_meanwhile.append(len(drawn) - before)
        return x + 1

    list(CodedWrapper(Call(slow), workers=LocalWorkers(), parts=2).map(batches(), in_flight=4))
    assert set(drawn_meanwhile) == {0}


def test_random_numbers_go_on_after_a_block_with_a_seed():
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    with random_numbers_kept(seed=0):
        first = torch.rand(1)
    with random_numbers_kept(seed=0):
        second = torch.rand(1)
    assert first == second
    assert torch.rand(2).tolist() == expected
