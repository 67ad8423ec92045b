"""What is divided, what is shared, and what is refused."""

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper
from coded_torch.codes import BerrutCode, LagrangeCode, ReplicationCode, SplineCode
from coded_torch.stragglers import Uniform
from coded_torch.testing.workers import PolynomialCode
from coded_torch.workers import LocalWorkers

from .modules import WAYS, Call, divided, rand

CODES = [PolynomialCode, SplineCode, BerrutCode, LagrangeCode, ReplicationCode]


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_vmap_hides_is_refused_by_name(way):
    coded = CodedWrapper(nn.Tanh(), workers=LocalWorkers(), **divided(way, 2, 4))
    with pytest.raises(ValueError, match=r"args\[0\] must not be under torch\.func\.vmap"):
        torch.vmap(coded)(rand(3, 4, 2))


X = torch.tensor([[3.0], [1.0], [4.0], [2.0]])
MASK = torch.tensor([[1], [0], [1], [0]]).bool()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lost", [0, 2])
def test_masks_are_carried_where_inputs_are_not_mixed(way, lost):
    pool = LocalWorkers(Uniform(lost, seed=0))
    module, exact = Call(lambda x, mask: x * mask), X * MASK
    coded = CodedWrapper(module, **divided(way, 4, 8), workers=pool)
    answers = coded(X, MASK)
    own = ~coded.last_run.estimated
    assert torch.equal(answers[own], exact[own])
    assert own.sum() >= 2
    by_name = coded(X, mask=MASK)
    own = ~coded.last_run.estimated
    assert torch.equal(by_name[own], exact[own])


@pytest.mark.parametrize("way", ["rows", "regression"])
def test_token_ids_alone(way):
    """Nothing to measure distances on: arrival, equal copies, the mean; and the report says so."""
    torch.manual_seed(0)
    module, ids = nn.EmbeddingBag(50, 3), torch.randint(0, 50, (12, 5))
    pool = LocalWorkers(Uniform(2 if way == "rows" else 3, seed=1))
    coded = CodedWrapper(module, **divided(way, 4, 6), workers=pool)
    answers, exact = coded(ids), module(ids)
    run = coded.last_run
    own = ~run.estimated
    assert torch.equal(answers[own], exact[own])
    assert 0 < own.sum() < 12
    assert "no floating-point input" in run.notes[0]
    mean = exact[own].mean(0).expand_as(answers)
    torch.testing.assert_close(answers[~own], mean[~own])


