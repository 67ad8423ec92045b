"""The tests of every code: inherit :class:`CodeTests` and implement ``make``."""

from __future__ import annotations

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from coded_torch.codes import NotEnoughResults, _base

__all__ = ["CodeTests"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_product(got, matrix, values, dim=0):
    """``got`` is ``matrix @ values`` along ``dim``, to the rounding of the dtype of ``values``.

    A dot product of n terms computed in a dtype of unit eps is off by at most n eps times the
    product of the absolute values, the matrix is rounded to that dtype first, and the result once
    more to the dtype of the values (Higham, Accuracy and Stability, section 3.1).
    """
    exact_values = values.double().movedim(dim, 0)  # [n, ...]
    expected = torch.tensordot(matrix, exact_values, dims=1)
    magnitude = torch.tensordot(matrix.abs(), exact_values.abs(), dims=1)
    eps = torch.finfo(values.dtype).eps
    acc = torch.finfo(torch.promote_types(values.dtype, torch.float32)).eps
    bound = eps * expected.abs() + 2 * (matrix.shape[1] + 2) * acc * magnitude
    assert got.dtype == values.dtype
    error = (got.double().movedim(dim, 0) - expected).abs()
    assert bool((error <= bound + torch.finfo(values.dtype).smallest_normal).all())


class CodeTests:
    """The suite. The code should have at least 20 workers, and be well conditioned."""

    def make(self):
        raise NotImplementedError("CodeTests: implement make, which returns a code")

    @pytest.fixture
    def code(self):
        return self.make()

    @pytest.fixture
    def received(self, code):
        """The smallest set that keeps the workers evenly spread, at least 60 % of them."""
        count = max(code.min_received, -(-3 * code.num_workers // 5))
        return [(2 * i + 1) * code.num_workers // (2 * count) for i in range(count)]

    # Shapes and values.

    @pytest.mark.parametrize(
        ("before", "after"),
        [((), ()), ((), (3,)), ((2,), ()), ((2, 3), (4,)), ((0,), (2,)), ((), (2, 0))],
    )
    def test_maps_along_any_dim(self, code, received, before, after):
        for dim in (len(before), -1 - len(after)):
            values = normal(*before, code.num_data, *after)
            coded = code.encode(values, dim)
            assert coded.shape == (*before, code.num_workers, *after)
            assert_is_product(coded, code.encoder.matrix(), values, dim)
            results = coded.index_select(dim, torch.tensor(received))
            answers = code.decode(results, received, dim)
            assert answers.shape == values.shape
            assert_is_product(answers, code.decoder(received).matrix(), results, dim)

    def test_constants_are_reproduced(self, code, received):
        everybody = range(code.num_workers)
        for map_ in (code.encoder, code.decoder(received), code.decoder(everybody)):
            matrix = map_.matrix()
            assert_is_product(
                torch.ones(len(matrix)).double(), matrix, torch.ones(matrix.shape[1]).double()
            )

    # The received set.

    def test_received_in_any_form(self, code, received):
        results = normal(len(received), 3)
        expected = code.decode(results, received)
        keys = dict.fromkeys(received).keys()
        for form in (keys, torch.tensor(received), np.array(received, dtype=np.int32)):
            assert torch.equal(code.decode(results, form), expected)
            assert code.decoder(form) is code.decoder(received)
        assert code.encoder is code.encoder

    def test_workers_are_given_once_and_in_order(self, code, received):
        for wrong in (received[::-1], [received[0], *received]):
            with pytest.raises(ValueError, match="received must be strictly increasing"):
                code.decode(normal(len(wrong)), wrong)

    def test_a_worker_that_does_not_exist(self, code):
        for worker, bound in ((-1, "least 0"), (code.num_workers, f"most {code.num_workers - 1}")):
            with pytest.raises(ValueError, match=f"of received must be at {bound}, got {worker}"):
                code.decoder([worker])

    def test_received_that_are_no_indices(self, code):
        for received in ([0.5], ["0"], [[0], [0, 1]], torch.ones(1), 3, torch.ones(2, 2).int()):
            with pytest.raises(TypeError, match=r"received must be (an integer|of type Iterable)"):
                code.decoder(received)

    def test_too_few_results(self, code):
        few = list(range(1, code.min_received))
        with pytest.raises(NotEnoughResults, match="missing") as caught:
            code.decode(normal(len(few), 2), few)
        assert caught.value.received == tuple(few)
        assert caught.value.required == code.min_received
        assert caught.value.missing == (0, *range(code.min_received, code.num_workers))
        code.decoder([0, *few])

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
    def test_what_is_no_real_number_is_carried_or_refused(self, code, dtype):
        values = torch.arange(code.num_data).to(dtype)
        if code.mixes:
            with pytest.raises(TypeError, match=f"values must be .* floating-point .* got {dtype}"):
                code.encode(values)
        else:
            coded = code.encode(values)
            assert coded.dtype == dtype
            assert torch.equal(coded, values[code.encoder.matrix().argmax(1)])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_exact_answers_are_results_bit_for_bit(self, code, received, dtype):
        for workers in (received, range(code.num_workers)):
            source = code.source(workers)
            exact = source >= 0
            inputs = normal(code.num_data, 33, dtype=dtype)
            results = code.encode(inputs)[list(workers)].sin()
            answers = code.decode(results, workers)
            assert torch.equal(answers[exact], inputs.sin()[exact])
            assert torch.equal(results[source[exact]], answers[exact])
            # The definition, by the dense matrices.
            decoder, encoder = code.decoder(workers).matrix(), code.encoder.matrix()[list(workers)]
            for k in range(code.num_data):
                hits = (encoder == torch.eye(code.num_data)[k]).all(1)
                rows = torch.eye(len(decoder[k]))[hits]
                assert exact[k] == any(torch.equal(decoder[k], row.double()) for row in rows)
        assert (code.source(range(code.min_received - 1)) == -1).all()

    # The object.

    def test_travels(self, code, received):
        values, results = normal(code.num_data, 3), normal(len(received), 3)
        code.encode(values), code.decode(results, received)
        for twin in (pickle.loads(pickle.dumps(code)), copy.deepcopy(code), copy.copy(code)):
            assert repr(twin) == repr(code)
            assert torch.equal(twin.encode(values), code.encode(values))
            assert torch.equal(twin.decode(results, received), code.decode(results, received))

    def test_replace(self, code, received):
        twin = code.replace()
        assert repr(twin) == repr(code)
        assert type(twin) is type(code)
        results = normal(len(received), 3)
        assert torch.equal(twin.decode(results, received), code.decode(results, received))
        with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
            code.replace(nonsense=1)
        with pytest.raises(ValueError, match=f"{type(code).__name__}: num_workers must be at most"):
            code.replace(num_workers=10**9)

    def test_candidates_are_arguments(self, code):
        for name, values in code.candidates().items():
            assert len(values) == len(set(values)) > 1
            for value in values:
                assert getattr(code.replace(**{name: value}), name) == value

    def test_repr_says_what_it_is(self, code):
        assert repr(code).startswith(f"{type(code).__name__}(")
        assert f"num_data={code.num_data}, num_workers={code.num_workers}" in repr(code)

    def test_decoders_do_not_pile_up(self, code):
        choose = random.Random(0)
        asked = set()
        for _ in range(1500):
            count = choose.randint(code.min_received, min(code.min_received + 2, code.num_workers))
            asked.add(received := (*sorted(choose.sample(range(code.num_workers), count)),))
            code.decoder(received)
        assert code._decoder.cache_info().currsize == min(len(asked), _base.CACHED_DECODERS)

    def test_shared_between_threads(self, code):
        choose = random.Random(0)
        count = max(code.min_received, code.num_workers - 3)
        sets = [sorted(choose.sample(range(code.num_workers), count)) for _ in range(300)]
        results = normal(count, 4)
        expected = [self.make().decode(results, received) for received in sets]
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda received: code.decode(results, received), sets))
        assert all(map(torch.equal, answers, expected))
