"""Rows that are not finite, where inputs are not mixed: computed, and no others' affair."""

import copy
import math
import random

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Regression, Waiting
from coded_torch.codes import NotEnoughResults, ReplicationCode
from coded_torch.nn._division import Inputs, Rows
from coded_torch.nn._finite import all_finite, finite, sums_of
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory
from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.testing.workers import FailsAt, divide_by_zero
from coded_torch.workers import DeviceWorkers, LocalWorkers

from .modules import WAYS, Call, divided
from .pools import Separate

BAD = [2, 7]


def spoiled(size: int = 24, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.linspace(0, 3, 3 * size, dtype=torch.float64).view(size, 3).to(dtype)
    x[BAD[0], 1], x[BAD[1]] = math.nan, -math.inf
    return x


@pytest.mark.parametrize("size", [24, 600])
def test_a_transform_does_not_hide_them(size):
    """The memory of a tensor in a transform of PyTorch is not that of its numbers."""
    x, found = spoiled(size), list[bool]()

    def call(x: torch.Tensor) -> torch.Tensor:
        found.append(finite(x))
        return CodedWrapper(nn.Identity(), workers=LocalWorkers(), parts=2)(x)

    assert same(torch.func.functionalize(call)(x), x)
    assert found == [False]


X = torch.arange(24.0).view(12, 2)


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        (X.split(3)[::-1], 1),
        ((*X.split(3)[:2], X[9:]), 2),
        ((*X.split(3)[:2], X[9:].double()), 2),
        (X.T.split(1), 2),
        (X.split(1, 1), 2),
        (X.to(torch.complex64).split(3), 1),
        ((X[:0], X[:6], X[6:]), 2),
        ([X.clone() for _ in range(3)], 3),
    ],
)
@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
def test_tensors_that_lie_end_to_end_have_one_sum(tensors, count, bad):
    tensors = copy.deepcopy(tensors)  # those of one memory again have one
    sums = sums_of(tensors)
    assert len(sums) == count
    assert sum(sums) == sum(x.sum() for x in tensors)
    assert all_finite(sums)
    for i in range(len(tensors)):
        if bad is not None and tensors[i].numel():
            tensors[i][-1, -1] = bad
            assert not all_finite(sums_of(tensors))
            tensors[i][-1, -1] = 0


def test_sums_of_half_precision_do_not_overflow():
    assert all_finite(sums_of([torch.full((1000,), 6e4, dtype=torch.float16)]))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7), b.nan_to_num(nan=7))


def others(size: int = 24) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[BAD] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_such_a_row_is_answered_as_the_module_does(way, dtype):
    x = spoiled(dtype=dtype)
    for module in (nn.ReLU(), Call(lambda x: x.nan_to_num(nan=-1.0, neginf=3.0))):
        coded = CodedWrapper(module, **divided(way, 4, 6), workers=Separate())
        assert same(coded(x), module(x))
        assert not coded.last_run.estimated.any()
        assert not coded.last_run.rejected
        assert coded.last_run.error_bounds is None or not coded.last_run.error_bounds.any()


@pytest.mark.parametrize("ordering", ["similarity", "arrival"])
@pytest.mark.parametrize("way", WAYS)
def test_without_a_result_it_gets_the_mean_and_an_infinite_error_bar(way, ordering):
    """And what else is lost is estimated from finite rows alone."""
    x, module = spoiled(), Call(lambda x: x.sin())
    seen = torch.zeros(24, dtype=torch.bool)
    for seed in range(20):
        stragglers = Uniform(3 if way != "rows" else 2, seed=seed)
        how = divided(way, 4, 6)
        if way != "rows":
            how["code"] = how["code"].replace(ordering=ordering)
        coded = CodedWrapper(module, **how, workers=LocalWorkers(stragglers))
        answers, report = coded.run(x)
        own, errors = ~report.estimated, report.error_bounds
        assert same(answers[own], module(x)[own])
        assert answers[others()].isfinite().all()
        lost = report.estimated & ~others()
        seen |= lost
        mean = module(x)[own & others()].mean(0).expand(int(lost.sum()), 3)
        torch.testing.assert_close(answers[lost], mean)
        if errors is not None:
            assert errors[lost].isinf().all()
            assert report.error_bounds_at(0.5)[~lost].isfinite().all()
    assert seen.any()