UNREADABLE = {
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "strided nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "meta": lambda x: x.to("meta"),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of prototypes
@pytest.mark.parametrize("how", [{"parts": 2}, {"code": SplineCode(2, 4)}])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_tensors_that_are_not_plain_are_refused_in_one_line(kind, how):
    coded = CodedWrapper(nn.Identity(), workers=LocalWorkers(), **how)
    x = UNREADABLE[kind](torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    must = r"^CodedWrapper: args\[0\] must be a dense, strided"
    with pytest.raises(TypeError, match=must) as info:
        coded(x)
    assert "\n" not in str(info.value)
    if kind in ("float8", "complex"):
        assert ("or more, or integers, got" in str(info.value)) == ("parts" in how)


@pytest.mark.parametrize(
    ("place", "given"),
    [
        (r"args\[1\]", lambda: ((MASK,), {})),
        (r"args\[1\]", lambda: ((MASK.numpy(),), {})),
        (r"kwargs\['mask'\]", lambda: ((), {"mask": [1, 0, 1, 0]})),
        (r"kwargs\['mask'\]", lambda: ((), {"mask": ["a", "b", None, "d"]})),
        (r"args\[1\]", lambda: ((range(4),), {})),
        (r"args\[1\]", lambda: (([[1], [2], [3], [4]],), {})),
        (r"args\[1\]", lambda: (([{"w": 1}, object(), 2, 3],), {})),
        (r"args\[1\]", lambda: (([*np.ones(4)],), {})),
        (r"args\[1\]\['a'\]\[1\]", lambda: (({"a": (None, [1, 0, 1, 0])},), {})),
    ],
)
def test_a_shared_input_that_looks_like_an_entry_for_each_row_is_refused(place, given):
    args, kwargs = given()
    coded = CodedWrapper(
        Call(lambda x, mask: x), ReplicationCode(4, 4), in_dims=(0, None)[: 1 + len(args)]
    )
    must = rf'^CodedWrapper: {place} must be a tensor .*"shared" in in_dims if .* batch size 4$'
    with pytest.raises(ValueError, match=must):
        coded(X, *args, **kwargs)


@pytest.mark.parametrize("shared", [torch.ones(4, 1), np.ones(4), [1, 0, 1, 0]])
def test_a_shared_input_of_the_batch_size_is_taken_if_in_dims_says_so(shared):
    coded = CodedWrapper(
        Call(lambda x, mask: x * torch.as_tensor(mask)),
        ReplicationCode(4, 4),
        in_dims=(0, "shared"),
    )
    x = torch.ones(4, 4, 1)
    assert torch.equal(coded(x, shared), coded.module(x, shared))
    # Of one row, the entry and the whole are the same; tuples are sizes and the like.
    coded.in_dims = (0, None)
    assert torch.equal(coded(x[:1], shared), coded.module(x[:1], shared))
    coded.in_dims = 0
    assert torch.equal(coded(x, (1, 2, 3, 4)), coded.module(x, (1, 2, 3, 4)))


@pytest.mark.parametrize("make", [code for code in CODES if code.mixes])
def test_codes_that_mix_name_the_row_that_is_not_finite(make):
    x = rand(4, 3)
    x[2, 1] = -math.inf
    coded = CodedWrapper(Call(lambda a, **b: a + b["mask"]), make(2, 4))
    with pytest.raises(ValueError, match=r"args\[0\] must be finite, .* -inf in row 2, at"):
        coded(x, mask=rand(4, 3))
    with pytest.raises(ValueError, match=r"kwargs\['mask'\] must be finite, .* nan in row 0"):
        coded(rand(4, 3), mask=x * math.nan)
    shared = CodedWrapper(Call(lambda x, mask: x + (mask < 0)), make(2, 2), in_dims=(0, None))
    assert shared(rand(4, 3), x[2]).isfinite().all()  # all parts have it as it is


IDS, ROW = torch.arange(4), rand(4, 1)
PREFIX, HOLD = "in_dims must be a pytree prefix", "in_dims must hold integers, None or 'shared'"


@pytest.mark.parametrize(
    ("args", "in_dims", "error", "match"),
    [
        (({"x": ROW, "ids": IDS},), 0, TypeError, r"args\[0\]\['ids'\] .* as Poly.*int64.*embed"),
        ((ROW, IDS > 2), 0, TypeError, r'args\[1\] must be .* torch.bool.*"shared" in in_dims$'),
        ((ROW, [ROW[:3]]), 0, ValueError, r"size, got 4 in args\[0\], 3 in args\[1\]\[0\]"),
        ((3, np.ones(3)), 0, ValueError, "a tensor or strings to divide, got int, ndarray"),
        ((torch.tensor(1.0),), 0, ValueError, r'dimension 0, or "shared".*shape \(\)'),
        ((ROW,), None, ValueError, "a tensor or strings to divide, got Tensor"),
        *[((ROW, ROW), in_dims, ValueError, PREFIX) for in_dims in ((0,), [0, 0], {"a": 0})],
        *[((ROW,), in_dims, TypeError, HOLD) for in_dims in ("rows", 1.0, True)],
    ],
)
def test_inputs_that_cannot_be_divided(args, in_dims, error, match):
    coded = CodedWrapper(Call(lambda *args: args[0]), PolynomialCode(2, 4), in_dims=in_dims)
    with pytest.raises(error, match=f"^CodedWrapper: .*{match}"):
        coded(*args)


def test_many_columns_are_looked_at_once_each():
    columns = {f"column {number}": ROW for number in range(1500)}
    coded, since = CodedWrapper(Call(dict), workers=LocalWorkers(), parts=2), time.process_time()
    assert coded(columns).keys() == columns.keys()
    assert time.process_time() - since < 4  # 15 s, as each looked for its own name
