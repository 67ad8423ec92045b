import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_torch._extension import short_path
from coded_torch.input_space.geometry import Geometry
from coded_torch.input_space.ordering import Grouping, order_of, similarity_order

# K and B together: B = 0 .. 3 K.
SIZES = st.integers(1, 9).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, 3 * k)))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_distances(x):
    return (x[:, None] - x).square().sum(-1).sqrt()


def length(distances, order):
    return float(distances[order[:-1], order[1:]].sum())


def greedy(distances):
    """Nearest neighbours from the most remote point, ties to the lowest index."""
    distances = np.array(distances)
    path = [int(distances.sum(1).argmax())] if len(distances) else []
    while len(path) < len(distances):
        row = distances[path[-1]].copy()
        row[path] = np.inf
        path.append(int(row.argmin()))
    return path


# Grouping


@given(SIZES, st.randoms(use_true_random=False))
def test_groups_are_consecutive_rows_of_the_order(sizes, random):
    num_data, batch_size = sizes
    order = list(range(batch_size))
    random.shuffle(order)
    grouping = Grouping(order, num_data)
    groups = [order[i : i + num_data] for i in range(0, batch_size, num_data)]
    assert grouping.num_groups == len(groups)
    assert grouping.rows.shape == grouping.targets.shape == (num_data, len(groups))
    assert grouping.rows.dtype == grouping.targets.dtype == torch.int64
    for g, group in enumerate(groups):
        lacking = num_data - len(group)
        assert grouping.rows[:, g].tolist() == group + group[-1:] * lacking
        assert grouping.targets[:, g].tolist() == group + [-1] * lacking


@given(SIZES, st.sampled_from([(), (3,), (2, 0), (2, 2)]), st.randoms(use_true_random=False))
def test_scatter_inverts_gather(sizes, shape, random):
    num_data, batch_size = sizes
    order = list(range(batch_size))
    random.shuffle(order)
    grouping = Grouping(torch.tensor(order, dtype=torch.int32), num_data)
    batch = randn(batch_size, *shape)
    groups = grouping.gather(batch)
    assert groups.shape == (num_data, grouping.num_groups, *shape)
    assert torch.equal(grouping.scatter(groups), batch)
    # What stands at copies is dropped, and nothing else.
    marked = groups.clone()
    marked[grouping.targets < 0] = math.nan
    assert torch.equal(grouping.scatter(marked), batch)
    for k, g in np.ndindex(*grouping.targets.shape):
        if grouping.targets[k, g] >= 0:
            assert torch.equal(groups[k, g], batch[grouping.targets[k, g]])


def test_gather_and_scatter_are_differentiable():
    grouping = Grouping([3, 1, 4, 0, 2], 3)
    batch = randn(5, 2).requires_grad_()
    groups = randn(3, 2, 2).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(grouping.gather, batch)
        assert check(grouping.scatter, groups)


def test_arrival():
    grouping = Grouping.arrival(5, 2)
    assert grouping.rows.tolist() == [[0, 2, 4], [1, 3, 4]]
    assert grouping.targets.tolist() == [[0, 2, 4], [1, 3, -1]]


def test_grouping_does_not_follow_its_argument():
    order = torch.tensor([1, 0])
    grouping = Grouping(order, 2)
    order[:] = 0
    assert grouping.rows.tolist() == [[1], [0]]


def test_grouping_moves_and_travels():
    grouping = Grouping([2, 0, 1], 2)
    assert grouping.to("cpu") is grouping
    elsewhere = grouping.to("meta")
    assert elsewhere is grouping.to("meta")
    assert elsewhere.rows.device == elsewhere.targets.device == torch.device("meta")
    assert elsewhere.batch_size == 3
    assert grouping.gather(torch.empty(3, 4, device="meta")).shape == (2, 2, 4)
    for twin in (pickle.loads(pickle.dumps(grouping)), copy.deepcopy(grouping)):
        assert torch.equal(twin.rows, grouping.rows)
        assert twin.to("meta").rows.device.type == "meta"