@pytest.mark.parametrize("way", WAYS)
def test_no_other_answer_depends_on_it(way):
    x, answers = spoiled(), []
    for odd in (0.0, 1e30, math.nan):
        module = Call(lambda x, odd=odd: torch.where(x.isfinite(), x.sin(), odd))
        pool = LocalWorkers(Uniform(3 if way != "rows" else 2, seed=1))
        coded = CodedWrapper(module, **divided(way, 4, 6), workers=pool)
        answers.append(coded(x))
        assert coded.last_run.estimated[others()].any()
    assert torch.equal(answers[0][others()], answers[1][others()])
    assert torch.equal(answers[0][others()], answers[2][others()])


@pytest.mark.parametrize("way", WAYS)
def test_surrogates_and_memories_do_not_see_it(way):
    x, memory = spoiled(48), Memory()
    module = Call(lambda x: (90 * x).sin())  # which distances do not tell
    surrogates = Call(lambda x: (90 * x).sin() - 0.1 * x), memory
    for seed in range(2):
        pool = LocalWorkers(Uniform(3 if way != "rows" else 2, seed=seed))
        coded = CodedWrapper(module, **divided(way, 4, 6), workers=pool, surrogate=surrogates)
        known, answers = len(memory), coded(x)
        run = coded.last_run
        assert (run.notes, run.surrogate_weights[0][0] > 0.5) == ((), True)
        assert answers[others(48)].isfinite().all()
        assert len(memory) - known == (~run.estimated & others(48)).sum()


def test_where_the_mean_estimates_such_rows_calibrate_no_error_bounds():
    """If time is short: without distances, nothing else tells which rows are finite."""
    plan = Rows(
        Inputs((spoiled(),), {}, 0), Regression(), by_mean=True, parts=4, dealer=random.Random(0)
    ).plan
    results, radii = torch.linspace(-1, 1, 24)[:, None, None], []
    results[BAD] = 0.0  # the mean of the others
    for left_out in ((5,), (5, *BAD)):
        received = [i for i in range(24) if i not in left_out]
        answers = plan.decode(results[received], received)
        radii.append(plan.error_bounds(answers).at(0.5)[5])
        plan = Regression().plan([], 24)
    assert radii[0] == pytest.approx(radii[1])


def test_in_any_argument_wherever_the_batch_is():
    module = Call(lambda tree, scale: {"y": tree["x"][0].T * scale[:, None], "max": scale.max()})
    coded = CodedWrapper(
        module, parts=3, workers=Separate(), in_dims=({"x": 1},), out_dims={"y": 0, "max": None}
    )
    scale, x = torch.ones(9), torch.ones(2, 9)
    scale[4], x[1, 8] = math.inf, math.nan
    answers, report = coded.run({"x": [x]}, scale=scale)
    assert same(answers["y"], x.T * scale[:, None])
    assert not report.rejected
    mask = torch.arange(9) % 2 == 0
    masked = CodedWrapper(nn.Identity(), ReplicationCode(3, 5))
    assert torch.equal(masked(mask), mask.clone())


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_nothing_else(way):
    x = torch.full((6, 2), math.nan)
    coded = CodedWrapper(nn.Identity(), **divided(way, 3, 6), workers=Separate())
    assert coded(x).isnan().all()
    module = FailsAt(7.0, divide_by_zero)
    x[:2] = 7.0
    how = divided(way, 3, 3) | {"waiting": Waiting(on_error="estimate")}
    lost = CodedWrapper(module, **how, workers=Separate())
    with pytest.raises(NotEnoughResults, match="no row with finite inputs has a result"):
        lost(x)


def test_a_memory_does_not_answer_a_batch_of_nothing_else():
    how = {"parts": 3, "waiting": Waiting(on_error="estimate"), "surrogate": (memory := Memory())}
    coded = CodedWrapper(nn.Identity(), workers=LocalWorkers(), **how)
    coded(torch.rand(100, 2))
    memory.rebuild()
    coded.workers = LocalWorkers(Uniform(1, seed=0))
    with pytest.raises(NotEnoughResults, match="no row with finite inputs has a result"):
        coded(torch.full((6, 2), math.nan))


MASKED = torch.linspace(-1, 1, 24, dtype=torch.float64).view(12, 2).sin()


def masks(x: torch.Tensor) -> torch.Tensor:
    """Mask all that is below -.5, as logits of actions that are not allowed."""
    return x.masked_fill(x < -0.5, -math.inf)


