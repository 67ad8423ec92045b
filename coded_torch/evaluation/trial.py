"""A wrapped module on one batch, tried with any code and from any received set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import shown
from .._transforms import as_called
from ..codes import BatchPlan, Code, ReplicationCode, plan_batch
from ..input_space.geometry import Geometry
from ..input_space.ordering import order_of
from ..nn import CodedWrapper
from ..nn._inputs import Inputs
from ..nn._results import Results
from ..nn._stand_in import training_part
from ..workers import LocalWorkers, Task

__all__ = ["Trial", "calls_of"]


@as_called()
def calls_of(owner: str, module: nn.Module, batches: Any) -> list[tuple[Any, ...]]:
    """The positional arguments of a call for each of ``batches``.

    Raises:
        TypeError: they are not a sequence of batches.
        ValueError: one of them is empty, or the module would learn from them.
    """
    try:
        calls = None if isinstance(batches, Tensor | np.ndarray | str | bytes) else list(batches)
    except TypeError:
        calls = None
    if calls is None:
        raise TypeError(
            f"{owner}: batches must be a sequence of batches, such as [x], "
            f"got {type(batches).__name__}"
        )
    if (name := training_part(module)) is not None:
        raise ValueError(
            f"{owner}: the module must be in evaluation mode, as {name} learns from every batch it "
            "sees; call eval() on it"
        )
    calls = [batch if isinstance(batch, tuple) else (batch,) for batch in calls]
    for i, args in enumerate(calls):
        tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        if not tensors:
            raise TypeError(f"{owner}: batches[{i}] must hold a tensor, got {shown(args)}")
        if any(0 in x.shape[:1] for x in tensors):
            raise ValueError(f"{owner}: batches[{i}] must hold at least one input, got none")
    return calls


class Trial:
    """One batch: what the module makes of it, and what codes decode it to.

    The module runs in this process, without gradients: once on the batch, and once for each
    distinct encoder on the coded inputs of the workers that are in a received set.

    Args:
        wrapper: the module and how it is called, and the ordering where nothing else is said. Its
            workers compute nothing; neither its hooks nor its ``on_run`` are called.
        args: the positional arguments of the call.
        received: the received sets.

    Attributes:
        inputs: the floating-point inputs that are divided, ``[B, ...]`` each.
        mixable: whether all divided inputs are floating-point, so that codes can mix them.
        exact: the module's own answers, ``[B, ...]`` for every output that is decoded.
    """

    def __init__(
        self, wrapper: CodedWrapper, args: tuple[Any, ...], received: Iterable[Sequence[int]] = ()
    ) -> None:
        # Whether its code mixes is checked when it is tried; the batch itself goes to the module.
        self._inputs = Inputs(args, {}, wrapper.in_dims, ReplicationCode(1, 1))
        self._wrapper = wrapper
        self._workers = sorted({worker for workers in received for worker in workers})
        self._place = {worker: i for i, worker in enumerate(self._workers)}
        self._path: Sequence[int] | Tensor | None = None
        self._plans: dict[Any, tuple[BatchPlan, list[Tensor]]] = {}
        self._results: dict[int, list[Tensor]] = {}
        self.inputs = self._inputs.floating()
        self.mixable = len(self.inputs) == len(self._inputs.batches())
        self.exact = [leaf[0] for leaf in self._run(lambda leaf: leaf[None])]

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
            num_stragglers: S, how many late workers the code is to expect.
            stage: of every output, what is decoded.
        """
        ordering = self._wrapper.ordering if ordering is None else ordering
        key = code, ordering if isinstance(ordering, str) else id(ordering), num_stragglers
        if key not in self._plans:
            plan = plan_batch(
                code,
                self._order(code, ordering),
                self.inputs,
                num_stragglers,
                batch_size=self._inputs.batch_size,
                others=[] if self.inputs else self._inputs.batches(),
            )
            self._plans[key] = plan, self._results_of(plan)
        plan, results = self._plans[key]
        rows = [self._place[worker] for worker in received]
        arrived = [stage(result[rows]) for result in results]
        answers = [plan.decode(result, received) for result in arrived]
        return answers, plan.expected_rmse(received, arrived[0])

    def _order(self, code: Code, ordering: Any) -> Any:
        """The path through the batch, found once for all codes that look at nothing else."""
        by_path = isinstance(ordering, str) and ordering == "similarity"
        large = self._inputs.batch_size > code.max_chunk
        if not (by_path and self.inputs) or code.uses_geometry or large:
            return ordering
        if self._path is None:
            self._path = order_of(ordering, self.inputs, Geometry(self.inputs).distances)
        return self._path

    def _results_of(self, plan: BatchPlan) -> list[Tensor]:
        """What the workers of the received sets answer, ``[|workers|, G, ...]`` an output."""
        if not plan.code.mixes:  # they compute inputs of the batch, whose results are known
            return [plan.encode(leaf)[self._workers] for leaf in self.exact]
        coded = [plan.encode(leaf)[self._workers] for leaf in self._inputs.batches()]
        content = hash(tuple(map(_bytes, coded)))  # the same for all decoders of one encoder
        if content not in self._results:
            self._results[content] = self._run(lambda leaf: plan.encode(leaf)[self._workers])
        return self._results[content]

    def _run(self, encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The module's outputs that are decoded, ``[U, R, ...]``, on inputs encoded as such."""
        wrapper, inputs = self._wrapper, self._inputs
        leaves = [
            leaf if dim is None else encode(leaf.movedim(dim, 0))
            for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
        ]
        first = next(x for x, dim in zip(leaves, inputs.dims, strict=True) if dim is not None)
        units, rows = first.shape[:2]
        task = Task(leaves, inputs.dims, inputs.spec, units, rows, inputs.device, wrapper.out_dims)
        workers = LocalWorkers(max_batch_size=getattr(wrapper.workers, "max_batch_size", None))
        results = Results(task)
        with torch.no_grad(), as_called():
            for reply in workers.run(wrapper.module, task):
                results.add(reply)
        if results.rejected:
            raise results.misfit or results.rejected[0]
        stacked = results.stack()
        return [
            leaf
            for leaf, dim in zip(stacked.leaves, stacked.dims, strict=True)
            if dim is not None and isinstance(leaf, Tensor)
        ]


def _bytes(values: Tensor) -> bytes:
    return values.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
