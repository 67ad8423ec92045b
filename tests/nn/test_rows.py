"""Outputs are joined by rows only where parts of two sizes prove that they have rows."""

import dataclasses
import itertools
import math
import random
import re
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting, codes
from coded_torch._layout import SIZES
from coded_torch.codes import NotEnoughResults
from coded_torch.nn._division import dealt
from coded_torch.stragglers import Trace
from coded_torch.workers import DeviceWorkers, LocalWorkers

from .modules import Call

# Modules whose rows depend on each other are the subject here; one test tells that calls warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*parts get other answers than the batch")

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
SURE = Waiting(deadline=1.0, hedge_budget=0)
POOLS = [lambda: DeviceWorkers(["cpu"] * 2), LocalWorkers]
pools = pytest.mark.parametrize("make", POOLS, ids=["devices", "local"])
ROWS = r"must have one row per row of its part, at dim 0 only"


def states(x):
    """Return what an LSTM of two layers does: outputs, and states [layers, B, H]."""
    return x * 2, torch.stack([x, x + 1])


def run(make, function, *args, parts=4, **options):
    with make() as pool, torch.no_grad():
        return CodedWrapper(Call(function), workers=pool, parts=parts, **options).run(*args)


def shuffled(size, parts):
    """Return the rows of each part, by Python's generator."""
    dealer = random.Random(0)
    hands = [[row] for row in range(parts)]
    for start in range(parts, size, parts):
        rows = list(range(start, min(start + parts, size)))
        dealer.shuffle(rows)
        for hand, row in zip(hands, rows, strict=False):
            hand.append(row)
    return [*map(tuple, hands)]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 16, 64, 300])
@pytest.mark.parametrize("size", [1, 2, 9, 64, 300, 2003])
def test_rows_are_dealt_as_python_shuffles_them(size, parts):
    if parts <= size:
        hands = dealt(size, parts)
        assert hands == shuffled(size, parts)
        assert [*itertools.chain(*(hand.array.tolist() for hand in hands))] == [
            *itertools.chain(*hands)
        ]


@pytest.mark.parametrize(
    ("function", "inputs", "match"),
    [
        (states, [X], rf"output\[1\] {ROWS}.* got shapes \(2, 2, 8\) and \(2, 3, 8\) for 2 and 3"),
        (lambda x: x @ x.T, [X], rf"output {ROWS}"),
        (
            lambda x: {"y": x, "loss": x.mean()},
            [X],
            r"output\['loss'\] must .* got a scalar .* leave it out",
        ),
        (lambda x: x[1:], [X], rf"output {ROWS}"),
        (lambda x: {"y": x, "n": len(x)}, [X], r"output\['n'\] .* got 2 and 3 for 2 and 3 rows"),
        (lambda x, other: x @ other.T, [X, X], rf'output {ROWS}.*"shared" in in_dims'),
        (torch.add, [X, torch.ones(8)], 'one row, but not two or three: .*"shared" in in_dims'),
        (lambda x: [x] * (len(x) % 2 + 1), [X], "the same structure in all parts"),
    ],
)
@pytest.mark.parametrize("parts", [4, 3])
@pools
def test_outputs_that_do_not_follow_rows_are_refused_in_one_line(
    make, function, inputs, match, parts
):
    with pytest.raises(ValueError, match=match) as info:
        run(make, function, *inputs, parts=parts)
    assert "\n" not in str(info.value)


@pools
def test_a_named_batch_dimension_is_joined(make):
    found, _ = run(make, states, X, out_dims=(0, 1))
    for answers, wanted in zip(found, states(X), strict=True):
        assert torch.equal(answers, wanted)


