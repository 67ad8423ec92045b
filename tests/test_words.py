"""The prose of the package keeps the rules of `words.py`."""

import importlib.util
from pathlib import Path

import pytest

import coded_torch

_SPEC = importlib.util.spec_from_file_location("words", Path(__file__).with_name("words.py"))
words = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(words)
FILES = sorted(Path(coded_torch.__file__).parent.rglob("*.py"))

BROKEN = [
    "Those of a batch.",
    "That of a call.",
    "What the pool has computed.",
    "Whether a worker is up.",
    "As the policy says.",
    "Of a part: its rows.",
    "Return what came.",
    "Return the rows, those that are missing.",
    "Return None likewise.",
    "Return a number; None: there is none.",
    "In full it is 12.",
]
KEPT = [
    "Return the answers and the report.",
    "Run a module on unreliable workers.",
    "A part is hedged when its running time exceeds the hedging threshold.",
    "The buffer is reused only when nothing references it.",
    "The squared distances before rounding.",
]


def faults(tmp_path, docstring):
    file = tmp_path / "file.py"
    file.write_text(f'"""{docstring}"""\n')
    return words.faults(file)


@pytest.mark.parametrize("docstring", BROKEN)
def test_a_broken_rule_is_found(tmp_path, docstring):
    assert faults(tmp_path, docstring)


@pytest.mark.parametrize("docstring", KEPT)
def test_a_plain_sentence_passes(tmp_path, docstring):
    assert not faults(tmp_path, docstring)


def test_a_tuned_number_needs_a_comment(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("_ROWS = 4096\n_SECONDS = 2.0  # a bound; benchmarks/x.py\n_NAMES = ()\n")
    assert [line for line, rule, _ in words.faults(file) if rule == "constant"] == [1]


@pytest.mark.parametrize(
    "source",
    [
        "class Liar: ...",
        "def reask(part): ...",
        "def f(num_machines): ...",
        "class A:\n  curve: int",
    ],
)
def test_a_name_outside_the_glossary_is_found(tmp_path, source):
    file = tmp_path / "file.py"
    file.write_text(source)
    assert [rule for _, rule, _ in words.faults(file)] == ["name"]


def test_the_package_keeps_the_rules():
    found = [
        f"{file}:{line}: {rule}: {text}"
        for file in FILES
        for line, rule, text in words.faults(file)
    ]
    assert found == []
