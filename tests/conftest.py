"""Marks, handled in one place."""

import os
import sys
from pathlib import Path

import pytest
import torch

from coded_torch._logging import SPARING

# Worker processes import the modules of the tests from where they are.
sys.path.append(str(Path(__file__).resolve().parents[1]))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = pytest.mark.skip(reason="a long run: give --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
    if not torch.cuda.is_available():
        required = os.environ.get("CODED_TORCH_REQUIRE_CUDA") == "1"
        for item in items:
            if "cuda" in item.keywords:
                if required:
                    item.add_marker(pytest.mark.usefixtures("missing_cuda"))
                else:
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def missing_cuda():
    pytest.fail("CODED_TORCH_REQUIRE_CUDA=1, but torch sees no CUDA device")


@pytest.fixture(autouse=True)
def every_warning():
    """Warnings that an earlier test has had are logged again."""
    SPARING.forget()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
