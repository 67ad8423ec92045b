"""Error bounds against full conformal prediction by brute force, and their limits."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_torch import Regression
from coded_torch.input_space._error_bounds import Bounds, ErrorBounds, bounds_of, label_p_values
from coded_torch.input_space._gaussian_process import GaussianProcess

POWER = 0.75 / 2


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def regressed(x, n):
    """The regression of the other rows from the first n."""
    squared = torch.cdist(x, x).square()
    return squared, GaussianProcess(squared, 1.5, torch.arange(n), torch.arange(n, len(x)))


def scores(squared, points, y):
    """The numerators and denominators of the scores of all points, with fresh regressions."""
    process = GaussianProcess(squared, 1.5, points)
    residuals = process.leave_one_out_residuals(y[points])
    return residuals, process.leave_one_out_variances**POWER


def brute_force(squared, n, y, centre, outside, trust):
    """The largest error that full conformal prediction allows the last point.

    Its result is tried at 0 and 1: all residuals are linear in it. Between the roots of
    ``|residual of j| = |own residual|`` the number of results that look odder is constant.
    """
    points = torch.arange(n + 1)
    tried = []
    for value in (0.0, 1.0):
        z = torch.cat([y, torch.full((1, 1), value, dtype=y.dtype)])
        residuals, sizes = scores(squared, points, z)
        deviations = (z - z.mean(0)) * ((n + 1) / n)
        residuals = trust * residuals[:, 0] + (1 - trust) * deviations[:, 0]
        residuals[n] = value - centre  # by the estimate that stands in the middle of the ball
        tried.append(residuals / sizes)
    at_0, slope = tried[0], tried[1] - tried[0]
    roots = [(s * at_0[n] - at_0[:n]) / (slope[:n] - s * slope[n]) for s in (1.0, -1.0)]
    roots = torch.cat(roots).sort().values
    far = roots.abs().max() * 10 + 1
    ends = torch.cat([-far[None], roots, far[None]])
    middles = (ends[:-1] + ends[1:]) / 2
    values = at_0 + slope * middles[:, None]
    allowed = (values[:, :n].abs() >= values[:, n:].abs()).sum(1) >= outside
    if allowed[0] or allowed[-1]:
        return math.inf
    kept = torch.cat([ends[:-1][allowed], ends[1:][allowed]])
    return float((kept - centre).abs().max())


def problem(n, d, trust, seed):
    """A regression of n results, and its estimate of the row after them."""
    x, noise = normal(n + 1, d, seed=seed), normal(n + 1, 1, seed=seed + 1) / 10
    y = (x.sin().sum(1, keepdim=True) + noise)[:n]
    squared, process = regressed(x, n)
    return squared, process, y, torch.lerp(y.mean(0), process.weights @ y, trust)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(19, 70),
    d=st.integers(1, 4),
    trust=st.one_of(st.just(1.0), st.floats(0.05, 1)),
    seed=st.integers(0, 10**6),
)
def test_a_bound_is_that_of_full_conformal_estimate(n, d, trust, seed):
    """Of one output it is the same, but where a result weighs so much that it is never odd."""
    squared, process, y, estimated = problem(n, d, trust, seed)
    limits = bounds_of(torch.tensor([n]), y, estimated, process, trust)
    found = ErrorBounds(n + 1, [limits])
    for coverage in (0.8, 0.95):
        outside = math.floor((1 - coverage) * (n + 1) + 1e-9)
        exact = brute_force(squared, n, y, estimated.item(), outside, trust)
        radius = found.at(coverage)[n].item()
        assert radius >= exact * (1 - 1e-6)
        if limits.thresholds.isfinite().all():
            assert radius == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("trust", [0.0, 0.6, 1.0])
def test_no_bound_is_larger_at_a_lower_level(trust):
    x, y = normal(60, 3), normal(60, 4, seed=1)
    _, process = regressed(x, 40)
    mean = y[:40].mean(0)
    estimated = torch.lerp(mean, process.weights @ y[:40], trust)
    regression = (process, trust) if trust else ()
    found = ErrorBounds(60, [bounds_of(torch.arange(40, 60), y[:40], estimated, *regression)])
    levels = [found.at(level) for level in (0.5, 0.8, 0.95, 0.98)]
    assert all(bool((low <= high).all()) for low, high in itertools.pairwise(levels))
    assert not levels[0][:40].any()
    assert found.at(0.98)[40:].isinf().all()  # needs 49 results
    by = torch.linspace(0, 9, 60, dtype=torch.float64)
    assert torch.equal(found.widened(by).at(0.8)[40:], levels[1][40:] + by[40:])
    assert not found.widened(by).at(0.8)[:40].any()


def test_about_the_mean_it_is_the_largest_deviation():
    """With 19 results at 95 %: row i is as odd as the farthest result from the others' mean."""
    y = normal(19, 1)
    found = ErrorBounds(20, [bounds_of(torch.tensor([19]), y, y.mean(0, keepdim=True))])
    far = (y - y.mean()).abs().max().item()
    assert found.at(0.95)[19].item() == pytest.approx(far * (1 + 1 / 19) / (1 - 1 / 19))
    assert found.at(0.96)[19].item() == math.inf


