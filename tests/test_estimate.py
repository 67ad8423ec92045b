"""What estimates are made of: every kernel of the CPU, against the formulas in float64."""

import functools
import math

import pytest
import torch

from coded_torch import Regression, ops
from coded_torch._extension import short_path

from .test_ops import every_kernel

NUGGET = 1e-4
SIZES = [(1, 0), (1, 1), (2, 7), (5, 8), (63, 16), (64, 33), (67, 240), (130, 3), (200, 70)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_distances(rows):
    return (rows.double()[:, None] - rows.double()).square().sum(2)


@pytest.mark.parametrize(("n", "columns"), SIZES)
@every_kernel
def test_distances(n, columns):
    """Those of inner products, up to their rounding; near and repeated rows' are exact."""
    rows = normal(n, columns, seed=n) / math.sqrt(max(columns, 1))
    if n > 4:
        rows[3], rows[4] = rows[0], rows[1] + 1e-3 * rows[2]
    squared, squares, order, step = ops.squared_distances(rows, 1.0)
    exact, lengths = exact_distances(rows), rows.double().square().sum(1)
    both = lengths[:, None] + lengths
    error = (squared.double() - exact).abs()
    assert (error <= 1e-6 * both).all()
    near = exact < 5e-4 * both
    assert (error[near] <= 1e-5 * exact[near]).all()
    assert n < 5 or (squared[3, 0] == 0 and 0 < squared[4, 1] < 1e-5)
    assert torch.equal(squared, squared.T)
    assert not squared.diagonal().any()
    torch.testing.assert_close(squares.double(), lengths, rtol=1e-6, atol=1e-7)
    assert order.tolist() == short_path(squared.sqrt().numpy()).tolist()
    steps = exact[order[:-1], order[1:]].sqrt()
    steps = steps[steps > 0]
    assert step == pytest.approx(float(steps.median()) if len(steps) else 1.0, rel=1e-5)
    assert torch.equal(ops.squared_distances(rows, 1.0, None, order)[0], squared)


@every_kernel
def test_rows_that_repeat():
    """All of a hundred rows twice, among the others: pairs that inner products would part."""
    rows = normal(100, 300).repeat(2, 1) * 3 + 1
    squared, _, order, _ = ops.squared_distances(rows, 900.0)
    zero = torch.eye(100, dtype=torch.bool).repeat(2, 2)
    assert torch.equal(squared == 0, zero)
    assert int((squared[order[:-1], order[1:]] == 0).sum()) == 100  # they are neighbours
    results = normal(200, 2)
    known, missing = torch.arange(150), torch.arange(150, 200)  # each has a twin that is known
    found = ops.regress(squared, 20.0, known, missing, NUGGET)
    weights = ops.estimate(found)[0]
    assert (weights.gather(1, missing[:, None] - 100) > 0.9).all()
    values = ops.estimate(found, results[:150].double(), 1.0)[0]
    torch.testing.assert_close(values, weights @ results[:150].double(), rtol=1e-3, atol=1e-3)


def test_rows_that_are_not_typical_are_infinitely_far():
    rows, typical = normal(20, 5), torch.arange(20) != 7
    squared, _, order, _ = ops.squared_distances(rows, 5.0, typical)
    assert squared[7].isinf().sum() == squared[:, 7].isinf().sum() == squared.isinf().sum() / 2
    assert order[-1] == 7


@functools.cache
def left_out_losses(n, columns, length, metric):
    """By solving without each result, in float64."""
    coordinates, results, _ = problem(n, columns)
    y = results - results[0]
    y = (y - y.mean(0)) / (y - y.mean(0)).abs().max()
    squared = exact_distances(coordinates[metric])
    s = math.sqrt(5) * squared.sqrt() / length
    whole = (1 + s + s.square() / 3) * torch.exp(-s) + NUGGET * torch.eye(n, dtype=torch.float64)
    errors, variances = torch.zeros_like(y), torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        c, k = whole[rest][:, rest], whole[rest, i]
        ones = torch.ones(n - 1, dtype=torch.float64)
        solved = torch.linalg.solve(c, torch.stack([ones, k], 1)).T
        left = (1 - solved[1].sum()) / solved[0].sum()
        weights = solved[1] + left * solved[0]
        errors[i] = y[i] - weights @ y[rest]
        variances[i] = whole[i, i] - k @ solved[1] + left**2 * solved[0].sum()
    q = (errors.square().mean(1) / variances).mean()
    return (q.log() + errors.square().mean(1) / (q * variances) - 1 + variances.log()) / 2


@functools.cache
def problem(n, columns):
    """Rows by two metrics, results that depend on the second, and the order of the rows."""
    x = normal(n, 4, seed=n + columns)
    coordinates = [x, x[:, :2].contiguous()]
    results = (x[:, :2] @ normal(2, columns, seed=1)).sin().double()
    return coordinates, results, torch.from_numpy(short_path(exact_distances(x).sqrt().numpy()))


def best(losses, default):
    """The key of the least mean loss, unless the gain over the default's may be chance."""
    found = min(losses, key=lambda key: losses[key].mean())
    gain = losses[default] - losses[found]
    chance = 2 * gain.std() / math.sqrt(len(gain))
    return found if found != default and gain.mean() > chance else default


@pytest.mark.parametrize("columns", [1, 3, 16, 37])
@pytest.mark.parametrize("n", [9, 16, 33, 70])
@every_kernel
def test_metric_and_length_are_those_of_the_formulas(n, columns):
    coordinates, results, order = problem(n, columns)
    units = [4.0, 2.0]
    some = torch.arange(n)
    args = coordinates, units, None, order, some, results
    steps = [ops.squared_distances(coordinates[m], 4.0 - 2 * m, None, order)[3] for m in (0, 1)]
    losses = [left_out_losses(n, columns, 2 * steps[m], m) for m in (0, 1)]
    metric = best(dict(enumerate(losses)), 0)
    for length in (2.0, None):
        found, _ = ops.choose_regression(*args, 0, length, NUGGET)
        assert found == metric

    def of(lengths):
        return {x: left_out_losses(n, columns, x * steps[metric], metric) for x in lengths}

    tried = of([1.0, 2.0, 4.0])
    want = best(tried, 2.0)
    if want == 4:
        tried |= of([8.0])
        want = best(tried, 2.0)
    near = [want / math.sqrt(2), want * math.sqrt(2)]
    if want / 2 in tried and want * 2 in tried:
        near.pop(0 if tried[want * 2].mean() < tried[want / 2].mean() else 1)
    want = best({want: tried[want]} | of(near), want)
    assert ops.choose_regression(*args, 0, None, NUGGET)[1] == pytest.approx(want)


def test_a_length_without_a_covariance_is_not_chosen():
    """Results at one place, and no nugget: no process gives them a density."""
    rows, results = torch.zeros(12, 3), normal(12, 2).double()
    units, order = [0.0], torch.arange(12)
    found = ops.choose_regression([rows], units, None, order, order, results, 0, None, 0.0)
    assert found == (0, 2.0)


@pytest.mark.parametrize("n", [2, 5, 16, 67, 300, 600])
@every_kernel
def test_regression(n):
    x = normal(n + 3, 3, seed=n)
    squared = exact_distances(x)
    y = x[:n].sin().double()
    known, missing = torch.arange(n), torch.arange(n, n + 3)
    exact = ops.regress(squared, 1.5, known, missing, NUGGET)
    found = ops.regress(squared.float(), 1.5, known, missing, NUGGET)
    for one, other in zip(
        ops.estimate(found, y, 1.0)[:2], ops.estimate(exact, y, 1.0)[:2], strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.01, atol=2e-3)
    for field in (6, 7, 8):  # variances, and weights of the results that are left out
        torch.testing.assert_close(found[field], exact[field], rtol=0.02, atol=0.01)


def thresholds(weights, variances, moved, known, trust, count, signed):
    of_left_out, residuals, shrunk, deviations = known
    w, rest = weights if signed else weights.abs(), 1 - trust
    ratio = of_left_out / variances[:, None]
    shrink = 1 / (w.square() * ratio + 1)
    ratio = ratio * shrink
    pull = w * ratio
    after = shrink * trust * residuals + (1 - 1 / count**2) * rest * deviations
    if signed:
        after = after + rest * (pull - 1 / count) * moved[:, None]
    else:
        other = shrunk + trust * (1 - shrink) * residuals + rest * deviations / count**2
        after = torch.minimum(after, other) + rest * (pull + 1 / count) * moved[:, None]
    score, pull = ratio**0.375, trust * pull + rest / count
    gaps = [score - pull]
    if signed:
        gaps = [score - pull * after.sign(), score + pull * after.sign()]
    limits = torch.stack([after.abs() / gap for gap in gaps])
    return limits.masked_fill(score <= pull.abs(), math.inf)


@pytest.mark.parametrize("trust", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("signed", [False, True])
@every_kernel
def test_thresholds(trust, signed):
    for n in (1, 7, 40):
        weights, known = normal(11, n).double(), normal(4, n, seed=1).double()
        known[: 1 if signed else 4].abs_()
        variances, moved = normal(2, 11, seed=2).double().abs_()
        args = weights, variances, moved, known, trust, n
        want = thresholds(*args, signed)
        torch.testing.assert_close(ops.error_thresholds(*args, n, signed)[0], want)
        some = torch.arange(min(n, 9)) * n // min(n, 9)  # so many results calibrate
        torch.testing.assert_close(ops.error_thresholds(*args, 9, signed)[0], want[:, :, some])


@pytest.mark.parametrize(("rows", "features"), [(64, 20), (240, 784), (700, 40), (1700, 30)])
def test_the_same_bits_on_any_number_of_threads(rows, features):
    x = normal(rows, features)
    y = (x @ normal(features, 5, seed=1) / math.sqrt(features)).sin()
    received = [i for i in range(rows) if i % 6]
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            plan = Regression().plan([x])
            answers = plan.decode(y[received, None], received)
            bounds = plan.error_bounds(answers)
        finally:
            torch.set_num_threads(before)
        found.append((plan.order, answers, bounds.at(0.9), bounds.label_p_values, plan.choices))
    for other in found[1:]:
        assert all(map(torch.equal, other[:4], found[0][:4]))
        assert other[4] == found[0][4]


def test_bad_arguments():
    x, order = normal(12, 3), torch.arange(12)
    y, one = normal(12, 2).double(), torch.ones(1, dtype=torch.float64)
    squared = exact_distances(x)
    process = ops.regress(squared, 1.0, order[:8], order[8:], NUGGET)
    none, rest = torch.empty(0, 0), (0, None, 1e-4)
    for call, args, message in (
        (ops.squared_distances, (x.double(), 1.0), "coordinates must be float32"),
        (ops.squared_distances, (x.T, 1.0), "coordinates must be float32, contiguous"),
        (ops.squared_distances, (x, 1.0, None, order + 1), r"rows must lie in 0\.\.11, got 12"),
        (ops.squared_distances, (x, 1.0, order), "typical must be bool"),
        (ops.typical_rows, ([x, x[1:]],), "as many in each tensor"),
        (ops.typical_rows, ([x.half()],), "got Half"),
        (ops.fit_metrics, ([x], [], None, [0], [0.0], [0]), "must be as many"),
        (ops.fit_metrics, ([x, x[1:]], [none] * 2, None, [0], [0.0], [0]), "as many in each"),
        (ops.choose_regression, ([x], [1.0], None, order, order, y[1:], *rest), "results"),
        (ops.choose_regression, ([x], [1.0], None, order, order, y.float(), *rest), "Float"),
        (ops.choose_regression, ([x], [1.0], None, order[1:], order, y, *rest), "order of"),
        (ops.choose_regression, ([x], [], None, order, order, y, *rest), "units"),
        (ops.regress, (squared[:5], 1.0, order, order, 1e-4), r"\[P, P\]"),
        (ops.regress, (squared, 1.0, order - 1, order, 1e-4), "got -1"),
        (ops.regress, (squared, 1.0, order[:0], order, 1e-4), "at least one row, got none"),
        (ops.path_variances, (squared, 1.0, order, 0, 1e-4), "most must be 1 to 512, got 0"),
        (ops.path_variances, (squared, 1.0, order - 1, 5, 1e-4), "got -1"),
        (ops.estimate, (process, y), r"contiguous, \[8, C\]"),
        (ops.estimate, (process[1:], y[:8]), "must be one of regress"),
        (ops.coefficients, (process, y), r"contiguous, \[8, C\]"),
        (ops.error_thresholds, (y, one, one, y, 1.0, 3, 3, False), "got"),
        (ops.error_bounds, ([], y, y, one[:, None], None, None, 1.0, 9), "as many columns"),
        (ops.error_radii, (y[None], 0.5, one), "for each of 12 rows"),
        (ops.error_thresholds, (y.float(), one, one, y, 1.0, 3, 3, False), "must be float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)


def test_schemas():
    operators = torch.ops.coded_torch
    x, order = normal(12, 3), torch.arange(12)
    y, none = normal(12, 2).double(), torch.empty(0, 0)
    process = ops.regress(exact_distances(x), 1.0, order[:8], order[8:], NUGGET)
    bounded = process[8], process[6], process[6], torch.ones(4, 8, dtype=torch.float64)
    for operator, arguments in (
        (operators.typical_rows, ([x],)),
        (operators.fit_metrics, ([x], [none], None, [0, 1], [0.01, 0.0], [0, 0])),
        (operators.squared_distances, (x, 3.0)),
        (operators.choose_regression, ([x], [1.0], None, order, order, y, 0, None, NUGGET)),
        (operators.regress, (exact_distances(x), 1.0, order[:8], order[8:], NUGGET)),
        (operators.path_variances, (exact_distances(x), 1.0, order, 5, NUGGET)),
        (operators.estimate, (process, y[:8])),
        (operators.coefficients, (process, y[:8])),
        (operators.error_thresholds, (*bounded, 0.5, 8, 8, False)),
        (operators.error_radii, (y[None], 0.5, y[:, 0].contiguous())),
        (operators.error_bounds, (process, y[:8], y[:8], y[8:], y[:8], y[8:], 0.5, 8)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema",))
