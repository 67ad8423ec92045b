"""Intervals for the mean of a data set, from few rows: which rows, and what of them."""

import inspect
import os
import signal
import warnings

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Regression, Waiting
from coded_torch.codes import ReplicationCode
from coded_torch.input_space._finite_mean import Kernel
from coded_torch.surrogates import Memory
from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.workers import DeviceWorkers, LocalWorkers, ProcessWorkers

from .modules import Call, rand

X = rand(400, 3).float()
LABELS = (X[:, 0] > 0.1).long()


def curve(x):
    """Two smooth outputs."""
    return torch.stack([x[:, 0].sin() + 0.2 * x[:, 1], x[:, 2]], 1)


def wrapped(function=curve, **settings):
    return CodedWrapper(Call(function), workers=LocalWorkers(), parts=3, **settings)


def last(intervals):
    *_, found = intervals
    return found


def truth(values):
    return values.double().mean(0)


def same(one, other):
    return torch.equal(one.value, other.value) and torch.equal(one.half_width, other.half_width)


def test_intervals_get_narrower_and_are_exact_at_the_end():
    found = list(wrapped().mean(X, seed=0))
    rows = [each.rows for each in found]
    assert rows == [60, 75, 94, 118, 148, 185, 232, 290, 363, 400]
    assert all(each.total == 400 for each in found)
    assert (found[-2].half_width < found[0].half_width).all()
    torch.testing.assert_close(found[-1].value, truth(curve(X)))
    assert not found[-1].half_width.any()
    off = torch.stack([(each.value - truth(curve(X))).abs() - each.half_width for each in found])
    assert (off <= 1e-12).double().mean() >= 0.85


def test_a_row_is_computed_once_and_only_drawn_rows_are():
    seen = []

    def noted(x):
        seen.extend(x[:, 0].tolist())
        return curve(x)

    coded = wrapped(noted)
    coded(X[:4])  # the first call proves the rows of outputs by small parts
    seen.clear()
    found = last(coded.mean(X, max_rows=100, seed=3))
    assert found.rows == 100
    assert len(seen) == len({*seen}) == 100


def test_the_end_by_width_and_a_width_per_column():
    def ends(half_width):
        found = list(wrapped().mean(X, half_width=half_width, seed=0))
        assert all((each.half_width > torch.as_tensor(half_width)).any() for each in found[:-1])
        assert (found[-1].half_width <= torch.as_tensor(half_width)).all()
        return found[-1].rows

    assert ends(0.05) < 400
    assert ends([0.05, 10.0]) <= ends([0.05, 0.01])
    assert ends(1e-9) == 400


def test_seeds_draw_the_rows_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    one, same_one, other = (next(wrapped().mean(X, seed=seed)) for seed in (1, 1, 2))
    assert same(one, same_one)
    assert not torch.equal(one.value, other.value)
    two = [next(wrapped().mean(X)) for _ in range(2)]
    assert not torch.equal(two[0].value, two[1].value)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_and_pytrees_give_the_intervals_of_one_tensor():
    alone = last(wrapped().mean(X, max_rows=94, seed=0))
    batches = [X[:150], X[150:300], X[300:]]
    bound = [inspect.signature(curve).bind(batch) for batch in batches]
    for inputs in (batches, [(batch,) for batch in batches], bound, (X,)):
        assert same(last(wrapped().mean(inputs, max_rows=94, seed=0)), alone)
    nested = wrapped(lambda pair: curve(pair["x"]))
    assert same(last(nested.mean({"x": X}, max_rows=94, seed=0)), alone)
    shared = wrapped(lambda x, by: curve(x.T) * by, in_dims=(1, "shared"))
    by = torch.ones(1)
    assert same(last(shared.mean((X.T.contiguous(), by), max_rows=94, seed=0)), alone)


def test_batches_are_of_one_size_but_the_last():
    for batches in ([X[:150], X[150:151], X[151:]], [X[:150], X[150:]]):
        must = "150 rows in each batch but the last, .* got .* in batch [12]"
        with pytest.raises(ValueError, match=must):
            last(wrapped().mean(batches, seed=0))


def test_batches_are_read_when_they_are_needed():
    class Lazy:
        def __len__(self):
            return 4

        def __getitem__(self, place):
            return X[100 * place : 100 * place + 100]

    assert same(next(wrapped().mean(Lazy(), seed=0)), next(wrapped().mean(X, seed=0)))