@pools
def test_lists_and_tuples_with_an_item_per_row_are_joined_by_rows(make):
    def named(x):
        signs = tuple("+" if row[0] > 0 else "-" for row in x)
        boxes = [{"box": row[row > 0]} for row in x]
        return {"y": x, "deep": [x * 2, [signs]], "boxes": boxes}

    found, report = run(make, named, X)
    wanted = named(X)
    assert torch.equal(found["y"], X)
    assert torch.equal(found["deep"][0], 2 * X)
    assert found["deep"][1] == wanted["deep"][1]
    for answers, box in zip(found["boxes"], wanted["boxes"], strict=True):
        assert torch.equal(answers["box"], box["box"])
    assert not report.notes


@pools
def test_a_tensor_without_rows_is_an_answer_if_all_parts_have_the_same_bits(make):
    anchors = torch.arange(8.0)
    found, _ = run(make, lambda x: (x, anchors, torch.tensor(3.0)), X)
    assert torch.equal(found[0], X)
    assert torch.equal(found[1], anchors)
    assert found[2] == 3.0


def largest(x):
    return x.amax().clamp(max=2.0)


@pools
@pytest.mark.parametrize("shared", [largest, lambda x: int(largest(x) * 100)])
def test_leaves_without_rows_are_compared_in_every_call(make, shared):
    with make() as pool, torch.no_grad():
        coded = CodedWrapper(Call(lambda x: (x, shared(x))), workers=pool, parts=2)
        coded(torch.full((8, 1), 5.0))
        with pytest.raises(NotEnoughResults, match=r"where (most|as many) returned"):
            coded(torch.linspace(0, 1, 8).view(8, 1))


@pools
def test_a_leaf_without_rows_may_change_between_calls(make):
    scale = nn.Parameter(torch.tensor(2.0))
    with make() as pool, torch.no_grad():
        coded = CodedWrapper(Call(lambda x: (x * scale, scale)), workers=pool, parts=2)
        for value in (2.0, 3.0, 3.0):
            scale.fill_(value)
            found, kept = coded(X)
            assert torch.equal(found, value * X)
            assert kept == value


@pools
def test_rows_that_pass_a_filter_are_no_tensor_that_all_parts_share(make):
    batch = torch.tensor([1.0, -1, -1, 2, 3, 4, -2]).view(7, 1)
    with pytest.raises(NotEnoughResults):  # of both small parts, the same row passes
        run(make, lambda x: x[x[:, 0] > 0], batch, parts=3)


def last_is_zero(x):
    y = x.clone()
    y[-1] = 0
    return y


@pools
@pytest.mark.parametrize("function", [lambda x: x - x.mean(0), last_is_zero])
def test_a_row_that_depends_on_others_is_marked_in_every_call(make, function):
    with make() as pool, torch.no_grad():
        coded = CodedWrapper(Call(function), workers=pool, parts=4)
        for _ in range(2):
            _, report = coded.run(X)
            (note,) = report.notes
            assert re.match("output of a row depends on the other rows of its part", note)


