"""What the page "On GPUs" shows must happen on a GPU."""

import re
import shlex
from pathlib import Path

import pytest

from coded_torch.cli.main import main

pytestmark = pytest.mark.cuda

PAGE = Path(__file__).resolve().parents[1] / "notebooks" / "guides" / "gpus.md"
TEXT = PAGE.read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", TEXT, re.S)
COMMANDS = re.findall(r"^coded-torch (.*)$", TEXT, re.M)


def test_the_page_has_three_examples_and_no_other_code():
    assert len(EXAMPLES) == TEXT.count("```python") == 3


@pytest.mark.parametrize(
    ("script", "shown"), EXAMPLES, ids=["one card", "a graph", "several cards"]
)
def test_examples(script, shown, capsys):
    exec(compile(script, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == shown


def test_commands(capsys):
    ask, examine = COMMANDS
    assert main(shlex.split(ask)) == 0
    assert "cuda:0" in capsys.readouterr().out
    # test_accelerator.py runs it, with fewer sizes.
    assert examine == "info --device cuda --json card.json --tests ."
