"""Let pytest, by `-p`, import only the packages that a machine with a card has.

They are torch, numpy, pytest, hypothesis, scipy, pybind11, ninja and what these require.
"""

import re
import sys
from importlib import metadata
from importlib.machinery import PathFinder

FEW = ("coded_torch", "torch", "numpy", "pytest", "hypothesis", "scipy", "pybind11", "ninja")
# NVRTC, which torch's builds for CUDA require; and what pytest starts with.
FEW += ("nvidia-cuda-nvrtc", "setuptools", "pip")


def name_of(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def closure(names):
    """Return packages and all that they require, without their extras."""
    found, left = set(), [name_of(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:  # of another system
            continue
        left += [name_of(text) for text in requirements if "extra ==" not in text]
    return found


ALLOWED = closure(FEW)
packages = metadata.packages_distributions()
REFUSED = {
    module for module, owners in packages.items() if ALLOWED.isdisjoint(map(name_of, owners))
}


class FewPackages(PathFinder):
    """Find no module of another package, nor what it tells of itself."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in REFUSED else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        return (
            found
            for found in super().find_distributions(*context)
            if name_of(found.name) in ALLOWED
        )


sys.meta_path[sys.meta_path.index(PathFinder)] = FewPackages