@pytest.mark.parametrize(("rows", "outputs", "length"), [(60, 3, "auto"), (700, 2, 2.0)])
def test_rows_of_a_batch_are_covered(rows, outputs, length):
    """By all outputs together; of many missing rows few results calibrate."""
    covered, count = 0, 0
    for seed in range(12):
        x = normal(rows, 4, seed=seed)
        y = torch.cat([x.sin()[:, : outputs - 1], normal(rows, 1, seed=seed + 50)], 1)
        known = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: rows * 3 // 5]
        received = known.sort().values.tolist()
        plan = Regression(length=length).plan([x])
        answers = plan.decode(y[received, None], received)
        errors = (answers - y).norm(dim=1)
        radii = plan.error_bounds(answers).at(0.9)
        assert not radii[received].any()
        lost = plan.source(received) < 0
        covered, count = covered + int((errors <= radii)[lost].sum()), count + int(lost.sum())
    assert 0.87 <= covered / count <= 0.97


def test_the_p_value_of_a_label_counts_wrong_ones_of_a_larger_margin():
    margins, left_out = torch.tensor([0.5, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 0.1])
    wrong = torch.tensor([True, True, False, True])
    assert label_p_values(margins, left_out, wrong).tolist() == [3 / 5, 2 / 5, 1 / 5]


def test_bounds_of_what_is_no_number_are_infinite():
    """Rounds and comparisons with NaN are false, by which a bound could become 0."""
    thresholds = torch.tensor([[[math.nan] * 9, [*range(9)]]], dtype=torch.float64)
    limits = ErrorBounds(2, [Bounds(torch.arange(2), thresholds, thresholds[0, 0], None)])
    assert limits.at(0.5).tolist() == [math.inf, 4.0]
    assert limits.at(math.nan).isinf().all()
    off = torch.tensor([0.0, math.nan], dtype=torch.float64)
    assert limits.widened(off).at(0.5).isinf().all()


def test_surrogates_take_part_in_labels_alone():
    """Radii are those of the residuals."""
    x, rest = normal(40, 2), normal(40, 3, seed=1) / 10
    _, process = regressed(x, 30)
    classes = torch.nn.functional.one_hot(torch.arange(40) % 3, 3).double()
    args = torch.arange(30, 40), rest[:30], process.weights @ rest[:30], process, 1.0
    without = bounds_of(*args, args[1:3])
    found = bounds_of(*args, (args[1] + classes[:30], args[2] + classes[30:]))
    assert torch.equal(found.thresholds, without.thresholds)
    assert found.p_values.tolist() == [1 / 31] * 10
    assert without.p_values.max() > 0.5


@pytest.mark.parametrize("trust", [0.0, 0.6, 1.0])
def test_bounds_of_many_outputs_are_those_of_few(trust):
    """Outputs that are all 0 change neither a norm nor, if others are larger, a label."""
    x, y = normal(60, 2), normal(60, 3, seed=1)
    _, process = regressed(x, 40)
    y = (y[:40], torch.lerp(y[:40].mean(0), process.weights @ y[:40], trust))
    zeros = [torch.zeros(len(z), 9000, dtype=z.dtype) for z in y]
    more = [torch.cat(pair, 1) for pair in zip(y, zeros, strict=True)]
    regression = (process, trust) if trust else (None, 0.0)
    few = bounds_of(torch.arange(40, 60), *y, *regression, (y[0] + 9, y[1] + 9))
    scores = [torch.cat([z + 9, zero], 1) for z, zero in zip(y, zeros, strict=True)]
    many = bounds_of(torch.arange(40, 60), *more, *regression, scores)
    torch.testing.assert_close(many.thresholds, few.thresholds)
    assert few.p_values.unique().numel() > 1 or not trust  # else all answers are the mean
    torch.testing.assert_close(many.p_values, few.p_values)
    images = [torch.zeros(len(z), 40_000) for z in y]  # too many to be classes
    assert bounds_of(torch.arange(40, 60), *images, labels=images).p_values is None


def test_bounds_of_more_outputs_than_are_sampled_and_fewer_than_results():
    x = normal(240, 3)
    y, received = (x @ normal(3, 150, seed=1)).sin(), [i for i in range(240) if i % 6]
    radii = []
    for results in (y[received, None], y[received, None].float()):
        plan = Regression().plan([x])
        answers = plan.decode(results, received)
        radii.append(plan.error_bounds(answers).at(0.9))
    assert radii[0].isfinite().all()
    torch.testing.assert_close(radii[1], radii[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("columns", [1, 200])
def test_bounds_around_a_mean_need_no_matrix_of_all_results(columns, tmp_path):
    code = f"""
import resource, torch
from coded_torch.input_space._error_bounds import bounds_of
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bounds_of(torch.arange(400), torch.randn(400, {columns}), torch.zeros(400, {columns}))
before = peak()
bounds_of(torch.arange(8000), torch.randn(8000, {columns}), torch.zeros(8000, {columns}))
print(peak() - before)
"""
    (script := tmp_path / "script.py").write_text(code)
    grown = subprocess.run([sys.executable, script], capture_output=True, check=True, text=True)
    assert int(grown.stdout) < 200_000  # KiB; the matrix has 500,000
