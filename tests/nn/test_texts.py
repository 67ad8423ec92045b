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
def test_strings_beside_tensors(pool):
    scale = torch.arange(9.0)[:, None]
    coded = CodedWrapper(Embed(), workers=pool, parts=4, in_dims=(0, 0))
    assert is_right(coded(TEXTS, scale), scale)
    coded.in_dims = 0
    assert is_right(coded(np.array(TEXTS), scale=scale), scale)
    with pytest.raises(ValueError, match='"shared" in in_dims'):  # the length may be chance
        coded(TEXTS, scale)


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


@torch.no_grad()
def test_start_takes_strings():
    with DeviceWorkers(["cpu"] * 2) as pool:
        pool.start(Embed(), TEXTS)
        assert is_right(CodedWrapper(Embed(), workers=pool)(TEXTS))


def coded(code=None):
    return CodedWrapper(Embed(), code, workers=LocalWorkers(), parts=None if code else 2)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: coded(SplineCode(2, 4))(TEXTS), TypeError, r"args\[0\] must be .*got strings"),
        (lambda: coded()(TEXTS, texts=TEXTS[:3]), ValueError, "one batch size, got 9 in .* 3 in"),
        (lambda: coded().mean([TEXTS]), TypeError, "mean: inputs must be tensors, got strings"),
        (lambda: coded()(["a", 1]), ValueError, "must hold a tensor or strings to divide, got"),
    ],
)
def test_strings_that_cannot_be_divided_are_refused_in_one_line(call, error, said):
    with pytest.raises(error, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
