"""Marks, handled in one place."""

import asyncio
import gc
import inspect
import os
import shutil
import signal
import sys
from pathlib import Path

# Two threads that share a core with another process wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests on a card are of its kernels. From how many knots cuBLAS takes over is each card's own.
os.environ.setdefault("CODED_TORCH_CUBLAS_KNOTS", "128")

import pytest
import torch

from coded_torch import linear
from coded_torch._arguments import SPARING
from coded_torch.cli.main import main

# Ray gives its workers a niceness of 15: beside processes that compute, they starve.
os.environ.setdefault("RAY_worker_niceness", "0")
# `coded-torch info --tests` has imported the package before.
linear._KNOTS = int(os.environ["CODED_TORCH_CUBLAS_KNOTS"])
CAPABILITIES = torch.ops.coded_torch.cpu_capabilities().split()

# Worker processes import the modules of the tests from where they are.
sys.path.append(str(Path(__file__).resolve().parents[1]))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_ignore_collect(collection_path, config):
    """Read no file without a test for CUDA where only these run.

    The others import packages that a machine with a card may not have.
    """
    if config.getoption("markexpr") == "cuda" and collection_path.match("test_*.py"):
        return "pytest.mark.cuda" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = pytest.mark.skip(reason="a long run: give --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
    for mark, name, found in (
        ("cuda", "CUDA device", torch.cuda.is_available()),
        ("browser", "chromium and chromedriver", shutil.which("chromedriver")),
    ):
        if found:
            continue
        fails = os.environ.get(f"CODED_TORCH_REQUIRE_{mark.upper()}") == "1"
        missing = (
            pytest.mark.usefixtures(f"missing_{mark}")
            if fails
            else pytest.mark.skip(reason=f"no {name}")
        )
        for item in items:
            if mark in item.keywords:
                item.add_marker(missing)
    for item in items:
        if "ray" in item.keywords:  # Ray leaves files, sockets and tasks when its connection ends
            for kind in ("Resource", "pytest.PytestUnraisableException", "Deprecation", "Future"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}Warning"))


def pytest_collection_finish():
    """What was imported stays, so that nobody who collects garbage need look at it."""
    gc.collect()
    gc.freeze()


def pytest_pyfunc_call(pyfuncitem):
    """Run a test that is a coroutine in an event loop of its own."""
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test):
        pyfuncitem.obj = lambda **given: asyncio.run(test(**given))


@pytest.fixture(scope="session")
def missing_cuda():
    pytest.fail("CODED_TORCH_REQUIRE_CUDA=1, but torch sees no CUDA device")


@pytest.fixture(scope="session")
def missing_browser():
    pytest.fail("CODED_TORCH_REQUIRE_BROWSER=1, but there is no chromedriver")


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Folders that a test imports from are not the next one's."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(autouse=True)
def every_warning():
    """Warnings that an earlier test has had are logged again."""
    SPARING.forget()


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """The instruction set whose kernels all operators use in this test."""
    torch.ops.coded_torch._use_cpu_capability(request.param)
    yield request.param
    torch.ops.coded_torch._use_cpu_capability(CAPABILITIES[0])


@pytest.fixture
def refused(capsys):
    """Return a function that runs a command, and returns the one line that refuses it."""

    def run(line):
        capsys.readouterr()
        assert main(line) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"coded-torch {line[0]}: ")
        return said

    return run


@pytest.fixture
def interrupts():
    """Ctrl-C raises, as what runs in the background of a shell may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
