"""Which machines lie: LeNet-5 on digits, and small functions."""

import contextlib
import functools
import math
import random

import pytest
import scipy.stats
import torch

from coded_torch._predictions import Predictions, student_quantile
from coded_torch.adversaries import Evidence, _Trial, locate
from coded_torch.codes import BerrutCode, KernelCode, SplineCode, plan_batch
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.input_space.gaussian_process import KernelRegression
from coded_torch.nn import CodedWrapper, TooManyAdversaries
from coded_torch.stragglers import Uniform
from coded_torch.workers import FaultyWorkers, LocalWorkers

BATCH = 240


@functools.cache
def outputs():
    with torch.no_grad():
        return lenet5()(digits()[0])


def request(case, seed):
    """Who answers one request to LeNet-5, what they answer ``[F, G, C]``, and where it lies."""
    n, k, s, most = case
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(outputs()), generator=generator)[:BATCH]
    plan = plan_batch(KernelCode(k, n), "similarity", [digits()[0][rows]], s + most)
    machines = sorted(torch.randperm(n, generator=generator)[: n - s].tolist())
    (sites,) = plan.sites(machines)
    return machines, plan.encode(outputs()[rows])[machines].double(), sites, generator


def evidence(values, sites, **options):
    f, g = sites.point.shape
    return [
        Evidence(
            values.flatten(0, 1),
            torch.arange(f).repeat_interleave(g),
            torch.arange(g).repeat(f),
            sites.point.flatten(),
            sites.at.flatten(),
            sites.regression,
            **options,
        )
    ]


def swapped(y, generator):
    top = y.topk(2, -1).indices
    return y.clone().scatter(1, top, y.gather(1, top.flip(1)))