def test_rows_that_are_looked_at_are_random_in_sorted_data():
    x = torch.linspace(0, 1, 20_000)[:, None]
    found = [next(wrapped(lambda x: x).mean(x, seed=seed)) for seed in range(4)]
    assert all(abs(float(each.value) - 0.5) < 1.5 * float(each.half_width) for each in found)
    assert all(float(each.half_width) < 0.02 for each in found)


def test_of_gets_the_numbers_of_rows_and_its_boolean_columns_are_shares():
    def right(outputs, rows):
        return (outputs[:, 0] > 0).long() == LABELS[rows]

    found = list(wrapped().mean(X, right, seed=0))
    torch.testing.assert_close(found[-1].value, truth(right(curve(X), torch.arange(400)))[None])
    rare = next(wrapped().mean(X, lambda outputs, _: outputs > 1e6, seed=0))
    assert (rare.half_width > 0.02).all()  # though no row of 60 is one
    both = next(wrapped().mean(X, lambda outputs, _: (outputs, outputs[:, 0] > 1e6), seed=0))
    assert torch.equal(both.half_width[2:], rare.half_width[:1])
    assert both.value.shape == (3,)


def ones(outputs, rows):
    """5 % of the rows, of which some draws of 60 have one or none."""
    return (rows % 20 == 0)[:, None]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 10.0), (3.0, -2.5)])
def test_a_column_of_two_values_is_a_share(low, high):
    def numbers(outputs, rows):
        return low + (high - low) * ones(outputs, rows).double()

    seen = 0
    for seed in range(6):
        found = next(wrapped().mean(X, numbers, seed=seed))
        share = next(wrapped().mean(X, ones, seed=seed))
        if found.half_width.isfinite().all():
            seen += 1
            torch.testing.assert_close(found.value, low + (high - low) * share.value)
            torch.testing.assert_close(found.half_width, abs(high - low) * share.half_width)
    assert seen >= 3


@pytest.mark.parametrize("value", [0.0, 3.0, 7])
def test_equal_numbers_say_nothing_of_others_unless_there_are_bounds(value):
    def constant(outputs, rows):
        return torch.full((len(rows), 1), value)

    found = list(wrapped().mean(X, constant, half_width=0.01, seed=0))
    assert found[-1].rows == 400  # no width is reached before
    assert all(each.half_width.isinf().all() for each in found[:-1])
    assert not found[-1].half_width.any()
    assert found[-1].value.tolist() == [value]
    first = next(wrapped().mean(X, constant, bounds=(value - 10, value + 10), seed=0))
    unseen = 1 - 0.05 ** (1 / 60)  # a share that 60 rows miss with a probability of .05
    assert float(first.value) == pytest.approx(value)
    assert float(first.half_width) == pytest.approx(10 * unseen, rel=0.2)


def test_few_rows_that_differ_from_the_commonest_value_say_too_little():
    def rare(outputs, rows):
        return torch.where(rows % 20 == 0, outputs[:, 0].exp(), 0.0)

    found = list(wrapped().mean(X, rare, seed=0))
    is_finite = [bool(each.half_width.isfinite()) for each in found]
    assert not is_finite[0]
    assert is_finite == sorted(is_finite)
    assert is_finite[-3:] == [True] * 3
    bounds = (0.0, 10.0)
    assert next(wrapped().mean(X, rare, bounds=bounds, seed=0)).half_width.isfinite()


def test_bounds_widen_the_interval_by_what_was_not_drawn():
    plain = next(wrapped().mean(X, seed=0))
    y = curve(X).double()
    near = next(wrapped().mean(X, bounds=(y.amin(0), y.amax(0)), seed=0))
    far = next(wrapped().mean(X, bounds=(-100, 100), seed=0))
    assert (near.half_width >= plain.half_width).all()
    assert (near.half_width < 4 * plain.half_width).all()
    assert (far.half_width > 3).all()
    assert ((far.value - truth(curve(X))).abs() < far.half_width).all()


@pytest.mark.parametrize("anytime", [False, True])
def test_a_rare_value_that_was_not_drawn_is_within_the_interval_of_bounds(anytime):
    y = torch.zeros(400, 1)
    y[5] = 1000.0  # its row is the first one of a look in the order of the data
    for seed in range(10):
        looks = wrapped().mean(
            X, lambda _, rows: y[rows], bounds=(0, 1000), anytime=anytime, max_rows=300, seed=seed
        )
        for found in looks:
            assert ((found.value - 2.5).abs() <= found.half_width).all()


