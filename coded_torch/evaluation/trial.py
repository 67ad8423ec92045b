"""A module on one batch, tried with any code and any received set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import shown
from .._torch import as_called
from ..codes import BatchPlan, Code
from ..nn.division import Inputs
from ..nn.module_proxy import training_part
from ..workers.task import broadcast_dims

__all__ = ["Trial", "calls_of"]


@as_called()
def calls_of(owner: str, module: nn.Module, batches: Any) -> list[tuple[Any, ...]]:
    """Return the positional arguments of a call for each of ``batches``.

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
    """One batch: the module's answers, and the answers that codes decode.

    The module runs in this process, without gradients: once on the batch, and once for each
    distinct encoder, on the coded inputs of the workers that are in a received set.

    Args:
        module: the module.
        args: the positional arguments of the call.
        received: the received sets that will be tried.
        in_dims, out_dims: as for :class:`~coded_torch.CodedWrapper`.
        max_batch_size: the number of rows that the module is given at most. Defaults to None.

    Attributes:
        inputs: the floating-point inputs that are divided, ``[B, ...]`` each.
        mixable: whether all divided inputs are floating-point, so that codes can mix them.
        exact: the module's own answers, ``[B, ...]`` for every output that is decoded.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        received: Iterable[Sequence[int]] = (),
        *,
        in_dims: Any = 0,
        out_dims: Any = 0,
        max_batch_size: int | None = None,
    ) -> None:
        # A code that mixes checks the inputs itself; the batch goes to the module as it is.
        self._inputs = Inputs(args, {}, in_dims)
        self._module, self._out_dims, self._most = module, out_dims, max_batch_size
        self._workers = sorted({worker for workers in received for worker in workers})
        self._place = {worker: i for i, worker in enumerate(self._workers)}
        self._plans: dict[Any, tuple[BatchPlan, list[Tensor]]] = {}
        self._results: dict[int, list[Tensor]] = {}
        self.inputs = self._inputs.floating()
        self.mixable = len(self.inputs) == len(self._inputs.batches())
        self.exact = self._run(self._inputs.batches())

    def decode(
        self,
        code: Code,
        received: Sequence[int],
        *,
        num_stragglers: int = 0,
        stage: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> list[Tensor]:
        """Return every output's answers, ``[B, ...]``.

        Args:
            code: the code.
            received: the workers with results, one of the trial's received sets.
            num_stragglers: S, the number of late workers that the code is to expect.
            stage: a function of the results of every output, which is decoded.
        """
        if (code, num_stragglers) not in self._plans:
            plan = code.plan(
                self.inputs,
                num_stragglers,
                batch_size=self._inputs.batch_size,
                others=[] if self.inputs else self._inputs.batches(),
            )
            self._plans[code, num_stragglers] = plan, self._results_of(code, plan)
        plan, results = self._plans[code, num_stragglers]
        rows = [self._place[worker] for worker in received]
        arrived = [stage(result[rows]) for result in results]
        return [plan.decode(result, received) for result in arrived]

    def _results_of(self, code: Code, plan: BatchPlan) -> list[Tensor]:
        """Return the results of the workers in received sets, ``[|workers|, G, ...]`` an output."""
        if not code.mixes:  # workers compute inputs of the batch, whose results are known
            return [plan.encode(leaf)[self._workers] for leaf in self.exact]
        coded = [plan.encode(leaf)[self._workers] for leaf in self._inputs.batches()]
        content = hash(tuple(map(_bytes, coded)))  # the same for all decoders of one encoder
        if content not in self._results:
            results = self._run([x.flatten(0, 1) for x in coded])
            shape = coded[0].shape[:2]
            self._results[content] = [x.unflatten(0, shape) for x in results]
        return self._results[content]

    def _run(self, batches: list[Tensor]) -> list[Tensor]:
        """Return the module's outputs that are decoded, ``[R, ...]``, on rows ``[R, ...]``."""
        rows = len(batches[0])
        size = self._most or rows
        parts = [self._call([x[i : i + size] for x in batches]) for i in range(0, rows, size)]
        return [torch.cat(leaf) for leaf in zip(*parts, strict=True)]

    def _call(self, batches: list[Tensor]) -> list[Tensor]:
        inputs, given = self._inputs, iter(batches)
        leaves = [
            leaf if dim is None else next(given).movedim(0, dim)
            for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, inputs.spec)
        with torch.no_grad(), as_called():
            outputs, spec = pytree.tree_flatten(self._module(*args, **kwargs))
        dims = broadcast_dims("out_dims", self._out_dims, spec)
        found = [
            output.movedim(dim, 0)
            for output, dim in zip(outputs, dims, strict=True)
            if dim is not None and isinstance(output, Tensor)
        ]
        for output in found:
            if not output.is_floating_point():
                raise TypeError(
                    f"an output must be a floating-point tensor to be decoded, got {output.dtype}"
                )
            if not bool(output.isfinite().all()):
                raise RuntimeError("the module must return finite outputs, got not finite ones")
        return found


def _bytes(values: Tensor) -> bytes:
    return values.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
