"""Metrics: what each measures, that the one which fits is found, and that nothing else changes."""

import math

import pytest
import torch

from coded_torch import Regression
from coded_torch.codes import RegressionCode
from coded_torch.input_space.metrics import METRICS, Distances, Sources, fitted, leaves_of
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import LocalWorkers

from ..nn.modules import Call


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(name, x):
    (leaf,) = leaves_of([x])
    (found,) = fitted([leaf], [METRICS[name]])
    if found is None:
        return None
    rows = leaf.pooled if METRICS[name].features == "pooled" else leaf.rows
    return (rows.double() * found.map[0] - found.map[1]).float()


def answered(module, code, *x, lost=4, seed=0):
    """The squared error of the answers, and the report."""
    coded = CodedWrapper(Call(module), code, workers=LocalWorkers(Uniform(lost, seed=seed)))
    got, want = coded(*x), module(*x)
    assert torch.equal(got[~coded.last_run.estimated], want[~coded.last_run.estimated])
    return float((got - want).square().sum()), coded.last_run


@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_features_by_their_spread(scale):
    x = normal(50, 4) * torch.tensor([1e3, 1.0, 1e-4, 0.0]) * scale
    got = features("spread", x)
    equal = torch.full((2,), 0.5**0.5)  # two features vary
    torch.testing.assert_close(got[:, :2].std(0, correction=0), equal, rtol=1e-3, atol=0)
    assert not got[:, 2:].any()  # a ten-millionth of the others is rounding
    assert features("spread", x[:, :1]) is None
    assert features("spread_covariance", x[:15]) is None
    assert torch.equal(features("spread_covariance", x), got)


def test_features_of_sequences():
    x = normal(6, 5, 3)
    want = torch.cat([x.mean(1), x.std(1, correction=0)], 1)
    got, want = features("mean_spread", x), want - want.mean(0)
    torch.testing.assert_close(got, want / want.square().sum(1).mean().sqrt())
    for other in (x[:, :1], x[:, 0], x[..., None]):
        assert features("mean_spread", other) is None


def test_rows_far_from_all_others_say_nothing():
    x = normal(40, 6)
    x[3], x[5, 2], x[9] = 200, math.nan, x[9] + 1000
    distances = Distances(Sources([x + 100]), tuple(METRICS))
    assert distances.far.nonzero().flatten().tolist() == [5, 9]
    for metric in distances.competing:
        squared, step = distances.by(metric)
        assert squared[5, 6:].isinf().all()
        assert squared[:, 5].isinf().sum() == 39
        assert step > 0
    assert set(distances.order[-2:].tolist()) == {5, 9}


@pytest.mark.parametrize(("size", "odd"), [(1024, 4), (512, 2), (1000, 0)])
def test_rows_that_are_not_finite_determine_no_metric(size, odd):
    """A quarter, a half and 97 % of the rows are NaN; each estimates as without them."""
    x = normal(size, 4)
    y = x.sin()
    good = torch.tensor([i % odd > 0 if odd else i % 33 == 0 for i in range(size)])
    x[~good] = math.nan
    places = good.nonzero().flatten()
    received = [int(i) for k, i in enumerate(places) if k % 6]
    missing = places[::6]
    alone = Regression("shrunk").plan([x[places]])
    among = Regression("shrunk").plan([x])
    own = [k for k in range(len(places)) if k % 6]
    want = alone.decode(y[received, None], own)[::6]
    got = among.decode(y[received, None], received)
    torch.testing.assert_close(got[missing], want, rtol=1e-3, atol=1e-3)
    radii = among.error_bounds(got).at(0.5)
    assert radii[missing].isfinite().all()


def ramp(x):
    return x[:, :1] * torch.tensor([1.0, 2.0])


