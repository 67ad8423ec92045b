"""A wrapped module on one batch, tried with any code and from any received set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .codes.base import BatchPlan, Code
from .codes.kernel import KernelCode
from .codes.replication import ReplicationCode
from .geometry import Geometry
from .grouping import Grouping, order_of
from .nn import CodedWrapper
from .nn._runs import fit_batch as plan_batch
from .workers import LocalWorkers

__all__ = ["Trial"]


class Trial:
    """One batch: what the module makes of it, and what codes decode it to.

    The module runs in this process, without gradients: once on the batch, and once for each
    distinct encoder on the coded inputs of the workers that are in a received set.

    Args:
        wrapper: the module and how it is called: dimensions, link, and, where nothing else is
            said, the ordering. Neither its hooks nor its ``on_run`` hear of the trial.
        args: the positional arguments of the call.
        received: the received sets.

    Attributes:
        exact: the module's own answers, ``[B, ...]`` for every output that is decoded.
    """

    def __init__(
        self, wrapper: CodedWrapper, args: tuple[Any, ...], received: Iterable[Sequence[int]] = ()
    ) -> None:
        self._wrapper, self._args = wrapper, args
        self._workers = sorted({worker for workers in received for worker in workers})
        self._place = {worker: i for i, worker in enumerate(self._workers)}
        self._paths: dict[float, Sequence[int] | Tensor] = {}
        self._plans: dict[Any, tuple[BatchPlan, list[Tensor]]] = {}
        self._results: dict[int, list[Tensor]] = {}
        run = _Recorded(ReplicationCode(1, 1).fit, [0])
        self._run(run)
        self.inputs = [leaf for leaf in run.inputs if leaf.is_floating_point()]
        self.exact = [result[0] for result in run.results]

    def decode(
        self,
        code: Code,
        received: Sequence[int],
        *,
        ordering: Any = None,
        num_stragglers: int = 0,
        stage: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> tuple[list[Tensor], float | None]:
        """Every output's answers, ``[B, ...]``, and the error that the code expects of the first.

        Args:
            code: the code.
            received: the workers whose results there are, one of the trial's received sets.
            ordering: of the batch; None: the wrapper's.
            num_stragglers: how many late workers the code is to expect.
            stage: of every output, what is decoded.
        """
        ordering = self._wrapper.ordering if ordering is None else ordering
        key = code, ordering if isinstance(ordering, str) else id(ordering), num_stragglers
        if key not in self._plans:
            plan = plan_batch(code, self._order(code, ordering), self.inputs, num_stragglers)
            self._plans[key] = plan, self._results_of(plan)
        plan, results = self._plans[key]
        rows = [self._place[worker] for worker in received]
        arrived = [stage(result[rows]) for result in results]
        answers = [plan.decode(result, received) for result in arrived]
        return answers, plan.expected_rmse(received, arrived[0])

    def _order(self, code: Code, ordering: Any) -> Any:
        """The ordering, or the order it gives where a code does not need the distances itself."""
        if not isinstance(ordering, str) or ordering != "similarity" or code.uses_geometry:
            return ordering
        if len(self.inputs[0]) > code.max_run:
            return ordering
        if code.shrinkage not in self._paths:
            distances = Geometry(self.inputs, shrinkage=code.shrinkage).distances
            self._paths[code.shrinkage] = order_of("similarity", self.inputs, distances)
        return self._paths[code.shrinkage]

    def _results_of(self, plan: BatchPlan) -> list[Tensor]:
        """What the workers of the received sets answer, ``[|workers|, G, ...]`` an output."""
        if _selects(plan.code):  # what it sends is in the batch, and so are the results
            return [plan.encode(leaf)[self._workers] for leaf in self.exact]
        coded = [plan.encode(leaf)[self._workers] for leaf in self.inputs]
        content = hash(tuple(_bytes(leaf) for leaf in coded))  # whatever the decoder
        if content not in self._results:
            run = _Recorded(lambda _: plan, self._workers)
            self._run(run)
            self._results[content] = run.results
        return self._results[content]

    def _run(self, code: _Recorded) -> None:
        wrapper = self._wrapper
        workers = LocalWorkers(max_batch_size=getattr(wrapper.workers, "max_batch_size", None))
        beside = CodedWrapper(
            wrapper.module,
            code,
            workers=workers,
            ordering="arrival",
            shuffle=False,
            link=wrapper.link,
            in_dims=wrapper.in_dims,
            out_dims=wrapper.out_dims,
        )
        with torch.no_grad():
            beside(*self._args)


def _selects(code: Code) -> bool:
    """Whether every coded input is an input of the batch."""
    return isinstance(code, ReplicationCode | KernelCode) and not getattr(code, "placement", 0)


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).cpu().numpy().tobytes()


class _Recorded(Code):
    """Keeps what is encoded and what comes back.

    Args:
        plan: makes the plan, from the batch in groups of one.
        workers: of the plan: whose coded inputs are wanted.

    Attributes:
        inputs: what was encoded, leaf by leaf, ``[B, ...]``.
        results: what was to be decoded, ``[|workers|, G, ...]`` an output.
    """

    def __init__(self, plan: Callable[[Grouping], BatchPlan], workers: Sequence[int]) -> None:
        super().__init__(1, len(workers))
        self.plan, self.workers = plan, list(workers)
        self.inputs: list[Tensor] = []
        self.results: list[Tensor] = []

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        return _Recording(self, self.plan(grouping))


class _Recording(BatchPlan):
    def __init__(self, code: _Recorded, plan: BatchPlan) -> None:
        self.code: _Recorded = code
        self.num_groups = plan.num_groups
        self._plan = plan

    def encode(self, values: Tensor) -> Tensor:
        self.code.inputs.append(values)
        return self._plan.encode(values)[self.code.workers]

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        self.code.results.append(results)
        return results[0]
