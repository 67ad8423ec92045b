"""setup.py: what it builds for CUDA, and that what it leaves can be imported and used."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import coded_torch

ROOT = Path(__file__).resolve().parents[1]
HOME, CUDA = "/usr/local/cuda", "13.0"


def load_setup():
    spec = importlib.util.spec_from_file_location("coded_torch_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup():
    return load_setup()


@pytest.mark.parametrize(
    ("choice", "torch_cuda", "why"),
    [
        ("", CUDA, None),
        ("1", CUDA, None),
        ("0", CUDA, "CODED_TORCH_CUDA was 0"),
        ("", None, "the build lacked a CUDA build of torch"),
    ],
)
def test_nothing_is_printed_where_nothing_is_missing(setup, choice, torch_cuda, why, capsys):
    assert setup.without_cuda(choice, torch_cuda, HOME, lambda toolkit: None) == why
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("home", "torch_cuda", "missing"),
    [
        (HOME, CUDA, "an nvcc that compiles"),
        (None, CUDA, "nvcc; set CUDA_HOME to the CUDA toolkit"),
        (HOME, None, "a CUDA build of torch"),
    ],
)
def test_what_is_missing_is_said_in_one_line(setup, home, torch_cuda, missing, capsys):
    with pytest.raises(SystemExit) as stop:
        setup.without_cuda("1", torch_cuda, home, lambda toolkit: missing)
    assert str(stop.value) == f"setup.py: CODED_TORCH_CUDA=1 needs {missing}"
    assert setup.without_cuda("", torch_cuda, home, lambda toolkit: missing) == (
        f"the build lacked {missing}"
    )
    line = f"setup.py: builds for the CPU alone: CUDA needs {missing}\n"
    assert capsys.readouterr().err == (line if torch_cuda else "")


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
    assert "csrc/ops/cpu/spline.inc" in setup.HEADERS
    assert not any(Path(header).is_absolute() for header in setup.HEADERS)


# A compiler that takes no time: objects are empty, and a library is the one that was built before.
COMPILER = """\
#!/bin/sh
for output; do [ "$last" = -o ] && break; last=$output; done
case " $* " in
  *" -c "*) : >"$output" ;;
  *_ops_cuda*" -shared "*|*" -shared "*_ops_cuda*) : >"$output" ;;
  *" -shared "*) cp "{built}/$(basename "$output")" "$output" 2>/dev/null || : >"$output" ;;
  *) exec {compiler} "$@" ;;
esac
"""
# A toolkit that knows all generations but the last, and writes down what it compiles.
NVCC = """\
#!/bin/sh
case " $* " in
  *" --version "*) echo "Cuda compilation tools, release {release}, V{release}.0" ;;
  *" --list-gpu-code "*) printf 'sm_75\\nsm_80\\nsm_90\\nsm_90a\\nsm_100\\n' ;;
  *" -c "*) echo "$*" >>"{log}"; {compile} ;;
esac
"""
OBJECT = 'for output; do [ "$last" = -o ] && break; last=$output; done; : >"$output"'
REFUSAL = 'echo "host_config.h:1: #error -- unsupported GNU version" >&2; exit 1'
USE = """
import warnings, torch
torch.version.cuda = "{cuda}"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from coded_torch import _extension
    from coded_torch.linear import SplineMap
assert SplineMap([0.0, 1.0], [0.5])(torch.tensor([0.0, 1.0])).item() == 0.5
print(_extension.build_info()["cuda kernels"])
print([str(w.message) for w in caught if "coded_torch" in str(w.message)])
"""


class Machine:
    """A machine with a CUDA build of torch, its compilers, and the package as setup.py builds it.

    torch is told that it were such a build, in processes of their own; it looks no further.
    """

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "nvcc.log"
        self.package = folder / "installed" / "coded_torch"
        sources = Path(coded_torch.__file__).parent
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_cuda_missing.txt")
        shutil.copytree(sources, self.package, ignore=ignored)
        self.script("g++", COMPILER.format(built=sources, compiler=shutil.which("g++")))
        # What the linker is asked for must be found, but is not looked at.
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("CC", "TORCH_CUDA_ARCH_LIST")},
            "CXX": str(folder / "bin" / "g++"),
            "CUDA_HOME": str(folder / "none"),
            "PYTHONPATH": str(folder / "installed"),
        }

    def script(self, name, text):
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def nvcc(self, release, compile=OBJECT):
        self.script("nvcc", NVCC.format(release=release, log=self.log, compile=compile))
        self.environment["CUDA_HOME"] = str(self.folder)

    def python(self, code, *arguments, cwd=ROOT):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def install(self):
        """Run the real setup.py; returns what it printed."""
        code = (
            f"import runpy, torch; torch.version.cuda = '{CUDA}'; "
            "torch.cuda._is_compiled = lambda: True; torch.cuda.is_available = lambda: False; "
            "runpy.run_path('setup.py', run_name='__main__')"
        )
        library, scratch = self.package.parent, self.folder / "build"
        options = ("build_ext", f"--build-lib={library}", f"--build-temp={scratch}")
        return self.python(code, *options)

    def use(self):
        """Import the package and compute; returns what runs for CUDA, and the warnings."""
        done = self.python(USE.format(cuda=CUDA), cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def compiled(self):
        """The architectures for which the operators were compiled."""
        lines = [line for line in self.log.read_text().splitlines() if "csrc/ops/cuda" in line]
        assert lines
        (found,) = {tuple(re.findall(r",code=(\S+)", line)) for line in lines}
        return found


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_toolkit_of_another_cuda_builds_for_the_cpu(machine):
    machine.nvcc("12.4")
    done = machine.install()
    assert done.returncode == 0, done.stderr
    needs = "nvcc 13.x for torch's CUDA 13.0, got nvcc 12.4"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("setup.py")]
    assert needs in line
    info, warned = machine.use()
    assert info.startswith(f"torch's own operators (the build lacked {needs}")
    assert warned == "[]"
    machine.environment["CODED_TORCH_CUDA"] = "1"
    refused = machine.install()
    assert refused.returncode == 1
    assert f"CODED_TORCH_CUDA=1 needs {needs}" in refused.stderr


@pytest.mark.parametrize(
    ("compile", "needs"),
    [
        (None, "nvcc; set CUDA_HOME"),
        (REFUSAL, "an nvcc that compiles, got: host_config.h:1: #error -- unsupported GNU version"),
    ],
)
def test_without_an_nvcc_that_compiles_it_builds_for_the_cpu(machine, compile, needs):
    if compile:
        machine.nvcc("13.0", compile)
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert f"CUDA needs {needs}" in done.stderr
    assert machine.use()[0].startswith(f"torch's own operators (the build lacked {needs}")


def test_one_machine_code_a_generation_that_nvcc_knows(machine):
    machine.nvcc("13.0")
    done = machine.install()
    assert done.returncode == 0, done.stderr
    codes = ("sm_75", "sm_80", "[sm_90,compute_90]", "[sm_100,compute_100]")
    assert machine.compiled() == codes


def test_torch_cuda_arch_list_and_a_library_that_does_not_load(machine):
    machine.nvcc("13.0")
    machine.environment["TORCH_CUDA_ARCH_LIST"] = "7.5"
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert machine.compiled() == ("sm_75",)
    # The compiler of this test made no library of it: the CPU works, and CUDA by torch's own.
    info, warned = machine.use()
    assert info.startswith("torch's own operators (_ops_cuda")
    assert "does not load into torch" in info
    assert "CUDA tensors are computed by torch's own operators, as _ops_cuda" in warned
