"""Tests that need a card run with the few packages that its machine has."""

import re
import subprocess
import sys
from pathlib import Path

from .test_accelerator import FEWEST

ROOT = Path(__file__).parents[1]


def test_everything_marked_cuda_is_collected_with_few_packages():
    options = ["-p", "tests.few_packages", "-p", "no:cacheprovider", "-q"]
    options += ["-m", "cuda", "--collect-only"]
    # The folder of the sources comes last: the package that is installed has compiled parts.
    program = f"import sys, pytest; sys.path[:1] = []; sys.path.append({str(ROOT)!r});"
    program += f" sys.exit(pytest.main({options}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (count,) = re.findall(r"^(\d+)/\d+ tests collected", done.stdout, re.M)
    assert int(count) > FEWEST
    assert "test_on_cuda.py::test_serve" in done.stdout