@pytest.mark.cuda
def test_a_stream_reads_its_indices_after_the_grouping_is_gone():
    batch = torch.randn(4096, 8, device="cuda")
    grouping = Grouping(torch.randperm(4096), 4)
    want = grouping.gather(batch)  # places the indices, on this stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        got = grouping.gather(batch)
    del grouping
    _others = [torch.zeros(4096, dtype=torch.int64, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.cuda
def test_grouping_on_cuda():
    grouping, batch = Grouping([2, 0, 1], 2), randn(3, 4)
    groups = grouping.gather(batch.cuda())
    assert torch.equal(groups.cpu(), grouping.gather(batch))
    assert torch.equal(grouping.scatter(groups).cpu(), batch)


@pytest.mark.parametrize(
    ("order", "num_data", "error", "message"),
    [
        ([0, 1], 0, ValueError, "num_data must be at least 1, got 0"),
        ([0, 1], 1.5, TypeError, r"num_data must be an integer, got 1\.5"),
        ([0.0, 1.0], 2, TypeError, r"order must be a sequence of integers, got torch\.float32"),
        ([True, False], 2, TypeError, r"order must be a sequence of integers, got torch\.bool"),
        ("ab", 2, TypeError, "order must be a sequence of integers, got 'ab'"),
        (None, 2, TypeError, "order must be a sequence of integers, got None"),
        ([[0, 1]], 2, ValueError, r"order must have one dimension, got shape \(1, 2\)"),
        ([0, 2, 2], 2, ValueError, r"order must hold each of 0\.\.2 once, got no 1"),
        ([0, -1], 2, ValueError, r"order must hold each of 0\.\.1 once, got no 1"),
        (torch.tensor([1, 2]), 2, ValueError, r"order must hold each of 0\.\.1 once, got no 0"),
    ],
)
def test_bad_groupings(order, num_data, error, message):
    with pytest.raises(error, match=f"Grouping: {message}"):
        Grouping(order, num_data)


def test_bad_batches():
    grouping = Grouping.arrival(5, 2)
    with pytest.raises(ValueError, match=r"batch must have size 5 along dim 0, got shape \(4, 2\)"):
        grouping.gather(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"batch must have size 5 along dim 0, got shape \(\)"):
        grouping.gather(torch.zeros(()))
    with pytest.raises(ValueError, match=r"sizes \(2, 3\) along dims 0 and 1, got shape \(3, 2\)"):
        grouping.scatter(torch.zeros(3, 2))


# Orderings


def test_order_of():
    x = torch.tensor([3.0, 0.0, 1.0])

    def never():
        raise AssertionError("distances asked for")

    assert list(order_of("arrival", [x], never)) == [0, 1, 2]
    assert list(order_of([2, 1, 0], [x], never)) == [2, 1, 0]
    assert list(order_of(torch.tensor([1, 0, 2]), [x], never)) == [1, 0, 2]
    assert list(order_of(lambda inputs: inputs[1].argsort(), [x, -x], never)) == [0, 2, 1]
    assert list(order_of("similarity", [x], lambda: (x[:, None] - x).abs())) == [0, 2, 1]


@pytest.mark.parametrize(
    ("ordering", "error", "message"),
    [
        ("similar", ValueError, "must be 'similarity', 'arrival', a permutation or a callable"),
        (3, TypeError, "must be a name, a permutation or a callable that returns one, got 3"),
        (lambda inputs: None, TypeError, "a callable that returns one, got None"),
        (lambda inputs: [0, 1], ValueError, "must order the 3 rows of the batch, got 2 entries"),
        ([0, 1, 2, 3], ValueError, "must order the 3 rows of the batch, got 4 entries"),
    ],
)
def test_bad_orderings(ordering, error, message):
    with pytest.raises(error, match=message):
        order_of(ordering, [torch.zeros(3)], lambda: torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_similarity_order_takes_any_layout_and_dtype(dtype):
    distances = naive_distances(torch.tensor([[0.0], [4.0], [1.0], [3.0]])).to(dtype)
    wide = distances.repeat_interleave(2, 1)[:, ::2]
    for d in (distances, distances.T, wide, distances.clone().requires_grad_()):
        order = similarity_order(d)
        assert order.dtype == torch.int64
        assert order.tolist() == [0, 2, 3, 1]


def test_bad_distances():
    with pytest.raises(TypeError, match=r"must be a dense, .* got torch\.int64"):
        similarity_order(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"must be a dense, .* got list"):
        similarity_order([[0.0]])
    for shape in ((2, 3), (4,), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"distances must be \[B, B\], got shape"):
            similarity_order(torch.zeros(shape))
    with pytest.raises(ValueError, match="short_path"):
        short_path(np.zeros((2, 3)))
    with pytest.raises(TypeError):
        short_path(np.zeros((2, 2), dtype=np.int64))


# The path. Small integers make ties; NaN and infinity may stand anywhere.

ENTRIES = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, math.inf, math.nan])


@st.composite
def distance_matrices(draw, entries=ENTRIES):
    n = draw(st.integers(0, 12))
    numbers = draw(st.lists(entries, min_size=n * n, max_size=n * n))
    upper = np.triu(np.array(numbers, dtype=np.float64).reshape(n, n), 1)
    return np.where(np.tri(n, dtype=bool), upper.T, upper)


@given(distance_matrices(), st.sampled_from([np.float64, np.float32]))
def test_path_is_a_permutation_and_ends_with_the_unreachable(distances, dtype):
    distances = distances.astype(dtype)
    order = short_path(distances)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(distances)))
    assert np.array_equal(order, short_path(distances.copy()))
    off_diagonal = ~np.eye(len(distances), dtype=bool)
    reachable = (np.isfinite(distances) & off_diagonal).any(1)
    assert order[reachable.sum() :].tolist() == np.flatnonzero(~reachable).tolist()
    # NaN is infinity, and the diagonal is not read.
    same = np.where(np.isnan(distances) | ~off_diagonal, np.inf, distances)
    assert np.array_equal(order, short_path(same.astype(dtype)))


