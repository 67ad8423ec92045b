r"""A module that runs any other module on coded workers."""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import operator
import random
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ..codes.base import BatchPlan, Code, NotEnoughResults
from ..workers.base import CONSTANTS, Task, Workers, broadcast_dims, check_batch, leaf_name
from ..workers.local import LocalWorkers
from ._ballot import Ballot, Result
from ._runs import fit_batch

if TYPE_CHECKING:
    from ..stragglers import Stragglers

__all__ = ["CodedWrapper", "RunReport"]


@dataclasses.dataclass(frozen=True)
class RunReport:
    """How one call of a :class:`CodedWrapper` went.

    Attributes:
        num_workers: N.
        num_groups: G, into how many groups the batch was cut.
        received: the workers whose results were decoded, in increasing order.
        latencies: seconds until each worker that replied or failed had done so, in order.
        rejected: what was wrong with each of them that was not used.
        expected_rmse: the root mean squared error of the answers that the code expects, comparable
            to :func:`coded_torch.metrics.rmse` of the first decoded output; None where it cannot
            tell.
        encode_seconds: time spent on ordering, planning and encoding.
        compute_seconds: time spent on waiting for the workers and checking their results.
        decode_seconds: time spent on decoding and ungrouping.
    """

    num_workers: int
    num_groups: int
    received: tuple[int, ...]
    latencies: Mapping[int, float]
    rejected: Mapping[int, str]
    expected_rmse: float | None
    encode_seconds: float
    compute_seconds: float
    decode_seconds: float

    @property
    def missing(self) -> tuple[int, ...]:
        """The workers whose results were not decoded: late, not waited for, or rejected."""
        return tuple(n for n in range(self.num_workers) if n not in self.received)


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
    finite, or unlike most in structure, shape or dtype, counts as missing, and is named in
    :attr:`last_run`. So mask with a large negative number, or logits after decoding, not with
    ``-inf``: neither can it be coded, nor do results that hold it count.

    Args:
        module: the module; its outputs are floating-point tensors with a batch dimension, and
            plain constants that are the same for every worker, such as None.
        code: the code; it says K and N.
        workers: who computes; by default :class:`~coded_torch.workers.LocalWorkers`.
        stragglers: shorthand for ``workers=LocalWorkers(stragglers, generator=generator)``.
        num_stragglers: S: N - S good results are waited for. By default as many as the law of the
            workers' stragglers makes late; never so many that nothing could be decoded. Where the
            law names no number, or there is none, 0: all that ever reply are waited for, however
            late, so there say S or a deadline.
        deadline: seconds to wait; then what has arrived is decoded. None: until the workers have
            no more to give.
        ordering: in which order the batch is laid out before it is cut into groups of K:
            "similarity", so that neighbours resemble each other; "arrival", as the paper does; a
            permutation of the batch, a sequence or an integer tensor; or a callable that is given
            the coded inputs, a list of ``[B, ...]``, and returns one.
        shuffle: deal the coded inputs to the workers anew for every call, so that neighbouring
            workers that are late together do not lose neighbours on the curve. The wrapper's own
            sequence, the same for every wrapper.
        link: "softmax" where the outputs are probabilities over their last dimension: they are
            decoded on the scale of logits, where they bend least, and come back as probabilities.
        in_dims: as in :func:`torch.func.vmap`, for the positional arguments: the batch dimension
            of each, an integer, None for the same on every worker, or a pytree prefix of such.
            Tensors in keyword arguments are coded along dimension 0. What is not a tensor is the
            same for every worker.
        out_dims: the batch dimension of the outputs, likewise; at None, the result of the first
            worker received is passed through.
        generator: for ``stragglers``; None: the law's own.

    Attributes:
        last_run: the :class:`RunReport` of the call that ended last; None before the first.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: ``stragglers`` or ``generator`` beside ``workers``;
            ``num_stragglers`` negative, or more than the code can lose; ``deadline`` not positive.

    Calling raises:
        TypeError: a tensor to be coded is not floating-point, or an output cannot be decoded.
        ValueError: coded inputs differ in batch size or have not the dimension, there are none, an
            output has not the batch size, or too few good results are due to an input that is not
            finite.
        NotEnoughResults: fewer good results than the code needs; its cause is the error of the
            first worker that had one.

    Note:
        :math:`N / K` times the module's work. The answers depend on which workers were received,
        not on the order in which they replied, bit for bit. An empty batch goes to the module
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
        ordering: Any = "similarity",
        shuffle: bool = True,
        link: str | None = None,
        in_dims: Any = 0,
        out_dims: Any = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for argument, value, kind in (
            ("module", module, nn.Module),
            ("code", code, Code),
            ("workers", workers, Workers),
            ("deadline", deadline, numbers.Real),
        ):
            if not isinstance(value, kind) and (value is not None or kind in (nn.Module, Code)):
                raise TypeError(
                    f"CodedWrapper: {argument} must be of type {kind.__name__}, "
                    f"got {type(value).__name__}"
                )
        for argument, option in (("stragglers", stragglers), ("generator", generator)):
            if workers is not None and option is not None:
                raise ValueError(
                    f"CodedWrapper: {argument} must be given to the workers themselves, "
                    f"got workers and {argument}"
                )
        if deadline is not None and not deadline > 0:
            raise ValueError(f"CodedWrapper: deadline must be positive seconds, got {deadline}")
        self.module = module
        self.code = code
        self.workers = LocalWorkers(stragglers, generator=generator) if workers is None else workers
        self.num_stragglers = self._num_stragglers(num_stragglers)
        self.deadline = deadline
        if link not in (None, "softmax"):
            raise ValueError(f"CodedWrapper: link must be None or 'softmax', got {link!r}")
        self.ordering = ordering
        self.shuffle = shuffle
        self.link = link
        self.in_dims = in_dims
        self.out_dims = out_dims
        self.last_run = None
        self._shuffler = random.Random(0)
        self._warned = False
        self.training = module.training
        self.register_load_state_dict_post_hook(_name_keys)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._warn_of_batch_statistics()
        start = time.perf_counter()
        inputs = _Inputs(args, kwargs, self.in_dims)
        if inputs.batch_size == 0:
            output = self.module(*args, **kwargs)
            spent = time.perf_counter() - start
            self.last_run = RunReport(self.code.num_workers, 0, (), {}, {}, None, 0.0, spent, 0.0)
            return output
        plan = fit_batch(self.code, self.ordering, inputs.rows(), self.num_stragglers)
        task = self._encode(inputs, plan)
        encoded = time.perf_counter()
        ballot = self._compute(task)
        results, rejected = ballot.count()
        received = tuple(result.worker for result in results)
        computed = time.perf_counter()
        expected = None
        try:
            if len(received) < self.code.min_received:
                raise NotEnoughResults(received, self.code.min_received, self.code.num_workers)
            answers, expected = self._decode(results, task, plan)
            return answers
        except NotEnoughResults as error:
            inputs.check_finite()
            raise error from (rejected[0] if rejected else None)
        finally:
            self.last_run = RunReport(
                num_workers=self.code.num_workers,
                num_groups=task.num_groups,
                received=received,
                latencies=ballot.latencies,
                rejected={error.worker: error.reason for error in rejected},
                expected_rmse=expected,
                encode_seconds=encoded - start,
                compute_seconds=computed - encoded,
                decode_seconds=time.perf_counter() - computed,
            )

    def _encode(self, inputs: _Inputs, plan: BatchPlan) -> Task:
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

    def _compute(self, task: Task) -> Ballot:
        ballot, quorum = Ballot(), task.num_workers - self.num_stragglers
        with contextlib.closing(
            self.workers.run(self.module, task, quorum=quorum, deadline=self.deadline)
        ) as replies:
            for reply in replies:
                ballot.add(reply)
                if ballot.agreed >= quorum:
                    break
        return ballot

    def _decode(
        self, results: Sequence[Result], task: Task, plan: BatchPlan
    ) -> tuple[Any, float | None]:
        """The answers, and the error to expect of the first decoded one."""
        results = sorted(results, key=lambda result: task.position(result.worker))
        received = [task.position(result.worker) for result in results]
        spec, answers, expected = results[0].spec, [], None
        output = pytree.tree_unflatten(results[0].leaves, spec)
        dims = broadcast_dims("out_dims", self.out_dims, spec)
        columns = zip(*(result.leaves for result in results), strict=True)
        for i, (dim, column) in enumerate(zip(dims, columns, strict=True)):
            leaf = column[0]
            if dim is None or isinstance(leaf, CONSTANTS):
                answers.append(leaf)
                continue
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"CodedWrapper: {leaf_name('output', output, i)} must be a floating-point "
                    f"tensor to be decoded, got {kind}; return a tensor of logits or scores "
                    "instead, register containers with torch.utils._pytree, or say None in out_dims"
                )
            check_batch(output, i, leaf, dim, task.num_groups)
            stacked = torch.stack([leaf.movedim(dim, 0) for leaf in column])  # [F, G, ...]
            if self.link == "softmax":
                # Of probabilities that are 0 in floating point, no logarithm is left.
                stacked = stacked.clamp(min=torch.finfo(stacked.dtype).tiny).log()
            if expected is None:
                expected = plan.expected_rmse(received, stacked)
            decoded = plan.decode(stacked, received)  # [B, ...]
            if self.link == "softmax":
                decoded = decoded.softmax(dim=-1)
            answers.append(decoded.movedim(0, dim))
        return pytree.tree_unflatten(answers, spec), expected

    def _num_stragglers(self, given: int | None) -> int:
        most = self.code.num_workers - self.code.min_received
        if given is None:
            law = self.workers.stragglers
            return max(0, min(most, (law and law.num_stragglers) or 0))
        try:
            given = operator.index(given)
        except TypeError:
            raise TypeError(
                f"CodedWrapper: num_stragglers must be an integer, got {given!r}"
            ) from None
        if not 0 <= given <= most:
            raise ValueError(
                f"CodedWrapper: num_stragglers must lie in 0..{most}, as {self.code} needs "
                f"{self.code.min_received} results, got {given}"
            )
        return given

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
        return f"{self.code}, {self.workers}, num_stragglers={self.num_stragglers}"


