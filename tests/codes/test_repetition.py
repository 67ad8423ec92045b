"""The codes that repeat inputs: exact where it can be, close where it cannot, and it knows."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_torch.codes import BerrutCode, RegressionCode, ReplicationCode, SplineCode
from coded_torch.demo import digits, lenet5
from coded_torch.experiments import scores
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Contiguous, Uniform
from coded_torch.testing.codes import DTYPES, CodeTests, normal
from coded_torch.workers import LocalWorkers


def smooth(x):
    return torch.stack([x.sum(-1).sin(), x.square().sum(-1)], dim=-1)


class Smooth(torch.nn.Module):
    def forward(self, x):
        return smooth(x)


def inputs(size, generator, dim=2):
    return torch.randn(size, dim, dtype=torch.float64, generator=generator)


def arrival(k, n, **numbers):
    return RegressionCode(k, n, ordering="arrival", **numbers)


@pytest.fixture(scope="module")
def network():
    return lenet5(), *digits()


@settings(max_examples=40, deadline=None)
@given(
    batch_size=st.integers(1, 15),
    code=st.sampled_from(
        [RegressionCode(5, 9), SplineCode(5, 60), BerrutCode(5, 60), ReplicationCode(5, 7)]
    ),
    ordering=st.sampled_from(["similarity", "arrival", "reversed"]),
    stragglers=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_answers_come_back_in_the_callers_order(batch_size, ordering, code, stragglers, seed):
    """A linear model, which every code reproduces on constants: answer i belongs to input i."""
    x = torch.arange(1.0, batch_size + 1, dtype=torch.float64)[:, None] * torch.ones(3).double()
    ordering = list(range(batch_size))[::-1] if ordering == "reversed" else ordering
    plan = code.replace(ordering=ordering).plan([x], stragglers)
    order = torch.randperm(code.num_workers, generator=torch.Generator().manual_seed(seed))
    received = order[stragglers:].sort().values.tolist()
    y = plan.decode(plan.encode(x)[received], received)
    assert y.shape == x.shape
    if isinstance(code, (SplineCode, BerrutCode)) or not stragglers:
        assert bool(((y - x).abs() < 0.5).all())
    assert bool((y >= -batch_size).all())


def test_lost_answers_are_close(generator):
    x = inputs(200, generator)
    coded = CodedWrapper(Smooth(), RegressionCode(20, 30), workers=LocalWorkers(Uniform(8, seed=0)))
    got = coded(x)
    mean = smooth(x).mean(0).expand_as(got)
    assert scores.rmse(got, smooth(x)) < 0.2 * scores.rmse(mean, smooth(x))


def test_copies_go_where_the_others_tell_least(generator):
    """Three inputs far from all others get the copies that there are to spare."""
    x = 0.01 * inputs(16, generator)
    x[[2, 7, 11]] += torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0]])
    plan = arrival(16, 19).plan([x], num_stragglers=3)
    sent = plan.encode(torch.arange(16.0)).flatten().long()
    assert sent.bincount().tolist() == [2 if i in (2, 7, 11) else 1 for i in range(16)]


@pytest.mark.parametrize("batch_size", [500, 501, 1001])
def test_large_batches_leave_no_few_inputs_to_themselves(batch_size):
    """Each is estimated from many others, however the batch is cut."""
    x = torch.linspace(0, 1, batch_size)[:, None]
    assert RegressionCode(3, 4).plan([x]).leave_one_out_variances().max() < 0.1


def test_without_stragglers_copies_are_even(generator):
    plan = arrival(5, 15).plan([inputs(10, generator)])
    assert plan.encode(torch.arange(10.0)).flatten().long().bincount().tolist() == [3] * 10


@pytest.mark.parametrize(("k", "n", "least"), [(20, 24, 3), (20, 30, 5), (20, 60, 20)])
def test_workers_share_inputs_with_many_others(k, n, least, generator):
    """So that two that are late together lose few inputs."""
    x = torch.randn(12 * k, 3, generator=generator)
    point = RegressionCode(k, n).plan([x], n - k).encode(torch.arange(12 * k))  # [N, G]
    partners = {worker: set() for worker in range(n)}
    for group in point.T:
        for row in group.unique().tolist():
            copies = (group == row).nonzero().flatten().tolist()
            for worker in copies:
                partners[worker] |= set(copies) - {worker}
            if len(copies) > 1:  # a burst that is late together leaves one
                gaps = [(b - a) % n for a, b in zip(copies, copies[1:] + copies[:1], strict=True)]
                assert n - max(gaps) >= n / 8
    assert sorted(len(others) for others in partners.values())[n // 2] >= least


def test_a_short_group_gives_its_workers_to_its_own_inputs(generator):
    plan = arrival(4, 6).plan([inputs(6, generator)], num_stragglers=1)
    sent = plan.encode(torch.arange(6.0)).long()  # [N, G]
    assert sorted(set(sent[:, 0].tolist())) == [0, 1, 2, 3]
    assert sorted(sent[:, 1].tolist()) == [4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize("setting", [(24, 20, 4), (100, 20, 60), (10, 8, 2)])
def test_beats_the_paper_and_replication_and_knows_by_how_much(network, setting):
    n, k, s = setting
    model, images, labels = network
    images, labels = images[:720], labels[:720]
    with torch.inference_mode():
        exact = model(images)

    def run(code):
        coded = CodedWrapper(model, code, workers=LocalWorkers(Uniform(s, seed=1)))
        with torch.inference_mode():
            answers, within = [], []
            for part in images.split(240):
                answers.append(coded(part))
                if (radii := coded.last_run.radii) is not None:
                    errors = (answers[-1] - model(part)).norm(dim=1)
                    within.append((errors <= radii)[coded.last_run.estimated])
        return torch.cat(answers), within

    answers, within = run(RegressionCode(k, n))
    error = scores.rmse(answers, exact)
    paper, _ = run(SplineCode(k, n, ordering="arrival"))
    # Over many batches a tenth and less. Three of them vary.
    assert error**2 < 0.2 * scores.rmse(paper, exact) ** 2
    replicated, _ = run(ReplicationCode(k, n))
    assert error < scores.rmse(replicated, exact)
    accuracy = scores.relative_accuracy(answers, exact, labels)
    assert accuracy > scores.relative_accuracy(replicated, exact, labels)
    assert 0.9 < torch.cat(within).double().mean() < 0.99


def test_a_burst_of_late_neighbours_is_no_worse_than_others(network):
    model, images, _ = network
    with torch.inference_mode():
        exact = model(images[:960])
        errors = []
        for delays in (Uniform(60, seed=3), Contiguous(60, seed=3)):
            coded = CodedWrapper(model, RegressionCode(20, 100), workers=LocalWorkers(delays))
            answers = torch.cat([coded(part) for part in images[:960].split(240)])
            errors.append(scores.rmse(answers, exact))
    assert errors[1] < 1.25 * errors[0]


def test_inputs_that_tell_nothing_are_answered_by_the_mean(generator):
    """Outputs that change from each input to the next: no worse than replication's fill."""
    x = torch.randn(240, 300, dtype=torch.float64, generator=generator)
    exact = torch.randn(240, 10, dtype=torch.float64, generator=generator)
    plan = arrival(20, 24).plan([x], num_stragglers=4)
    received = list(range(20))
    results = plan.encode(exact)[received]
    got = plan.decode(results, received)
    lost = plan.source(received) < 0
    mean = exact[~lost].mean(0).expand_as(exact)
    assert scores.rmse(got[lost], exact[lost]) < 1.02 * scores.rmse(mean[lost], exact[lost])
    assert torch.equal(got[~lost], exact[~lost])


