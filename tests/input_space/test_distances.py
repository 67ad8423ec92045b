"""Metrics: what each measures, that the one which fits is found, and that nothing else changes."""

import copy
import itertools
import math

import pytest
import torch

from coded_torch.codes import KernelCode, SplineCode, plan_batch, plan_rows
from coded_torch.evaluation.tune import tune
from coded_torch.input_space.distances import (
    METRICS,
    Leaf,
    features_by,
    inner_products,
    similarity_by,
    squared_distances,
)
from coded_torch.input_space.geometry import Geometry
from coded_torch.input_space.ordering import Grouping
from coded_torch.input_space.points import Points
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(name, x, basis=None):
    found = features_by(METRICS[name], [Leaf(x, basis)])
    return None if found is None else found[0]


class Some(torch.nn.Module):
    """A module from a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def answered(module, code, *x, lost=4, seed=0):
    """The squared error of the answers, and the report."""
    coded = CodedWrapper(Some(module), code, stragglers=Uniform(lost, seed=seed))
    got, want = coded(*x), module(*x)
    assert torch.equal(got[~coded.last_run.predicted], want[~coded.last_run.predicted])
    return float((got - want).square().sum()), coded.last_run


# What each metric measures


def test_features_by_their_spread():
    x = normal(50, 4, dtype=torch.float64) * torch.tensor([1e3, 1.0, 1e-4, 0.0])
    spread = x.std(0, correction=0)
    overall = spread.square().mean().sqrt()
    torch.testing.assert_close(features("spread", x), x / (spread + 0.01 * overall))
    every = features("spread_all", x)
    torch.testing.assert_close(every[:, :2], x[:, :2] / spread[:2])
    assert not every[:, 2:].any()  # a ten-millionth of the others is rounding
    assert features("spread", x[:, :1]) is None


def test_whitened_features_are_uncorrelated():
    x = normal(200, 3, dtype=torch.float64) @ normal(3, 3, seed=1, dtype=torch.float64) * 7
    torch.testing.assert_close(
        features("whitened", x).T.cov(), torch.eye(3).double(), atol=2e-2, rtol=0
    )
    assert features("whitened", x[:11]) is None


def test_features_of_sequences():
    x = normal(6, 5, 3)
    assert torch.equal(features("mean", x), x.mean(1))
    want = torch.cat([x.mean(1), x.std(1, correction=0)], 1)
    torch.testing.assert_close(features("mean_spread", x), want)
    assert torch.equal(features("mean_spread", x[:, torch.randperm(5)]).argmax(), want.argmax())
    for other in (x[:, :1], x[:, 0], x[..., None]):
        assert features("mean", other) is None


def test_features_of_pictures():
    x = normal(4, 3, 8, 8)
    assert torch.equal(features("grey", x), x.mean(1))
    torch.testing.assert_close(features("colour", x), x.mean((2, 3)))
    assert features("grey", x[:, :1]) is None


def test_the_spectrum_does_not_see_when():
    x = normal(5, 1, 600)
    spectrum = features("spectrum", x)
    torch.testing.assert_close(features("spectrum", x.roll(7, -1)), spectrum, atol=2e-3, rtol=1e-3)
    assert features("spectrum", x[..., :511]) is None
    assert features("spectrum", x.expand(5, 2, 600)) is None


@pytest.mark.parametrize("name", METRICS)
def test_linear_features_are_those_of_mixtures(name):
    shape = (2, 6, 6) if name in ("grey", "colour") else (4, 3) if "mean" in name else (5,)
    x = normal(60, *shape, dtype=torch.float64)
    found = features(name, x)
    if not METRICS[name].linear or found is None:
        pytest.skip("not linear, or not of this shape")
    weights = normal(3, 60, seed=1, dtype=torch.float64).softmax(1)
    both = features(
        name, torch.cat([x, (weights @ x.flatten(1)).view(3, *shape)]), torch.arange(60)
    )
    torch.testing.assert_close(both[60:].flatten(1), weights @ both[:60].flatten(1))


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, math.inf])
def test_few_rows_are_measured_as_the_geometry_does(shrinkage):
    inputs = [normal(40, 7, dtype=torch.float64), 9 * normal(40, 3, seed=1, dtype=torch.float64)]
    got = squared_distances(inner_products(inputs), shrinkage)
    want = Geometry(inputs, shrinkage=shrinkage).squared_distances()
    torch.testing.assert_close(got / got[0, 1], want / want[0, 1])


# The choice


OF_EVERY_FEATURE = ("spread_all", "spread_shrunk", "spread_covariance", "whitened")


def ramp(x):
    return x[:, :1] * torch.tensor([1.0, 2.0])


def test_a_feature_that_decides_is_found_in_any_units():
    x = normal(240, 6)
    units = torch.tensor([1e-3, 1.0, 100.0, 1.0, 1e-2, 30.0])
    standard = raw = fixed = 0.0
    for seed in range(6):  # copies are others, and so are answers that are lost
        standard += answered(ramp, KernelCode(20, 24), x, seed=seed)[0]
        error, report = answered(
            lambda x: ramp(x / units), KernelCode(20, 24), x * units, seed=seed
        )
        raw += error
        assert report.distances[0].metric in OF_EVERY_FEATURE
        assert 0 < report.distances[0].error < 0.5
        code = KernelCode(20, 24, metric="shrunk", length=2.0)
        fixed += answered(lambda x: ramp(x / units), code, x * units, seed=seed)[0]
    assert raw < 3 * standard
    assert raw < 0.2 * fixed


def test_every_output_has_its_own_choice():
    x = normal(240, 30, 3)

    def module(x):
        return torch.cat([x.mean(1).sin(), x.std(1)], 1), x[:, 0] @ normal(3, 4, seed=2)

    coded = CodedWrapper(Some(module), KernelCode(20, 24), stragglers=Uniform(4, seed=0))
    coded(x)
    first, second = coded.last_run.distances
    assert (first.output, second.output) == (0, 1)
    assert first.metric in ("mean", "mean_spread")
    assert second.metric not in ("mean", "mean_spread")


def test_the_same_results_give_the_same_bits():
    x = normal(100, 5)
    y = x.sin()
    received = [0, 1, 3, 4, 6, 7, 8, 9]
    answers = []
    for _ in range(3):
        plan = plan_batch(KernelCode(8, 10), "similarity", [x], 2)
        results = plan.encode(y)[received]
        plan.expected_errors(received, results)
        answers.append(plan.decode(results, received))
        # What was decoded before leaves no trace.
        plan.decode(results.cos(), received)
        plan.decode(results[1:], received[1:])
        assert torch.equal(plan.decode(results, received), answers[0])
        assert torch.equal(answers[-1], answers[0])


def test_what_is_fixed_is_what_would_be_chosen():
    x = normal(240, 6) * torch.tensor([1.0, 1, 10, 1, 1, 30])
    received = list(range(3, 23))

    def decoded(**how):
        plan = plan_batch(KernelCode(20, 24, **how), "similarity", [x], 0)
        return plan.decode(plan.encode(ramp(x))[received], received), plan.choices

    chosen, (choice,) = decoded()
    fixed, choices = decoded(metric=choice.metric, length=choice.length)
    assert choices == (choice,)
    assert torch.equal(fixed, chosen)


def test_one_result_or_few():
    for size in (1, 2, 3, 7, 9):
        x = normal(size, 4)
        error, _ = answered(torch.sin, KernelCode(3, 4), x, lost=2)
        assert error < 4 * size


# Callables


def test_a_callable_competes():
    x = normal(240, 40)

    def stem(x):
        return x[:, ::7]

    def module(x):
        return stem(x).sin()

    without, _ = answered(module, KernelCode(20, 24), x)
    error, report = answered(module, KernelCode(20, 24, metric=stem), x)
    assert error < 0.8 * without
    assert report.distances[0].metric == "stem"
    error, report = answered(module, KernelCode(20, 24, metric=lambda x: x[:, 1::7]), x)
    assert error == without
    alone, report = answered(module, KernelCode(20, 24, metric=[lambda x: x[:, 1::7]]), x)
    assert report.distances[0].metric == "<lambda>"
    assert alone > without


@pytest.mark.parametrize("encoder", [None, SplineCode(20, 24)])
def test_a_callable_runs_once_without_gradients(encoder):
    seen = []

    def stem(x):
        assert not torch.is_grad_enabled()
        seen.append(len(x))
        return x.square()

    code = KernelCode(*(() if encoder else (20, 24)), encoder=encoder, metric=stem)
    coded = CodedWrapper(Some(lambda x: (x.sin(), x.cos())), code, stragglers=Uniform(4, seed=0))
    x = normal(100, 3).requires_grad_()
    coded(x)
    assert len(seen) == 1
    assert seen[0] >= 100


@pytest.mark.parametrize(
    ("stem", "reason"),
    [
        (lambda x: x[1:], r"ValueError: features must be floating-point, one for each of 60 rows"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
        (lambda x: "text", "got 'text'"),
        (lambda x: x.long(), "floating-point"),
    ],
)
def test_a_callable_that_fails_is_left_out(stem, reason, caplog):
    x = normal(60, 3)
    without, _ = answered(torch.sin, KernelCode(20, 24), x)
    error, report = answered(torch.sin, KernelCode(20, 24, metric=stem), x)
    assert error == without
    assert len(report.notes) == 1
    assert "<lambda> was left out" in report.notes[0]
    assert reason in report.notes[0]
    assert "was left out" in caplog.text
    _, report = answered(torch.sin, KernelCode(20, 24, metric=[stem]), x)
    assert report.distances[0].metric == "shrunk"


def test_token_ids_are_near_by_their_embeddings():
    """Without a callable there is nothing to measure: lost answers are the mean."""
    weight = normal(30, 8)
    tokens = torch.randint(0, 30, (240, 6), generator=torch.Generator().manual_seed(0))

    def module(tokens):
        return weight[tokens].mean(1).sin()

    with pytest.warns(UserWarning, match="no distances"):
        blind, report = answered(module, KernelCode(20, 24), tokens)
    assert len(report.notes) == 1
    for metric in (lambda tokens: weight[tokens], [lambda tokens: weight[tokens].mean(1)]):
        error, report = answered(module, KernelCode(20, 24, metric=metric), tokens)
        assert error < 0.6 * blind
        assert not report.notes
        assert report.distances
    plan = plan_rows(
        KernelCode(20, 24, metric=metric), "arrival", [], batch_size=240, others=[tokens]
    )
    received = list(range(30, 240))
    got = plan.decode(module(tokens)[received, None], received)
    want = module(tokens)
    mean = want[received].mean(0)
    assert float((got - want).square().sum()) < 0.6 * float((mean - want)[:30].square().sum())
    error, report = answered(module, KernelCode(20, 24, metric=[max]), tokens)
    assert error == blind
    assert "max was left out" in report.notes[0]


def test_any_code_can_be_ordered_by_features():
    x = normal(40, 5)
    order = similarity_by(lambda x: x[:, :1])([x])
    steps = x[order, 0].diff().abs()
    assert float(steps.sum()) < 1.01 * float(x[:, 0].max() - x[:, 0].min())
    ordering = similarity_by(lambda x: x[:, :1])
    coded = CodedWrapper(Some(ramp), SplineCode(8, 10), stragglers=Uniform(2), ordering=ordering)
    assert float((coded(x) - ramp(x)).square().mean()) < 0.1


# Mixtures


@pytest.mark.parametrize("metric", ["spread", "mean", "mean_spread", "covariance"])
def test_distances_of_mixtures(metric):
    """They are those of the coded inputs."""
    x = normal(40, 6, 4, dtype=torch.float64)
    code = KernelCode(encoder=SplineCode(8, 20), metric=metric)
    grouping, geometry = Grouping(torch.randperm(40), 8), Geometry([x])
    plan = code.fit(grouping, geometry)
    batch = plan._batch
    assert isinstance(batch, Points)
    squared = batch.squared_distances(metric)
    coded = plan.encode(x)
    points = plan._point
    for (n, g), (p, h) in itertools.product([(0, 0), (3, 1), (19, 4)], [(7, 2), (10, 4)]):
        both = torch.stack([coded[n, g], coded[p, h]])
        found = features_by(METRICS[metric], [Leaf(torch.cat([x, both]), torch.arange(40))])[
            0
        ].flatten(1)
        if METRICS[metric].shrinkage == math.inf:
            centred = found[:40] - found[:40].mean(0)
            found = found @ torch.linalg.cholesky(centred.T @ centred)
        want, base = ((found[i] - found[i + 1]).square().sum() for i in (40, 0))
        got = squared[points[n, g], points[p, h]] / squared[0, 1]
        torch.testing.assert_close(got, (want / base).to(got.dtype))


# Inputs of any kind


BAD = {
    "constant": lambda x: torch.ones_like(x),
    "equal rows": lambda x: x[:1].expand_as(x).clone(),
    "one feature": lambda x: x[:, :1].clone(),
    "a constant feature": lambda x: x * torch.tensor([1.0, 0, 1, 1]),
    "few values": lambda x: (x > 0).float(),
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "one long row": lambda x: torch.cat([x[:1] * 1e6, x[1:]]),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "no dimension": lambda x: x[:, 0].clone(),
}


@pytest.mark.parametrize("encoder", [None, SplineCode(8, 10)])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("size", [1, 9, 60])
def test_inputs_of_any_kind(kind, size, encoder):
    """Without an error or a warning, which are errors here."""
    x = BAD[kind](normal(size, 4))
    code = KernelCode(*(() if encoder else (8, 10)), encoder=encoder)
    coded = CodedWrapper(Some(lambda x: x.float().tanh()), code, stragglers=Uniform(2, seed=0))
    assert coded(x).isfinite().all()
    assert math.isfinite(coded.last_run.expected_rmse)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(5,), (6, 3), (3, 4, 4), (600,)])
def test_rows_that_are_not_finite(bad, shape):
    x = normal(60, *shape)
    x.view(60, -1)[7, 3] = bad
    plan = plan_batch(KernelCode(6, 9), "similarity", [x], 2)
    received = [0, 1, 3, 4, 5, 7, 8]
    y = x.flatten(1)[:, :2].nan_to_num(0, 0, 0).sin()
    answers = plan.decode(plan.encode(y)[received], received)
    assert answers.isfinite().all()


def test_several_inputs():
    x = normal(120, 3, 4, 4), 100 * normal(120, 5, seed=1)
    error, report = answered(lambda a, b: a.mean((2, 3)) + b[:, :3] / 100, KernelCode(10, 12), *x)
    assert len(report.distances) == 1
    assert math.isfinite(error)


# Arguments, and tuning


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "near"}, ValueError, "metric must be 'auto' or one of shrunk, euclidean"),
        ({"metric": []}, ValueError, "metric must hold at least one, got none"),
        ({"metric": [1]}, TypeError, "metric must hold names and callables, got 1"),
        ({"metric": 1}, TypeError, "metric must be a name, a callable or a sequence of these"),
        ({"length": "long"}, ValueError, "length must be positive or 'auto', got 'long'"),
        ({"length": [0.0]}, ValueError, "length must be positive and finite, got 0.0"),
        ({"length": ()}, ValueError, "length must hold at least one, got none"),
        ({"length": None}, TypeError, "length must be positive and finite, got None"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"KernelCode: {message}"):
        KernelCode(4, 6, **arguments)


def test_tuning_fixes_metric_and_length():
    units = torch.tensor([1e-3, 1.0, 100.0, 1.0, 1e-2, 30.0])
    coded = CodedWrapper(
        Some(lambda x: ramp(x / units)), KernelCode(20, 24), stragglers=Uniform(4, seed=0)
    )
    code = tune(coded, [normal(240, 6, seed=i) * units for i in range(3)])
    assert code.metric in OF_EVERY_FEATURE
    assert code.length >= 2
    assert (len(code.metrics), len(code.lengths)) == (1, 1)

    def first(x):
        return x[:, :1] * 1e3

    coded.code = KernelCode(20, 24, metric=first)
    code = tune(coded, [normal(240, 6) * units])
    assert code.metric == (first,)
    assert copy.deepcopy(code).metric[0] is first


def test_autocast_leaves_features_as_they_are():
    x = normal(64, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = {name: features(name, x) for name in METRICS}
    for name, found in under.items():
        want = features(name, x)
        assert found is want is None or torch.equal(found, want), name


@pytest.mark.cuda
def test_the_recommended_code_under_autocast_on_cuda():
    module, x = torch.nn.Linear(12, 5).cuda(), normal(64, 12).cuda()
    coded = CodedWrapper(module, KernelCode(8, 10), stragglers=Uniform(4, seed=0))
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert (coded(x) - module(x)).abs().max() < 1
