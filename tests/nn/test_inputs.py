"""What is divided, what is shared, and what is refused."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coded_torch import CodedWrapper, Waiting
from coded_torch.codes import (
    BerrutCode,
    LagrangeCode,
    RegressionCode,
    ReplicationCode,
    SplineCode,
)
from coded_torch.stragglers import Uniform
from coded_torch.testing.workers import PolynomialCode
from coded_torch.workers import DeviceWorkers, LocalWorkers

from .modules import EXACT, WAYS, Call, divided, rand

CODES = [PolynomialCode, SplineCode, BerrutCode, LagrangeCode, ReplicationCode]


@pytest.mark.parametrize("devices", [None, ["cpu"]])
@pytest.mark.parametrize("make", [code for code in CODES if code.mixes])
def test_codes_that_mix_name_the_row_that_is_not_finite(make, devices):
    x = rand(4, 3)
    x[2, 1] = -math.inf
    options = {} if devices is None else {"workers": DeviceWorkers(devices)}
    coded = CodedWrapper(Call(lambda a, **b: a + b["mask"]), make(2, 4), **options)
    with coded.workers:
        with pytest.raises(ValueError, match=r"args\[0\] must be finite, .* -inf in row 2, at"):
            coded(x, mask=rand(4, 3))
        with pytest.raises(ValueError, match=r"kwargs\['mask'\] must be finite, .* nan in row 0"):
            coded(rand(4, 3), mask=x * math.nan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_inputs_may_be_as_great_as_their_sum_is_not(dtype):
    greatest = torch.finfo(dtype).max
    x = torch.tensor([[greatest], [greatest], [-greatest], [1.0]], dtype=dtype)
    coded = CodedWrapper(nn.Identity(), ReplicationCode(2, 4, ordering="arrival"))
    assert torch.equal(coded(x), x)


def test_what_is_the_same_for_every_worker_need_not_be_finite():
    coded = CodedWrapper(
        Call(lambda x, mask: x.masked_fill(mask < 0, 0.0)), PolynomialCode(2, 4), in_dims=(0, None)
    )
    mask = torch.tensor([0.0, -math.inf, 0.0])
    torch.testing.assert_close(coded(rand(4, 3), mask), coded.module(rand(4, 3), mask), **EXACT)


def test_integer_inputs_are_named_with_the_remedy():
    coded = CodedWrapper(Call(lambda *args, **kwargs: args[0]["x"]), PolynomialCode(2, 4))
    ids = torch.arange(4)
    with pytest.raises(
        TypeError,
        match=r"args\[0\]\['ids'\] must be floating-point, as PolynomialCode.*int64.*embed",
    ):
        coded({"x": rand(4, 1), "ids": ids})
    with pytest.raises(TypeError, match=r"\['mask'\] must be .* torch.bool.*shared"):
        coded({"x": rand(4, 1)}, mask=ids > 2)
    shared = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=({"x": 0, "ids": "shared"},))
    torch.testing.assert_close(shared({"x": rand(4, 1), "ids": ids}), rand(4, 1), **EXACT)


def test_bad_inputs():
    coded = CodedWrapper(Call(lambda *args: args[0]), PolynomialCode(2, 4))
    with pytest.raises(
        ValueError, match=r"one batch size, got 4 in args\[0\], 3 in args\[1\]\[0\]"
    ):
        coded(rand(4, 1), [rand(3, 1)])
    with pytest.raises(ValueError, match=r"a tensor to be coded, got int, ndarray"):
        coded(3, np.ones(3))
    with pytest.raises(ValueError, match=r"args\[0\] must have the batch dimension 0 .*shape \(\)"):
        coded(torch.tensor(1.0))
    for in_dims in ((0,), (0, 0, 0), [0, 0], {"a": 0}):
        wrong = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=in_dims)
        with pytest.raises(ValueError, match="in_dims must be a pytree prefix"):
            wrong(rand(4, 1), rand(4, 1))
    for in_dims in ("rows", 1.0, True):
        wrong = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=in_dims)
        with pytest.raises(TypeError, match="in_dims must hold integers, None or 'shared', got"):
            wrong(rand(4, 1))
    everywhere = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=None)
    with pytest.raises(ValueError, match="got none"):
        everywhere(rand(4, 1))


# ------------------------------------------------------------------ masks, token ids, lengths


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


X = torch.tensor([[3.0], [1.0], [4.0], [2.0]])
MASK = torch.tensor([[1], [0], [1], [0]]).bool()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lost", [0, 2])
def test_masks_are_carried_where_inputs_are_not_mixed(way, lost):
    pool = LocalWorkers(Uniform(lost, seed=0))
    coded = CodedWrapper(Masked(), **divided(way, 4, 8), workers=pool)
    exact = Masked()(X, MASK)
    answers = coded(X, MASK)
    own = ~coded.last_run.predicted
    assert torch.equal(answers[own], exact[own])
    assert own.sum() >= 2
    by_name = coded(X, mask=MASK)
    own = ~coded.last_run.predicted
    assert torch.equal(by_name[own], exact[own])


@pytest.mark.parametrize("make", CODES)
@pytest.mark.parametrize("in_dims", [(0, None), None])
def test_a_mask_of_the_batchs_size_given_as_none_is_refused(make, in_dims):
    coded = CodedWrapper(Masked(), make(4, 4), in_dims=in_dims)
    if in_dims is None:
        with pytest.raises(ValueError, match="inputs must hold a tensor to be coded, got none"):
            coded(X, MASK)
        return
    with pytest.raises(
        ValueError,
        match=r"^CodedWrapper: args\[1\] must not have the batch size 4 .*say 0 if each input has "
        r'its own .*"shared" if all of it is meant for every input, got shape \(4, 1\)$',
    ):
        coded(X, MASK)


def test_the_remedies_that_the_error_names_work():
    shared = CodedWrapper(Masked(), ReplicationCode(4, 4), in_dims=(0, "shared"))
    wide = torch.arange(4.0).view(4, 1) > 1
    x = torch.ones(4, 4, 1)
    assert torch.equal(shared(x, wide), x * wide)
    # With one row, what is its own and what is shared are the same.
    assert torch.equal(
        CodedWrapper(Masked(), ReplicationCode(4, 4), in_dims=(0, None))(X[:1], MASK[:1]), X[:1]
    )
    divided = CodedWrapper(Masked(), ReplicationCode(4, 4), in_dims=(0, 0))
    assert torch.equal(divided(X, MASK), X * MASK)


@pytest.mark.parametrize("way", ["rows", "regression"])
def test_token_ids_alone(way):
    """Nothing to measure distances on: arrival, equal copies, the mean; and the report says so."""
    torch.manual_seed(0)
    module, ids = nn.EmbeddingBag(50, 3), torch.randint(0, 50, (12, 5))
    pool = LocalWorkers(Uniform(2 if way == "rows" else 3, seed=1))
    coded = CodedWrapper(module, **divided(way, 4, 6), workers=pool)
    with pytest.warns(UserWarning, match="no distances.*metric=features.* or .* a surrogate$"):
        answers, exact = coded(ids), module(ids)
    run = coded.last_run
    with warnings.catch_warnings():  # once, and not where one of the remedies is taken
        warnings.simplefilter("error")
        pool.stragglers = None
        coded(ids)
        coded.replace(surrogate=module)(ids)
        coded.replace(waiting=Waiting(predict=False))(ids)
        CodedWrapper(module, **divided(way, 4, 6, metric=lambda ids: ids.float()), workers=pool)(
            ids
        )
        CodedWrapper(module, ReplicationCode(4, 6))(ids)  # predicts by the mean in any case
    own = ~run.predicted
    assert torch.equal(answers[own], exact[own])
    assert 0 < own.sum() < 12
    assert "no floating-point input" in run.notes[0]
    mean = exact[own].mean(0).expand_as(answers)
    torch.testing.assert_close(answers[~own], mean[~own])


class Words(nn.Module):
    """A recurrent network over sequences of unequal lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gru = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1][-1]


