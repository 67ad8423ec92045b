"""Every notebook runs from top to bottom, and its stored outputs are what it prints."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    names = {}
    grad = torch.is_grad_enabled()
    try:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "code":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), str(path), "exec"), names)
            stored = "".join("".join(output["text"]) for output in cell["outputs"])
            # Numbers may differ in their last digits between processors.
            assert [line.split()[0] for line in printed.getvalue().splitlines()] == [
                line.split()[0] for line in stored.splitlines()
            ]
    finally:
        torch.set_grad_enabled(grad)


def test_there_are_notebooks():
    assert NOTEBOOKS
