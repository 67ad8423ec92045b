r"""A module that runs any other module on coded workers."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from .._arguments import count, instance, positive
from ..codes.base import Code
from ..codes.plans import BatchPlan, MeanPlan, plan_batch
from ..grouping import check_ordering
from ..workers.base import Task, Workers, broadcast_dims
from ..workers.local import LocalWorkers
from ._ballot import Ballot, Result
from ._inputs import Inputs
from .run_report import RunReport, Timed

if TYPE_CHECKING:
    from ..stragglers import Stragglers

__all__ = ["CodedWrapper"]

logger = logging.getLogger("coded_torch.nn")


class CodedWrapper(nn.Module):
    r"""Run a module on N workers, and answer from whichever N - S of them reply first.

    The batch is put in order and cut into groups :math:`X` of K inputs. With the code's encoder
    :math:`E` (N x K) and, for the received set :math:`F`, its decoder :math:`D_F` (K x |F|), a
    group is answered by

    .. math:: D_F \, [\, f(E_n X) \,]_{n \in F},

    exactly :math:`f(X)` where the code is exact, else close to it; codes that look at the whole
    batch decode all groups together. Each worker gets one coded input of every group, in one batch;
    the last group is filled up with copies of its last input. Answers come back in the caller's
    order.

    The wrapper stands in for the module: the keys of its state dict are those of the module, and
    ``train``, ``to``, hooks, autograd, autocast, pickling and deep copies work as they do for it.
    The names of its parameters begin with ``module.``, so :func:`torch.func.functional_call` takes
    ``dict(coded.named_parameters())``, not the state dict; state-dict hooks belong to the module.

    Tensors of the inputs and outputs may be nested in any pytree. A result that is an error, not
    finite, of another batch size, or unlike most in structure, shape or dtype, counts as missing,
    and is named in :attr:`last_run`. So mask with a large negative number, or logits after
    decoding, not with ``-inf``: neither can it be coded, nor do results that hold it count.

    Args:
        module: the module; its outputs are floating-point tensors with a batch dimension, and
            plain constants that are the same for every worker, such as None.
        code: the code; it says K and N.
        workers: who computes; by default :class:`~coded_torch.workers.LocalWorkers`.
        stragglers: shorthand for ``workers=LocalWorkers(stragglers, generator=generator)``.
        num_stragglers: S: N - S good results are waited for. None: as many as the law of the
            workers' stragglers makes late. Where the law names no number, or there is none, 0: all
            that ever reply are waited for, however late, so there say S or a deadline. Of another
            code that is assigned later, at most as many as that one can lose.
        deadline: seconds to wait; then what has arrived is decoded. None: until the workers have
            no more to give.
        tolerance: the error that is good enough, as a share of the outputs' standard deviation:
            while the code expects a greater one of N - S results or more, one more is waited for.
            None, and for codes that cannot tell: N - S are enough.
        degraded: "mean" to answer with the mean of the results, and say so in the report, where
            some arrived but too few to be decoded. None: :class:`NotEnoughResults` is raised.
        ordering: in which order the batch is laid out before it is cut into groups of K:
            "similarity", so that neighbours resemble each other; "arrival", as the paper does; a
            permutation of the batch, a sequence or an integer tensor; or a callable that is given
            the coded inputs, a list of ``[B, ...]``, and returns one.
        shuffle: deal the coded inputs to the workers anew for every call, so that neighbouring
            workers that are late together do not lose neighbours on the curve. The wrapper's own
            sequence, the same for every wrapper.
        link: "softmax" where all outputs are probabilities over their last dimension: they are
            decoded on the scale of logits, where they bend least, and come back as probabilities.
            The report tells no ``expected_rmse`` then, as its units are those of logits.
        in_dims: as in :func:`torch.func.vmap`, for the positional arguments: the batch dimension
            of each, an integer, None for the same on every worker, or a pytree prefix of such.
            Tensors in keyword arguments are coded along dimension 0. What is not a tensor is the
            same for every worker.
        out_dims: the batch dimension of the outputs, likewise; at None, the result of the first
            worker received is passed through.
        on_run: called with the :class:`RunReport` of every call, in its thread, when it has ended,
            whether it answers or raises.
        generator: for ``stragglers``; None: the law's own.

    Attributes:
        last_run: the :class:`RunReport` of the call that ended last, even by an error; None before
            the first. Where several threads call, ``on_run`` tells each its own.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: ``stragglers`` or ``generator`` beside ``workers``;
            ``num_stragglers`` negative, or more than the code can lose; ``deadline`` or
            ``tolerance`` not positive; another name of ``ordering``, ``link`` or ``degraded``.

    Calling raises:
        TypeError: a tensor to be coded is not floating-point, or no worker's output can be decoded.
        ValueError: coded inputs differ in batch size, have not the dimension, or are not finite, or
            there are none; no worker's output has the batch size or, with ``link``, probabilities.
        NotEnoughResults: fewer good results than the code needs; its cause is the error of the
            first worker that had one.

    Note:
        :math:`N / K` times the module's work. The answers depend on which workers were received,
        not on the order in which they replied: the same results give the same bits. (The results
        themselves may differ in their last bits where the module was run on batches of other
        sizes, see :class:`~coded_torch.workers.LocalWorkers`.) An empty batch goes to the module
        itself.

    Reference:
        Moradi, Tahmasebi, Maddah-Ali, "Coded Computing for Resilient Distributed Computing: A
        Learning-Theoretic Framework", NeurIPS 2024, arXiv:2406.00300.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> double = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(double.weight, 2.0)
        >>> coded = CodedWrapper(double, ReplicationCode(2, 6), stragglers=Uniform(2))
        >>> coded(torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist()
        [2.0, 4.0, 6.0]
        >>> len(coded.last_run.received), len(coded.last_run.missing), coded.last_run.num_groups
        (4, 2, 2)
    """

    last_run: RunReport | None

    def __init__(
        self,
        module: nn.Module,
        code: Code,
        *,
        workers: Workers | None = None,
        stragglers: Stragglers | None = None,
        num_stragglers: int | None = None,
        deadline: float | None = None,
        tolerance: float | None = None,
        degraded: str | None = None,
        ordering: Any = "similarity",
        shuffle: bool = True,
        link: str | None = None,
        in_dims: Any = 0,
        out_dims: Any = 0,
        on_run: Callable[[RunReport], None] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        instance(self, "module", module, nn.Module)
        instance(self, "code", code, Code)
        instance(self, "workers", workers, Workers, optional=True)
        instance(self, "generator", generator, torch.Generator, optional=True)
        instance(self, "on_run", on_run, Callable, optional=True)
        for argument, option in (("stragglers", stragglers), ("generator", generator)):
            if workers is not None and option is not None:
                raise ValueError(
                    f"CodedWrapper: {argument} must be given to the workers themselves, "
                    f"got workers and {argument}"
                )
        for argument, name, known in (("link", link, "softmax"), ("degraded", degraded, "mean")):
            if name not in (None, known):
                raise ValueError(
                    f"CodedWrapper: {argument} must be None or {known!r}, got {name!r}"
                )
        check_ordering(self, ordering)
        self.module = module
        self.code = code
        self.workers = LocalWorkers(stragglers, generator=generator) if workers is None else workers
        if num_stragglers is not None:
            num_stragglers = count(self, "num_stragglers", num_stragglers, least=None)
            most = code.num_workers - code.min_received
            if not 0 <= num_stragglers <= most:
                raise ValueError(
                    f"CodedWrapper: num_stragglers must lie in 0..{most}, as {code} needs "
                    f"{code.min_received} results, got {num_stragglers}"
                )
        self.num_stragglers = num_stragglers
        self.deadline = None if deadline is None else positive(self, "deadline", deadline)
        self.tolerance = None if tolerance is None else positive(self, "tolerance", tolerance)
        self.degraded = degraded
        self.ordering = ordering
        self.shuffle = shuffle
        self.link = link
        self.in_dims = in_dims
        self.out_dims = out_dims
        self.on_run = on_run
        self.last_run = None
        self._shuffler = random.Random(0)
        self._warned = False
        self.training = module.training
        self.register_load_state_dict_post_hook(_name_keys)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        facts: dict[str, Any] = {"failed": True}
        try:
            self._warn_of_batch_statistics()
            answers = self._answer(facts, args, kwargs)
            facts["failed"] = False
            return answers
        finally:
            self._report(RunReport(**facts))

    def _answer(self, facts: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answers; what goes into the report is put into ``facts`` as soon as it is known."""
        with Timed(facts, "encode_seconds"):
            inputs = Inputs(args, kwargs, self.in_dims)
            inputs.check_finite()
            if inputs.batch_size:
                plan = plan_batch(self.code, self.ordering, inputs.rows(), self._spared())
                task = self._encode(inputs, plan)
        if not inputs.batch_size:
            with Timed(facts, "compute_seconds"):
                return self.module(*args, **kwargs)
        ballot = Ballot(task, self.link)
        facts |= {
            "num_workers": task.num_workers,
            "num_groups": task.num_groups,
            "latencies": ballot.latencies,
        }
        with Timed(facts, "compute_seconds"):
            self._compute(ballot, task, plan)
            results, rejected = ballot.count()
        facts["received"] = tuple(result.worker for result in results)
        facts["rejected"] = {error.worker: error.reason for error in rejected}
        with Timed(facts, "decode_seconds"):
            if len(results) < self.code.min_received:
                if not (results and self.degraded):
                    raise ballot.failure(self.code)
                facts["degraded"] = True
                plan = MeanPlan(plan)
            answers, facts["expected_rmse"] = self._decode(results, task, plan)
        return answers

    def _report(self, run: RunReport) -> None:
        self.last_run = run
        for worker, reason in run.rejected.items():
            logger.warning("worker %d %s", worker, reason)
        if run.degraded:
            logger.warning("answered with the mean of %d results", len(run.received))
        if self.on_run is not None:
            self.on_run(run)

    def _encode(self, inputs: Inputs, plan: BatchPlan) -> Task:
        n = self.code.num_workers
        return Task(
            [
                leaf if dim is None else plan.encode(leaf.movedim(dim, 0))  # [N, G, ...]
                for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
            ],
            inputs.dims,
            inputs.spec,
            num_workers=n,
            num_groups=plan.num_groups,
            device=inputs.device,
            out_dims=self.out_dims,
            positions=self._shuffler.sample(range(n), n) if self.shuffle else None,
        )

    def _compute(self, ballot: Ballot, task: Task, plan: BatchPlan) -> None:
        """Wait for results until enough are good."""
        quorum = task.num_workers - self._spared()
        with contextlib.closing(
            self.workers.run(self.module, task, quorum=quorum, deadline=self.deadline)
        ) as replies:
            for reply in replies:
                ballot.add(reply)
                if len(ballot.agreed) >= quorum and self._suffices(ballot.agreed, task, plan):
                    break

    def _suffices(self, results: Sequence[Result], task: Task, plan: BatchPlan) -> bool:
        """Whether the error to expect is tolerable."""
        if self.tolerance is None:
            return True
        expected = plan.expected_rmse(sorted(task.position(result.worker) for result in results))
        return expected is None or expected <= self.tolerance

    def _decode(
        self, results: Sequence[Result], task: Task, plan: BatchPlan
    ) -> tuple[Any, float | None]:
        """The answers, and the error to expect of the first decoded one."""
        results = sorted(results, key=lambda result: task.position(result.worker))
        received = [task.position(result.worker) for result in results]
        answers, expected = [], None
        columns = zip(*(result.leaves for result in results), strict=True)
        dims = broadcast_dims("out_dims", task.out_dims, results[0].spec)
        for dim, column in zip(dims, columns, strict=True):
            if dim is None or not isinstance(column[0], Tensor):
                answers.append(column[0])
                continue
            stacked = torch.stack(column).movedim(dim + (dim >= 0), 1)  # [F, G, ...]
            if self.link == "softmax":
                # Of probabilities that are 0 in floating point, no logarithm is left.
                stacked = stacked.clamp(min=torch.finfo(stacked.dtype).tiny).log()
            elif expected is None:
                expected = plan.expected_rmse(received, stacked)
            decoded = plan.decode(stacked, received)  # [B, ...]
            if self.link == "softmax":
                decoded = decoded.softmax(dim=-1)
            answers.append(decoded.movedim(0, dim))
        return pytree.tree_unflatten(answers, results[0].spec), expected

    def _spared(self) -> int:
        """S, for the code and the workers that are there now."""
        lost = self.num_stragglers
        if lost is None:
            law = self.workers.stragglers
            lost = (law and law.num_stragglers) or 0
        return max(0, min(lost, self.code.num_workers - self.code.min_received))

    def _warn_of_batch_statistics(self) -> None:
        if not self.training or self._warned:
            return
        for name, part in self.module.named_modules():
            if part.training and isinstance(part, _BatchNorm):
                self._warned = True
                warnings.warn(
                    f"CodedWrapper: {name or 'the module'} is in training mode and takes its "
                    "statistics from the coded inputs, not from the batch; call eval() on it",
                    UserWarning,
                    stacklevel=4,
                )
                return

    # The state dict is the module's own. Overriding is enough for a wrapper on its own; as a part
    # of a bigger module, loading recurses into `module`, under whose name the keys must then be.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in list(state_dict):
            state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        self._loading = prefix, args[-3:]  # for _name_keys, when the module has been loaded too
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.code}, {self.workers}, num_stragglers={self._spared()}"


def _name_keys(coded: CodedWrapper, _: Any) -> None:
    """Name missing, unexpected and bad keys as they are in the state dict, without ``module.``."""
    prefix, complaints = vars(coded).pop("_loading")
    pattern = re.compile(rf"(?<![\w.]){re.escape(prefix)}module\.")
    for texts in complaints:
        texts[:] = [pattern.sub(prefix, text) for text in texts]
