"""Everything marked cuda on a pretended accelerator: two devices whose kernels the host runs."""

import json
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


# `.ci/run` leaves the second to `.ci/full`.
@pytest.mark.parametrize(("operators", "devices"), [("kernels", 2), ("torch", 1)])
def test_everything_marked_cuda(accelerator, tmp_path, operators, devices):
    tests = [ROOT / "tests", ROOT / "tests" / "accelerator" / "own_checks.py"]
    run = Run(accelerator, operators, tmp_path / "run.txt", *tests, devices=devices)
    status, output = run.end()
    assert status == 0, output
    counts = re.findall(r"(\d+) (passed|skipped)", output.splitlines()[-1])
    counts = {kind: int(count) for count, kind in counts}
    lacking = r"^SKIPPED \[(\d+)\] .*(?:the extra|could not import|there is no cuda:1)"
    skipped = sum(map(int, re.findall(lacking, output, re.M)))
    assert counts.get("skipped", 0) == skipped, output
    assert counts["passed"] > (FEWEST if operators == "kernels" else FEWEST_OF_ONE), output


def test_kernels_are_tried_before_they_are_used(accelerator, tmp_path):
    """In a process of its own, in which none has been used."""
    trials = ROOT / "tests" / "accelerator" / "trials.py"
    status, output = Run(accelerator, "kernels", tmp_path / "trials.txt", trials).end()
    assert status == 0, output


class Info:
    """`coded-torch info --device cuda` on the accelerator, with a folder of tests."""

    def __init__(self, accelerator, folder, test, **variables):
        (folder / "sources" / "tests").mkdir(parents=True)
        (folder / "sources" / "pyproject.toml").write_text(
            '[tool.pytest.ini_options]\nmarkers = ["cuda: a device"]\n'
        )
        text = f"import pytest, torch\n@pytest.mark.cuda\ndef test_device():\n    {test}\n"
        (folder / "sources" / "tests" / "test_device.py").write_text(text)
        (folder / "sitecustomize.py").write_text("import tests.accelerator.plugin\n")
        package = Path(coded_torch.__file__).parents[1]
        variables |= {
            "PYTHONPATH": os.pathsep.join(map(str, (folder, package, ROOT))),
            "CODED_TORCH_ACCELERATOR": str(accelerator),
            "XDG_CACHE_HOME": str(folder),
        }
        code = "import sys; from coded_torch.cli.main import main; sys.exit(main())"
        self._card = folder / "card.json"
        options = ["--quick", "--json", str(self._card), "--tests", str(folder / "sources")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "info", "--device", "cuda", *options],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self):
        """Return the exit status, what the file holds, and the standard error."""
        _, said = self.process.communicate(timeout=600)
        return self.process.returncode, json.loads(self._card.read_text()), said


def check_environment_and_kernels(card):
    """Check what the file says of the card, and of all kernels that are right."""
    assert card["finished"]
    assert card["environment"]["card"] == "a pretended accelerator"
    assert re.fullmatch(r"\d+\.\d+", card["environment"]["nvrtc"])
    assert [kernel["number"] for kernel in card["kernels"]] == [*range(30)]
    assert all(kernel["registers"] for kernel in card["kernels"] if kernel["right"])


# Each starts 36 processes; `.ci/run` leaves this one to `.ci/full`.
def test_info_leaves_a_file_of_all_that_the_card_shows(accelerator, tmp_path):
    test = "assert torch.ones(3, device='cuda').sum().item() == 3"
    status, card, said = Info(accelerator, tmp_path, test).end()
    assert (status, card["problems"]) == (0, []), said
    check_environment_and_kernels(card)
    assert all(kernel["right"] for kernel in card["kernels"])
    assert {*card["borders"]} == {"float64", "float32", "bfloat16", "float16"}
    for border in card["borders"].values():
        assert [*border["ratios"]][:1] == ["32"]
    cells = card["times"]
    assert len(cells) == 4 * 2 * 2 * 2 * 2
    for cell in cells:
        times = [cell[name] for name in ("copy", "matmul", "kernel", "sweep", "graph", "host")]
        assert all(seconds > 0 for seconds in times)
        assert cell["right"]
        assert not cell["fallback"]
        assert all(cell["dtype"] in name for name in cell["kernels"])
    assert (card["tests"]["passed"], card["tests"]["exit"]) == (1, 0)


def test_info_fails_and_names_what_is_wrong(accelerator, tmp_path):
    faults = "product_float32=wrong,sweep_float64_transposed=killed"
    info = Info(accelerator, tmp_path, "assert False", CODED_TORCH_ACCELERATOR_FAULTS=faults)
    status, card, said = info.end()
    assert status == 1
    check_environment_and_kernels(card)
    wrong = {kernel["name"]: kernel["reason"] for kernel in card["kernels"] if not kernel["right"]}
    assert [*wrong] == ["sweep_float64_transposed", "product_float32"]
    assert wrong["sweep_float64_transposed"] == "its process was ended by signal 9"
    assert wrong["product_float32"].startswith("its results differ from torch's by ")
    # What was timed before the process of float64 ended is kept; of float32 a fallback was timed.
    kept = [cell for cell in card["times"] if cell["dtype"] == "float64"]
    assert len(kept) == 4
    assert not any(cell["fallback"] for cell in kept)
    assert any("4 of 16 cells of float64 were timed: its process" in x for x in card["problems"])
    (fallback,) = (x for x in card["problems"] if "cells timed a fallback" in x)
    assert "product_float32 on cuda:0: its results differ" in fallback
    assert card["tests"]["failures"] == ["tests/test_device.py::test_device"]
    for problem in card["problems"]:
        assert f"coded-torch info: {problem}\n" in said


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
