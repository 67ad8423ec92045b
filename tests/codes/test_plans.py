"""Plans: any batch, any ordering, any code, and which of the answers are exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_torch import Regression
from coded_torch.codes import BerrutCode, RegressionCode, ReplicationCode, SplineCode, _base
from coded_torch.input_space._gaussian_process import GaussianProcess
from coded_torch.input_space.metrics import Distances, Sources
from coded_torch.testing.codes import DTYPES, normal

# Every data point is a worker's, and the others lie between.
POINTS = {
    "data_points": np.arange(-4, 5, 2) / 5,
    "worker_points": np.union1d(np.arange(-4, 5, 2) / 5, np.arange(-3, 4, 2) / 4),
}
SYSTEMATIC = SplineCode(5, 9, **POINTS)
SELECTING = [ReplicationCode(5, 9), RegressionCode(5, 9)]
MIXING = [SplineCode(5, 9), SYSTEMATIC, BerrutCode(5, 9)]
RECEIVED = [0, 2, 3, 6, 7]
NOTE = "no floating-point input to measure distances on: missing answers are the mean"
ORDERINGS = ["similarity", "arrival"]


def inputs(batch_size, dtype=torch.float64):
    return normal(batch_size, 4, dtype=dtype)


def planned(code, ordering, x, lost=2):
    return code.replace(ordering=ordering).plan([x], lost)


@settings(max_examples=60, deadline=None)
@given(
    code=st.sampled_from(SELECTING + MIXING),
    ordering=st.sampled_from(ORDERINGS),
    batch_size=st.integers(1, 24),
    most=st.sampled_from([4096, 7, 11]),
    received=st.sets(st.integers(0, 8), min_size=1),
    dtype=st.sampled_from(DTYPES),
)
def test_exact_answers_are_results_bit_for_bit(code, ordering, batch_size, most, received, dtype):
    x, received = inputs(batch_size, dtype), sorted(received)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_base, "MOST_ROWS", most)
        plan = planned(code, ordering, x)
    assert (type(plan.code), plan.batch_size, plan.note) == (type(code), batch_size, "")
    coded = plan.encode(x)
    assert coded.shape == (9, plan.num_groups, 4)
    results = coded[received].sin()
    answers = plan.decode(results, received)
    exact = plan.source(received) >= 0
    assert exact.dtype == torch.bool
    assert answers.shape == x.shape
    assert torch.equal(answers[exact], x.sin()[exact])
    bounds = plan.error_bounds(answers)
    assert (bounds is None) == (not isinstance(code, RegressionCode))
    if bounds is not None:
        radii = bounds.at(0.5)
        assert radii.shape == (batch_size,)
        assert ((radii > 0) | exact).all()
        assert not radii[exact].any()


@pytest.mark.parametrize("code", MIXING)
def test_codes_that_mix_refuse_what_cannot_be_mixed(code):
    name = type(code).__name__
    with pytest.raises(TypeError, match=r"values must be a dense, strided .* got"):
        code.plan([inputs(13)], 2).encode(torch.arange(13))
    with pytest.raises(ValueError, match=f"^{name}: inputs must hold a floating-point tensor"):
        code.plan([], 2, batch_size=3)


@pytest.mark.parametrize("code", SELECTING)
def test_without_distances_copies_are_equal_and_lost_answers_the_mean(code):
    plan = code.plan([], 3, batch_size=11)
    rows = plan.encode(torch.arange(11))  # [9, 3]
    copies = rows[:, :2].flatten().bincount()
    assert sorted(copies.tolist()) == [1, 1, 2, 2, 2, 2, 2, 2, 2, 2] or len(copies) == 11
    received = [0, 2]
    results = normal(11, 3)[rows[received]]
    answers, exact = plan.decode(results, received), (plan.source(received) >= 0)
    assert torch.equal(answers[exact], normal(11, 3)[exact])
    if isinstance(code, RegressionCode):
        assert plan.note == NOTE
        mean = normal(11, 3)[exact].mean(0)
        torch.testing.assert_close(answers[~exact], mean.expand(int((~exact).sum()), 3))
        radii = plan.error_bounds(answers).at(0.75)
        assert len(radii[~exact].unique()) == 1
        assert not radii[exact].any()


def test_a_batch_of_which_nothing_is_known_needs_its_size():
    for make in (RegressionCode(5, 9).plan, Regression().plan):
        with pytest.raises(ValueError, match="batch_size must be given where there are no inputs"):
            make([])
        with pytest.raises(ValueError, match=r"batch_size must be that of inputs\[0\], .* got 3"):
            make([inputs(4)], batch_size=3)


# Large batches.


@pytest.mark.parametrize(
    ("batch_size", "num_data", "sizes"),
    [
        (5000, 20, [2500, 2500]),
        (4096, 20, [4096]),
        (4100, 20, [2040, 2060]),
        (4080, 20, [4080]),
        (10_000, 5000, [5000, 5000]),
    ],
)
def test_large_batches_are_cut_evenly(batch_size, num_data, sizes):
    assert [len(rows) for rows in _base.cut(torch.arange(batch_size), num_data)] == sizes


def test_a_part_of_the_rows_that_is_lost_altogether_is_answered_by_the_mean():
    x = inputs(8)
    plan = Regression().plan([x], block=4)
    results = x[:3, None]
    answers = plan.decode(results, [0, 1, 2])
    torch.testing.assert_close(answers[4:], x[:3].mean(0).expand(4, 4))
    radii = plan.error_bounds(answers).at(0.75)
    far = float((x[:3] - x[:3].mean(0)).norm(dim=1).max())
    assert radii[4:].tolist() == pytest.approx([far * (4 / 3) / (2 / 3)] * 4)


@pytest.mark.parametrize("code", SELECTING + MIXING)
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_transforms(code, ordering):
    x = inputs(12)

    def answers(x):
        plan = planned(code, ordering, x)
        results = plan.encode(x)[RECEIVED].sin()
        found = plan.decode(results, RECEIVED)
        plan.error_bounds(found)
        return found

    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(answers(leaf).square().sum(), leaf)[0]
    total = lambda x: answers(x).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(total)(x), want)
    torch.testing.assert_close(torch.func.jacrev(total)(x), want)
    value, slope = torch.func.jvp(total, (x,), (torch.ones_like(x),))
    torch.testing.assert_close((value, slope), (total(x), want.sum()))
    second = torch.func.grad(lambda x: torch.func.grad(total)(x).sum())(x)
    assert second.isfinite().all()
    assert torch.equal(answers(x), answers(x))  # nothing of a transform is left behind
    with pytest.raises(ValueError, match=r"inputs\[0\] must not be under torch\.func\.vmap"):
        torch.func.vmap(answers)(x[None])


def test_what_is_left_out_of_the_mean_and_of_a_regression():
    x = inputs(10)
    y = x.sin()
    mean = Regression().plan([], batch_size=10)
    others = (y.sum(0) - y) / 9
    left = float((y - others).square().sum())
    assert mean.left_out_squares(range(10), y) == pytest.approx([left])
    plan = Regression("shrunk", 2.0).plan([x])
    squared, step = Distances(Sources([x]), ["shrunk"]).by("shrunk")
    left = 0.0
    for i in range(10):
        kept = torch.tensor([j for j in range(10) if j != i])
        weights = GaussianProcess(squared, 2.0 * step, kept, torch.tensor([i])).weights
        left += float((y[i] - weights @ y[kept]).square().sum())
    assert plan.left_out_squares(range(10), y, 2 * y) == pytest.approx([left, 4 * left], rel=1e-4)
    zigzag = torch.tensor([[1.0], [-1.0]] * 5, dtype=torch.float64)  # the mean estimates it
    plan = Regression("shrunk", 2.0).plan([torch.arange(10.0)[:, None]])
    left = mean.left_out_squares(range(10), zigzag)
    assert plan.left_out_squares(range(10), zigzag) == left


def test_results_of_another_shape_are_refused():
    code, x = RegressionCode(3, 4), inputs(9)
    plan = code.plan([x], 1)
    with pytest.raises(ValueError, match=r"RegressionCode: .* \[3, 3\] and more, got \[4, 3, 4\]"):
        plan.decode(plan.encode(x), [1, 2, 3])
    with pytest.raises(ValueError, match=r"results must have shape .* and more, got \[5, 4\]"):
        Regression().plan([x]).decode(x[:5], range(5))
    with pytest.raises(ValueError, match=r"results must have shape \[1, 1\] and more"):
        Regression().plan([x]).decode(x[:0, None], [])


def test_the_only_metric_measures_few_rows_too():
    """The fourth row resembles the first in this metric, and the third in all others."""
    x = torch.tensor([[0.0, 0.0], [1.0, 5.0], [2.0, 9.0], [0.1, 9.1]])
    plan = Regression([lambda x: x[:, :1]], length=1.0).plan([x])
    answers = plan.decode(x[:3, None, :1], [0, 1, 2])
    assert plan.choices[0].metric == "<lambda>"
    assert answers[3] < 1


def test_outputs_without_numbers_are_estimated_as_such(generator):
    x, known = torch.randn(12, 2, generator=generator), range(9)
    for shape in (0,), (0, 3), (3, 0):
        answers = Regression().plan([x]).decode(torch.empty(9, 1, *shape), known)
        assert answers.shape == (12, *shape)