def test_gradients_of_lost_answers_take_the_weights_as_constant(generator):
    x = inputs(12, generator).requires_grad_()
    plan, received = RegressionCode(4, 6).plan([x], 2), [0, 1, 3, 5]
    answers = plan.decode(smooth(plan.encode(x)[received]), received)
    own = plan.source(received) >= 0
    lost = int((~own).nonzero()[0])
    for i in own.nonzero().flatten().tolist():
        got, want = (
            torch.autograd.grad(y[i].sum(), x, retain_graph=True)[0] for y in (answers, smooth(x))
        )
        assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(answers[lost].sum(), x)
    assert not gradient[lost].any()
    assert gradient[own].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (50,)])
def test_answers_of_any_shape_are_the_same_with_gradients(shape, dtype, generator):
    x = inputs(72, generator)
    plan = RegressionCode(4, 6).plan([x], 2)
    of = torch.randn(2, math.prod(shape), dtype=torch.float64, generator=generator)
    y = (10 + (x @ of).sin()).view(72, *shape).to(dtype)
    received, results = [0, 2, 3, 5], plan.encode(y)[[0, 2, 3, 5]]
    answers = plan.decode(results, received)
    assert (answers.dtype, answers.shape) == (dtype, y.shape)
    own = plan.source(received) >= 0
    assert torch.equal(answers[own], y[own])
    recorded = plan.decode(results.clone().requires_grad_(), received)
    assert recorded.requires_grad
    rounding = max(torch.finfo(dtype).eps, 1e-5)  # of systems solved in float32
    torch.testing.assert_close(recorded, answers, rtol=rounding, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_results_that_cannot_be_decoded(dtype, generator):
    plan = RegressionCode(4, 6).plan([inputs(72, generator)], 2)
    with pytest.raises(TypeError, match="results must be a dense, strided floating"):
        plan.decode(torch.ones(4, 18, 5, dtype=dtype), range(4))


@pytest.mark.parametrize("scale", [1e-60, 1e-45, 1e39, 1e100])
def test_results_beyond_the_range_of_float32(scale, generator):
    x = inputs(72, generator).float()
    y = smooth(x.double())
    plan = RegressionCode(4, 6).plan([x], 2)
    want, got = (plan.decode(plan.encode(z)[:4], range(4)) for z in (y, y * scale))
    torch.testing.assert_close(got / scale, want, rtol=1e-6, atol=1e-6)


def answered(code, model, x, lost, seed=0):
    """The answers, the truth, and which of them are the model's own, bit for bit."""
    coded = CodedWrapper(model, code, workers=LocalWorkers(Uniform(lost, seed=seed)))
    with torch.inference_mode():
        got, want = coded(x), model(x)
    assert got.isfinite().all()
    assert not coded.last_run.radii.isnan().any()
    return got.double(), want.double(), (got == want).flatten(1).all(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0, 1e-9, 1e-6, 1e-4, 1e-3, 0.01, 0.02, 0.03, 0.05, 0.1])
