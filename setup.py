"""Builds the compiled parts: the planner, and the operators with the sources of CUDA kernels.

A package index shows README without the repository, so that its links must be absolute. Whoever
builds a release says where the repository is, as .github/workflows/wheels.yml does:
CODED_TORCH_REPOSITORY=https://HOST/OWNER/NAME and CODED_TORCH_REVISION=TAG.
"""

import os
import re
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
HEADERS = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[hic]*")]
# The oldest torch that the operators run on: the stable ABI promises all later ones.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Nothing reads errno of a root, so roots may be taken a vector at a time. -Wpsabi is about wide
# vectors that cross a function boundary, and none does. The prefix map keeps the builder's paths
# out of error messages.
PRIVATE = ["-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
CXX = ["-std=c++17", "-O3", "-Wno-psabi", "-fno-math-errno", *PRIVATE]

REPOSITORY = os.environ.get("CODED_TORCH_REPOSITORY", "")
REVISION = os.environ.get("CODED_TORCH_REVISION", "main")
PAGES = {"Changelog": "CHANGELOG.md", "Documentation": "notebooks/index.md"}


def described(text, repository, revision):
    """Return README without comments, whose links lead into the repository, if there is one."""
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    if repository:
        text = re.sub(
            r"(!?)\[((?:[^\[\]]|\n)*)\]\((?!https?:|#)([^)]+)\)",
            lambda m: f"{m[1]}[{m[2]}]({repository}/{'raw' if m[1] else 'blob'}/{revision}/{m[3]})",
            text,
        )
    return text


def compiled():
    """Return the arguments of ``setup`` by which the compiled parts are built."""
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    def bound(name):
        sources = [f"csrc/{name}/bindings.cpp"]
        how = {"cxx_std": 17, "extra_compile_args": ["-O3"], "depends": HEADERS}
        return Pybind11Extension(f"coded_torch._{name}", sources, **how)

    # Loaded by torch.ops.load_library; there is no Python in it, and nothing of CUDA.
    operators = Extension(
        "coded_torch._ops",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "ops").rglob("*.cpp")),
        include_dirs=[str(ROOT / "csrc"), *include_paths("cpu")],
        library_dirs=library_paths("cpu"),
        libraries=["torch", "torch_cpu", "c10"],
        language="c++",
        py_limited_api=True,
        extra_compile_args=[*CXX, STABLE_ABI],
        depends=HEADERS,
    )
    # Pools of processes need Linux, whose shared memory they seal.
    modules = [bound("plan"), operators]
    if sys.platform == "linux":
        modules.append(bound("lane"))
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < 77:  # which read the licences otherwise
        sys.exit(
            "coded_torch: the build must have setuptools 77 or later, "
            f"got {setuptools.__version__}; run `pip install 'setuptools>=77'`"
        )
    # pip asks twice what the package is before it builds, which needs no second of importing torch.
    builds = not {"egg_info", "dist_info"} & {*sys.argv}
    blob = f"{REPOSITORY}/blob/{REVISION}"
    setup(
        long_description=described((ROOT / "README.md").read_text(), REPOSITORY, REVISION),
        long_description_content_type="text/markdown",
        project_urls={
            "Source": REPOSITORY,
            "Issues": f"{REPOSITORY}/issues",
            **{name: f"{blob}/{path}" for name, path in PAGES.items()},
        }
        if REPOSITORY
        else {},
        **(compiled() if builds else {}),
    )
