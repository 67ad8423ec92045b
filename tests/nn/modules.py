"""Small modules and inputs that the tests of the wrapper share."""

from typing import Any

import torch
from torch import Tensor, nn

from coded_torch import Regression, Waiting
from coded_torch.codes import RegressionCode, ReplicationCode

#: The ways to divide a batch whose inputs are not mixed.
WAYS = ("rows", "regression", "replication")
FIXED = {"metric": "shrunk", "length": 2.0}  # to choose takes time
SOON = Waiting(estimate_after=3.0)  # missing rows are estimated


def divided(way: str, k: int, n: int, link: str | None = None, **choice: Any) -> dict[str, Any]:
    """Arguments of a wrapper: K parts of rows, or the N columns of a code that repeats K inputs."""
    if way == "rows":
        return {"parts": k, "estimator": Regression(link=link, **choice), "waiting": SOON}
    if way == "regression":
        return {"code": RegressionCode(k, n, link=link, **choice)}
    return {"code": ReplicationCode(k, n, link=link)}


EXACT = {"rtol": 1e-8, "atol": 1e-8}  # codes of degree up to 4, from any K of up to 9 results


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(inputs: int = 3, outputs: int = 2, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=dtype)


class Call(nn.Module):
    """A module from a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Liar(nn.Module):
    """Returns something else at the inputs ``at``."""

    def __init__(self, lies: dict[float, Any]) -> None:
        super().__init__()
        self.lies = lies

    def forward(self, x: Tensor) -> Any:
        value = {"y": x * 1.0, "kind": "good"}
        lie = self.lies.get(float(x[0, 0]))
        return value if lie is None else lie(value)
