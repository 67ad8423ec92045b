"""What is logged where the application says nothing of logging."""

import logging
import re
import subprocess
import sys
import threading
import types

import pytest

from coded_torch import Report
from coded_torch._arguments import Sparing
from coded_torch._table import Table, WorkerError


@pytest.fixture
def clock():
    return types.SimpleNamespace(now=0.0)


@pytest.fixture
def passed(clock):
    """Warns through a filter of its own; returns the texts that passed."""
    logger, texts = logging.Logger("coded_torch.test"), []
    logger.addFilter(Sparing(lambda: clock.now))
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logger.addHandler(handler)
    return logger, texts


def test_one_warning_per_cause_and_minute_says_how_many_were_held_back(clock, passed):
    logger, texts = passed
    for machine in range(3):
        logger.warning("machine %d (pid %d) died", machine, 4000 + machine)
    logger.warning("another cause: %s", "100 % of memory")
    clock.now = 59.9
    logger.warning("machine 7 (pid 1) died")
    assert texts == ["machine 0 (pid 4000) died", "another cause: 100 % of memory"]
    clock.now = 60.0
    logger.warning("machine %d (pid %d) died", 8, 2)
    assert texts[2:] == ["machine 8 (pid 2) died (3 more like it since the last one)"]
    logger.error("machine 8 failed")
    logger.error("machine 8 failed")
    assert texts[3:] == ["machine 8 failed"] * 2


def test_the_end_of_a_worker_is_logged_by_its_pool_only(caplog):
    died = WorkerError(0, 0, "was lost: process 1 was killed", "died")
    other = WorkerError(1, 1, "returned what only this test knows")
    report = Report()
    report._note_table(Table(first=[(0,), (1,)], needed=2), 2, [died, other])
    assert report.rejected == {0: died.reason, 1: other.reason}
    expected = "CodedWrapper: a result was rejected: worker 1 returned what only this test knows"
    assert caplog.messages == [expected]


def test_the_causes_that_are_remembered_are_bounded(passed):
    logger, texts = passed
    words = ["".join(chr(97 + (i >> s) % 16) for s in (0, 4, 8)) for i in range(1000)]
    for word in words:
        logger.warning("%s", word)
    assert len(texts) == 1000
    logger.warning("%s", words[-1])
    assert len(texts) == 1000
    logger.warning("%s", words[0])  # forgotten
    assert len(texts) == 1001


def test_of_many_threads_one_is_heard(passed):
    logger, texts = passed
    threads = [threading.Thread(target=logger.warning, args=("lost",)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["lost"]


SCRIPT = """
import contextlib, os, torch
from torch import nn
from coded_torch import CodedWrapper, Waiting
from coded_torch.workers import FaultyWorkers, ProcessWorkers

class Model(nn.Module):
    def forward(self, x):
        if float(x[0, 0]) < 0:
            os._exit(7)
        return x.sin()

def main():
    x = torch.linspace(0, 3, 24)[:, None]
    with ProcessWorkers(2).start() as pool, torch.no_grad():
        coded = CodedWrapper(Model(), workers=pool, waiting=Waiting(estimate_after=3.0))
        with contextlib.suppress(RuntimeError):
            coded.run(torch.cat([-torch.ones(1, 1), x]), waiting=Waiting(deadline=2.0))
        coded.workers = FaultyWorkers(pool, rates={"nan": 0.7}, seed=1)
        for _ in range(8):
            with contextlib.suppress(RuntimeError):
                coded.run(x)
    print("done")

if __name__ == "__main__":
    main()
"""


def test_python_shows_what_went_wrong_where_nothing_is_configured(tmp_path):
    """Rejected results, replaced workers, estimated answers: each once, on standard error."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert ran.stdout == "done\n", ran.stderr
    for line in (
        "a worker was lost and is replaced: process",
        r"CodedWrapper: a result was rejected: worker \d returned values that are not finite in",
        r"CodedWrapper: \d+ of 2\d answers are estimated: ",
    ):
        assert re.search(line, ran.stderr), ran.stderr
    texts = [re.sub(r"\d+", "#", line) for line in ran.stderr.splitlines()]
    assert len(texts) == len(set(texts)) <= 6, ran.stderr