def test_a_feature_that_decides_is_found_in_any_units():
    x = normal(240, 6)
    units = torch.tensor([1e-3, 1.0, 100.0, 1.0, 1e-2, 30.0])
    standard = raw = fixed = 0.0
    for seed in range(6):  # copies are others, and so are answers that are lost
        standard += answered(ramp, RegressionCode(20, 24), x, seed=seed)[0]
        error, report = answered(
            lambda x: ramp(x / units), RegressionCode(20, 24), x * units, seed=seed
        )
        raw += error
        assert report.distances[0].metric in ("spread", "spread_covariance")
        assert 0 < report.distances[0].error < 0.5
        code = RegressionCode(20, 24, metric="shrunk", length=2.0)
        fixed += answered(lambda x: ramp(x / units), code, x * units, seed=seed)[0]
    assert raw < 3 * standard
    assert raw < 0.2 * fixed


def test_every_output_has_its_own_choice():
    x = normal(240, 30, 3)

    def module(x):
        return torch.cat([x.mean(1).sin(), x.std(1)], 1), x[:, 0] @ normal(3, 4, seed=2)

    coded = CodedWrapper(
        Call(module), RegressionCode(20, 24), workers=LocalWorkers(Uniform(4, seed=0))
    )
    coded(x)
    first, second = coded.last_run.distances
    assert (first.output, second.output) == (0, 1)
    assert first.metric == "mean_spread"
    assert second.metric != "mean_spread"


def test_a_callable_competes():
    x = normal(240, 40)

    def stem(x):
        return x[:, ::7]

    def module(x):
        return stem(x).sin()

    without, _ = answered(module, RegressionCode(20, 24), x)
    error, report = answered(module, RegressionCode(20, 24, metric=stem), x)
    assert error < 0.8 * without
    assert report.distances[0].metric == "stem"
    error, report = answered(module, RegressionCode(20, 24, metric=lambda x: x[:, 1::7]), x)
    assert error == without
    alone, report = answered(module, RegressionCode(20, 24, metric=[lambda x: x[:, 1::7]]), x)
    assert report.distances[0].metric == "<lambda>"
    assert alone > without
    before = x.clone()
    answered(module, RegressionCode(20, 24, metric=lambda x: x.sub_(x.mean(0))), x)
    assert torch.equal(x, before)


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
    without, _ = answered(torch.sin, RegressionCode(20, 24), x)
    error, report = answered(torch.sin, RegressionCode(20, 24, metric=stem), x)
    assert error == without
    assert len(report.notes) == 1
    assert "<lambda> was left out" in report.notes[0]
    assert reason in report.notes[0]
    assert "was left out" in caplog.text
    _, report = answered(torch.sin, RegressionCode(20, 24, metric=[stem]), x)
    assert report.distances[0].metric == "shrunk"


def test_token_ids_are_near_by_their_embeddings():
    """Without a callable there is nothing to measure: lost answers are the mean."""
    weight = normal(30, 8)
    tokens = torch.randint(0, 30, (240, 6), generator=torch.Generator().manual_seed(0))

    def module(tokens):
        return weight[tokens].mean(1).sin()

    want, received = module(tokens), list(range(30, 240))

    def error(regression):
        plan = regression.plan([], 240, others=[tokens])
        got = plan.decode(want[received, None], received)
        return float((got - want).square().sum()), plan.note

    blind, note = error(Regression())
    assert "no floating-point input" in note
    for metric in (lambda tokens: weight[tokens], [lambda tokens: weight[tokens].mean(1)]):
        assert error(Regression(metric))[0] < 0.6 * blind
        assert error(Regression(metric))[1] == ""
    failed, note = error(Regression([max]))
    assert failed == blind
    assert "max was left out" in note


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


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("size", [1, 9, 60])
def test_inputs_of_any_kind(kind, size):
    """Without an error or a warning, which are errors here."""
    x = BAD[kind](normal(size, 4))
    plan = RegressionCode(8, 10).plan([x], 2)
    received = [0, 1, 2, 4, 5, 6, 8, 9]
    results = plan.encode(x.float().tanh())[received]
    answers = plan.decode(results, received)
    assert answers.isfinite().all()
    assert not plan.error_bounds(answers).at(0.9).isnan().any()
