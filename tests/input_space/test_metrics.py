"""Metrics: what each measures, that the one which fits is found, and that nothing else changes."""

import math

import pytest
import torch

from coded_torch import Regression
from coded_torch.codes import RegressionCode
from coded_torch.experiments.tune import tune
from coded_torch.input_space.metrics import METRICS, Distances, Sources, leaves_of, transforms
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import LocalWorkers


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(name, x):
    (leaf,) = leaves_of([x])
    found = transforms(METRICS[name], [leaf])
    return None if found is None else found[0](leaf)


class Some(torch.nn.Module):
    """A module from a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def answered(module, code, *x, lost=4, seed=0):
    """The squared error of the answers, and the report."""
    coded = CodedWrapper(Some(module), code, workers=LocalWorkers(Uniform(lost, seed=seed)))
    got, want = coded(*x), module(*x)
    assert torch.equal(got[~coded.last_run.estimated], want[~coded.last_run.estimated])
    return float((got - want).square().sum()), coded.last_run


# What each metric measures


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
    assert (~distances.usable).nonzero().flatten().tolist() == [5, 9]
    for metric in distances.competing:
        squared, step, _ = distances.by(metric)
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
    radii = among.error_bounds(received, y[received, None], got).radii(0.5)
    assert radii[missing].isfinite().all()


# The choice


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
        Some(module), RegressionCode(20, 24), workers=LocalWorkers(Uniform(4, seed=0))
    )
    coded(x)
    first, second = coded.last_run.distances
    assert (first.output, second.output) == (0, 1)
    assert first.metric == "mean_spread"
    assert second.metric != "mean_spread"


def test_the_same_results_give_the_same_bits():
    x = normal(100, 5)
    y = x.sin()
    received = [0, 1, 3, 4, 6, 7, 8, 9]
    answers = []
    for _ in range(3):
        plan = RegressionCode(8, 10).plan([x], 2)
        results = plan.encode(y)[received]
        answers.append(plan.decode(results, received))
        plan.error_bounds(received, results, answers[-1])
        # What was decoded before leaves no trace.
        plan.decode(results.cos(), received)
        plan.decode(results[1:], received[1:])
        assert torch.equal(plan.decode(results, received), answers[0])
        assert torch.equal(answers[-1], answers[0])


def test_what_is_fixed_is_what_would_be_chosen():
    x = normal(240, 6) * torch.tensor([1.0, 1, 10, 1, 1, 30])
    received = list(range(3, 23))

    def decoded(**how):
        plan = RegressionCode(20, 24, **how).plan([x])
        return plan.decode(plan.encode(ramp(x))[received], received), plan.choices

    chosen, (choice,) = decoded()
    assert choice.metric != "shrunk"
    plan = RegressionCode(20, 24, metric=["shrunk", choice.metric], length=choice.length).plan([x])
    fixed = plan.decode(plan.encode(ramp(x))[received], received)
    assert plan.choices == (choice,)
    assert torch.equal(fixed, chosen)


def test_large_batches_compare_on_more_results():
    units = torch.tensor([1e-3, 1.0, 100.0, 1.0])
    x = normal(1500, 4) * units
    plan = Regression().plan([x])
    known = torch.arange(0, 1500, 2)
    answers = plan.decode(ramp(x / units)[known, None], known.tolist())
    assert plan.choices[0].metric in ("spread", "spread_covariance")
    assert (answers - ramp(x / units)).square().mean() < 0.01


def test_one_result_or_few():
    for size in (1, 2, 3, 7, 9):
        error, _ = answered(torch.sin, RegressionCode(3, 4), normal(size, 4), lost=2)
        assert error < 4 * size


# Callables


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


def test_a_callable_runs_once_without_gradients():
    seen = []

    def stem(x):
        assert not torch.is_grad_enabled()
        seen.append(len(x))
        return x.square()

    code = RegressionCode(20, 24, metric=stem)
    coded = CodedWrapper(
        Some(lambda x: (x.sin(), x.cos())), code, workers=LocalWorkers(Uniform(4, seed=0))
    )
    coded(normal(100, 3).requires_grad_())
    assert seen == [100]


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_callable_whose_features_are_not_finite_is_left_out(bad):
    def stem(x):
        features = x.square()
        features[7, 1] = bad
        return features

    x = normal(60, 3)
    without, _ = answered(torch.sin, RegressionCode(20, 24), x)
    assert answered(torch.sin, RegressionCode(20, 24, metric=stem), x)[0] == without


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
    assert not plan.error_bounds(received, results, answers).radii(0.9).isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(5,), (6, 3), (3, 4, 4), (600,)])
def test_rows_that_are_not_finite(bad, shape):
    x = normal(60, *shape)
    x.view(60, -1)[7, 3] = bad
    plan = RegressionCode(6, 9).plan([x], 2)
    received = [0, 1, 3, 4, 5, 7, 8]
    y = x.flatten(1)[:, :2].nan_to_num(0, 0, 0).sin()
    assert plan.decode(plan.encode(y)[received], received).isfinite().all()


def test_several_inputs():
    x = normal(120, 3, 4, 4), 100 * normal(120, 5, seed=1)
    error, report = answered(
        lambda a, b: a.mean((2, 3)) + b[:, :3] / 100, RegressionCode(10, 12), *x
    )
    assert len(report.distances) == 1
    assert math.isfinite(error)


# Arguments, and tuning


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "near"}, ValueError, "metric must be 'auto', one of shrunk, .* got 'near'"),
        ({"metric": []}, ValueError, "metric must hold at least one, got none"),
        (
            {"metric": [1]},
            TypeError,
            r"metric must be .* a sequence of these, got \[1",
        ),
        ({"metric": 1}, TypeError, "metric must be .* a callable or a sequence of these, got 1"),
        ({"length": "long"}, TypeError, "length must be positive .* or 'auto', got 'long'"),
        ({"length": 0.0}, ValueError, "length must be positive and finite, or 'auto', got 0.0"),
        ({"length": None}, TypeError, "length must be positive and finite, or 'auto', got None"),
        ({"link": "logit"}, ValueError, "link must be None or 'softmax', got 'logit'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"Regression: {message}"):
        Regression(**arguments)


def test_a_regression_says_what_it_was_made_of():
    assert repr(Regression()) == "Regression()"
    text = "Regression(metric='spread', length=3.0, link='softmax')"
    assert repr(Regression("spread", 3, "softmax")) == text


def test_tuning_fixes_metric_and_length():
    units = torch.tensor([1e-3, 1.0, 100.0, 1.0, 1e-2, 30.0])
    coded = CodedWrapper(
        Some(lambda x: ramp(x / units)),
        RegressionCode(20, 24),
        workers=LocalWorkers(Uniform(4, seed=0)),
    )
    code = tune(coded, [normal(240, 6, seed=i) * units for i in range(3)])
    assert code.metric in ("spread", "spread_covariance")
    assert code.length >= 2


@pytest.mark.cuda
def test_the_regression_under_autocast_on_cuda():
    module, x = torch.nn.Linear(12, 5).cuda(), normal(64, 12).cuda()
    coded = CodedWrapper(module, RegressionCode(8, 10), workers=LocalWorkers(Uniform(4, seed=0)))
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert (coded(x) - module(x)).abs().max() < 1