def test_rows_are_bet_on_in_the_order_of_drawing_not_of_the_data():
    y = torch.linspace(0, 1, 400).square()[:, None].double()
    held = []
    for seed in range(20):
        looks = wrapped(lambda x: x[:, :0]).mean(
            torch.zeros(400, 1),
            lambda _, rows: y[rows],
            bounds=(0, 1),
            anytime=True,
            max_rows=200,
            seed=seed,
        )
        held += [bool((x.value - y.mean()).abs() <= x.half_width) for x in looks]
    assert sum(held) >= 0.97 * len(held)


def test_all_looks_hold_together_by_wider_intervals():
    plain, wide = (last(wrapped().mean(X, max_rows=232, seed=0, anytime=x)) for x in (False, True))
    ratios = wide.half_width / plain.half_width  # of seven looks; of normal quantiles 1.37
    assert ((ratios > 1.36) & (ratios < 1.6)).all()
    torch.testing.assert_close(wide.value, plain.value)


def test_a_surrogate_narrows_the_interval_and_a_useless_one_does_not_widen_it():
    noise = rand(400, 2, seed=8).float()

    def rough(x):  # no regression on inputs explains it
        rows = (x[:, None, :1] == X[None, :, :1]).long().argmax(1)[:, 0]
        return noise[rows]

    def nearly(x):
        return 2 * rough(x) + 0.05 * x[:, :2]

    alone = next(wrapped(rough).mean(X, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        helped = next(wrapped(rough, surrogate=nearly).mean(X, seed=0))
        useless = next(wrapped(rough, surrogate=lambda x: x[:, :2]).mean(X, seed=0))
    assert (helped.half_width < 0.2 * alone.half_width).all()
    torch.testing.assert_close(useless.half_width, alone.half_width, rtol=0.1, atol=0)


def test_a_memory_is_not_used_as_it_knows_the_computed_rows():
    memory = Memory()
    memory.observe([X], [curve(X)])
    memory.rebuild()
    coded = wrapped(surrogate=memory)
    memory.follow(coded.module)
    assert same(next(coded.mean(X, seed=0)), next(wrapped().mean(X, seed=0)))


def test_inputs_without_features_are_sampled_and_a_callable_metric_gives_features():
    table = rand(50, 3, seed=4).float()
    tokens = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(0))

    def model(tokens):
        return curve(table[tokens])

    sampled = next(wrapped(model).mean(tokens, seed=0))
    y = model(tokens).double()
    metric = Regression(metric=lambda tokens: table[tokens])
    narrow = next(wrapped(model, estimator=metric).mean(tokens, seed=0))
    assert (narrow.half_width < 0.7 * sampled.half_width).all()
    spread = y.std(0) * (1 / 60 - 1 / 400) ** 0.5
    assert ((sampled.half_width / (2 * spread) - 1).abs() < 0.3).all()


def test_rows_that_are_not_finite_resemble_no_others():
    x = X.clone()
    x[::7, 0] = torch.nan
    model = wrapped(lambda x: curve(x.nan_to_num(0.3)))
    found = list(model.mean(x, seed=0))
    assert all(each.value.isfinite().all() for each in found)
    torch.testing.assert_close(found[-1].value, truth(curve(x.nan_to_num(0.3))))
    assert all(each.half_width.isfinite().all() for each in found)


def test_many_rows_have_the_kernel_of_the_last_look_alone(monkeypatch):
    made = []

    class Counted(Kernel):
        def __init__(self, z, length):
            made.append(len(z))
            super().__init__(z, length)

    monkeypatch.setattr("coded_torch.nn._mean.Kernel", Counted)
    monkeypatch.setattr("coded_torch.nn._mean._COMPARED", 100)
    found = list(wrapped().mean(X, max_rows=148, seed=0))
    assert [made.count(each.rows) > 1 for each in found] == [True, True, True, False, False]
    assert {made.count(118), made.count(148)} == {1}
    assert (found[-1].half_width < found[-3].half_width).all()


@pytest.mark.parametrize("total", [1, 2, 3, 61])
def test_few_rows(total):
    found = list(wrapped().mean(X[:total], seed=0))
    torch.testing.assert_close(found[-1].value, truth(curve(X[:total])))
    assert found[-1].rows == total
    few = last(wrapped().mean(X, max_rows=2, seed=0))
    assert few.half_width.isfinite().all()
    assert (few.half_width > 0).all()


def test_a_row_on_which_the_module_fails_is_an_error_that_names_it():
    def failing(x):
        if (x[:, 0] == X[123, 0]).any():
            raise IndexError("row 123")
        return curve(x)

    with DeviceWorkers(["cpu"] * 2) as pool, pytest.raises(IndexError, match="row 123") as caught:
        last(CodedWrapper(Call(failing), workers=pool).mean(X, seed=0))
    assert caught.value.rows == (123,)
    assert "rows (123,)" in caught.value.__notes__[-1]


def test_nothing_is_estimated_whatever_the_policy_of_the_wrapper():
    """The first part of each call never replies, until it is hedged."""
    pool = VirtualWorkers([[("silent", 9.0)], [("ok", 1.0)], [("ok", 1.0)]])
    waiting = Waiting(deadline=0.5, on_error="estimate")
    coded = CodedWrapper(Call(curve), workers=pool, waiting=waiting)
    found = list(coded.mean(X, seed=0))
    torch.testing.assert_close(found[-1].value, truth(curve(X)))


def test_workers_may_be_killed():
    with ProcessWorkers(3).start(nn.Tanh(), X[:1], timeout=120) as pool:
        found = []
        for each in CodedWrapper(nn.Tanh(), workers=pool).mean(X, seed=0):
            found.append(each)
            if len(found) in (1, 3, 5):
                os.kill(pool.pids[0], signal.SIGKILL)
    torch.testing.assert_close(found[-1].value, truth(X.tanh()))
    assert found[-1].rows == 400


def test_the_callers_modes_hold_while_the_loop_is_open():
    looks = wrapped().mean(X.requires_grad_(), seed=0)
    try:
        found = next(looks)
        assert torch.is_grad_enabled()
        assert not found.value.requires_grad
    finally:
        X.requires_grad_(False)
    with torch.autocast("cpu"):
        cast = next(wrapped(lambda x: curve(x).float()).mean(X, seed=0))
    assert same(cast, found)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"level": 1.0}, "mean: level must be between 0 and 1, got 1.0"),
        ({"half_width": 0}, "mean: half_width must be positive, one or per column, got 0"),
        ({"half_width": [1.0, -1.0]}, "mean: half_width must be positive"),
        ({"max_rows": 1}, "mean: max_rows must be at least 2, got 1"),
        ({"seed": -1}, "mean: seed must be at least 0, got -1"),
        ({"anytime": 1}, "mean: anytime must be of type bool, got int"),
        ({"bounds": 1}, r"mean: bounds must be \(low, high\), finite and low < high"),
        ({"bounds": (1, 0)}, r"mean: bounds must be \(low, high\), finite and low < high"),
        ({"bounds": (0, float("inf"))}, r"mean: bounds must be \(low, high\), finite and"),
        ({"bounds": ("a", "b")}, "mean: bounds must be real numbers"),
        ({"of": 3}, "mean: of must be of type Callable or None, got int"),
    ],
)
def test_arguments_are_checked_before_the_first_look(given, error):
    with pytest.raises((TypeError, ValueError), match=error):
        wrapped().mean(X, **given)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"half_width": [1.0] * 3}, r"one for each of 2 columns, got \[1.0, 1.0, 1.0\]"),
        (
            {"bounds": ([0] * 3, [1] * 3)},
            "bounds must be two numbers, or two for each of 2 columns",
        ),
        (
            {"bounds": (-9, 0)},
            "mean: outputs must be between -9 and 0, got .* in row .*, col",
        ),
        (
            {"of": lambda y, _: y[:1]},
            r"mean: results of `of` .* row for each of 60, got torch.float32 \[1, 2\]",
        ),
        ({"of": lambda y, _: 1.0}, r"mean: .* one row for each of 60, got float"),
        ({"of": lambda y, _: y / 0}, r"mean: results of `of` must be finite, got others in row"),
    ],
)
def test_what_of_returns_is_checked(given, error):
    with pytest.raises(ValueError, match=error):
        next(wrapped().mean(X, seed=0, **given))


def test_bad_inputs_codes_and_surrogates():
    with pytest.raises(ValueError, match="mean: inputs must hold at least one row, got none"):
        wrapped().mean(X[:0])
    with pytest.raises(ValueError, match="inputs must hold a tensor or strings to divide, got str"):
        wrapped().mean("rows.npy")
    coded = CodedWrapper(nn.ReLU(), ReplicationCode(2, 4))
    with pytest.raises(ValueError, match="mean: code must be None, as rows are computed"):
        coded.mean(X)
    with pytest.raises(ValueError, match=r"surrogates must be 2 numbers per row, .* got 3"):
        next(wrapped(surrogate=lambda x: x).mean(X))
