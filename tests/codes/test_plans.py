"""Plans: any batch, any ordering, any code, and which of the answers are exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_torch.codes import (
    BerrutCode,
    Code,
    KernelCode,
    ReplicationCode,
    SplineCode,
    plan_batch,
    plan_rows,
)
from coded_torch.codes.nodes import equidistant, systematic
from coded_torch.codes.plans import ChunkedPlan, MeanPlan
from coded_torch.input_space.gaussian_process import KernelRegression
from coded_torch.input_space.geometry import Geometry
from coded_torch.input_space.points import path_step
from coded_torch.testing.codes import DTYPES, normal

SYSTEMATIC = SplineCode(
    5, 9, data_points=equidistant(5), worker_points=systematic(equidistant(5), 9)
)
SELECTING = [
    ReplicationCode(5, 9),
    KernelCode(5, 9),
    KernelCode(encoder=ReplicationCode(5, 9)),
]
MIXING = [
    SplineCode(5, 9),
    SYSTEMATIC,
    BerrutCode(5, 9),
    KernelCode(encoder=SplineCode(5, 9)),
    KernelCode(encoder=SYSTEMATIC),
]
RECEIVED = [0, 2, 3, 6, 7]
NOTE = (
    "no floating-point input to measure distances on: order of arrival, equal copies, "
    "lost answers are the mean"
)


def inputs(batch_size, dtype=torch.float64):
    return normal(batch_size, 4, dtype=dtype)


ORDERINGS = ["similarity", "arrival", lambda x: x[0][:, 0].argsort(), "reversed"]


def in_order(ordering, batch_size):
    return list(range(batch_size))[::-1] if ordering == "reversed" else ordering


@settings(max_examples=80, deadline=None)
@given(
    code=st.sampled_from(SELECTING + MIXING),
    ordering=st.sampled_from(ORDERINGS),
    batch_size=st.integers(1, 24),
    max_chunk=st.sampled_from([4096, 7, 11]),
    received=st.sets(st.integers(0, 8), min_size=1),
    dtype=st.sampled_from(DTYPES),
)
def test_exact_answers_are_results_bit_for_bit(
    code, ordering, batch_size, max_chunk, received, dtype
):
    code = code.replace()
    code.max_chunk = max_chunk
    x, received = inputs(batch_size, dtype), sorted(received)
    plan = plan_batch(code, in_order(ordering, batch_size), [x], 2)
    assert (plan.code, plan.batch_size, plan.note) == (code, batch_size, "")
    coded = plan.encode(x)
    assert coded.shape == (9, plan.num_groups, 4)
    results = coded[received].sin()
    answers = plan.decode(results, received)
    exact = plan.exact(received)
    assert exact.dtype == torch.bool
    assert answers.shape == x.shape
    assert torch.equal(answers[exact], x.sin()[exact])
    for known in (None, results):
        errors = plan.expected_errors(received, known)
        rmse = plan.expected_rmse(received, known)
        if errors is None:
            assert not isinstance(code, KernelCode)
            assert rmse is None
            continue
        assert errors.shape == (batch_size,)
        assert torch.equal(errors[exact], torch.zeros(int(exact.sum()), dtype=torch.float64))
        assert rmse == pytest.approx(float(errors.square().mean().sqrt()))


@pytest.mark.parametrize("code", [*SELECTING, SYSTEMATIC, KernelCode(encoder=SYSTEMATIC)])
def test_with_every_worker_all_answers_are_exact(code):
    plan = plan_batch(code, "similarity", [inputs(23)], 2)
    assert plan.exact(range(9)).all()
    assert not plan.exact([]).any()


def test_what_is_lost_is_not_exact():
    """Worker n of replication computes input n mod 5 of each group; 2 and 7 are lost."""
    plan = plan_batch(ReplicationCode(5, 9), "arrival", [inputs(12)], 2)
    exact = plan.exact([0, 1, 3, 4, 5, 6, 8])
    assert exact.tolist() == [i % 5 != 2 for i in range(12)]


@pytest.mark.parametrize("code", SELECTING)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.int16]
)
def test_codes_that_select_carry_any_dtype(code, dtype):
    x, tokens = inputs(13), torch.arange(26).view(13, 2).to(dtype)
    assert not code.mixes
    plan = plan_batch(code, "similarity", [x], 2)
    rows = plan.encode(torch.arange(13))
    assert torch.equal(plan.encode(tokens), tokens[rows])
    assert torch.equal(plan.encode(x), x[rows])


@pytest.mark.parametrize("code", MIXING)
def test_codes_that_mix_refuse_what_cannot_be_mixed(code):
    assert code.mixes
    plan = plan_batch(code, "similarity", [inputs(13)], 2)
    name = type(code).__name__
    with pytest.raises(TypeError, match=f"^{name}: values must be floating-point to be mixed, got"):
        plan.encode(torch.arange(13))
    message = f"plan_batch: inputs must hold a floating-point tensor, as {name}"
    with pytest.raises(ValueError, match=message):
        plan_batch(code, "similarity", [], 2, batch_size=3)


# Nothing to measure distances on.


@pytest.mark.parametrize("code", SELECTING)
@pytest.mark.parametrize("ordering", ["similarity", [2, 1, 0, 5, 4, 3, 6, 7, 10, 9, 8]])
def test_without_distances_copies_are_equal_and_lost_answers_the_mean(code, ordering):
    plan = plan_batch(code, ordering, [], 3, batch_size=11)
    rows = plan.encode(torch.arange(11))  # [9, 3]
    copies = rows[:, :2].flatten().bincount()
    assert sorted(copies.tolist()) == [1, 1, 2, 2, 2, 2, 2, 2, 2, 2] or len(copies) == 11
    looks = code.uses_geometry or ordering == "similarity"
    assert plan.note == (NOTE if looks else "")
    received = [0, 2]
    results = normal(11, 3)[rows[received]]
    answers, exact = plan.decode(results, received), plan.exact(received)
    assert torch.equal(answers[exact], normal(11, 3)[exact])
    if isinstance(code, KernelCode):
        mean = normal(11, 3)[exact].mean(0)
        torch.testing.assert_close(answers[~exact], mean.expand(int((~exact).sum()), 3))
        variance = normal(11, 3)[exact].var(0).sum() * (1 + 1 / exact.sum())
        errors = plan.expected_errors(received, results)
        torch.testing.assert_close(errors[~exact], variance.sqrt().expand(int((~exact).sum())))
        assert (errors[exact] == 0).all()
        assert plan.expected_rmse(received) > 0


def test_a_batch_of_which_nothing_is_known_needs_its_size():
    with pytest.raises(ValueError, match="batch_size must be given where there are no inputs"):
        plan_batch(KernelCode(5, 9), "similarity", [], 3)


# Rows.


@settings(max_examples=60, deadline=None)
@given(
    code=st.sampled_from(SELECTING),
    ordering=st.sampled_from(ORDERINGS),
    batch_size=st.integers(1, 24),
    max_chunk=st.sampled_from([4096, 7]),
    data=st.data(),
)
def test_rows(code, ordering, batch_size, max_chunk, data):
    code = code.replace()
    code.max_chunk = max_chunk
    x = inputs(batch_size)
    received = sorted(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1)))
    plan = plan_rows(code, in_order(ordering, batch_size), [x])
    assert plan.num_groups == 1
    assert torch.equal(plan.encode(x), x[:, None])
    results = x[received, None].sin()
    answers, exact = plan.decode(results, received), plan.exact(received)
    assert exact.nonzero().flatten().tolist() == received
    assert torch.equal(answers[exact], x.sin()[exact])
    errors = plan.expected_errors(received, results)
    assert bool((errors[exact] == 0).all())
    assert errors.isfinite().all()
    assert (plan.expected_errors(received) > 0).tolist() == (~exact).tolist()
    if isinstance(code, ReplicationCode):
        lost = int((~exact).sum())
        mean = x.sin()[exact].mean(0)
        torch.testing.assert_close(answers[~exact], mean.expand(lost, 4))


def test_rows_are_predicted_as_in_a_batch():
    """One group of B workers is the same thing, but for the order of the workers."""
    x = inputs(30)
    rows = plan_rows(KernelCode(5, 9), "similarity", [x])
    batch = plan_batch(KernelCode(30, 30), "similarity", [x], 0)
    order = batch.encode(torch.arange(30)).flatten()
    received = torch.arange(0, 30, 3)
    results = x.sin()[received, None]
    at = torch.stack([(order == row).nonzero().flatten()[0] for row in received]).sort()
    want = batch.decode(results[at.indices], at.values.tolist())
    got = rows.decode(results, received.tolist())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        rows.expected_rmse(received.tolist(), results),
        batch.expected_rmse(at.values.tolist(), results[at.indices]),
    )


def test_rows_of_tokens():
    plan = plan_rows(KernelCode(5, 9), "similarity", [], batch_size=6)
    assert plan.note == NOTE
    assert plan.encode(torch.arange(6)).tolist() == [[i] for i in range(6)]
    got = plan.decode(torch.tensor([[1.0], [5.0]]), [1, 4])
    assert got.tolist() == [3.0, 1.0, 3.0, 3.0, 5.0, 3.0]


@pytest.mark.parametrize("code", MIXING)
def test_rows_of_mixtures(code):
    with pytest.raises(ValueError, match="plan_rows: code must not mix inputs, got"):
        plan_rows(code, "similarity", [inputs(5)])


# Large batches.


@pytest.mark.parametrize(
    ("batch_size", "num_data", "max_chunk", "sizes"),
    [
        (5000, 20, 4096, [2500, 2500]),
        (4096, 20, 4096, [4096]),
        (4100, 20, 4096, [2040, 2060]),
        (4080, 20, 4096, [4080]),
        (100, 8, 32, [24, 24, 24, 28]),
        (10, 8, 4, [8, 2]),
    ],
)
def test_large_batches_are_cut_evenly(batch_size, num_data, max_chunk, sizes, monkeypatch):
    seen = []

    class Counting(SplineCode):
        def fit(self, grouping, geometry=None, num_stragglers=0):
            seen.append(grouping.batch_size)
            return super().fit(grouping, geometry, num_stragglers)

    code = Counting(num_data, num_data + 1)
    code.max_chunk = max_chunk
    plan = plan_batch(code, "similarity", [torch.arange(batch_size).double()], 1)
    assert seen == sizes
    assert plan.num_groups == -(-batch_size // num_data)
    assert isinstance(plan, ChunkedPlan) == (len(sizes) > 1)


def test_a_chunk_of_rows_that_is_lost_altogether_is_answered_by_the_mean():
    code = KernelCode(2, 3)
    code.max_chunk = 4
    x = inputs(8)
    plan = plan_rows(code, "arrival", [x])
    results = x[:3, None]
    answers = plan.decode(results, [0, 1, 2])
    torch.testing.assert_close(answers[4:], x[:3].mean(0).expand(4, 4))
    errors = plan.expected_errors([0, 1, 2], results)
    variance = float(x[:3].var(0).sum()) * 4 / 3
    assert errors[4:].tolist() == pytest.approx([math.sqrt(variance)] * 4)


def test_the_mean_of_everything():
    x = inputs(11)
    plan = plan_batch(KernelCode(5, 9), "similarity", [x], 2)
    mean = MeanPlan(plan)
    results = plan.encode(x)[[1]]
    answers = mean.decode(results, [1])
    torch.testing.assert_close(answers, results.mean((0, 1)).expand(11, 4))
    assert torch.equal(mean.encode(x), plan.encode(x))
    assert not mean.exact([1]).any()
    assert mean.expected_rmse([1]) == pytest.approx(math.sqrt(4 / 3))
    mixed = MeanPlan(plan_batch(SplineCode(5, 9), "similarity", [x], 2))
    assert mixed.expected_rmse([1], results) is None


@pytest.mark.parametrize("columns", [4, 300])
@pytest.mark.parametrize("max_chunk", [4096, 7])
@pytest.mark.parametrize("code", SELECTING + MIXING, ids=str)
def test_results_in_memory_that_is_there_are_the_same_bit_for_bit(
    code, max_chunk, columns, monkeypatch
):
    monkeypatch.setattr(code, "max_chunk", max_chunk)
    x = normal(11, columns)
    plan = plan_batch(code, "similarity", [x], 2)
    coded = plan.encode(x)
    answers = plan.decode(coded[RECEIVED], RECEIVED)
    for into in (torch.empty_like, lambda like: torch.empty(*like.shape, 2).double()[..., 0]):
        out = into(coded)
        assert plan.encode(x, out=out) is out
        assert torch.equal(out, coded)
        out = into(answers)
        assert plan.decode(coded[RECEIVED], RECEIVED, out=out) is out
        assert torch.equal(out, answers)
        mean = into(answers)
        assert MeanPlan(plan).decode(coded[:1], [0], out=mean) is mean
        assert torch.equal(mean, MeanPlan(plan).decode(coded[:1], [0]))
    for wrong in (out[1:], out.float(), torch.empty_like(coded)[..., :1]):
        with pytest.raises(ValueError, match=r"out must be torch\.float64 of shape"):
            plan.encode(x, out=wrong)
        with pytest.raises(ValueError, match=r"out must be torch\.float64 of shape"):
            plan.decode(coded[RECEIVED], RECEIVED, out=wrong)
    with pytest.raises(ValueError, match="out must be None where gradients are recorded"):
        plan.encode(x.requires_grad_(), out=torch.empty_like(coded))


@pytest.mark.parametrize("code", SELECTING, ids=str)
@pytest.mark.parametrize("max_chunk", [4096, 4])
def test_rows_in_memory_that_is_there(code, max_chunk, monkeypatch):
    monkeypatch.setattr(code, "max_chunk", max_chunk)
    x = inputs(9)
    plan, received = plan_rows(code, "similarity", [x]), [0, 3, 4, 8]
    coded, out = plan.encode(x), torch.empty(9, 1, 4, dtype=x.dtype)
    assert plan.encode(x, out=out) is out
    assert torch.equal(out, coded)
    answers, out = plan.decode(coded[received], received), torch.empty_like(x)
    assert plan.decode(coded[received], received, out=out) is out
    assert torch.equal(out, answers)


# Transforms. PyTorch itself compiles its formulas of forward mode with what it has deprecated.


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("code", SELECTING + MIXING)
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_transforms(code, ordering):
    x = inputs(12)
    ordering = in_order(ordering, 12)

    def answers(x):
        plan = plan_batch(code, ordering, [x], 2)
        results = plan.encode(x)[RECEIVED].sin()
        plan.expected_rmse(RECEIVED, results)
        return plan.decode(results, RECEIVED)

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


def test_what_can_be_ordered():
    class Wrong(Code):
        def fit(self, grouping, geometry=None, num_stragglers=0):
            raise AssertionError("never asked")

    for ordering, error in (("nope", ValueError), (3, TypeError), ([0, 1], ValueError)):
        with pytest.raises(error, match="ordering must"):
            plan_batch(Wrong(2, 3), ordering, [inputs(5)], 0)


@pytest.mark.parametrize("code", SELECTING + MIXING, ids=repr)
@pytest.mark.parametrize("max_chunk", [4096, 11])
def test_what_is_left_out_falls_with_what_is_left_of_the_results(code, max_chunk):
    code = code.replace()
    code.max_chunk = max_chunk
    x = inputs(23)
    plan = plan_batch(code, "similarity", [x], 2)
    results = plan.encode(x)[RECEIVED].sin()
    used = plan.used(RECEIVED)
    assert len(used.unique()) == len(used)
    whole = plan.left_out_square(results, RECEIVED)
    assert whole > 0
    assert plan.left_out_square(results / 3 + 5, RECEIVED) == pytest.approx(whole / 9)


def test_what_is_left_out_of_the_mean_and_of_a_regression():
    x = inputs(10)
    y = x.sin()
    mean = plan_rows(ReplicationCode(5, 9), "arrival", [x])
    others = (y.sum(0) - y) / 9
    left = float((y - others).square().sum())
    assert mean.left_out_square(y[:, None], range(10)) == pytest.approx(left)
    plan = plan_rows(KernelCode(5, 9, metric="shrunk", length=2.0), "arrival", [x])
    squared = Geometry([x]).squared_distances()
    length = 2.0 * path_step(squared, torch.arange(10))
    left = 0.0
    for i in range(10):
        kept = [j for j in range(10) if j != i]
        fit = KernelRegression(squared[kept][:, kept], length)
        left += float((y[i] - fit.weights(squared[i, kept][None]) @ y[kept]).square().sum())
    assert plan.left_out_square(y[:, None], range(10)) == pytest.approx(left)
