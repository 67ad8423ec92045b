"""The pretended accelerator finds what it is for. tests/test_accelerator.py runs this on it."""

import pytest
import torch

from coded_torch import ops
from tests.accelerator.plugin import take_reports

from ..test_ops import make_plan
from ..waits import host_waits, sync_debug_mode

pytestmark = pytest.mark.cuda
HERE = "accelerator/own_checks.py:"


@pytest.fixture
def side():
    return torch.cuda.Stream()


def test_an_unordered_read_is_reported_with_both_lines(side):
    x = torch.ones(3, device="cuda")
    with torch.cuda.stream(side):
        x + 1
    side.synchronize()
    first, second, third = take_reports().strip().splitlines()
    assert first.startswith("aten::add (cuda:0, stream ")
    assert HERE in first
    assert second.startswith("  reads what aten::fill_ (cuda:0, stream 0, from " + HERE)
    assert third == "  writes, and does not wait for it"


@pytest.mark.parametrize("wait", ["wait_stream", "event", "synchronize", "host"])
def test_what_waits_is_ordered(side, wait):
    x = torch.ones(3, device="cuda")
    now = torch.cuda.current_stream()
    if wait == "wait_stream":
        side.wait_stream(now)
    elif wait == "event":
        side.wait_event(now.record_event())
    elif wait == "synchronize":
        now.synchronize()
    else:
        x.sum().item()
    with torch.cuda.stream(side):
        y = x + 1
    now.wait_stream(side)
    x.add_(y)
    x.record_stream(side)
    y.record_stream(now)


def test_memory_freed_under_another_stream_is_reported(side):
    x = torch.ones(3, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1
    del x
    report = take_reports()
    assert report.startswith("memory of cuda:0, stream 0 is freed while aten::add (cuda:0, stream ")
    assert HERE in report


def test_kernels_are_ordered_like_operators(side):
    coefficients, schedule, _ = make_plan(9, torch.float32)
    operands = (coefficients.cuda(), schedule.cuda())
    values = torch.randn(9, 1, 20, device="cuda")
    with torch.cuda.stream(side):
        ops.spline_apply(values, *operands)
    side.synchronize()
    report = take_reports()
    assert "reads what aten::normal_ (cuda:0, stream 0, from " + HERE in report


def test_devices_do_not_mix():
    here, there = (torch.ones(2, device=f"cuda:{i}") for i in range(2))
    for other in (there, torch.ones(2)):
        with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
            here + other
    assert (here + torch.tensor(2.0)).tolist() == [3, 3]
    assert (here + there.to("cuda:0")).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(2, device="cuda:2")
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_waits_of_the_host_are_counted_by_line():
    x = torch.ones(3, device="cuda")
    with host_waits() as lines:
        x.cpu()
        for _ in range(3):
            x.sum().item()
        x[x > 0]
        x * 2
        x.to("cpu", non_blocking=True)
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert sorted(lines.values()) == [1, 1, 3], lines
    assert all(line.startswith(HERE) for line in lines)
    wait = pytest.raises(RuntimeError, match="called a synchronizing CUDA operation")
    with sync_debug_mode("error"), wait:
        x.tolist()


def test_memory_that_was_not_written_is_no_number():
    assert torch.empty(3, device="cuda").isnan().all()
