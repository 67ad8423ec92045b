"""The predictor of missing rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .kernel import KernelCode
from .plans import plan_rows

if TYPE_CHECKING:
    from ..input_space.distances import Features
    from .batch_plan import BatchPlan

__all__ = ["Regression"]

MOST_ROWS = 4096


class Regression:
    """Predicts missing rows of a batch by regression on the rows that have results.

    Args:
        metric: "auto", the name of a metric, a callable that makes features of the inputs, or a
            sequence of these. Defaults to "auto".
        length: of the regression, positive, in median distances between neighbours. Defaults to
            "auto".
        link: None or "softmax". Defaults to None.
    """

    def __init__(
        self,
        metric: str | Features | Sequence[str | Features] = "auto",
        length: float | str = "auto",
        link: str | None = None,
    ) -> None:
        self._code = KernelCode(1, 1, metric=metric, length=length, link=link)
        self.metric, self.length, self.link = metric, length, link

    def plan(
        self,
        inputs: Sequence[Tensor],
        batch_size: int | None = None,
        *,
        others: Sequence[Tensor] = (),
        chunk: int = MOST_ROWS,
    ) -> BatchPlan:
        """Plan one batch, before any of its results is there.

        Args:
            inputs: the floating-point inputs that are divided, ``[B, ...]`` each. If there is none,
                missing rows get the mean of the others.
            batch_size: B, which must be given if there is no input.
            others: the inputs of other dtypes, of which a callable metric may make features.
            chunk: the most rows that are predicted together.

        Returns:
            The plan: results are ``[F, 1, ...]``, ``received`` the rows that they belong to.
        """
        code: Any = self._code.replace()
        code.max_chunk = chunk
        return plan_rows(code, "similarity", inputs, batch_size=batch_size, others=others)

    def __repr__(self) -> str:
        shown = {"metric": self.metric, "length": self.length, "link": self.link}
        given = (f"{k}={v!r}" for k, v in shown.items() if v not in ("auto", None))
        return f"Regression({', '.join(given)})"