def _name_keys(coded: CodedWrapper, _: Any) -> None:
    """Name missing, unexpected and bad keys as they are in the state dict, without ``module.``."""
    prefix, complaints = vars(coded).pop("_loading")
    pattern = re.compile(rf"(?<![\w.]){re.escape(prefix)}module\.")
    for texts in complaints:
        texts[:] = [pattern.sub(prefix, text) for text in texts]


class _Inputs:
    """The arguments of one call: their leaves, where each has its batch, and its size."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        dims = broadcast_dims("in_dims", in_dims, pytree.tree_structure(args))
        self.num_positional = len(dims)
        dims += [0] * (len(self.leaves) - self.num_positional)
        self.dims = [
            dim if isinstance(leaf, Tensor) else None
            for leaf, dim in zip(self.leaves, dims, strict=True)
        ]
        coded = [(i, self.leaves[i], dim) for i, dim in enumerate(self.dims) if dim is not None]
        if not coded:
            raise ValueError("CodedWrapper: inputs must hold a tensor to be coded, got none")
        for i, leaf, dim in coded:
            if not leaf.is_floating_point():
                raise TypeError(
                    f"CodedWrapper: {self.name(i)} must be floating-point to be coded, got "
                    f"{leaf.dtype}; code what it is turned into instead (the embeddings of "
                    "tokens), or pass it by position with None in in_dims to give every worker "
                    "the same"
                )
            if not -leaf.dim() <= dim < leaf.dim():
                raise ValueError(
                    f"CodedWrapper: {self.name(i)} must have the batch dimension {dim} that "
                    f"in_dims says, got shape {tuple(leaf.shape)}"
                )
        sizes = {i: leaf.shape[dim] for i, leaf, dim in coded}
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{size} in {self.name(i)}" for i, size in sizes.items())
            raise ValueError(f"CodedWrapper: coded inputs must have one batch size, got {got}")
        self.batch_size: int = coded[0][1].shape[coded[0][2]]
        self.device: torch.device = coded[0][1].device

    def name(self, i: int) -> str:
        if i < self.num_positional:
            return leaf_name("args", self.args, i)
        return leaf_name("kwargs", self.kwargs, i - self.num_positional)

    def check_finite(self) -> None:
        """Raise a ValueError if an input that is coded is not finite: it spoils its whole group."""
        for i, dim in enumerate(self.dims):
            bad = [] if dim is None else (~self.leaves[i].isfinite()).nonzero().tolist()
            if bad:
                raise ValueError(
                    f"CodedWrapper: {self.name(i)} must be finite to be coded, "
                    f"got {self.leaves[i][tuple(bad[0])].item()} at {bad[0]}"
                )

    def rows(self) -> list[Tensor]:
        """The coded inputs, ``[B, ...]`` each."""
        return [
            leaf.movedim(dim, 0)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
            if dim is not None
        ]
