"""Whatever a caller gives: one line that names the caller's own argument, at once and for free."""

import inspect
import math
import re
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from coded_torch import Regression, codes, compare, linear, nn, stragglers, tune, workers
from coded_torch._arguments import MOST_WORKERS, count, dense, real
from coded_torch.codes import curves
from coded_torch.experiments import scores, simulation

SECONDS, BYTES = 0.1, 10e6
X = torch.arange(12.0).view(6, 2)
# What is called, with arguments that are right; each of them is replaced by a wrong one in turn.
CALLS = [
    (codes.SplineCode, {"num_data": 4, "num_workers": 6, "encoder_smoothing": 0.0,
                        "decoder_smoothing": 0.0, "data_points": None, "worker_points": None}),
    (codes.BerrutCode, {"num_data": 4, "num_workers": 6}),
    (codes.FloaterHormannCode, {"num_data": 4, "num_workers": 6, "order": 0, "data_points": None,
                        "worker_points": None}),
    (codes.LagrangeCode, {"num_data": 2, "num_workers": 6, "degree": 2}),
    (codes.LagrangeCode, {"num_data": 2, "num_workers": 6, "decoder_degree": 2,
                          "data_points": None, "worker_points": None}),
    (codes.ReplicationCode, {"num_data": 4, "num_workers": 6}),
    (codes.RegressionCode, {"num_data": 2, "num_workers": 3, "metric": "shrunk", "length": 1.0}),
    (Regression, {"metric": "shrunk", "length": 2.0, "link": None}),
    (codes.SplineCode(2, 3).plan, {"inputs": [X], "num_stragglers": 1}),
    (codes.RegressionCode(2, 3).plan, {"inputs": [X], "num_stragglers": 1}),
    (codes.RegressionCode(2, 3).plan, {"inputs": [], "num_stragglers": 1, "batch_size": 6}),
    (Regression().plan, {"inputs": [X]}),
    (Regression().plan, {"inputs": [], "batch_size": 6, "block": 4}),
    (linear.MatrixMap, {"matrix": [[1.0]]}),
    (linear.MatrixMap([[1.0]]), {"values": torch.ones(1), "dim": 0}),
    (linear.SplineMap, {"knots": [0.0, 1.0, 2.0], "points": [0.5], "smoothing": 0.0,
                        "weights": None}),
    (curves.chebyshev_first, {"num_points": 3}),
    (curves.chebyshev_second, {"num_points": 3}),
    (stragglers.Uniform, {"num_stragglers": 1, "seed": 0}),
    (stragglers.Contiguous, {"num_stragglers": 1, "seed": 0}),
    (stragglers.Uniform(1, seed=0).sample, {"num_workers": 3, "generator": None}),
    (stragglers.Bernoulli, {"p": 0.5, "latency": 1.0, "seed": None}),
    (stragglers.ShiftedExponential, {"shift": 1.0, "rate": 1.0, "seed": 0}),
    (stragglers.Trace, {"source": [[1.0]]}),
    (scores.rmse, {"decoded": X, "exact": X}),
    (scores.relative_accuracy, {"decoded": X, "exact": X, "labels": torch.ones(6).long()}),
    (nn.CodedWrapper, {"module": torch.nn.Tanh(), "code": codes.ReplicationCode(2, 3),
                       "workers": None, "waiting": None}),
    (nn.CodedWrapper, {"module": torch.nn.Tanh(), "code": None, "workers": workers.LocalWorkers(),
                       "parts": 2, "estimator": None}),
    (nn.Waiting, {"deadline": 1.0, "estimate_after": 3.0, "hedge_budget": 0.25, "estimate": True,
                  "on_error": "raise"}),
    (nn.Waiting.first, {"num_stragglers": 1, "deadline": 1.0}),
    (workers.LocalWorkers, {"stragglers": None}),
    (workers.DeviceWorkers, {"devices": ["cpu"], "timeout": 1.0}),
    (workers.ProcessWorkers, {"num_workers": 2, "devices": ["cpu"], "threads": 1,
                              "hang_timeout": 1.0, "timeout": 1.0}),
    (workers.FaultyWorkers, {"pool": workers.LocalWorkers(), "delays": None, "rates": {"nan": 0.1},
                             "seed": 0}),
    (tune, {"wrapper": nn.CodedWrapper(torch.nn.Tanh(), codes.FloaterHormannCode(2, 3)),
                   "batches": [X], "order": [0]}),
    (compare, {"module": torch.nn.Tanh(), "batches": [X, X], "settings": [(3, 2, 1)], "seeds": 0,
               "labels": None, "schemes": ["replication"]}),
    (simulation.Conditions, {"spread": 0.1, "straggling": 0.1, "slow": 0.1, "dead": 0.1,
                             "dead_after": 9.0, "bursts": 9.0, "delays": None}),
]  # fmt: skip
with warnings.catch_warnings(action="ignore"):  # of prototypes
    QUANTISED = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    MASKED = torch.masked.masked_tensor(torch.ones(3), torch.ones(3, dtype=torch.bool))
