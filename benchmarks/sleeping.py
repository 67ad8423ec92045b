"""The model that all servers of the benchmark ``serving`` answer with, and its requests."""

from typing import Any

import torch
from torch import Tensor, nn

from .traffic import Sleeping

PROCESSES = 2
BATCH = 64  # the rows of the largest batch
FEATURES = 16
PATH = "/v2/models/model/infer"


def sleeping() -> nn.Module:
    """Return the model, which takes 1 ms a row."""
    torch.set_num_threads(1)
    return Sleeping(nn.Identity(), 0.0, 1e-3)


def row_of(request: Any) -> Tensor:
    return torch.tensor(request["inputs"][0]["data"])


def answer(row: Tensor) -> Any:
    return {"outputs": [{"name": "output", "data": row.tolist()}]}