@given(distance_matrices(st.integers(0, 9).map(float)))
def test_path_is_no_longer_than_the_greedy_one(distances):
    order = short_path(distances)
    assert length(distances, order) <= length(distances, np.array(greedy(distances), int)) + 1e-9


@given(distance_matrices(), st.integers(0, 2**32 - 1))
def test_any_matrix_gives_a_permutation(distances, seed):
    skewed = distances * np.random.default_rng(seed).uniform(0, 2, distances.shape)
    assert sorted(short_path(skewed)) == list(range(len(skewed)))


def test_few_points():
    assert short_path(np.zeros((0, 0))).tolist() == []
    assert short_path(np.full((1, 1), np.nan)).tolist() == [0]
    assert short_path(np.array([[0.0, 1.0], [1.0, 0.0]])).tolist() == [0, 1]
    x = np.array([1.0, 0.0, 5.0])
    assert short_path(abs(x[:, None] - x)).tolist() == [2, 0, 1]
    assert short_path(np.full((3, 3), np.nan)).tolist() == [0, 1, 2]


def test_ties_go_to_the_lowest_index():
    for n in (5, 40):
        assert short_path(np.ones((n, n))).tolist() == list(range(n))
        assert short_path(np.zeros((n, n), np.float32)).tolist() == list(range(n))


def test_nan_row_comes_last_and_changes_nothing_else():
    distances = naive_distances(randn(30, 2)).numpy()
    order = short_path(distances)
    spoilt = np.insert(np.insert(distances, 7, np.nan, axis=0), 7, np.nan, axis=1)
    got = short_path(spoilt)
    assert got[-1] == 7
    assert np.array_equal(got[:-1] - (got[:-1] > 7), order)


def test_points_on_a_line_are_put_in_order():
    x = np.random.default_rng(0).permutation(200) ** 1.5
    order = short_path(abs(x[:, None] - x))
    assert np.array_equal(np.sort(x)[:: 1 if order[0] == x.argmin() else -1], x[order])


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_path_is_close_to_the_shortest(n):
    ratios = []
    for seed in range(60):
        distances = naive_distances(randn(n, 3, seed=seed)).numpy()
        best = min(length(distances, np.array(p)) for p in itertools.permutations(range(n)))
        ratios.append(length(distances, short_path(distances)) / best)
    assert min(ratios) >= 1 - 1e-12
    assert np.mean(ratios) < 1.02


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [60, 300])
def test_local_search_shortens_the_greedy_path(n, dtype):
    for seed in range(3):
        distances = naive_distances(randn(n, 2, seed=seed)).numpy().astype(dtype)
        start = length(distances, np.array(greedy(distances)))
        assert length(distances, short_path(distances)) < 0.95 * start


def test_no_small_move_shortens_the_path():
    # With so few points that every point is everyone's neighbour, the local optimum is exact.
    distances = naive_distances(randn(10, 2)).numpy()
    order = short_path(distances)
    best = length(distances, order)
    for i, j in itertools.combinations(range(11), 2):
        flipped = np.concatenate([order[:i], order[i:j][::-1], order[j:]])
        if i > 0 and j < 10:
            assert length(distances, flipped) >= best * (1 - 1e-5)