@pytest.mark.parametrize("way", ["rows", "regression"])
def test_a_recurrent_network_with_lengths(way):
    x, lengths = rand(24, 7, 4).float(), torch.arange(24) % 7 + 1
    coded = CodedWrapper(
        Words(),
        **divided(way, 8, 12),
        workers=LocalWorkers(Uniform(2, seed=0)),
        in_dims=(0, 0),
    )
    with torch.no_grad():
        answers, exact = coded(x, lengths), coded.module(x, lengths)
    own = ~coded.last_run.predicted
    assert own.sum() >= 16
    torch.testing.assert_close(answers[own], exact[own])


@pytest.mark.parametrize("way", ["rows", "regression"])
def test_a_transformer_with_token_ids_and_attention_mask(way):
    import transformers  # seconds

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    bert = transformers.BertModel(config).eval()
    ids = torch.randint(0, 60, (20, 9))
    mask = torch.arange(9) < torch.randint(3, 10, (20, 1))
    embeds = bert.embeddings.word_embeddings(ids)

    def embedded(ids: Tensor, mask: Tensor) -> Tensor:
        return (bert.embeddings.word_embeddings(ids) * mask[..., None]).mean(1)

    pool = LocalWorkers(Uniform(2, seed=0))
    coded = CodedWrapper(bert, **divided(way, 5, 8, metric=embedded), workers=pool)
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        with torch.no_grad():
            answers = coded(**inputs, attention_mask=mask.long())
            exact = bert(**inputs, attention_mask=mask.long())
        own = ~coded.last_run.predicted
        assert own.sum() >= 12
        for name in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(answers[name][own], exact[name][own], rtol=1e-4, atol=1e-5)


