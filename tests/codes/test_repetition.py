"""The codes that repeat inputs: exact where it can be, close where it cannot, and it knows."""

import itertools
import math

import pytest
import torch

from coded_torch.codes import RegressionCode, ReplicationCode, SplineCode
from coded_torch.demo import digits, lenet5
from coded_torch.experiments import scores
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.testing.codes import CodeTests
from coded_torch.workers import LocalWorkers


def smooth(x):
    return torch.stack([x.sum(-1).sin(), x.square().sum(-1)], dim=-1)


def inputs(size, generator, dim=2):
    return torch.randn(size, dim, dtype=torch.float64, generator=generator)


def arrival(k, n, **numbers):
    return RegressionCode(k, n, ordering="arrival", **numbers)


@pytest.fixture(scope="module")
def network():
    return lenet5(), *digits()


def test_copies_go_where_the_others_tell_least(generator):
    """Three inputs far from all others get the copies that there are to spare."""
    x = 0.01 * inputs(16, generator)
    x[[2, 7, 11]] += torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0]])
    plan = arrival(16, 19).plan([x], num_stragglers=3)
    sent = plan.encode(torch.arange(16.0)).flatten().long()
    assert sent.bincount().tolist() == [2 if i in (2, 7, 11) else 1 for i in range(16)]


@pytest.mark.parametrize("size", [9, 8])  # the last group is whole, or of two inputs
def test_no_other_copies_have_less_expected_error(size, generator):
    k, n, stragglers = 3, 7, 3
    plan = arrival(k, n).plan([inputs(size, generator)], stragglers)
    sent = plan.encode(torch.arange(float(size))).flatten().long().bincount()
    errors = plan.leave_one_out_variances() ** 0.75

    def expected(copies, errors):
        lost = [math.comb(n - c, stragglers - c) if c <= stragglers else 0 for c in copies]
        return sum(x * y for x, y in zip(lost, errors, strict=True))

    for own, of_group in zip(sent.split(k), errors.split(k), strict=True):
        ways = itertools.product(range(1, n + 1), repeat=len(own))
        least = min(expected(x, of_group.tolist()) for x in ways if sum(x) == n)
        assert sum(own.tolist()) == n
        assert expected(own.tolist(), of_group.tolist()) == pytest.approx(least)


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
                if (radii := coded.last_run.error_bounds) is not None:
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


class TestReplicationCode(CodeTests):
    def make(self):
        return ReplicationCode(6, 21)


class TestUncoded(CodeTests):
    def make(self):
        return ReplicationCode(20, 20)


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
    with pytest.raises(ValueError, match="each worker of received must be at most 8, got 9"):
        code.source([9])


def midpoints(k, n, **numbers):
    return RegressionCode(k, n, redundancy="midpoints", **numbers)


@pytest.mark.parametrize(("k", "n", "size"), [(2, 3, 16), (4, 6, 23), (3, 7, 10), (1, 2, 5)])
def test_spare_workers_compute_midpoints_of_a_group(k, n, size, generator):
    x = inputs(size, generator)
    plan = midpoints(k, n).plan([x], 1)
    sent = plan.encode(x)
    assert sent.shape == (n, -(-size // k), 2)
    middles = (x[:, None] + x) / 2
    for rows in sent.flatten(0, 1), plan.encode(x.float()).flatten(0, 1).double():
        assert ((rows[:, None] - middles.flatten(0, 1)).norm(dim=2).amin(1) < 1e-6).all()
    own = plan.source(range(n))
    assert torch.equal(sent.flatten(0, 1)[own], x)  # rows are computed as they are
    assert torch.equal(plan.decode(sent, range(n)), x)
    with pytest.raises(ValueError, match="must have size"):
        plan.encode(x[1:])


@pytest.mark.parametrize("lost", range(3))
def test_a_line_through_a_midpoint_gives_the_other_end(lost, generator, monkeypatch):
    monkeypatch.setattr("coded_torch.codes._repetition._WEIGHT", 1.0)
    x, received = inputs(30, generator), [n for n in range(3) if n != lost]
    plan = midpoints(2, 3).plan([x], 1)
    results = plan.encode(x) @ torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64) + 7
    want = x @ torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64) + 7
    answers = plan.decode(results[received], received)
    assert 5 < int((plan.source(received) < 0).sum()) < 25
    torch.testing.assert_close(answers, want)


def test_gradients_take_one_of_several_midpoints_of_a_pair(generator, monkeypatch):
    monkeypatch.setattr("coded_torch.codes._repetition._MidpointPlan._weight", lambda *_: 0.5)
    x, received = inputs(12, generator), [0, 1, 2]
    plan = midpoints(2, 4).plan([x], 1)
    results = plan.encode(x).sin()[received].requires_grad_()
    total = plan.decode(results, received).square().sum()
    (gradient,) = torch.autograd.grad(total, results)
    assert bool((plan.source(received) < 0).any())
    # The decoder is linear, with its weights held constant.
    torch.testing.assert_close((gradient * results).sum(), 2 * total)
    by_func = torch.func.grad(lambda y: plan.decode(y, received).square().sum())(results.detach())
    torch.testing.assert_close(by_func, gradient)


def test_left_out_errors_choose_the_weight_of_lines(generator):
    def weight(function):
        x, received = 3 * inputs(240, generator), [0, 1, 2, 3, 4]
        plan = midpoints(4, 6).plan([x], 1)
        return plan._weight(function(plan.encode(x))[received], received)

    assert weight(lambda x: 2 * x + 1) > 0.5
    assert weight(lambda x: (20 * x).sin()) < 0.3


def test_midpoints_in_a_wrapper_have_no_bounds_and_need_finite_floats():
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    x = torch.randn(20, 3)
    coded = CodedWrapper(model.eval(), midpoints(2, 3), workers=LocalWorkers(Uniform(1, seed=0)))
    answers, report = coded.run(x.clone().requires_grad_())
    answers.sum().backward()
    estimated = report.estimated
    assert 0 < int(estimated.sum()) < 20
    assert report.error_bounds is None
    torch.testing.assert_close(answers[~estimated], model(x)[~estimated])
    assert (answers - model(x)).norm() < 0.5 * (model(x) - model(x).mean(0)).norm()
    with pytest.raises(TypeError, match="must be floating-point, as RegressionCode"):
        coded(torch.ones(20, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be finite, as RegressionCode"):
        coded(torch.full((20, 3), math.nan))
    with pytest.raises(ValueError, match="surrogate must be left out"):
        coded.surrogate = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="redundancy must be 'copies' or 'midpoints', got 'both'"):
        RegressionCode(2, 3, redundancy="both")
