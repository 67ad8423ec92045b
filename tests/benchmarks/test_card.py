"""The page of kernels on a card."""

import copy
import json

import pytest

from benchmarks import card
from benchmarks.__main__ import main

CELL = {
    "dtype": "float32", "knots": 20, "points": 24, "transpose": False, "indices": False,
    "columns": 150528, "copy": 1e-5, "matmul": 2e-5, "product": 1.25e-5, "sweep": 3e-5,
    "graph": "no graph", "host": 5e-6, "kernels": ["sweep_float32", "wide_product_float32"],
}  # fmt: skip
FOUND = {
    "command": "coded-torch info --device cuda",
    "seconds": 300.0,
    "finished": False,
    "problems": ["kernel sweep_float64 is not right: it hangs"],
    "environment": {"card": "a card", "torch": "2.11.0"},
    "kernels": [
        {"name": "sweep_float32", "right": True, "error": 2e-7, "registers": 96, "local_bytes": 8},
        {"name": "sweep_float64", "right": False, "reason": "it hangs"},
    ],
    "borders": {
        "float64": {"ratios": {"32": 0.5, "128": 1.25}, "knots": [[72, 1 << 62]]},
        "float16": {"ratios": {"32": 0.5}, "knots": []},
    },
    "times": [CELL],
    "tests": {"passed": 3, "failed": 1, "error": 0, "skipped": 2},
}


@pytest.fixture
def page_path(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "PAGE", tmp_path / "kernels.md")
    return tmp_path / "kernels.md"


def test_a_page_is_made_of_what_a_card_has_shown(tmp_path, page_path):
    (tmp_path / "card.json").write_text(json.dumps(FOUND))
    assert main(["kernels", "--device", "cuda", "--card", str(tmp_path / "card.json")]) == 0
    page = page_path.read_text()
    assert "Measured on a card with torch 2.11.0" in page
    assert "The command did not come to its end" in page
    assert "- kernel sweep_float64 is not right: it hangs" in page
    assert "| sweep_float32 | yes | 2.0e-07 | 96 | 8 |" in page
    assert "| sweep_float64 | no |  |  |  |" in page
    assert "| dtype | 32 | 128 | cuBLAS |" in page
    assert "| float64 | 0.50 | 1.25 | from 72 |" in page
    assert "| float16 | 0.50 |  | none |" in page
    times = "10.0 | 20.0 | 12.5 | 30.0 |  | 5.0"
    assert f"| 20 -> 24 | 150,528 | {times} | sweep_float32, wide_product_float32 |" in page
    assert "3 passed, 1 failed, 0 error, 2 skipped." in page


@pytest.mark.parametrize("lacks", ["file", "kernels"])
def test_without_the_file_of_a_card_there_is_no_page(lacks, tmp_path, page_path, capsys):
    if lacks == "kernels":
        found = copy.deepcopy(FOUND)
        del found["kernels"]
        (tmp_path / "card.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="2"):
        main(["kernels", "--device", "cuda", "--card", str(tmp_path / "card.json")])
    assert "make it by: coded-torch info --device cuda --json FILE" in capsys.readouterr().err
    assert not page_path.exists()