UNUSUAL = [
    torch.ones(3).to_sparse(),
    torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    torch.ones(3, device="meta"),
    torch.ones(3).to(torch.float8_e4m3fn),
    MASKED,
    QUANTISED,
    torch.ones(3, dtype=torch.complex64),
    torch.tensor([math.nan]),
    torch.zeros(0),
    torch.ones(3, dtype=torch.int64),
]
WRONG = st.one_of(
    st.sampled_from([None, True, "", "x", b"x", math.nan, math.inf, -math.inf, -1, 0, -0.5, 1.5]),
    st.sampled_from([10**9, 10**30, -(10**30), 10**5000, 1e300, 5e-324, 1j, object(), int, len]),
    st.sampled_from([[], [math.nan], [[1.0], [2.0, 3.0]], ["x"], {}, {1: 2}, (), range(3), [[]]]),
    st.sampled_from([np.ones(2), np.array(["x"]), np.zeros((0, 2)), np.float32(1), np.ones(())]),
    st.sampled_from(UNUSUAL),
    st.integers(),
    st.floats(),
    st.lists(st.floats(), max_size=4),
    st.text(max_size=3),
)


class Allocated(TorchDispatchMode):
    """Adds up the bytes of all results of operations."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if type(leaf) is torch.Tensor and not (leaf.is_meta or leaf.is_sparse):
                self.bytes += leaf.numel() * leaf.element_size()
        return out


def is_huge(value):
    return isinstance(value, (int, float)) and abs(value) > 1e6


def outcome(call, arguments):
    """The error or None, the seconds of processor time, and the bytes that were asked for."""
    start = time.process_time()
    try:
        call(**arguments)
    except (TypeError, ValueError) as caught:
        return caught, time.process_time() - start
    return None, time.process_time() - start


def name_of(call):
    return "" if isinstance(call, dict) else getattr(call, "__name__", type(call).__name__)


@pytest.mark.parametrize(("call", "arguments"), CALLS, ids=name_of)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_wrong_arguments_are_named_at_once(call, arguments, data):
    argument = data.draw(st.sampled_from(sorted(arguments)))
    wrong = data.draw(WRONG)
    if call is stragglers.Trace and isinstance(wrong, (str, bytes)):
        return  # a path
    if argument == "batch_size" and is_huge(wrong):
        return  # what it raises is its own; what it takes is what was asked for
    given = arguments | {argument: wrong}
    for _ in range(2):  # the first may import modules; other threads count, too
        tracemalloc.start()
        with Allocated() as allocated:
            error, seconds = outcome(call, given)
        used = tracemalloc.get_traced_memory()[1] + allocated.bytes
        tracemalloc.stop()
        if error is None:
            return
        if used < BYTES:
            break
    assert used < BYTES, (argument, wrong, error)
    text, own = str(error), inspect.signature(call).parameters.keys() | arguments.keys()
    # Mostly the wrong one itself; or one that does not fit to it.
    assert any(re.search(rf"\b{name}\b", text) for name in own), text
    assert len(text.splitlines()) == 1
    if seconds > SECONDS:
        assert min(outcome(call, given)[1] for _ in range(3)) < SECONDS


NAN, INF = math.nan, math.inf
# Values that each argument of a call refuses, beside what else is right.
REFUSED = [
    (codes.SplineCode, {
        "num_data": [0, True, 1.0, 10**30], "num_workers": [0, 3, 6.0, 10**9],
        "encoder_smoothing": [-1.0], "decoder_smoothing": [NAN, "x"],
        "data_points": [[0.0], [[0.0] * 4], [0.0, 1, 1, 2], [INF] * 4],
        "worker_points": [[0.0, 1, 2, 3, 4, NAN], [0.0, 1, 2, 3, 4, INF], [5.0, 4, 3, 2, 1, 0]]}),
    (codes.FloaterHormannCode, {"order": [-1, 4, 0.5]}),
    (codes.LagrangeCode, {"degree": [0, 1.5], "decoder_degree": [-1], "num_workers": [2]}),
    (codes.RegressionCode, {
        "num_workers": [1, 6.0, 10**30], "shuffle": [1], "link": ["logit"],
        "ordering": ["near", 3, [1, 0]]}),
    (Regression, {"metric": ["near", [], [1], 1], "length": ["long", 0.0, None]}),
    (curves.chebyshev_first, {"num_points": [0, 2.0]}),
    (linear.MatrixMap, {"matrix": [[1.0, 2.0], [[NAN]], "ab", [[1.0], [1.0, 2.0]]]}),
    (linear.SplineMap, {
        "knots": [[0, 2, 1], [0, 1, 1], [0, NAN, 1], [0, 1, INF], [[0, 1, 2]], [], ["a"] * 3],
        "points": [[NAN], 0.5], "smoothing": [-1.0, NAN, [0.1, 0.2], "much"],
        "weights": [[1, 1], [1, 0, 1], [1, NAN, 1]]}),
    (stragglers.Uniform, {"num_stragglers": [-1, 1.5], "seed": [0.5, 10**30]}),
    (stragglers.Uniform(1, seed=0).sample, {"num_workers": [0, 4.0, 10**9], "generator": [5]}),
    (stragglers.Bernoulli, {"p": [1.5, "0.5"], "latency": [-1.0]}),
    (stragglers.ShiftedExponential, {"shift": [INF], "rate": [0]}),
    (stragglers.Trace, {"source": [None, [], [[]], [1.0], [[1.0], [1.0, 2.0]], [[-2.0]], [[NAN]]]}),
    (scores.rmse, {"decoded": [[1.0], X[:2]], "exact": [X.int()]}),
    (scores.relative_accuracy, {"labels": [X, [0, 1, 2], torch.ones(2).long()]}),
    (nn.Waiting, {
        "deadline": [0.0, INF, "200ms"], "estimate_after": [0, NAN], "estimate": [0],
        "on_error": ["skip"], "hedge_budget": [-1, None]}),
    (nn.Waiting.first, {"num_stragglers": [-1, 1.5]}),
    (workers.LocalWorkers, {"stragglers": [3]}),
    (workers.DeviceWorkers, {
        "devices": [[], "cpu", torch.device("cpu"), ["nonsense"], ["cuda:99"]], "timeout": [NAN]}),
    (workers.ProcessWorkers, {
        "num_workers": [0, 10**8], "threads": [0], "hang_timeout": [0.0], "timeout": [NAN],
        "devices": ["cpu", ["nowhere"]]}),
    (workers.FaultyWorkers, {
        "pool": [3], "delays": [0.1], "seed": [0.5], "crash_every": [0], "attack": ["lie"],
        "rates": [{"nan": "x"}, {"nan": 1.5}, {"nap": 0.5}, {"nan": 0.6, "crash": 0.6}],
        "adversaries": [(1,)]}),
    (nn.CodedWrapper, {"code": [np.ones(2)], "workers": [np.ones(2)]}),
    (tune, {"wrapper": [None], "batches": [None, []], "order": [1.0, [], [-1.0]]}),
    (compare, {
        "module": [None], "batches": [None, X, [X, X[:0]], [X]], "labels": [[X]],
        "tuning_batches": [2],
        "settings": [[(4, 5, 1)], [(5, 4, 5)], [(5, 4)], (5, 4, 1), []], "received_sets": [0],
        "seeds": [-1, ["x"], [], [10**30]], "surrogate": [3], "attack": ["noise"],
        "delays": [stragglers.Uniform(1)],
        "schemes": ["regression", ["x"], ["regression", "x"]]}),
    (simulation.Conditions, {"dead": [2.0], "spread": [-1.0], "dead_after": [0.0]}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "refused"), REFUSED, ids=name_of)
def test_what_is_wrong_is_refused_by_name(call, refused):
    others = [args for each, args in CALLS if name_of(each) == name_of(call)]
    for argument, values in refused.items():
        given = next((args for args in others if argument in args), others[0])
        for wrong in values:
            with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b.* must ") as info:
                call(**given | {argument: wrong})
            assert "\n" not in str(info.value), (argument, wrong)


@pytest.mark.parametrize(("call", "arguments"), CALLS, ids=name_of)
def test_what_is_right_is_taken(call, arguments):
    call(**arguments)


def test_every_public_class_and_function_is_tried():
    tried = {call for call, _ in CALLS if inspect.isclass(call) or inspect.isroutine(call)}
    # Abstract ones, an exception, and what is not for callers to make.
    tried |= {codes.BatchPlan, codes.Code, codes.CurveCode, codes.FixedCode, linear.LinearMap}
    tried |= {codes.NotEnoughResults, codes.DeadlineExceeded}
    tried.add(stragglers.Stragglers)
    for module in (codes, linear, stragglers):
        for name in {*module.__all__}:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                assert thing in tried, name


@pytest.mark.parametrize("name", ["SplineCode", "BerrutCode", "ReplicationCode", "RegressionCode"])
def test_the_largest_code(name):
    code = getattr(codes, name)(2, MOST_WORKERS)
    assert code.num_workers == 65536


@pytest.mark.parametrize("tensor", UNUSUAL[:7], ids=str)
@pytest.mark.parametrize(
    "use",
    [
        linear.SplineMap([0.0, 1.0, 2.0], [0.5]),
        linear.MatrixMap(torch.ones(2, 3)),
        lambda x: Regression().plan([x]),
    ],
)
def test_tensors_that_kernels_cannot_read(use, tensor):
    message = "must be a dense, strided floating-point tensor of 16 bits or more, got"
    with pytest.raises(TypeError, match=message):
        use(tensor)


def test_what_the_messages_say():
    with pytest.raises(TypeError, match="mine: x must be a dense, strided tensor, got layout"):
        dense("mine", "x", UNUSUAL[0], floating=False)
    with pytest.raises(TypeError, match=r"mine: x must be .*, got a tensor on the meta device"):
        dense("mine", "x", UNUSUAL[2])
    with pytest.raises(ValueError, match="mine: n must be at most 9, got an integer of 16610 bits"):
        count("mine", "n", 10**5000, most=9)
    with pytest.raises(ValueError, match="mine: x must be small, got an integer of 16610 bits"):
        real("mine", "x", 10**5000, "small", lambda x: x < 1)
    with pytest.raises(TypeError, match=r"mine: n must be an integer, got \[0, 1, .*\.\.\.$"):
        count("mine", "n", list(range(10**4)))