def test_a_worker_that_is_always_wrong_is_no_dependence_of_rows():
    wrong = []  # the first thread that computes

    def wrong_on_one_worker(x):
        thread = threading.get_ident()
        if not wrong:
            wrong.append(thread)
        return x + 1 if thread == wrong[0] else x

    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        _, report = CodedWrapper(Call(wrong_on_one_worker), workers=pool, parts=4).run(X)
    assert not any("depends on" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:.* cannot be estimated")
def test_a_list_is_neither_estimated_nor_verified_nor_decoded():
    named = Call(lambda x: (x, ["ok"] * len(x)))
    lossy = LocalWorkers(Trace([[0.0, 0.0, 0.0, math.inf]]))
    coded = CodedWrapper(named, workers=lossy, parts=4, waiting=SURE)
    with pytest.raises(NotEnoughResults, match=r"output\[1\] is a list and cannot be estimated"):
        coded(X)
    pool = LocalWorkers()
    verified = CodedWrapper(named, workers=DeviceWorkers(["cpu"] * 3), verify=0.5)
    with pytest.raises(ValueError, match="verify must be None if outputs are lists"):
        verified(X)
    verified.workers.close()
    for x in (X, X[:1]):
        with pytest.raises(TypeError, match="only calls without one join lists by rows"):
            CodedWrapper(named, codes.ReplicationCode(2, 4), workers=pool)(x)


def test_rows_that_raise_or_lie_prove_nothing_of_the_others():
    def some(x):
        if (x[:, 0] == 0).any():
            raise ValueError("bad row")
        return x

    x = torch.arange(8.0).view(8, 1)
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        coded = CodedWrapper(Call(some), workers=pool, waiting=Waiting(on_error="estimate"))
        answers, report = coded.run(x)
    assert report.module_failed_rows == (0,)
    assert torch.equal(answers[1:], x[1:])


def test_one_worker_that_raises_is_no_reason_to_doubt_the_module():
    refusing = threading.Event()

    def refuse(x):
        if refusing.is_set() and len(x) in SIZES:
            raise ValueError("refused")
        return x

    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        coded = CodedWrapper(Call(refuse), workers=pool, parts=2)
        pool.exclude(1)
        refusing.set()
        _, report = coded.run(X)
        assert any("raised on small parts: worker 0 failed" in note for note in report.notes)
        pool.restart(1)
        with pytest.raises(ValueError, match="one row, but not two or three"):
            coded(X)
        refusing.clear()
        answers, report = coded.run(X)
    assert torch.equal(answers, X)
    assert not report.notes


@pools
def test_calls_warn_once_of_rows_that_depend_on_others(make):
    with make() as pool, torch.no_grad():
        coded = CodedWrapper(Call(lambda x: x - x.mean(0)), workers=pool, parts=4)
        with pytest.warns(UserWarning, match="depends on the other rows .* than the batch"):
            coded(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            coded(X)


def trimmed(ids):
    """Return a mean of places up to the end of the longest row, as models without a mask do."""
    length = int((ids > 0).sum(1).max())
    return ids[:, :length].double().mean(1, keepdim=True)


@pools
def test_rows_that_depend_on_the_longest_row_are_noticed(make):
    ids = torch.ones(8, 6, dtype=torch.int64)
    ids[:5, 3:] = 0
    _, report = run(make, trimmed, ids)
    assert any("depends on the other rows" in note for note in report.notes)
    _, report = run(make, trimmed, ids[:4])
    assert not report.notes


@pools
def test_strings_that_depend_on_the_longest_one_are_noticed(make):
    def lengths(texts):
        return torch.tensor([[max(map(len, texts))]] * len(texts))

    texts = ["a", "be", "a", "be", "a", "see", "a", "be"]
    _, report = run(make, lengths, texts, in_dims=0)
    assert any("depends on the other rows" in note for note in report.notes)


def test_later_calls_ask_for_nothing_more():
    calls = []
    counted = nn.Sequential(Call(lambda x: calls.append(len(x)) or x))
    coded = CodedWrapper(counted, workers=LocalWorkers(), parts=4)
    coded(X)
    assert calls == [2, 3, 8]
    CodedWrapper(counted, workers=LocalWorkers(), parts=2)(X[:, :4])
    assert calls == [2, 3, 8, 8]
    coded(X.double())  # another structure of inputs
    assert calls[4:] == [2, 3, 8]


def test_a_proof_that_results_contradict_is_repeated():
    wrong = [True]
    constant = torch.arange(3.0)

    def first_without_rows(x):
        if wrong:  # the worker of the proof is wrong
            return constant
        return x

    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        coded = CodedWrapper(Call(first_without_rows), workers=pool, parts=4)
        coded(X)
        wrong.clear()
        with pytest.raises(NotEnoughResults):
            coded(X)
        answers, report = coded.run(X)
    assert torch.equal(answers, X)
    assert not report.notes


@pools
@pytest.mark.parametrize("size", [1, 2])
def test_a_call_of_one_part_is_proved_only_if_an_output_needs_it(make, size):
    sizes = []
    anchors = torch.arange(3.0)
    plain = Call(lambda x: sizes.append(len(x)) or x)
    assert torch.equal(run(make, plain, X[:size], parts=1)[0], X[:size])
    assert sizes == [size]
    module = Call(lambda x: (x, anchors, [(1.5, "box")] * len(x)))
    with make() as pool, torch.no_grad():
        for number in (size, 8):  # one row several times proves nothing of others
            coded = CodedWrapper(module, workers=pool, parts=1 if number == size else 4)
            answers, report = coded.run(X[:number])
            assert torch.equal(answers[0], X[:number])
            assert torch.equal(answers[1], anchors)
            assert answers[2] == [(1.5, "box")] * number
            assert not report.notes


def test_a_small_dependence_on_other_rows_is_marked_in_single_precision():
    module = nn.Sequential(nn.Linear(8, 8), Call(lambda y: y + 0.02 * y.mean(0)))
    _, report = CodedWrapper(module, workers=LocalWorkers(), parts=4).run(X)
    assert "depends on the other rows of its part" in report.notes[0]
    _, report = CodedWrapper(module[0], workers=LocalWorkers(), parts=4).run(X)
    assert not report.notes


def test_a_dependence_that_start_warns_of_is_noted_by_each_call():
    # Both parts of the proof hold the largest row.
    largest = Call(lambda x: torch.where(x >= x.max(), 1.0, 0.0))
    example = torch.tensor([[1.0], [2.0]])
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        with pytest.warns(UserWarning, match="depends on the other rows of its batch"):
            pool.start(largest, example)
        _, report = CodedWrapper(largest, workers=pool, parts=4).run(X)
    assert "depends on the other rows" in report.notes[0]


@dataclasses.dataclass
class Scores:
    logits: torch.Tensor
    hidden: Any = None


@dataclasses.dataclass(frozen=True)
class Nested:
    scores: Scores
    names: list[str]


@pools
def test_dataclasses_are_joined_by_their_fields(make):
    def nested(x):
        return {"a": Nested(Scores(2 * x), ["a"] * len(x)), "b": (Scores(x, x[:, 0]),)}

    found, _ = run(make, nested, X)
    assert torch.equal(found["a"].scores.logits, 2 * X)
    assert found["a"].names == ["a"] * 8
    assert found["a"].scores.hidden is None
    assert torch.equal(found["b"][0].hidden, X[:, 0])


@dataclasses.dataclass
class Computes:
    logits: torch.Tensor

    def __post_init__(self):
        self.logits = self.logits.softmax(-1)


@dataclasses.dataclass(init=False)
class MadeElsewise:
    logits: torch.Tensor

    def __init__(self, logits):
        self.logits = logits + 1


@pools
@pytest.mark.parametrize("kind", [Computes, MadeElsewise])
def test_dataclasses_that_compute_when_they_are_made_are_refused(make, kind):
    """Made again of joined fields, they would be others."""
    with pytest.raises(TypeError, match=f"got {kind.__name__}; .*register its class"):
        run(make, kind, X)


class Cache:
    """Stands for the keys and values of a language model."""


@pytest.mark.filterwarnings("ignore:.* depends on the number of rows")
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda x: {"y": x, "cache": Cache()},
            r"output\['cache'\] must .* Cache; .*use_cache",
        ),
        (states, rf"output\[1\] {ROWS}"),
        (lambda x: (x, x.mean().item()), r"output\[1\] must have one row .* got a float; return"),
    ],
)
def test_start_says_what_calls_will_refuse_and_the_remedy_works(function, said, caplog):
    module = Call(function)
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        for each in (LocalWorkers(), pool):
            caplog.clear()
            each.start(module, X)
            assert re.search(f"calls will be refused: {said}", caplog.text)
        with pytest.raises((TypeError, ValueError), match=f"^CodedWrapper: {said}") as caught:
            CodedWrapper(module, workers=pool, parts=4)(X)
        assert "decoded" not in str(caught.value)
        first = module(X[:1])
        names = first if isinstance(first, dict) else range(len(first))
        dims = [0, None]
        out_dims = dict(zip(names, dims, strict=True)) if isinstance(first, dict) else tuple(dims)
        answers = CodedWrapper(module, workers=pool, parts=4, out_dims=out_dims)(X)
    rows = answers["y"] if isinstance(answers, dict) else answers[0]
    assert torch.equal(rows, X if function is not states else 2 * X)


