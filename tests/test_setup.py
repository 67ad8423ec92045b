"""setup.py: the library that it builds needs nothing of CUDA, and carries what a card needs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from readme_renderer import markdown
from torch.utils.cpp_extension import include_paths

from coded_torch import _extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def library():
    (path,) = Path(_extension.__file__).parent.glob("_ops.*")
    return path


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("coded_torch_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def test_a_package_index_renders_readme_with_links_that_lead_somewhere(setup):
    text = (ROOT / "README.md").read_text()
    page = markdown.render(setup.described(text, "https://example.org/owner/name", "v1"))
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "https://example.org/owner/name/raw/v1/benchmarks/results/fleet.png" in links
    assert "https://example.org/owner/name/blob/v1/CHANGELOG.md" in links
    assert "&lt;!--" not in page
    assert page.count("<table>") == len(re.findall(r"\n\|---", text))
    assert setup.described("[a](b.md)", "", "v1") == "[a](b.md)"


def test_headers_are_named_from_the_folder_of_setup(setup):
    """setup.py names sources by relative paths, as absolute ones break the source distribution."""
    assert {"csrc/math/spline_sweep.h", "csrc/ops/cpu/spline.inc"} < set(setup.HEADERS)
    assert not any(Path(header).is_absolute() for header in setup.HEADERS)


def test_pip_learns_what_the_package_is_without_importing_torch(tmp_path):
    command = [sys.executable, "-X", "importtime", "setup.py", "egg_info", "--egg-base", tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "| setuptools" in found.stderr
    assert "| torch" not in found.stderr
    (sources,) = tmp_path.glob("*/SOURCES.txt")
    assert "csrc/plan/bindings.cpp" in sources.read_text()


def test_an_old_setuptools_is_refused_in_one_line(tmp_path):
    (tmp_path / "setuptools.py").write_text('__version__ = "76.1.0"\nExtension = setup = print\n')
    command = [sys.executable, "setup.py", "egg_info"]
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("coded_torch: the build must have setuptools 77 or later, got 76.1.0;")


def refused_words(*folder):
    """Return the exit status and the lines of .ci/headers."""
    command = [sys.executable, ROOT / ".ci" / "headers", *folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_the_operators_use_what_the_lowest_torch_has():
    assert refused_words() == (0, [])


def test_a_word_that_the_headers_of_the_lowest_torch_lack_is_refused(tmp_path):
    headers = Path(include_paths("cpu")[0]) / "torch" / "csrc" / "stable"
    if not any("torch_from_blob" in path.read_text() for path in headers.rglob("*.h")):
        pytest.skip(f"torch {torch.__version__} has no word that is later than the lowest")
    code = (
        "/* torch_new_generator_handle */ STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(std::tm));"
    )
    (tmp_path / "new.cpp").write_text(code)
    status, lines = refused_words(tmp_path)
    assert status == 1
    found = [line.partition(" is in torch")[0] for line in lines]
    assert found == ["new.cpp: STABLE_TORCH_ERROR_CODE_CHECK", "new.cpp: torch_from_blob"]


def test_one_library_is_for_all_builds_of_torch(library):
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    needed = [line for line in listed.stdout.splitlines() if "NEEDED" in line]
    assert any("libtorch_cpu" in line for line in needed)
    assert not any("cuda" in line or "nvrtc" in line for line in needed)


def test_the_library_holds_the_sources_of_kernels_and_no_path_of_the_builder(library):
    code = library.read_bytes()
    headers = ("pack", "half", "spline_layout", "spline_sweep")
    names = [f"math/{name}.h" for name in headers]
    names += [
        "ops/spline_args.h",
        *(f"ops/cuda/{x}.h" for x in ("rows", "dense_block", "spline_block")),
    ]
    for name in (*names, "ops/cuda/spline.cu"):
        assert (ROOT / "csrc" / name).read_bytes() in code, name
    assert str(ROOT).encode() not in code


def test_the_package_does_not_import_the_compiler_which_takes_a_second(tmp_path):
    code = "import sys, coded_torch.cli.main; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)
    marked = torch.compiler.assume_constant_result(lambda: False)
    assert vars(marked).items() <= vars(_extension._allows_tf32).items()
