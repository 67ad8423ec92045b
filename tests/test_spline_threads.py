"""The text that NVRTC gets, run by threads of the host under ThreadSanitizer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .cuda_as_cpp import build_threads

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RACE = 66


def run_grids(library, grids):
    """Return the exit status and the output of some of tests/test_spline_grid.py, on threads."""
    name = subprocess.check_output(["c++", "-print-file-name=libtsan.so"], text=True, timeout=60)
    # What is not compiled for it, such as torch, it does not understand.
    sanitizer = f"halt_on_error=1 exitcode={RACE} ignore_noninstrumented_modules=1"
    variables = {
        "LD_PRELOAD": name.strip(),
        "TSAN_OPTIONS": sanitizer,
        "CODED_TORCH_GRID_THREADS": str(library),
        "OMP_NUM_THREADS": "1",
    }
    tests = ["tests/test_spline_grid.py", "-k", grids, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", *tests],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


# An architecture; the grids, but those of 20 GB of address space, whose shadow would be larger;
# and how many were there when this was written, as none would be no success. Before sm_80,
# bfloat16 is rounded without an instruction.
@pytest.mark.parametrize(
    ("capability", "grids", "fewest"),
    [(900, "threads and not beyond_2_to", 330), (750, "threads and bfloat16", 70)],
)
def test_no_two_threads_race(tmp_path, capability, grids, fewest):
    status, output = run_grids(build_threads(tmp_path, capability), grids)
    assert status == 0, output
    assert "ThreadSanitizer" not in output
    assert int(re.search(r"(\d+) passed", output)[1]) >= fewest, output


# A line of the text, what takes its place, and what is said of it.
FAULTS = {
    "no barrier": ("  barrier();", "", "ThreadSanitizer: data race .*(load_matrix|dense_pack)"),
    "a thread leaves before the barrier": (
        "  barrier();",
        "  if (thread == 0) return; else barrier();",
        "threads miss a barrier",
    ),
    "two blocks sweep the same columns": (
        "  const int64_t first = block * grid.threads + thread;",
        "  const int64_t first = block / 2 * grid.threads + thread;",
        "ThreadSanitizer: data race .*spline_column",
    ),
    "half of the rows": (
        "for (int k = 0; k < rows_in; ++k, matrix += stride)",
        "for (int k = 0; k < rows_in / 2; ++k, matrix += stride)",
        "AssertionError",
    ),
}


@pytest.mark.parametrize(("line", "instead", "found"), FAULTS.values(), ids=FAULTS)
def test_what_is_planted_is_found(tmp_path, line, instead, found):
    def change(text):
        assert text.count(line) == 1
        return text.replace(line, instead)

    library = build_threads(tmp_path, 900, change)
    status, output = run_grids(library, "whole_grid and threads-17-129-torch.float32-False")
    assert status == (RACE if "race" in found else 1), output
    assert re.search(found, output, re.S), output