def test_near_duplicates(dtype, noise, generator):
    """Their distances are as small as what rounding does to those of the others."""
    x = torch.randn(5, 32, dtype=torch.float64, generator=generator).repeat(12, 1)
    x = (x + noise * torch.randn(60, 32, dtype=torch.float64, generator=generator)).to(dtype)
    got, want, own = answered(RegressionCode(4, 6), torch.nn.Tanh(), x, 2)
    assert scores.rmse(got, want) < 0.1 * scores.rmse(want.mean(0).expand_as(want), want)
    assert own.sum() >= 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [20, 240])
def test_one_image_that_is_not_normalised(dtype, batch_size, network):
    model, images, _ = network
    model = copy.deepcopy(model).to(dtype)
    errors = []
    for factor in (1, 50, 255, 3000, 1e5):
        x = images[:batch_size].to(dtype, copy=True)
        x[0] *= factor
        square = 0
        for seed in range(5 if batch_size == 240 else 20):
            got, want, own = answered(RegressionCode(20, 24), model, x, 4, seed)
            square += float((got - want)[1:].square().sum())
            assert own.sum() >= batch_size * 5 // 6
        errors.append(math.sqrt(square))
    assert max(errors) < 1.2 * errors[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_inputs_of_any_scale(scale, generator):
    x = torch.randn(24, 5, generator=generator)
    small, _, _ = answered(RegressionCode(6, 9), torch.nn.Identity(), x, 2)
    got, _, _ = answered(RegressionCode(6, 9), torch.nn.Identity(), x * scale, 2)
    torch.testing.assert_close(got / scale, small, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_plan_keeps_clear_of_an_input_that_is_not_finite(bad, generator):
    x = inputs(60, generator).float()
    x[7] = bad
    plan = RegressionCode(6, 9).plan([x], 2)
    received = [0, 1, 3, 4, 5, 7, 8]
    results = smooth(plan.encode(x))[received]
    answers = plan.decode(results, received)
    others = torch.arange(60) != 7
    assert answers[others].isfinite().all()
    assert scores.rmse(answers[others], smooth(x[others])) < 0.7
    radii = plan.error_bounds(received, results, answers).radii(0.9)
    assert radii[others].isfinite().all()


def test_probabilities_are_decoded_as_logits(network):
    model, images, _ = network
    softmax = torch.nn.Sequential(model, torch.nn.Softmax(dim=-1))
    errors = []
    with torch.inference_mode():
        exact = softmax(images[:240])
        for link in (None, "softmax"):
            coded = CodedWrapper(
                softmax, SplineCode(20, 60, link=link), workers=LocalWorkers(Uniform(20, seed=0))
            )
            answers = coded(images[:240])
            errors.append(scores.rmse(answers, exact))
        torch.testing.assert_close(answers.sum(1), torch.ones(240))
    assert errors[1] < errors[0]


def test_an_ordering_is_a_copy():
    ordering = torch.arange(8).flip(0)
    code = ReplicationCode(4, 4, ordering=ordering)
    ordering[:] = 0
    assert code.ordering.tolist() == [*range(7, -1, -1)]


def test_copies_of_the_code():
    code = RegressionCode(4, 6, length=3.0, link="softmax", shuffle=False)
    for other in (pickle.loads(pickle.dumps(code)), copy.deepcopy(code), code.replace()):
        assert repr(other) == repr(code)
        assert other.regression.length == 3.0
    assert code.replace(length=4.0).length == 4.0
    assert code.replace(length=4.0).link == "softmax"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_workers": 3}, ValueError, "num_workers must be at least num_data, 4, got 3"),
        ({"num_data": True}, TypeError, "num_data must be an integer, got True"),
        ({"num_workers": 6.0}, TypeError, r"num_workers must be an integer, got 6\.0"),
        ({"ordering": "near"}, ValueError, "ordering must be 'similarity', 'arrival' or a perm"),
        ({"ordering": 3}, TypeError, "ordering must be .* a permutation of 0..B-1, got 3"),
        ({"ordering": [1.5, 0]}, ValueError, r"or a permutation of 0..B-1, got \[1.5, 0\]"),
        ({"ordering": [0, 2, 2]}, ValueError, r"or a permutation of 0..B-1, got \[0, 2, 2\]"),
        ({"ordering": [True, False]}, ValueError, r"or a permutation of 0..B-1, got \[True, Fal"),
        ({"ordering": torch.tensor([[1], [0]])}, ValueError, "or a permutation of 0..B-1, got"),
        ({"ordering": [[0, 1]]}, ValueError, r"or a permutation of 0..B-1, got \[\[0, 1\]\]"),
        ({"shuffle": 1}, TypeError, "shuffle must be of type bool.*, got int"),
        ({"link": "logit"}, ValueError, "link must be None or 'softmax', got 'logit'"),
        ({"unknown": 1}, TypeError, "unexpected keyword argument 'unknown'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RegressionCode(**({"num_data": 4, "num_workers": 6} | arguments))


class TestReplicationCode(CodeTests):
    def make(self):
        return ReplicationCode(6, 21)


class TestUncoded(CodeTests):
    def make(self):
        return ReplicationCode(20, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_with_an_answer_of_their_own_inputs_come_back_bit_for_bit(dtype):
    code = ReplicationCode(4, 10)
    results = normal(10, 33, dtype=dtype) * 100
    received = [1, 2, 5, 6, 9]  # inputs 1, 2, 1, 2, 1
    answers = code.decode(results[received], received)
    assert torch.equal(answers[[1, 2]], results[[1, 2]])
    mean = results[[1, 2]].double().mean(0).to(dtype)
    torch.testing.assert_close(answers[[0, 3]], mean.expand(2, -1))
    assert torch.equal(answers[0], answers[3])


def test_workers_compute_the_inputs_in_turn():
    code = ReplicationCode(3, 8)
    inputs = normal(3, 5)
    assert torch.equal(code.encode(inputs), inputs[[0, 1, 2, 0, 1, 2, 0, 1]])


def test_every_input_counts_once_in_the_mean():
    code = ReplicationCode(3, 9)
    answers = code.decode(torch.tensor([1.0, 4.0, 1.0, 1.0]), [0, 1, 3, 6])
    assert answers.tolist() == [1.0, 4.0, 2.5]


def test_inputs_with_an_answer_of_their_own():
    code = ReplicationCode(3, 9)
    assert code.source([2, 3, 8]).tolist() == [1, -1, 0]
    assert (code.source(torch.tensor([1])) >= 0).tolist() == [False, True, False]
    assert (code.source([]) >= 0).tolist() == [False, False, False]
    assert (code.source(range(9)) >= 0).all()
    with pytest.raises(ValueError, match=r"received must lie in 0\.\.8, got 9"):
        code.source([9])