LIES = {
    "noise": lambda y, g: y + y.std() * torch.randn(y.shape, generator=g),
    "sign_flip": lambda y, g: -y,
    "constant": lambda y, g: y.mean(0).expand_as(y),
    "replay": lambda y, g: outputs()[torch.randint(2000, (len(y),), generator=g)].double(),
    "larger": lambda y, g: 1.5 * y,
    "smaller": lambda y, g: 0.5 * y,
    "permute": lambda y, g: y.roll(1, 0),
    "swap": swapped,
    "offset": lambda y, g: y + y.std() * torch.tensor([1.0, -1.0] * 5),
    "huge": lambda y, g: y * 1e30,
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("case", [(24, 20, 2, 1), (10, 8, 1, 1), (30, 20, 4, 2)], ids=str)
def test_liars_are_found(case, lie):
    for seed in range(2):
        machines, values, sites, generator = request(case, seed)
        liars = torch.randperm(len(machines), generator=generator)[: case[-1]].tolist()
        for liar in liars:
            values[liar] = LIES[lie](values[liar], generator)
        verdict = locate(evidence(values, sites), machines, case[-1])
        assert sorted(verdict.liars) == sorted(machines[liar] for liar in liars)
        assert verdict.left == ""


class Answers(torch.nn.Module):
    """Of LeNet-5: logits, probabilities, or classes, one of ten numbers being 1."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.network = kind, lenet5()

    def forward(self, x):
        y = self.network(x)
        if self.kind == "probabilities":
            return y.softmax(1)
        classes = torch.nn.functional.one_hot(y.argmax(1), 10).float()
        return classes if self.kind == "classes" else y


@pytest.mark.parametrize("kind", ["logits", "probabilities", "classes"])
@pytest.mark.parametrize(("k", "n", "size"), [(4, 6, 8), (4, 8, 4), (8, 12, 8), (20, 24, 40)])
@torch.no_grad()
def test_machines_are_honest_in_small_requests_too(k, n, size, kind):
    accused = 0
    code, module = KernelCode(k, n, metric="shrunk", length=2.0), Answers(kind)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(outputs()), generator=generator)[:size]
        coded = CodedWrapper(module, code, max_adversaries=1, shuffle=random.Random(seed))
        coded(digits()[0][rows])
        accused += bool(coded.last_run.adversaries)
    assert accused <= 1


@pytest.mark.parametrize("code", [SplineCode(8, 16), BerrutCode(8, 16), KernelCode(8, 16)])
@torch.no_grad()
def test_classes_are_judged_without_predictions(code):
    coded = CodedWrapper(Answers("classes"), code, max_adversaries=2, shuffle=random.Random(0))
    coded(digits()[0][:40])
    assert coded.last_run.adversaries == coded.last_run.suspects == ()


@pytest.mark.parametrize(("n", "lost", "most"), [(3, 1, 1), (5, 2, 2)])
@torch.no_grad()
def test_where_all_machines_contradict_each_other_none_is_named(n, lost, most):
    for seed in range(3):
        pool = LocalWorkers(Uniform(lost, seed=seed))
        coded = CodedWrapper(
            lenet5(),
            KernelCode(1, n, metric="shrunk", length=2.0),
            workers=FaultyWorkers(pool, attack="sign_flip", adversaries=(0,)),
            max_adversaries=most,
            shuffle=random.Random(seed),
        )
        with contextlib.suppress(TooManyAdversaries):
            coded(digits()[0][:40])
        report = coded.last_run
        late = set(range(n)) - {*report.received}
        assert 0 in {*report.adversaries, *report.suspects, *late}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_is_honest_about_probabilities_too(dtype):
    module = Answers("probabilities")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(outputs()), generator=generator)[:BATCH]
        odds = module.network(digits()[0][rows])[:, :1].sigmoid()
        y = torch.cat([odds, 1 - odds], 1)
        plan = plan_batch(KernelCode(8, 10), "similarity", [digits()[0][rows]], 2)
        (sites,) = plan.sites([*range(10)])
        values = plan.encode(y)
        values[::3] = torch.cat([odds.to(dtype), 1 - odds.to(dtype)], 1).float()[
            plan.encode(torch.arange(BATCH))[::3]
        ]
        of = evidence(values.double(), sites, probable=torch.tensor([True, True]))
        verdict = locate(of, range(10), 1)
        assert (verdict.liars, verdict.suspects) == ({}, ())


def test_two_liars_with_a_row_each_do_not_hide_each_other():
    found = 0
    for seed in range(5):
        machines, values, sites, _ = request((30, 20, 4, 2), seed)
        values[[3, 8], 5] *= -1e3
        found += len(locate(evidence(values, sites), machines, 2).liars)
    assert found >= 9


def test_honest_machines_score_as_normal_numbers_do():
    scores = []
    for seed in range(20):
        machines, values, sites, _ = request((24, 20, 2, 1), seed)
        verdict = locate(evidence(values, sites), machines, 1)
        assert not verdict.liars
        assert not verdict.suspects
        scores += verdict.scores.values()
    z = torch.tensor(scores)
    assert len(z) == 20 * 22
    assert abs(float(z.mean())) < 0.05
    assert 0.85 < float(z.std()) < 1.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_machines_of_less_precision_are_honest(dtype):
    for seed in range(5):
        machines, values, sites, _ = request((24, 20, 2, 1), seed)
        values[::3] = values[::3].to(dtype).double()
        assert not locate(evidence(values, sites), machines, 1).liars


def test_the_machine_that_disagrees_with_most_lies():
    # Machines 0, 1 and 2 have two copies with each other; no distances.
    values = torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0, 7.0]).double()[:, None]
    sites = torch.tensor([[0, 1], [0, 2], [1, 2]])
    of = Evidence(
        values,
        torch.arange(3).repeat_interleave(2),
        torch.arange(2).repeat(3),
        sites.flatten(),
        torch.full((6,), -1),
        None,
    )
    assert not locate([of], (4, 5, 6), 1).liars
    assert locate([of], (4, 5, 6), 1).suspects == (5, 6)
    values[0] = 40.0
    values[1] = 50.0
    values[5] = 3.0
    verdict = locate([of], (4, 5, 6), 1)
    assert verdict.liars == {4: "disagrees with machines 5 and 6 on 2 copies"}
    assert verdict.left == ""
    assert not verdict.scores  # nothing to predict from


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_results_of_another_size_are_odd(scale):
    machines, values, sites, _ = request((10, 8, 1, 1), 0)
    honest = _Trial(evidence(values, sites), len(machines), 1)._oddness(())
    assert honest.max() < 3
    values[3] *= scale
    trial = _Trial(evidence(values, sites), len(machines), 1)
    odd = trial._oddness((3,))
    assert odd.argmax() == 3
    assert odd[3] > 6


def without_copies(values, inputs):
    """What machines say ``[F, G, C]`` of inputs ``[F, G]`` on a line, none of which has copies."""
    f, g = inputs.shape
    at = torch.arange(f * g)
    x = inputs.flatten().double()
    regression = KernelRegression((x[:, None] - x).square(), 2.0)
    return [Evidence(values.flatten(0, 1), at // g, at % g, at, at, regression)]


def accused(values, inputs, most):
    """All that is said against machines 0, 1, ..."""
    verdict = locate(without_copies(values, inputs), range(len(values)), most)
    return {*verdict.liars, *verdict.suspects}, verdict.left


def different(generator, f=4, g=6):
    inputs = torch.randperm(f * g, generator=generator).view(f, g)
    return inputs, torch.randn(f, g, 10, generator=generator, dtype=torch.float64)


def smooth(inputs):
    x = inputs.double()[..., None] / 4
    return torch.cat([x.sin(), x.cos()], -1).repeat(1, 1, 5)


def test_one_of_two_that_return_the_same_for_different_inputs_lies(generator):
    inputs, values = different(generator)
    assert accused(values, inputs, 1) == (set(), "")
    values[2] = values[0]
    assert accused(values, inputs, 1) == ({0, 2}, "")


@pytest.mark.parametrize(("liar", "other"), [(2, 5), (5, 2)])
def test_the_one_that_is_not_predicted_returned_the_others_result(liar, other):
    machines, values, sites, _ = request((10, 8, 1, 1), 0)
    values[liar] = values[other]
    why = locate(evidence(values, sites), machines, 1).liars[machines[liar]]
    assert f"returned for other inputs the same as machine {machines[other]}" in why


@pytest.mark.parametrize("kind", ["constant", "classes", "few values", "padding", "equal inputs"])
@pytest.mark.parametrize("most", [1, 2])
def test_modules_may_give_the_same_for_many_inputs(kind, most, generator):
    inputs, values = different(generator, 8)
    if kind == "constant":
        values[:] = values[0, 0]
    elif kind == "classes":
        classes = torch.arange(48).view(8, 6) % 10
        classes[5] = classes[0]
        values = torch.eye(10, dtype=torch.float64)[classes]
    elif kind == "few values":
        values[2] = values[5] = values[0, :3].repeat(2, 1)
    elif kind == "padding":
        inputs[[2, 5]] = 0
        values = smooth(inputs)
    else:
        inputs[5], values[5] = inputs[0], values[0]
    assert accused(values, inputs, most) == (set(), "")


def test_a_few_that_are_alike_say_nothing_without_others(generator):
    inputs, values = different(generator, 2)
    values[1] = values[0]
    assert accused(values, inputs, 1) == (set(), "")


def test_a_padded_batch_beside_a_liar(generator):
    """It is found, and nothing is left that could be an error."""
    inputs, _ = different(generator, 8)
    inputs[[2, 5]] = 0
    values = smooth(inputs)
    values[3] *= -30
    assert accused(values, inputs, 1) == ({3}, "")


def test_what_is_left_beyond_the_budget_is_said():
    machines, values, sites, _ = request((24, 20, 2, 1), 0)
    values[[3, 11]] *= -1
    verdict = locate(evidence(values, sites), machines, 1)
    assert len(verdict.liars) == 1
    assert verdict.left.startswith("machine ")


@pytest.mark.parametrize("out", [(), (2,), (0, 3)])
def test_predictions_leave_out_what_is_left_out(out):
    generator = torch.Generator().manual_seed(0)
    at = torch.randn(8, 2, dtype=torch.float64, generator=generator)
    squares = (at[:, None] - at).square().sum(-1)
    machine = torch.arange(4).repeat_interleave(2)
    values = torch.randn(8, 1, dtype=torch.float64, generator=generator)
    group, regression = torch.arange(2).repeat(4), KernelRegression(squares, 2.0)
    part = Predictions(values, torch.ones(1), machine, group, torch.arange(8), regression)
    gone = torch.isin(torch.arange(4), torch.tensor(out, dtype=torch.int64))
    predicted, variances = part.predict(~gone[machine])
    for i in range(8):
        left = [j for j in range(8) if j != i and not gone[machine[j]]]
        alone = KernelRegression(squares[left][:, left], 2.0)
        weights = alone.weights(squares[[i]][:, left])
        torch.testing.assert_close(predicted[i], (weights @ part.values[left])[0])
        torch.testing.assert_close(variances[i], alone.variances(squares[[i]][:, left])[0])


def test_the_quantile_is_students():
    for freedom in (16, 48, 264):
        for level in (1e-2, 1e-4, 1e-6):
            exact = scipy.stats.t.isf(level, freedom)
            assert math.isclose(student_quantile(level, freedom), exact, rel_tol=1e-3)