@pytest.mark.parametrize(
    "make",
    [LocalWorkers, Separate, lambda: DeviceWorkers(["cpu"] * 2)],
    ids=["local", "virtual", "devices"],
)
def test_infinite_results_are_answers_if_two_workers_return_them_alike(make):
    module = Call(lambda x: (masks(x), torch.tensor([math.inf, 1.0])))
    with make() as pool, torch.no_grad():
        coded = CodedWrapper(module, workers=pool, parts=4)
        for _ in range(2):
            (answers, constant), report = coded.run(MASKED)
            assert torch.equal(answers, masks(MASKED))
            assert constant.tolist() == [math.inf, 1.0]
            assert not report.rejected
            assert not report.estimated.any()
            (note,) = report.notes
            assert note.startswith("rows 0, 1, 2: infinite alike on two workers")


def test_an_infinite_number_for_each_row_is_an_answer():
    module = Call(lambda x: (x.sum(1), x[:, 0].clamp(min=0).log()))
    answers = CodedWrapper(module, workers=Separate(), parts=4)(MASKED)
    assert torch.equal(answers[1], module(MASKED)[1])


def test_infinite_items_of_lists_are_answers_too():
    module = Call(lambda x: (x, [{"score": row.log()} for row in x.clamp(min=0)]))
    _, items = CodedWrapper(module, workers=Separate(), parts=4)(MASKED)
    for item, row in zip(items, MASKED.clamp(min=0), strict=True):
        assert torch.equal(item["score"], row.log())


@pytest.mark.parametrize("way", WAYS[1:])
def test_copies_of_a_code_confirm_infinite_results(way):
    module = Call(lambda x: masks(x))
    coded = CodedWrapper(module, **divided(way, 2, 4), workers=Separate())
    answers, report = coded.run(MASKED)
    assert torch.equal(answers, masks(MASKED))
    assert not report.rejected


def masked_by(at: int) -> object:
    def lie(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[..., at] = -math.inf
        return y

    return lie


def test_infinities_in_other_places_confirm_nothing():
    pool = VirtualWorkers([[(masked_by(0), 1.0)], [(masked_by(1), 1.0)]])
    coded = CodedWrapper(nn.Identity(), workers=pool, parts=2)
    why = "worker [01] returned values that are not finite in output, and no other worker the same"
    with pytest.raises(NotEnoughResults, match=why):
        coded(MASKED)
    assert coded.last_run.rejected.keys() == {0, 1}


@pytest.mark.parametrize(
    ("module", "workers"),
    [(lambda x: masks(x), 1), (lambda x: x.masked_fill(x < -0.5, math.nan), 2)],
    ids=["one worker", "NaN"],
)
def test_without_a_second_worker_or_with_nan_results_are_missing(module, workers):
    pool = VirtualWorkers([[("ok", 1.0)]] * workers)
    coded = CodedWrapper(Call(module), workers=pool, parts=4)
    with pytest.raises(NotEnoughResults, match="returned values that are not finite in output"):
        coded(MASKED)


def test_nothing_is_estimated_or_learnt_from_infinite_results():
    found = []
    for odd in (math.inf, -math.inf):
        module = Call(lambda x, odd=odd: x.cos().masked_fill(x < -0.5, odd))
        raising = FailsAt(float(MASKED[8, 0]), divide_by_zero)
        memory = Memory()
        coded = CodedWrapper(
            nn.Sequential(raising, module),
            workers=Separate(),
            parts=4,
            waiting=Waiting(on_error="estimate"),
            surrogate=memory,
        )
        answers, report = coded.run(MASKED)
        assert report.estimated.nonzero().flatten().tolist() == [8]
        assert answers[8].isfinite().all()
        assert torch.equal(answers[:4], module(MASKED[:4]))
        assert len(memory) == 12 - 3 - 1
        found.append(answers[8])
    assert torch.equal(*found)
    everything = Call(lambda x: torch.where(x == x, math.inf, x))
    coded = CodedWrapper(
        nn.Sequential(FailsAt(float(MASKED[8, 0]), divide_by_zero), everything),
        workers=Separate(),
        parts=4,
        waiting=Waiting(on_error="estimate"),
    )
    with pytest.raises(NotEnoughResults, match="has a result that is finite, which estimates need"):
        coded(MASKED)


def test_infinite_results_are_verified():
    pool = VirtualWorkers([[("ok", 1.0)]] * 4)
    coded = CodedWrapper(Call(lambda x: masks(x)), workers=pool, verify=1.0)
    answers, report = coded.run(MASKED)
    assert torch.equal(answers, masks(MASKED))
    assert report.verified.all()
    assert not report.wrong_results
