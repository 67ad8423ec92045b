"""One call, traced: few files of the package run in it."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

import coded_torch
from coded_torch import CodedWrapper, Waiting
from coded_torch.surrogates import Memory
from coded_torch.testing.helpers import until
from coded_torch.workers import ProcessWorkers

PACKAGE = Path(coded_torch.__file__).parent


class Slow(nn.Module):
    """Takes long for one row."""

    def forward(self, x):
        if (x[:, 0] == 99).any():
            time.sleep(1.3)
        return x.sin()


def test_a_call_with_a_late_part_runs_code_in_few_files():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    late = x.clone()
    late[-1, 0] = 99
    files = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.add(str(path.relative_to(PACKAGE)))

    with ProcessWorkers(4).start() as pool, torch.no_grad():
        waiting = Waiting(deadline=1.0)
        coded = CodedWrapper(Slow(), workers=pool, waiting=waiting, surrogate=Memory())
        for _ in range(12):  # until the latencies are known
            coded.run(x, waiting=Waiting(deadline=20.0))
        coded(late)
        until(lambda: pool._queue.num_idle == 4)
        coded.run(x, waiting=Waiting(deadline=20.0))
        sys.setprofile(note)
        try:
            _, report = coded.run(late)
        finally:
            sys.setprofile(None)
    assert report.ended == "deadline"
    assert report.hedges
    assert report.estimated.any()
    assert len(files) <= 30, sorted(files)
