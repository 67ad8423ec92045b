"""setup.py: when it builds for CUDA."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

HOME, CUDA = "/usr/local", "13.0"


def load_setup():
    path = Path(__file__).resolve().parents[1] / "setup.py"
    spec = importlib.util.spec_from_file_location("coded_torch_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup():
    return load_setup()


def never():
    raise AssertionError("the answer does not depend on cudart")


@pytest.mark.parametrize("choice", ["", "1"])
def test_cuda_is_built_where_torch_nvcc_and_cudart_are_there(setup, choice, capsys):
    assert setup.wants_cuda(choice, HOME, CUDA, lambda: True)
    assert capsys.readouterr() == ("", "")


def test_0_builds_for_the_cpu(setup, capsys):
    assert not setup.wants_cuda("0", HOME, CUDA, never)
    assert capsys.readouterr() == ("", "")


def test_a_cpu_build_of_torch_needs_no_word(setup, capsys):
    assert not setup.wants_cuda("", HOME, None, never)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("home", "torch_cuda", "missing"),
    [
        (HOME, CUDA, "cudart, and /usr/local has none; set CUDA_HOME to the CUDA toolkit"),
        (None, CUDA, "nvcc; set CUDA_HOME to the CUDA toolkit"),
        (HOME, None, "a CUDA build of torch"),
    ],
)
def test_what_is_missing_is_said_in_one_line(setup, home, torch_cuda, missing, capsys):
    with pytest.raises(SystemExit) as stop:
        setup.wants_cuda("1", home, torch_cuda, lambda: False)
    assert str(stop.value) == f"setup.py: CODED_TORCH_CUDA=1 needs {missing}"
    assert not setup.wants_cuda("", home, torch_cuda, lambda: False)
    line = (
        f"setup.py: builds for the CPU alone: CUDA needs {missing} "
        "(CODED_TORCH_CUDA=1 insists, CODED_TORCH_CUDA=0 expects it)\n"
    )
    assert capsys.readouterr().err == (line if torch_cuda else "")


def test_other_choices_are_refused(setup):
    with pytest.raises(SystemExit, match="CODED_TORCH_CUDA must be 0 or 1, got 'yes'"):
        setup.wants_cuda("yes", HOME, CUDA, never)


def test_a_library_is_found_where_the_linker_looks(setup, tmp_path):
    source = tmp_path / "empty.c"
    source.touch()
    library = tmp_path / "libcoded_torch_probe.so"
    assert not setup.can_link("coded_torch_probe", [str(tmp_path)])
    subprocess.run(["c++", "-shared", "-o", library, source], check=True)
    assert setup.can_link("coded_torch_probe", [str(tmp_path)])
    assert not setup.can_link("coded_torch_probe", [])


def test_headers_are_named_from_the_folder_of_setup(setup):
    """The source distribution holds what it names; absolute paths break it."""
    assert "csrc/math/spline_sweep.h" in setup.HEADERS
    assert "csrc/ops/cpu/tiles.inc" in setup.HEADERS
    assert not any(Path(header).is_absolute() for header in setup.HEADERS)
