"""Strings as rows of a batch, for modules that hold their tokenizer."""

import numpy as np
import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting
from coded_torch.codes import ReplicationCode, SplineCode
from coded_torch.nn import FixedBatch
from coded_torch.stragglers import Trace
from coded_torch.workers import DeviceWorkers, FaultyWorkers, LocalWorkers, ProcessWorkers

from .modules import Call

TEXTS = ["a", "bb", "ccc", "", "e" * 70, "ff", "g", "hhhh", "ü"]
LENGTHS = torch.tensor([len(text) for text in TEXTS])


class Embed(nn.Module):
    """Returns the length of each text, in two numbers, and the text in upper case."""

    def forward(self, texts, scale=None):
        assert type(texts) is list
        lengths = torch.tensor([[len(text), 1.0] for text in texts])
        return lengths * (1 if scale is None else scale), [text.upper() for text in texts]


NUMBERS = nn.Sequential(Embed(), Call(lambda pair: pair[0]))
POOLS = {
    "local": LocalWorkers,
    "devices": lambda: DeviceWorkers(["cpu"] * 2),
    "processes": lambda: ProcessWorkers(2),
}


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    with POOLS[request.param]() as pool:
        yield pool


def is_right(answers, scale=1.0):
    numbers, texts = answers
    wanted = torch.stack([LENGTHS.float(), torch.ones(len(TEXTS))], 1) * scale
    return torch.equal(numbers, wanted) and texts == [text.upper() for text in TEXTS]


@pytest.mark.parametrize("column", ["list", "numpy", "objects", "pandas"])
@torch.no_grad()
def test_strings_are_rows(pool, column):
    given = {
        "list": lambda: TEXTS,
        "numpy": lambda: np.array(TEXTS),
        "objects": lambda: np.array(TEXTS, dtype=object),
        "pandas": lambda: pytest.importorskip("pandas").Series(TEXTS, index=range(9, 0, -1)),
    }[column]()
    coded = CodedWrapper(Embed(), workers=pool, parts=4)
    for _ in range(2):
        answers, report = coded.run(given)
        assert is_right(answers)
        assert not report.notes
    assert is_right(coded(texts=given))


@torch.no_grad()
def test_strings_beside_tensors_are_rows_if_in_dims_says_so(pool):
    scale = torch.arange(9.0)[:, None]
    coded = CodedWrapper(Embed(), workers=pool, parts=4, in_dims=(0, 0))
    assert is_right(coded(TEXTS, scale), scale)
    assert is_right(coded(np.array(TEXTS), scale), scale)
    coded.in_dims = (0,)
    assert is_right(coded(TEXTS, scale=scale), scale)


class Named(nn.Module):
    """Returns the name that each number has in a list for the whole batch."""

    def forward(self, x, names):
        return [names[int(i)] for i in x.flatten()]


@pytest.mark.parametrize("kind", [list, np.array, "pandas"])
@pytest.mark.parametrize("in_dims", [0, (0,)])
def test_a_list_for_the_whole_batch_is_never_divided_by_chance(kind, in_dims):
    kind = pytest.importorskip("pandas").Series if kind == "pandas" else kind
    names = kind(["a", "b", "c"])
    coded = CodedWrapper(Named(), workers=LocalWorkers(), parts=2, in_dims=in_dims)
    for rows in (3, 4, 3):
        x = torch.arange(rows) % 3
        if rows == 3:  # its length is that of the batch
            with pytest.raises(ValueError, match='"shared" in in_dims'):
                coded(x, names=names)
        else:
            assert coded(x, names=names) == [names[int(i)] for i in x]


@torch.no_grad()
def test_a_list_of_another_length_is_for_the_whole_batch():
    named = Call(lambda x, names: [names[int(i)] for i in x])
    x = torch.tensor([0, 2, 1, 0])
    coded = CodedWrapper(named, workers=LocalWorkers(), parts=2)
    assert coded(x, ["a", "b", "c"]) == [*"acba"]
    coded.in_dims = (0, "shared")
    assert coded(x, ["a", "b", "c", "d"]) == [*"acba"]


@torch.no_grad()
def test_map_codes_that_repeat_and_fixed_batches():
    wanted = NUMBERS(TEXTS)
    coded = CodedWrapper(NUMBERS, workers=LocalWorkers(), parts=3)
    found = [answers for answers, _ in coded.map([TEXTS, TEXTS[:4]])]
    assert [*map(len, found)] == [9, 4]
    assert torch.equal(found[0], wanted)
    assert torch.equal(CodedWrapper(NUMBERS, ReplicationCode(3, 6))(TEXTS), wanted)
    assert torch.equal(FixedBatch(NUMBERS, 4, out_dims=0)(TEXTS), wanted)


@torch.no_grad()
def test_missing_rows_are_estimated_by_the_mean_of_the_others():
    late = LocalWorkers(Trace([[1.0, 1.0, 9.0]]))
    waiting = Waiting(deadline=5.0, hedge_budget=0)
    coded = CodedWrapper(NUMBERS, workers=late, parts=3, waiting=waiting)
    answers, report = coded.run(TEXTS)
    assert report.estimated.sum() == 3
    arrived = NUMBERS(TEXTS)[~report.estimated]
    assert torch.equal(answers[~report.estimated], arrived)
    mean = arrived.mean(0).expand(3, 2)
    torch.testing.assert_close(answers[report.estimated], mean)


@torch.no_grad()
def test_verification_compares_rows_of_strings():
    with DeviceWorkers(["cpu"] * 3) as pool:
        wrong = FaultyWorkers(pool, attack=lambda rows, _: rows + 100, adversaries=[1])
        coded = CodedWrapper(NUMBERS, workers=wrong, verify=1.0)
        for _ in range(3):
            assert torch.equal(coded(TEXTS), NUMBERS(TEXTS))


@pytest.mark.parametrize("column", [list, np.array])
@torch.no_grad()
def test_start_proves_rows_of_strings(column, caplog):
    sizes = []
    numbers = Call(lambda texts: sizes.append(len(texts)) or NUMBERS(texts))
    with DeviceWorkers(["cpu"] * 2) as pool:
        pool.start(numbers, column(TEXTS))
        assert not caplog.text
        sizes.clear()
        coded = CodedWrapper(numbers, workers=pool, parts=2)
        assert torch.equal(coded(column(TEXTS)), NUMBERS(TEXTS))
        assert sorted(sizes) == [4, 5]  # no small parts any more
        beside = CodedWrapper(Embed(), workers=pool, in_dims=(0, 0))
        pool.start(Embed(), (column(TEXTS), torch.ones(9, 1)))
        assert is_right(beside(TEXTS, torch.ones(9, 1)))


def coded(code=None):
    return CodedWrapper(Embed(), code, workers=LocalWorkers(), parts=None if code else 2)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: coded(SplineCode(2, 4))(TEXTS), TypeError, r"args\[0\] must be .*got strings"),
        (lambda: coded()(TEXTS, TEXTS[:3]), ValueError, r"only input, .*got args\[0\] and args"),
        (lambda: coded()(TEXTS, other=TEXTS), ValueError, "only input, or have 0 or .*by position"),
        (lambda: coded().mean([TEXTS]), TypeError, "mean: inputs must be tensors, got strings"),
        (lambda: coded()(["a", 1]), ValueError, "must hold a tensor or strings to divide, got"),
    ],
)
def test_strings_that_cannot_be_divided_are_refused_in_one_line(call, error, said):
    with pytest.raises(error, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