@pools
@pytest.mark.parametrize(
    "function",
    [
        lambda x: [row.item() for row in x[:, 0] - x[:, 0].mean()],
        lambda x: [{"rank": i} for i in range(len(x))],
        lambda x: [row - x.mean(0) for row in x],
        lambda x: [x] * len(x),
        lambda x: [str(len(x))] * len(x),
    ],
)
def test_items_of_lists_that_depend_on_other_rows_are_noted(make, function):
    _, report = run(make, function, X)
    assert report.notes[0].startswith("output of a row depends on the other rows of its part")


@pools
def test_items_of_lists_that_differ_by_rounding_are_not_noted(make):
    linear = nn.Linear(8, 8)

    def items(x):
        return [{"y": row, "sum": row.sum().item(), "name": "a"} for row in linear(x)]

    def rounded(x):
        return [{**item, "y": item["y"] * (1 + 1e-6 * len(x))} for item in items(x)]

    _, report = run(make, rounded, X)
    assert not report.notes


@pytest.mark.parametrize("name", ["first", "a"])
def test_leaves_without_rows_that_depend_on_the_size_of_parts_are_noted(name):
    whole = {"first": torch.ones(4, 3), "a": "many"}[name]
    single = {"first": torch.ones(1, 3), "a": "one"}[name]

    def function(x):
        return {"y": 2 * x, name: single if len(x) == 1 else whole}

    with DeviceWorkers(["cpu"] * 2) as pool:
        coded = CodedWrapper(Call(function), workers=pool)
        assert not coded.run(X)[1].notes
        with pytest.warns(UserWarning, match="may depend on the number of rows"):
            coded.run(X[:2])
        answers, report = coded.run(X[:2])  # warned once, noted always
        assert torch.equal(answers["y"], 2 * X[:2])
        assert report.notes[0].startswith(f"output['{name}'] is another one in small parts")
        for code in (None, codes.ReplicationCode(1, 2)):  # a part is the batch
            assert not CodedWrapper(coded.module, code, workers=pool).run(X[:1])[1].notes


