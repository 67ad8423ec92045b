"""The wrapper: any module, any pytree, any batch, and every answer although workers are lost."""

from __future__ import annotations

import dataclasses
import math
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch import CodedWrapper, Regression, Report, Waiting
from coded_torch.codes import NotEnoughResults, RegressionCode, ReplicationCode
from coded_torch.stragglers import ShiftedExponential, Uniform
from coded_torch.testing.workers import CopyCode, PolynomialCode
from coded_torch.workers import DeviceWorkers, LocalWorkers

from ..workers.test_local import Fixed
from .modules import EXACT, Call, linear, rand

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


pytree.register_dataclass(Output)


class Tower(nn.Module):
    """Affine in its inputs, nested in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = linear(3, 2), linear(4, 2)

    def forward(self, pair: Pair, other: dict[str, Any], *, extra: Tensor) -> Output:
        left = self.left(pair.first) + other["shift"]
        return Output(left + self.right(other["x"][0]), (left, pair.second.flatten(1)), None), [
            extra,
            "constant",
            7,
        ]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_data=st.integers(1, 5), extra=st.integers(0, 4))
def test_an_exact_code_gives_the_answers_of_an_affine_module(data, num_data, extra):
    code = PolynomialCode(num_data, num_data + extra)
    lost = data.draw(st.integers(0, extra))
    batch = data.draw(st.integers(0, 3 * num_data + 1))
    seed = data.draw(st.integers(0, 1000))
    coded = CodedWrapper(linear(), code, workers=LocalWorkers(Uniform(lost, seed=seed)))
    x = rand(batch, 3, seed=seed)
    out = coded(x)
    torch.testing.assert_close(out, coded.module(x), **EXACT)
    run = coded.last_run
    assert run.num_groups == math.ceil(batch / num_data)
    assert len(run.received) == (code.num_workers - lost if batch else 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(0, 10), num_data=st.integers(1, 4))
def test_pytrees_and_in_dims(data, batch, num_data):
    """Nested arguments, each with its batch at a dimension of its own, or none."""
    pair_dims = data.draw(st.sampled_from([0, Pair(0, 0), Pair(1, 0), Pair(0, -1), Pair(1, 2)]))
    x_dim = data.draw(st.sampled_from([0, 1, -1]))
    first_dim, second_dim = pair_dims if isinstance(pair_dims, Pair) else (pair_dims, pair_dims)

    class Moved(Tower):
        """Takes the batch where it is said to be."""

        def forward(self, pair, other, *, extra):
            pair = Pair(pair.first.movedim(first_dim, 0), pair.second.movedim(second_dim, 0))
            other = {"x": [other["x"][0].movedim(x_dim, 0)], "shift": other["shift"]}
            return super().forward(pair, other, extra=extra)

    args = (
        Pair(
            rand(batch, 3).movedim(0, first_dim), rand(batch, 2, 3, seed=1).movedim(0, second_dim)
        ),
        {"x": [rand(batch, 4, seed=2).movedim(0, x_dim)], "shift": rand(2, seed=3)},
    )
    extra = rand(batch, seed=4)
    coded = CodedWrapper(
        Moved(),
        PolynomialCode(num_data, num_data + 2),
        workers=LocalWorkers(Uniform(1, seed=0)),
        in_dims=(pair_dims, {"x": x_dim, "shift": "shared"}),
    )
    got, wanted = coded(*args, extra=extra), coded.module(*args, extra=extra)
    assert isinstance(got[0], Output)
    torch.testing.assert_close(
        pytree.tree_map(lambda leaf: leaf, list(vars(got[0]).values())),
        list(vars(wanted[0]).values()),
        **EXACT,
    )
    torch.testing.assert_close(got[1][0], wanted[1][0], **EXACT)
    assert got[1][1:] == ["constant", 7]


@pytest.mark.parametrize("batch", [0, 1, 3, 4, 5, 12])
def test_batches_around_the_size_of_a_group(batch):
    x = rand(batch, 3)
    for code in (PolynomialCode(4, 6), ReplicationCode(4, 8)):
        coded = CodedWrapper(linear(), code)
        torch.testing.assert_close(coded(x), coded.module(x), **EXACT)


def test_groups_are_consecutive_inputs_and_the_last_is_filled_up_with_the_last_input():
    seen = []
    coded = CodedWrapper(
        Call(lambda x: seen.append(x) or x),
        CopyCode(3, 3, ordering="arrival", shuffle=False),
    )
    x = torch.arange(1.0, 6.0)
    assert torch.equal(coded(x), x)
    # Worker after worker, its inputs of every group.
    assert seen[0].tolist() == [1.0, 4.0, 2.0, 5.0, 3.0, 5.0]


def test_a_worker_gets_contiguous_views_of_one_encoded_tensor():
    seen = []
    with DeviceWorkers(["cpu"]) as pool:
        CodedWrapper(Call(lambda x: seen.append(x) or x), PolynomialCode(2, 3), workers=pool)(
            rand(5, 4).T.contiguous().T
        )
    assert [tuple(x.shape) for x in seen] == [(3, 4)] * 3
    assert all(x.is_contiguous() for x in seen)
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1


def test_inputs_that_are_not_contiguous():
    wide = rand(3, 2, 7).transpose(0, 2)
    coded = CodedWrapper(linear(), PolynomialCode(3, 5))
    for x in (wide[:, 0], wide[::2, 1], rand(1, 3).expand(5, 3), rand(7, 3).flip(0)):
        torch.testing.assert_close(coded(x), coded.module(x), **EXACT)


def test_features_of_size_zero_and_inputs_of_one_dimension():
    coded = CodedWrapper(Call(lambda x: 2 * x), PolynomialCode(2, 3))
    assert coded(torch.zeros(5, 0)).shape == (5, 0)
    torch.testing.assert_close(coded(rand(5)), 2 * rand(5), **EXACT)


def test_out_dims():
    torch.manual_seed(0)
    gru, x = nn.GRU(3, 2).double(), rand(4, 5, 3)  # the batch is the second dimension
    coded = CodedWrapper(gru, CopyCode(2, 2), in_dims=1, out_dims=1)
    torch.testing.assert_close(coded(x), gru(x))
    both = Call(lambda x: (2 * x, torch.arange(3), x.T))
    out = CodedWrapper(both, PolynomialCode(2, 4), out_dims=(0, None, -1))(rand(3, 2))
    torch.testing.assert_close(out, both(rand(3, 2)), **EXACT)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 9))
def test_answers_do_not_depend_on_the_order_of_replies(seed, batch):
    """The same received set in another order: the same bits."""
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    latencies = (order + 1).double()
    latencies[order >= 3] = math.inf
    in_order = torch.where(latencies < math.inf, torch.arange(5).double(), math.inf)
    torch.manual_seed(seed)
    module, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), rand(batch, 3).float()
    first, second = (
        CodedWrapper(module, PolynomialCode(2, 5), workers=LocalWorkers(Fixed(*times.tolist())))
        for times in (latencies, in_order)
    )
    assert torch.equal(first(x), second(x))
    assert first.last_run.received == second.last_run.received
    assert first.last_run.latencies != second.last_run.latencies or latencies.equal(in_order)


def test_the_report():
    coded = CodedWrapper(
        linear(),
        PolynomialCode(2, 5),
        workers=LocalWorkers(Fixed(0.5, 0.1, math.inf, 0.3, 0.2)),
        waiting=Waiting.first(2),
    )
    assert coded.last_run is None
    coded(rand(5, 3))
    run = coded.last_run
    assert isinstance(run, Report)
    assert run.received == (1, 3, 4)
    assert run.missing == (0, 2)
    assert list(run.latencies.items()) == [(1, 0.1), (4, 0.2), (3, 0.3)]
    assert run.rejected == {}
    assert run.asked == (0, 1, 2, 3, 4)
    assert (run.work, run.ended) == (5 * 3 / 5, "first")
    assert run.predicted.all()
    assert not run.failed
    assert run.num_groups == 3
    assert min(run.encode_seconds, run.compute_seconds, run.decode_seconds) > 0
    coded(rand(0, 3))
    assert coded.last_run.num_groups == 0
    assert coded.last_run.received == ()


def test_the_number_of_stragglers_is_the_laws_or_the_given_one():
    code = PolynomialCode(3, 8)

    def lost(num_stragglers: Any = None, **options: Any) -> int:
        coded = CodedWrapper(linear(), code, waiting=Waiting.first(num_stragglers), **options)
        coded(rand(3, 3))
        return 8 - len(coded.last_run.received)

    assert lost() == 0
    assert lost(workers=LocalWorkers(Uniform(2))) == 2
    assert lost(workers=LocalWorkers(Uniform(2)), num_stragglers=4) == 4
    assert lost(num_stragglers=np.int64(3)) == 3
    assert repr(lost(num_stragglers=torch.tensor(1))) == "1"
    assert lost(workers=LocalWorkers(Uniform(2)), num_stragglers=0) == 2  # no more will come
    assert lost(workers=LocalWorkers(ShiftedExponential(0.0, 1.0))) == 0
    assert lost(workers=LocalWorkers(ShiftedExponential(0.0, 1.0)), num_stragglers=5) == 5


def test_what_is_assigned_is_checked_as_what_is_given():
    coded = CodedWrapper(linear(), ReplicationCode(3, 5), waiting=Waiting.first(4))
    coded(rand(1, 3))
    assert len(coded.last_run.received) == 1
    with pytest.raises(ValueError, match="num_stragglers must be at most 2, as PolynomialCode"):
        coded.code = PolynomialCode(3, 5)
    assert coded.code.min_received == 1
    coded.waiting, coded.workers = None, LocalWorkers(Uniform(1))
    coded.code = PolynomialCode(3, 5)
    coded(rand(1, 3))
    assert len(coded.last_run.received) == 4
    for name, value in (("workers", None), ("code", 3), ("parts", 2), ("surrogate", linear())):
        before = getattr(coded, name)
        with pytest.raises((TypeError, ValueError), match=f"^CodedWrapper: {name} must be"):
            setattr(coded, name, value)
        assert getattr(coded, name) is before


def test_latencies_belong_to_one_module_on_one_pool():
    def pool(seconds):
        return LocalWorkers(Fixed(*[seconds] * 4))

    coded = CodedWrapper(linear(), parts=4, workers=pool(1.0))
    for change in (
        lambda: setattr(coded, "workers", pool(2.0)),
        lambda: setattr(coded, "module", linear()),
    ):
        for _ in range(9):
            coded(rand(8, 3))
        assert coded.last_run.hedging_threshold is not None
        change()
        coded(rand(8, 3))
        assert coded.last_run.hedging_threshold is None


def test_a_law_that_loses_more_than_the_code_can():
    coded = CodedWrapper(linear(), PolynomialCode(3, 5), workers=LocalWorkers(Uniform(3)))
    with pytest.raises(NotEnoughResults, match="at least 3 of 5 results, got 2"):
        coded(rand(3, 3))
    assert len(coded.last_run.received) == 2
    assert coded.last_run.rejected == {}


def test_the_deadline_is_on_the_clock_of_the_workers():
    law = Fixed(1.0, 2.0, 3.0, 4.0, 5.0)
    coded = CodedWrapper(
        linear(),
        PolynomialCode(2, 5),
        workers=LocalWorkers(law),
        waiting=Waiting.first(deadline=3.5),
    )
    x = rand(4, 3)
    torch.testing.assert_close(coded(x), coded.module(x), **EXACT)
    assert coded.last_run.received == (0, 1, 2)
    coded.waiting = Waiting.first(deadline=1.5)
    with pytest.raises(NotEnoughResults, match=r"got 1; missing: \[1, 2, 3, 4\]"):
        coded(x)


def classifier(output: Any, **options: Any) -> CodedWrapper:
    return CodedWrapper(Call(output), RegressionCode(3, 6, link="softmax"), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_stay_such(dtype):
    x = (4 * rand(12, 50)).to(dtype)
    coded = classifier(lambda x: x.softmax(-1), workers=LocalWorkers(Uniform(2, seed=0)))
    out = coded(x)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double().sum(-1), torch.ones(12).double(), rtol=0, atol=8 * torch.finfo(dtype).eps
    )
    # The error of logarithms is in no unit of the answers.
    assert coded.last_run.radii is None or not coded.last_run.predicted.any()
    coded.code = coded.code.replace(link=None)
    coded(x)
    assert coded.last_run.radii is not None


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_gradients_reach_inputs_and_weights(devices):
    workers = None if devices is None else DeviceWorkers(devices)
    coded = CodedWrapper(linear(), PolynomialCode(3, 6), workers=workers, waiting=Waiting.first(2))
    x = rand(7, 3).requires_grad_()
    wanted = torch.autograd.grad(coded.module(x).pow(2).sum(), [x, *coded.module.parameters()])
    coded(x).pow(2).sum().backward()
    torch.testing.assert_close(
        [x.grad, *(p.grad for p in coded.parameters())], list(wanted), rtol=1e-7, atol=1e-7
    )
    coded.workers.close()


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    coded = CodedWrapper(
        module,
        PolynomialCode(2, 4, ordering="arrival", shuffle=False),
        workers=LocalWorkers(Fixed(0.0, math.inf, 2.0, 1.0)),
        waiting=Waiting.first(1),
    )
    x = rand(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(coded, (x,))
    assert torch.autograd.gradgradcheck(coded, (x,))


def test_no_graph_without_gradients():
    coded, x = CodedWrapper(linear(), PolynomialCode(2, 4)), rand(3, 3).requires_grad_()
    with torch.no_grad():
        assert not coded(x).requires_grad
    with torch.inference_mode():
        assert coded(x).is_inference()


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_autocast(devices):
    workers = None if devices is None else DeviceWorkers(devices)
    coded = CodedWrapper(linear(dtype=torch.float32), ReplicationCode(2, 4), workers=workers)
    x = rand(5, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = coded(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, coded.module(x))
    assert coded(x).dtype == torch.float32
    coded.workers.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    coded = CodedWrapper(linear(dtype=dtype), PolynomialCode(2, 4))
    x = rand(5, 3).to(dtype)
    out = coded(x)
    assert out.dtype == dtype
    # Coded inputs and results are rounded once each; the decoder at most triples that.
    torch.testing.assert_close(out, coded.module(x), rtol=0, atol=12 * torch.finfo(dtype).eps)


def test_concurrent_calls_keep_their_reports_whole():
    law = ShiftedExponential(0.0, 1.0)
    coded = CodedWrapper(
        linear(), PolynomialCode(2, 6), workers=LocalWorkers(law), waiting=Waiting.first(3)
    )
    reports = []

    def call(i: int) -> bool:
        x = rand(1 + i % 5, 3, seed=i)
        right = torch.allclose(coded(x), coded.module(x), **EXACT)
        reports.append(coded.last_run)
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(80)))
    for run in reports:
        assert len(run.received) == 3
        assert set(run.latencies) == set(run.received)
        assert list(run.latencies.values()) == sorted(run.latencies.values())


def test_the_global_random_state_is_not_touched():
    state = torch.get_rng_state()
    CodedWrapper(Call(lambda x: x), PolynomialCode(2, 4), workers=LocalWorkers(Uniform(1)))(
        rand(3, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_representation():
    text = repr(CodedWrapper(linear(), ReplicationCode(2, 4), waiting=Waiting.first(1)))
    assert "ReplicationCode(num_data=2, num_workers=4)" in text
    assert "num_stragglers=1" in text
    assert "(module): Linear" in text


def test_bad_construction():
    module, code = linear(), PolynomialCode(3, 5)
    for lost in (3, 5):
        with pytest.raises(
            ValueError, match=r"waiting.num_stragglers must be at most 2, .* needs 3 results"
        ):
            CodedWrapper(module, code, waiting=Waiting.first(lost))
    with pytest.raises(ValueError, match=r"waiting.num_stragglers must be at most 2"):
        CodedWrapper(module, code).run(rand(3, 3), waiting=Waiting.first(3))
    with pytest.raises(TypeError, match="module must be of type Module, got function"):
        CodedWrapper(lambda x: x, code)
    with pytest.raises(TypeError, match="code must be of type Code or None, got int"):
        CodedWrapper(module, 3)
    with pytest.raises(TypeError, match="workers must be of type Workers, got str"):
        CodedWrapper(module, code, workers="cpu")
    with pytest.raises(TypeError, match="waiting must be of type Waiting or None, got float"):
        CodedWrapper(module, code, waiting=1.0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "workers must be given without a code, got None"),
        ({"workers": LocalWorkers()}, ValueError, "parts must be given with LocalWorkers, which"),
        ({"workers": LocalWorkers(), "parts": 0}, ValueError, "parts must be at least 1, got 0"),
        (
            {"workers": LocalWorkers(), "parts": 2, "waiting": Waiting.first()},
            ValueError,
            r"waiting must be Waiting\(...\) without a code, .* got Waiting.first\(\)",
        ),
        ({"code": ReplicationCode(2, 4), "parts": 2}, ValueError, "parts must be None with a code"),
        (
            {"code": ReplicationCode(2, 4), "predictor": Regression()},
            ValueError,
            "predictor must be None with a code",
        ),
        ({"workers": LocalWorkers(), "parts": 2, "predictor": "mean"}, TypeError, "predictor must"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(options, error, match):
    with pytest.raises(error, match=f"^CodedWrapper: {match}"):
        CodedWrapper(linear(), **options)