def test_codes_that_mix_refuse_masks_with_the_ways_out():
    coded = CodedWrapper(Masked(), SplineCode(4, 6), in_dims=(0, 0))
    with pytest.raises(
        TypeError,
        match=r"args\[1\] must be floating-point, as SplineCode\(.*\) mixes inputs, got "
        r'torch.bool; leave the code out, .* "shared" in in_dims$',
    ):
        coded(X, MASK)


def test_vmap_over_the_wrapper_is_one_line():
    coded = CodedWrapper(Call(torch.tanh), SplineCode(2, 4))
    with pytest.raises(TypeError, match=r"^CodedWrapper: args\[0\] must not be mapped by .*vmap"):
        torch.func.vmap(coded)(rand(3, 4, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own jvp
@pytest.mark.parametrize("ordering", ["similarity", "arrival"])
@pytest.mark.parametrize("make", [SplineCode, RegressionCode, ReplicationCode, BerrutCode])
def test_functional_transforms_pass(make, ordering):
    coded, x = CodedWrapper(Call(torch.tanh), make(2, 4).replace(ordering=ordering)), rand(4, 3)
    grad = torch.func.grad(lambda v: coded(v).sum())(x)
    wanted = torch.autograd.functional.jacobian(lambda v: coded(v).sum(), x)
    torch.testing.assert_close(grad, wanted)
    _, tangent = torch.func.jvp(coded, (x,), (torch.ones_like(x),))
    assert tangent.shape == x.shape
    assert torch.func.jacrev(coded)(x).shape == (4, 3, 4, 3)


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
    with pytest.raises(
        TypeError, match=r"^CodedWrapper: args\[0\] must be a dense, strided"
    ) as info:
        coded(x)
    assert "\n" not in str(info.value)


def test_what_looks_like_a_row_an_input_but_is_no_tensor_is_refused():
    coded = CodedWrapper(Call(lambda x, mask: x * torch.as_tensor(mask)), ReplicationCode(4, 4))
    with pytest.raises(ValueError, match=r"args\[1\] must be a tensor if .*, as an array is"):
        coded(X, MASK.numpy())
    with pytest.raises(ValueError, match=r"kwargs\['mask'\] must be a tensor if .*, as a list is"):
        coded(X, mask=[1, 0, 1, 0])
    deep = Call(lambda x, options: x)
    with pytest.raises(ValueError, match=r"args\[1\]\['a'\]\[1\] must be a tensor"):
        CodedWrapper(deep, ReplicationCode(4, 4))(X, {"a": (None, [1, 0, 1, 0])})
    shared = CodedWrapper(coded.module, ReplicationCode(4, 4), in_dims=(0, "shared"))
    assert torch.equal(shared(X, np.ones(1)), X)
    assert torch.equal(shared(X.expand(4, 4), np.ones(4)), X.expand(4, 4))
    assert torch.equal(
        CodedWrapper(deep, ReplicationCode(4, 4))(X, (1, 2, 3, 4)), X
    )  # as sizes are