@pools
def test_leaves_without_rows_that_follow_the_weights_are_not_noted(make):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.scale[0], self.scale * 1

    module = Scaled()
    with make() as pool, torch.no_grad():
        coded = CodedWrapper(module, workers=pool, parts=2)
        coded(X)
        before = module.calls
        coded(X)
        usual = module.calls - before
        module.scale += 1
        answers, report = coded.run(X)
        assert torch.equal(answers[1], module.scale)
        assert not report.notes
        before = module.calls
        assert not coded.run(X)[1].notes
        assert module.calls - before == usual


@pools
def test_leaves_that_out_dims_leaves_out_need_no_second_proof(make):
    calls = list[int]()

    def function(x):
        calls.append(len(x))
        return 2 * x, len(x)

    with make() as pool, torch.no_grad():
        coded = CodedWrapper(Call(function), workers=pool, parts=2, out_dims=(0, None))
        coded(X)
        coded(X)
        proved = len(calls)
        coded(X)
        coded(X)
    assert len(calls) - proved <= 4
    assert not {*SIZES} & {*calls[proved:]}


def test_a_late_part_of_the_proof_is_asked_of_another_worker():
    """Without a deadline, nothing else ends the wait for a worker that hangs."""
    calls = itertools.count()
    go_on = threading.Event()

    def hangs_first(x):
        if next(calls) == 0:
            assert go_on.wait(60)
        return 2 * x

    with DeviceWorkers(["cpu"] * 3) as pool, torch.no_grad():
        try:
            answers, report = CodedWrapper(Call(hangs_first), workers=pool).run(X)
        finally:
            go_on.set()
    assert torch.equal(answers, 2 * X)
    assert report.encode_seconds < 30
