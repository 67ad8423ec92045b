import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coded_torch._extension import short_path
from coded_torch.input_space._ordering import Grouping
from coded_torch.testing.codes import normal as randn

# K and B together: B = 0 .. 3 K.
SIZES = st.integers(1, 9).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, 3 * k)))


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


def test_a_grouping_used_in_inference_mode_serves_derivatives_later():
    """Batches that are coded as they arrive share one."""
    x = randn(2, 3, 4)
    with torch.inference_mode():
        grouping = Grouping.arrival(5, 2)
        assert grouping.targets.shape == (2, 3)
        grouping.scatter(x)
    grouping.scatter(x.requires_grad_()).sum().backward()
    assert not grouping.targets.is_inference()
    assert x.grad.flatten(0, 1).any(1).sum() == 5


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


def test_grouping_moves():
    grouping = Grouping([2, 0, 1], 2)
    assert grouping.to(torch.device("cpu")) is grouping
    elsewhere = grouping.to(torch.device("meta"))
    assert elsewhere is grouping.to(torch.device("meta"))
    assert elsewhere.rows.device == elsewhere.targets.device == torch.device("meta")
    assert elsewhere.batch_size == 3
    assert grouping.gather(torch.empty(3, 4, device="meta")).shape == (2, 2, 4)


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


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_neighbours_on_the_path_are_near(dtype):
    distances = naive_distances(torch.tensor([[0.0], [4.0], [1.0], [3.0]])).numpy()
    assert short_path(distances.astype(dtype)).tolist() == [0, 2, 3, 1]


def test_bad_distances():
    with pytest.raises(ValueError, match="short_path"):
        short_path(np.zeros((2, 3)))
    with pytest.raises(TypeError):
        short_path(np.zeros((2, 2), dtype=np.int64))


# Distances. Small integers make ties; NaN and infinity may stand anywhere.
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


def test_ties_go_to_the_lowest_index():
    for n in (5, 40):
        assert short_path(np.ones((n, n))).tolist() == list(range(n))
        assert short_path(np.zeros((n, n), np.float32)).tolist() == list(range(n))


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
