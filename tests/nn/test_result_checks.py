"""Which replies are good results."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting
from coded_torch._table import Table
from coded_torch.codes import NotEnoughResults, RegressionCode, SplineCode
from coded_torch.nn._result_checks import Checks
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory
from coded_torch.testing.helpers import CopyCode, PolynomialCode, task_of
from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.workers import LocalWorkers, Reply

from ..waits import host_waits
from .modules import WAYS, Call, Liar, divided, rand
from .pools import Separate


@pytest.mark.filterwarnings("ignore:.*parts get other answers than the batch")
@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda v: v | {"y": v["y"][:, :0]}, r"float32 \(1, 0\).*most.*float32 \(1, 1\)"),
        (lambda v: v | {"y": v["y"].double()}, "float64.*most.*float32"),
        (lambda v: v | {"y": v["y"].long()}, r"cannot be decoded: output\['y'\] .*int64"),
        (
            lambda v: v | {"y": torch.cat([v["y"]] * 2)},
            r"must have size 1, .* shape \(2, 1\)$",
        ),
        (lambda v: v | {"y": v["y"][0, 0]}, r"must have size 1.*got shape \(\)"),
        (lambda v: v | {"y": v["y"].to_sparse()}, "a dense, .* layout torch.sparse_coo"),
        (lambda v: v | {"kind": "bad"}, "bad.*most.*good"),
        (lambda v: v | {"more": None}, "more.*most"),
        (lambda v: v["y"], r"^returned float32 \(1, 1\), where most .* {'y': 'float32 .*good.*}$"),
        (lambda v: None, "returned .*None.*most"),
        (lambda v: v | {"y": v["y"] - math.inf}, r"not finite in output\['y'\]"),
        (lambda v: v | {"y": v["y"] * math.nan}, r"not finite in output\['y'\]"),
    ],
)
@pytest.mark.parametrize("at", [0.0, 2.0])
def test_a_result_unlike_most_is_missing_and_named(lie, reason, at):
    x = torch.arange(4.0).reshape(4, 1)
    coded = CodedWrapper(
        Liar({at: lie}), CopyCode(4, 4, ordering="arrival", shuffle=False), workers=Separate()
    )
    out = coded(x)
    assert out["kind"] == "good"
    assert torch.equal(out["y"], torch.where(x == at, 0.0, x))
    assert list(coded.last_run.rejected) == [int(at)]
    assert coded.last_run.missing_workers == (int(at),)
    assert re.search(reason, coded.last_run.rejected[int(at)])


@pytest.mark.filterwarnings("ignore:.* cannot be estimated")
@pytest.mark.parametrize("way", WAYS)
def test_outputs_of_any_dtype_are_carried_where_every_row_has_a_result(way):
    module = Call(lambda x: {"top": x.argmax(1), "logits": x, "pair": x[:, :2].T > 0})
    options = {"out_dims": {"top": 0, "logits": 0, "pair": 1}, "surrogate": [module, Memory()]}
    x = rand(12, 3)
    whole = CodedWrapper(module, **divided(way, 4, 6), workers=Separate(), **options)
    answers, report = whole.run(x)
    for name, wanted in module(x).items():
        assert torch.equal(answers[name], wanted)
    assert not report.estimated.any()
    assert not report.error_bounds.any()
    pool = LocalWorkers(Uniform(1, seed=0))
    lost = CodedWrapper(module, **divided(way, 4, 4), workers=pool, **options)
    why = r"output\['top'\] is torch.int64 and cannot be estimated; .*estimate=False"
    with pytest.raises(NotEnoughResults, match=why):
        lost(x)


@pytest.mark.cuda
def test_replies_that_arrive_together_are_waited_for_once():
    whole = torch.ones(4, 2, device="cuda")
    task = task_of(whole[:, None])
    inputs = SimpleNamespace(unread=[])
    of_code = {"by_rows": False, "mixes": True}
    division = SimpleNamespace(task=task, inputs=inputs, link=None, not_finite=None, **of_code)
    checks = Checks(division)
    table = checks.table = Table(first=[(n,) for n in range(4)], needed=4, judge=checks.judge)
    values = zip(map(table.ask, table.first), whole.split(1), strict=True)
    replies = [Reply(part, part.number, 0.0, 0.0, value) for part, value in values]
    with host_waits() as lines:
        table.hear(replies)
    assert table.answered.keys() == {0, 1, 2, 3}
    assert sum(lines.values()) == 1, lines


FLOATING = "must be a floating-point tensor to be decoded, got"
NO_ROWS = "must be a tensor, a list with an item per row, or a constant, got"


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        (lambda x: {"a": x, "top": x.argmax(1)}, TypeError, rf"\['top'\] {FLOATING} torch.int64"),
        (lambda x: (x, x > 0), TypeError, rf"output\[1\] {FLOATING} torch.bool; return a tensor"),
        (lambda x: x.to(torch.complex64), TypeError, f"output {FLOATING} torch.complex64"),
        (lambda x: x * math.nan, NotEnoughResults, "^worker 0 .* not finite in output; .*got 0"),
    ],
)
def test_outputs_that_no_part_can_decode(output, error, match):
    coded = CodedWrapper(Call(output), PolynomialCode(2, 4), workers=Separate())
    with pytest.raises(error, match=match):
        coded(rand(4, 3))
    assert len(coded.last_run.rejected) == 4


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (lambda x: (x, 1.5), r"output\[1\] must have one row .* got a float; .* None in out_dims"),
        (lambda x: Call(x), f"output {NO_ROWS} Call.*register"),
    ],
)
def test_outputs_of_other_types_are_refused_before_the_parts_are_asked(output, match):
    coded = CodedWrapper(Call(output), PolynomialCode(2, 4), workers=Separate())
    with pytest.raises(TypeError, match=match):
        coded(rand(4, 3))
    assert not coded.last_run.asked


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (lambda x: x.mean(), r"output must have size 4, the batch size, at dim 0, got shape \(\)"),
        (lambda x: x[1:], "output must have size 4, the batch size, at dim 0"),
    ],
)
def test_results_that_lack_rows_are_rejected_and_their_workers_named(output, match):
    """Though the module has been seen to return rows for parts of two and three."""
    module = Call(lambda x: x if len(x) < 4 else output(x))
    coded = CodedWrapper(module, PolynomialCode(2, 4), workers=Separate())
    with pytest.raises(NotEnoughResults, match=f"^worker 0 returned .* decoded: {match}"):
        coded(rand(8, 3))
    assert len(coded.last_run.rejected) == 4


def test_scrambled_results_are_missing_where_single_rows_are_right():
    scripts = [[("rows", 1.0)] * 4 + [("ok", 1.0)]] * 2
    x = rand(4, 3)
    coded = CodedWrapper(nn.Identity(), workers=VirtualWorkers(scripts), parts=2)
    answers, report = coded.run(x)
    assert torch.equal(answers, x)
    assert "output must have size" in report.rejected[0]
    never = VirtualWorkers([[("rows", 1.0)]] * 2)
    why = r"^rows 0, 1: worker 0 returned .*: output must have size .*; rows 2, 3: worker 1"
    with pytest.raises(NotEnoughResults, match=why):
        CodedWrapper(nn.Identity(), workers=never, parts=2)(x)


def test_a_sparse_output_is_refused_on_simulated_workers_too():
    coded = CodedWrapper(Call(lambda x: x.to_sparse()), workers=LocalWorkers(), parts=2)
    with pytest.raises(TypeError, match=r"^CodedWrapper: output must be a dense, strided"):
        coded(rand(4, 3))


@pytest.mark.parametrize("code", [None, SplineCode(2, 3)])
def test_a_nested_output_is_refused_in_one_line(code):
    module = Call(lambda x: torch.nested.nested_tensor([*x]))
    parts = 2 if code is None else None
    coded = CodedWrapper(module, code, workers=LocalWorkers(), parts=parts)
    with pytest.raises(TypeError, match=r"^CodedWrapper: output must be a dense, .* got a nested"):
        coded(rand(4, 3))


def test_an_output_of_no_batch_may_have_any_layout():
    module = Call(lambda x: (2 * x, torch.eye(2).to_sparse()))
    coded = CodedWrapper(module, workers=LocalWorkers(), parts=2, out_dims=(0, None))
    answers, constant = coded(rand(4, 3))
    assert answers.shape == (4, 3)
    assert constant.layout is torch.sparse_coo


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda x: (x.softmax(-1), 10 * x), r"output\[1\].*, got values of -.*sums of -.* to "),
        (lambda x: (x.softmax(-1), x.sigmoid()), r"output\[1\].*, got values of 0.*sums of "),
        (lambda x: (x.softmax(-1), x.softmax(-1)[:, 0]), r"output\[1\].*, of shape \[2\], with"),
    ],
)
def test_what_are_no_probabilities_is_refused_by_name(output, got):
    code = RegressionCode(3, 6, link="softmax")
    with pytest.raises(ValueError, match=got):
        CodedWrapper(Call(output), code, workers=Separate())(rand(6, 5))


@pytest.mark.parametrize("seconds", [(1.0, 1.1, 1.2, 1.3), (1.3, 1.2, 1.1, 1.0)])
def test_of_two_camps_of_one_size_that_of_the_part_asked_first_is_taken(seconds):
    camps = [lambda y: y, lambda y: y.repeat(1, 2)] * 2
    pool = VirtualWorkers([[act] for act in zip(camps, seconds, strict=True)])
    x, waiting = rand(4, 1), Waiting(deadline=1.35, hedge_budget=0)
    answers, report = CodedWrapper(nn.Identity(), workers=pool, waiting=waiting).run(x)
    (first,), _, (third,), *_ = [part.units for _, _, part in pool.begun]
    assert torch.equal(answers[[first, third]], x[[first, third]])
    assert report.estimated[[first, third]].tolist() == [False] * 2
    assert report.estimated.sum() == 2
    assert report.rejected.keys() == {1, 3}
    assert "returned float64 (1, 2), where as many returned float64 (1, 1)" in report.rejected[1]
