"""Every notebook runs from top to bottom, and its stored outputs are what it prints and shows."""

import contextlib
import io
import json
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
MOST_BYTES = 200_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    names = {}
    grad = torch.is_grad_enabled()
    try:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "code":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), str(path), "exec"), names)
            stored = "".join(
                "".join(output["text"]) for output in cell["outputs"] if "text" in output
            )
            # Numbers may differ in their last digits between processors.
            assert [line.split()[0] for line in printed.getvalue().splitlines()] == [
                line.split()[0] for line in stored.splitlines()
            ]
            pictures = [output for output in cell["outputs"] if "data" in output]
            assert len(pictures) == len(pyplot.get_fignums())
            pyplot.close("all")
    finally:
        torch.set_grad_enabled(grad)
        pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_small(path):
    assert path.stat().st_size <= MOST_BYTES


def test_there_are_notebooks():
    assert NOTEBOOKS
