"""The shape of the package, read from its files: imports run down, and without a circle."""

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest

import coded_torch
from coded_torch import CodedWrapper

PACKAGE = Path(coded_torch.__file__).parent
# Each folder, or file beside the folders, may import those of the layers after its own, and itself.
LAYERS = (
    {"testing"},
    {"cli"},
    {"demo", "_page"},
    {"experiments"},
    {"serve"},
    {"nn"},
    {"verification"},
    {"scheduling", "codes", "surrogates"},
    {"input_space", "workers"},
    {"open_inference"},
    {"_tracing"},
    {"_table"},
    {"linear"},
    {"ops"},
    {"_changes"},
    {"_extension", "stragglers"},
    {"_layout", "_loaded"},
    {"_torch"},
    {"_arguments"},
    {"_untuned"},
)
FILES = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
every_file = pytest.mark.parametrize("name", sorted(FILES), ids=str)


def is_typing(node):
    """Whether a statement is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree):
    """All nodes but those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if not is_typing(node):
            yield node
            yield from statements(node)


def imported(name):
    """The files of this package that a file imports, wherever the import stands."""
    package = ".".join(("coded_torch", *name.parts[:-1]))
    for node in statements(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            modules = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            if module.partition(".")[0] == "coded_torch" and (
                file := file_of(module.split(".")[1:])
            ):
                yield file


def file_of(parts):
    """The file of a module, or of what is imported from a module."""
    for end in range(len(parts), 0, -1):
        path = Path(*parts[:end])
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate in FILES:
                return candidate
    return None  # compiled, or the package itself, for its version


def place(name):
    """The layer of a file, and the folder or file that has it."""
    own = name.parts[0].removesuffix(".py")
    return next((i for i, layer in enumerate(LAYERS) if own in layer), None), own


@every_file
def test_imports_run_down(name):
    if name == Path("__init__.py"):
        return
    level, own = place(name)
    assert level is not None, f"{own} has no place among the layers"
    for other in imported(name):
        below, its = place(other)
        assert its == own or below > level, f"{own} imports {other}"


def test_the_product_needs_no_experiments():
    """Public names of the experiments are loaded on demand, in two files."""
    users = {name for name, path in FILES.items() if ".experiments" in path.read_text()}
    product = {name for name in users if name.parts[0] not in ("testing", "cli", "experiments")}
    assert product == {Path("__init__.py"), Path("workers", "__init__.py")}


def test_no_files_import_each_other():
    done = set()

    def visit(name, path):
        assert name not in path, " imports ".join(map(str, (*path[path.index(name) :], name)))
        if name not in done:
            for other in imported(name):
                if other != name:
                    visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@every_file
def test_few_files_call_ops(name):
    if name.parts[0] not in ("linear.py", "input_space"):
        assert Path("ops.py") not in imported(name)


def test_the_wrapper_takes_ten_arguments():
    assert len(inspect.signature(CodedWrapper).parameters) <= 10


def test_only_the_suites_need_pytest():
    users = {name.parts[0] for name, path in FILES.items() if "import pytest" in path.read_text()}
    assert users == {"testing"}


def test_the_arithmetic_knows_no_torch():
    csrc = Path(__file__).resolve().parents[1] / "csrc"
    for header in (csrc / "math").iterdir():
        assert "#include <torch" not in header.read_text(), header