# Geometry


def naive_gram(inputs, shrinkage):
    rows = []
    for x in inputs:
        x = x.double().reshape(len(x), -1)
        centred = x - x.mean(0)
        rows.append(centred / centred.square().sum(1).mean().sqrt())
    x = torch.cat(rows, 1)
    covariance = x.T @ x
    if shrinkage == math.inf:
        metric = covariance
    else:
        eye = torch.eye(len(covariance), dtype=torch.float64)
        system = covariance + shrinkage * covariance.trace() * eye
        metric = covariance @ torch.linalg.inv(system) if shrinkage else eye
    gram = x @ metric @ x.T
    return gram * len(gram) / gram.trace()


@pytest.mark.parametrize("shrinkage", [0, 0.003, 0.01, 0.3, 30.0, math.inf])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
@pytest.mark.parametrize("shapes", [[(7, 3)], [(2,)], [(40,)], [(1, 4, 4), (5,), ()]])
def test_geometry(shrinkage, dtype, tolerance, shapes):
    inputs = [randn(24, *s, seed=i, dtype=dtype) * 7**i + 3 * i for i, s in enumerate(shapes)]
    geometry = Geometry(inputs, shrinkage=shrinkage)
    gram = naive_gram(inputs, shrinkage)
    torch.testing.assert_close(geometry.gram, gram, atol=tolerance * 24, rtol=0)
    assert torch.equal(geometry.gram, geometry.gram.T)
    assert float(geometry.gram.diagonal().mean()) == pytest.approx(1)
    assert geometry.finite.all()
    assert geometry.batch_size == 24
    weights = torch.cat([torch.eye(24, dtype=torch.float64), torch.full((1, 24), 1 / 24)])
    squares = (weights[:, None] - weights) @ gram
    squares = (squares * (weights[:, None] - weights)).sum(-1)[:24, :24]
    got = geometry.squared_distances()
    torch.testing.assert_close(got, squares, atol=tolerance * 96, rtol=0)
    assert got is geometry.squared_distances()
    assert torch.equal(got, got.T)
    assert (got >= 0).all()
    assert (got.diagonal() == 0).all()


def test_euclidean_distances_are_the_inputs_own_up_to_scale():
    x = randn(20, 5, 5)
    got = Geometry([x], shrinkage=0).squared_distances().sqrt()
    want = naive_distances(x.flatten(1))
    torch.testing.assert_close(got / got[0, 1], want / want[0, 1])


def test_mixtures():
    x, weights = randn(12, 30), randn(5, 12, seed=1)
    weights = weights / weights.sum(1, keepdim=True)
    together = Geometry([torch.cat([x, weights @ x])], shrinkage=0)
    alone = Geometry([x], shrinkage=0).gram
    gram = weights @ alone @ weights.T
    squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    want = together.squared_distances()
    scale = alone.diagonal()[0] + alone.diagonal()[1] - 2 * alone[0, 1]
    torch.testing.assert_close(squares / scale, want[12:, 12:] / want[0, 1])


@pytest.mark.parametrize("shrinkage", [0, 0.01, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (28, 28), (3, 70, 70)])
def test_equal_rows_are_at_distance_zero(shrinkage, dtype, shape):
    x = randn(33, *shape).to(dtype) + 5
    x = x[torch.arange(66) % 33]
    got = Geometry([x], shrinkage=shrinkage).squared_distances()
    zero = torch.eye(33, dtype=torch.bool).repeat(2, 2)
    assert torch.equal(got == 0, zero)


