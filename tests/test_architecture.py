"""Arrows between modules run down only."""

import ast
import importlib.util
from pathlib import Path

import pytest

import coded_torch

PACKAGE = Path(coded_torch.__file__).parent
# Each module may import those of the groups after its own, and its own group.
LAYERS = (
    {"testing"},
    {"cli"},
    {"serve"},
    {"evaluation", "demo"},
    {"nn", "scheduling", "verification"},
    {"surrogates"},
    {"workers", "codes"},
    {"functional"},
    {"input_space", "linear"},
    {"ops"},
    {"_extension", "stragglers"},
    {
        "_arguments",
        "_cuda_fallback",
        "_heap",
        "_logging",
        "_streams",
        "_transforms",
        "_weights",
    },
)
GROUND = LAYERS[-2]
ALL = set().union(*LAYERS)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            yield path


def imported(path):
    """The modules of this package that a file imports, wherever the import stands."""
    package = ".".join(["coded_torch", *path.relative_to(PACKAGE).parts[:-1]])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("coded_torch."))


@pytest.mark.parametrize("path", list(modules()), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    level = next((i for i, layer in enumerate(LAYERS) if own in layer), None)
    assert level is not None, f"{own} has no place among the layers"
    below = set().union(*LAYERS[level:]) | {own}
    if own in GROUND:
        below = {own} | LAYERS[-1]
    if own in ("workers", "codes"):
        below -= {"workers", "codes"} - {own}
    wrong = {name for name in imported(path) if name in ALL} - below
    assert not wrong, f"{own} imports {wrong}"


@pytest.mark.parametrize("path", list(modules()), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_few_modules_call_ops(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own not in ("linear", "input_space", "ops"):
        assert "ops" not in imported(path)


def test_only_the_suites_need_pytest():
    users = {path.parts[-2] for path in modules() if "import pytest" in path.read_text()}
    assert users == {"testing"}


def test_the_arithmetic_knows_no_torch():
    csrc = Path(__file__).resolve().parents[1] / "csrc"
    for header in (csrc / "math").iterdir():
        assert "#include <torch" not in header.read_text(), header
