"""Everything marked cuda on a pretended accelerator: two devices whose kernels the host runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coded_torch

from .accelerator.build import build

pytestmark = pytest.mark.slow  # two minutes

ROOT = Path(__file__).parents[1]
# Its internal headers are used. `.ci/run` reads this line.
TORCH = "2.13.0"
# The tests that need a real device; accelerator/plugin.py says what for.
NOT_RUN = 3
# As many were there when this was written: that none is found is not a success.
FEWEST = 338
# On one device; 58 of the others need two.
FEWEST_OF_ONE = 280


def obstacle():
    """Why there cannot be an accelerator here; None if there can."""
    if torch.version.cuda or torch.__version__.partition("+")[0] != TORCH:
        return f"needs torch {TORCH}, built for the CPU, got {torch.__version__}"
    if shutil.which("c++") is None:
        return "c++ is not installed"
    return None


@pytest.fixture(scope="module")
def accelerator(tmp_path_factory):
    """A folder with the accelerator, built once."""
    if reason := obstacle():
        required = os.environ.get("CODED_TORCH_REQUIRE_ACCELERATOR") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("accelerator")
    build(folder)
    return folder


class Run:
    """Tests on the accelerator, with `kernels` or with operators made of `torch` alone."""

    def __init__(self, folder, operators, output, *tests, devices=2):
        options = ["-m", "cuda", "-p", "tests.accelerator.plugin", "-p", "no:cacheprovider"]
        project = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
        package = Path(coded_torch.__file__).parents[1]  # the one that is tested, wherever it is
        variables = {
            "PYTHONPATH": f"{package}{os.pathsep}{ROOT}",
            "CODED_TORCH_ACCELERATOR": str(folder),
            "CODED_TORCH_ACCELERATOR_DEVICES": str(devices),
            "CODED_TORCH_CUDA": "1" if operators == "kernels" else "0",
            "XDG_CACHE_HOME": str(folder),
        }
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *project, *map(str, tests)],
                cwd=folder,
                env=os.environ | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def end(self):
        """Return the exit status and what was printed."""
        return self.process.wait(timeout=600), self.output.read_text()


@pytest.fixture(scope="module")
def runs(accelerator):
    """Both at once, each with a core of its own: with two devices, and with one."""
    tests = [ROOT / "tests", ROOT / "tests" / "accelerator" / "own_checks.py"]
    runs = {
        name: Run(accelerator, name, accelerator / f"{name}.txt", *tests, devices=devices)
        for name, devices in (("kernels", 2), ("torch", 1))
    }
    yield runs
    for run in runs.values():
        run.process.kill()
        run.process.wait()


@pytest.mark.parametrize("operators", ["kernels", "torch"])
def test_everything_marked_cuda(runs, operators):
    status, output = runs[operators].end()
    assert status == 0, output
    counts = re.findall(r"(\d+) (passed|skipped)", output.splitlines()[-1])
    counts = {kind: int(count) for count, kind in counts}
    lacking = r"^SKIPPED \[(\d+)\] .*(?:the extra|could not import|there is no cuda:1)"
    skipped = sum(map(int, re.findall(lacking, output, re.M)))
    assert counts["skipped"] - skipped == NOT_RUN, output
    assert counts["passed"] > (FEWEST if operators == "kernels" else FEWEST_OF_ONE), output


def test_kernels_are_tried_before_they_are_used(accelerator, tmp_path):
    """In a process of its own, in which none has been used."""
    trials = ROOT / "tests" / "accelerator" / "trials.py"
    status, output = Run(accelerator, "kernels", tmp_path / "trials.txt", trials).end()
    assert status == 0, output


def test_a_race_fails_the_run_and_names_both_lines(accelerator, tmp_path):
    racing = tmp_path / "racing.py"
    racing.write_text("""\
import pytest, torch
@pytest.mark.cuda
def test_race():
    x = torch.ones(3, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x + 1
""")
    status, output = Run(accelerator, "torch", tmp_path / "racing.txt", racing).end()
    assert status == 1
    assert "1 passed, 1 error" in output
    assert re.search(r"aten::add .* from \S*racing.py:6\)", output)
    assert re.search(r"aten::fill_ .* from \S*racing.py:4\)", output)