@pytest.mark.parametrize("shrinkage", [0, 0.01, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_rows_that_are_not_finite(shrinkage, bad):
    x, y = randn(9, 6, dtype=torch.float32), randn(9, dtype=torch.float32)
    keep = torch.tensor([0, 1, 3, 4, 5, 6, 8])
    clean = Geometry([x[keep], y[keep]], shrinkage=shrinkage)
    x[2, 3], y[7] = bad, math.nan  # 1e30 is finite, its square is not
    geometry = Geometry([x, y], shrinkage=shrinkage)
    assert geometry.finite.nonzero().flatten().tolist() == keep.tolist()
    assert torch.equal(geometry.gram[keep][:, keep], clean.gram)
    assert (geometry.gram[[2, 7]] == 0).all()
    assert (geometry.gram[:, [2, 7]] == 0).all()
    squares = geometry.squared_distances()
    assert torch.equal(squares[keep][:, keep], clean.squared_distances())
    assert (squares.diagonal() == 0).all()
    assert squares[2].isinf().sum() == squares[:, 7].isinf().sum() == 8
    assert similarity_order(squares.sqrt())[-2:].tolist() == [2, 7]


@pytest.mark.parametrize("shrinkage", [0, 0.01, math.inf])
@pytest.mark.parametrize("batch_size", [0, 1, 2, 5])
@pytest.mark.parametrize("fill", [0.0, 0.1, 1e18, math.nan])
def test_batches_without_any_spread(batch_size, fill, shrinkage):
    geometry = Geometry([torch.full((batch_size, 7), fill)], shrinkage=shrinkage)
    assert torch.equal(geometry.gram, torch.zeros(batch_size, batch_size, dtype=torch.float64))
    between = ~torch.eye(batch_size, dtype=torch.bool)
    want = math.inf if math.isnan(fill) else 0
    assert (geometry.squared_distances()[between] == want).all()
    assert Geometry([torch.zeros(batch_size, 0)]).gram.shape == (batch_size, batch_size)


@given(st.sampled_from([1e-18, 1e-3, 1e3, 1e18]), st.floats(-100, 100))
@settings(deadline=None)
def test_geometry_does_not_depend_on_scale_and_offset(scale, offset):
    x = randn(8, 10)
    want = Geometry([x]).gram
    torch.testing.assert_close(Geometry([(x + offset) * scale]).gram, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shrinkage", [0, 0.01, math.inf])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_geometry_of_any_scale_that_float32_has(shrinkage, scale):
    x = randn(12, 30, dtype=torch.float32)
    got, want = Geometry([x * scale], shrinkage=shrinkage), Geometry([x], shrinkage=shrinkage)
    assert got.finite.all()
    torch.testing.assert_close(got.squared_distances(), want.squared_distances(), rtol=0, atol=2e-5)
    torch.testing.assert_close(got.distances(), want.distances(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shrinkage", [0, 0.01, math.inf])
@pytest.mark.parametrize("factor", [20.0, 255.0, 1e4, 1e8])
@pytest.mark.parametrize("features", [slice(0, 30), slice(30, 40)])
def test_a_long_row_leaves_the_others_as_they_are(shrinkage, factor, features):
    """Along the others, or in features that they do not have."""
    x = torch.nn.functional.pad(randn(40, 30, dtype=torch.float32), (0, 10))
    x[3] = 0
    x[3, features] = factor
    others = torch.arange(40) != 3
    got, want = (Geometry([rows], shrinkage=shrinkage) for rows in (x, x[others]))
    assert got.finite.all()
    assert torch.equal(got.typical, others)
    squares = got.squared_distances()
    torch.testing.assert_close(
        squares[others][:, others], want.squared_distances(), rtol=0, atol=3e-5
    )
    assert float(squares[3, others].min()) > 8**2
    torch.testing.assert_close(
        got.distances()[others][:, others], want.distances(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shrinkage", [0, 0.01])
def test_longer_rows_among_equal_ones_are_all_there_is(shrinkage):
    x = torch.ones(40, 30)
    x[7] = 100
    x[8, 3:] = 100
    squares = Geometry([x], shrinkage=shrinkage).squared_distances()
    equal = torch.ones(40, dtype=torch.bool)
    equal[7:9] = False
    assert (squares[equal][:, equal] == 0).all()
    assert (squares[~equal][:, equal] > 1).all()


@pytest.mark.parametrize("shrinkage", [0, 0.01])
@pytest.mark.parametrize("noise", [1e-3, 0.01, 0.03])
def test_distances_of_near_duplicates_are_those_of_points(shrinkage, noise):
    """They are a thousandth of the rows' lengths: their squares are a float32's rounding."""
    x = randn(5, 32).repeat(12, 1) + noise * randn(60, 32, seed=1)
    got, want = Geometry([x.float()], shrinkage=shrinkage), Geometry([x], shrinkage=shrinkage)
    assert float(torch.linalg.eigvalsh(got.gram)[0]) > -1e-12
    near = want.squared_distances() < 0.1
    ratio = (got.squared_distances() / want.squared_distances())[near & ~torch.eye(60).bool()]
    assert float((ratio - 1).abs().max()) < 1e-5 / noise


def test_landmarks_tell_the_covariance():
    low_rank = randn(700, 6, dtype=torch.float32) @ randn(6, 50, seed=1, dtype=torch.float32)
    for shrinkage in (0.01, math.inf):
        geometry = Geometry([low_rank], shrinkage=shrinkage)
        want = naive_gram([low_rank], shrinkage)
        # Another 512 rows would give another covariance, by 1 / sqrt(512) or 4 %.
        assert float((geometry.gram - want).abs().max()) < 0.05 * float(want.max())
        assert not torch.allclose(geometry.gram, want, atol=1e-3)


def test_many_features_are_added_up():
    basis = randn(8, 3 * 60 * 60, seed=1, dtype=torch.float32)
    x = randn(100, 8, dtype=torch.float32) @ basis
    got = Geometry([x], shrinkage=0)
    assert torch.equal(got.gram, Geometry([x], shrinkage=0).gram)
    want = naive_distances(x.flatten(1)).square()
    between = ~torch.eye(100, dtype=torch.bool)
    ratio = (got.squared_distances() / want)[between]
    ratio = ratio / ratio.mean()
    assert float(ratio.std()) < 2 / math.sqrt(2039)
    assert float((ratio - 1).abs().max()) > 1e-4  # they were


def test_geometry_leaves_gradients_and_autocast_alone():
    x = randn(6, 40, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        geometry = Geometry([x])
    assert not geometry.gram.requires_grad
    assert torch.equal(geometry.gram, Geometry([x.detach()]).gram)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distances_to_order_by(dtype):
    inputs = [randn(30, 4, 64, dtype=dtype) * 5 + 3, randn(30, 7, seed=1, dtype=dtype)]
    want = [naive_distances(x.flatten(1) / x.std(0).norm()).square() for x in inputs]
    got = Geometry(inputs).distances()
    assert got.dtype == dtype
    torch.testing.assert_close(got / got[0, 1], (sum(want) / sum(want)[0, 1]).sqrt().to(dtype))


def test_neighbouring_features_are_added_up_for_an_order():
    x = randn(30, 2, 257)  # of 514, three each, and one is left over
    sums = torch.nn.functional.pad(x.flatten(1), (0, 2)).view(30, 172, 3).sum(2)
    torch.testing.assert_close(Geometry([x]).distances(), Geometry([sums]).distances())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 1000])
def test_order_of_equal_rows_and_of_rows_that_are_not_finite(dtype, width):
    x = (randn(40, width) + 5).to(dtype).repeat(2, 1)
    x[[7, 60]] = math.nan
    distances = Geometry([x]).distances()
    order = similarity_order(distances)
    assert order[-2:].tolist() == [7, 60]
    assert distances[7].isinf().all()
    partner = dict(itertools.pairwise(order.tolist()))
    pairs = [i for i in range(40) if i not in (7, 20)]
    assert all(partner.get(i) == i + 40 or partner.get(i + 40) == i for i in pairs)


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_no_distances_without_spread(batch_size):
    got = Geometry([torch.full((batch_size, 300), 0.1)]).distances()
    assert torch.equal(got, torch.zeros(batch_size, batch_size))


@pytest.mark.cuda
def test_geometry_on_cuda():
    x = randn(30, 3, 60, 60, dtype=torch.float32)
    got, want = Geometry([x.cuda()]), Geometry([x])
    torch.testing.assert_close(got.gram, want.gram, atol=1e-3, rtol=0)
    torch.testing.assert_close(got.distances(), want.distances(), atol=1e-3, rtol=0)


def test_bad_geometries():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="inputs must hold at least one tensor, got none"):
        Geometry([])
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a dense, .* got torch"):
        Geometry([x, torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a dense, .* got list"):
        Geometry([[1.0]])
    with pytest.raises(ValueError, match=r"got shape \(4, 2\) beside \(3, 2\)"):
        Geometry([x, torch.zeros(4, 2)])
    with pytest.raises(ValueError, match=r"got shape \(\) beside \(\)"):
        Geometry([torch.tensor(1.0)])
    for shrinkage in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"shrinkage must be at least 0, got {shrinkage}"):
            Geometry([x], shrinkage=shrinkage)
    with pytest.raises(TypeError, match="shrinkage must be at least 0, got 'some'"):
        Geometry([x], shrinkage="some")
