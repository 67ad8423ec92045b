r"""A module that runs any other module on coded workers."""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._arguments import instance
from .._transforms import on_host
from .._weights import unchanged
from ..codes.base import Code
from ..input_space.ordering import check_ordering
from ..scheduling.waiting import History, Waiting
from ..surrogates import Memory
from ..workers.base import Workers
from ..workers.local import LocalWorkers
from ._collect import collect, seconds_left
from ._guesses import Guesses, surrogates
from ._inputs import BLIND, Inputs
from ._residuals import alone, answer
from ._results import Results, Stacked
from ._shortfall import shortfall
from ._stand_in import StandIn
from ._units import Columns, Rows, Units, check_waiting, most_stragglers
from .report import Report

if TYPE_CHECKING:
    from ..stragglers import Stragglers

__all__ = ["CodedWrapper"]

_AT_ONCE, _AS_NEEDED = Waiting.first(), Waiting()


class CodedWrapper(StandIn):
    r"""Run a module on unreliable workers: exact answers from those in time, the rest predicted.

    The batch is asked for in parts, and :class:`Waiting` says when one is asked for again and when
    to wait no longer. There are two ways to divide a batch:

    - With ``Waiting()`` and a code that only repeats inputs, by *rows*: each is computed once,
      exactly as by the module, and what is missing in the end is predicted from the others.
    - Else by the *columns* of the code. The batch is put in order and cut into groups :math:`X` of
      K inputs; column n holds one coded input of every group. With the code's encoder :math:`E`
      (N x K) and, for the received set :math:`F`, its decoder :math:`D_F` (K x \|F\|), a group is
      answered by

      .. math:: D_F \, [\, f(E_n X) \,]_{n \in F},

      exactly :math:`f(X)` where the code is exact, else close to it; codes that look at the whole
      batch decode all groups together. The last group is filled up with copies of its last input.
      With ``Waiting()``, N - S columns are asked for first, S being the number that the law of the
      workers loses, and 0 where there is none; with ``Waiting.first(S)`` all N, and the call ends
      with the first N - S results.

    Answers come back in the caller's order. :attr:`last_run` says which of them were predicted.

    The wrapper stands in for the module: the keys of its state dict are those of the module, and
    ``train``, ``to``, hooks, autograd, autocast, pickling and deep copies work as they do for it.
    The names of its parameters begin with ``module.``, so :func:`torch.func.functional_call` takes
    ``dict(coded.named_parameters())``, not the state dict; state-dict hooks belong to the module.
    ``torch.compile(coded)`` and ``coded.compile()`` compile the module and leave the rest to
    Python; the former with default options, and both for workers in this process only.

    Tensors of the inputs and outputs may be nested in any pytree. A result that is an error, not
    finite, of another batch size, or unlike most in structure, shape or dtype, counts as missing,
    and is named in :attr:`last_run`. So mask logits with a large negative number, not ``-inf``.
    Codes that only repeat inputs compute a row with NaN or infinity, too. Where its result is
    missing, it gets the mean of the others and an infinite expected error.

    Args:
        module: the module; its outputs are floating-point tensors with a batch dimension, and
            plain constants that are the same for every part, such as None. Of codes that only
            repeat inputs, tensors of other dtypes too, which are never predicted.
        code: the code; it says K and N. Codes that only repeat inputs
            (:class:`~coded_torch.codes.KernelCode`, :class:`~coded_torch.codes.ReplicationCode`)
            take integer and boolean tensors too; codes that mix inputs need floating-point ones.
        workers: the pool that computes; by default :class:`~coded_torch.workers.LocalWorkers`.
        stragglers: shorthand for ``workers=LocalWorkers(stragglers)``.
        waiting: what to ask for, when, and when to stop. None: :class:`Waiting` on real machines,
            and ``Waiting.first()`` where time is simulated
            (:class:`~coded_torch.workers.LocalWorkers`), as in the paper's experiments.
        ordering: in which order the batch is laid out before it is cut into groups of K:
            "similarity", so that neighbours resemble each other; "arrival", as the paper does; a
            permutation of the batch, a sequence or an integer tensor; or a callable that is given
            the floating-point inputs, a list of ``[B, ...]``, and returns one.
        shuffle: ask for the columns in an order drawn anew for every call, so that neighbouring
            machines that are late together do not lose neighbours on the curve. The orders come
            from one fixed seed, the same for every wrapper. A ``random.Random`` brings its own.
        link: "softmax" where all outputs are probabilities over their last dimension: they are
            decoded on the scale of logits, where they bend least, and come back as probabilities.
            The report has no expected errors then, as their units would be those of logits.
        surrogate: cheap approximations of the module, one or a sequence: callables of its inputs
            whose outputs are like its own, such as a smaller network that was taught to imitate it
            (:func:`coded_torch.surrogates.distill`). Where something has to be predicted, they are
            asked, and what the code decodes is what they leave of the results; a useless one costs
            next to nothing, as their weights are fitted to the results that arrived. They run in
            this process, where the batch is, without gradients, and in the mode that they are in.
            A :class:`~coded_torch.surrogates.Memory` learns from exact answers, after each call.
        in_dims: as in :func:`torch.func.vmap`, for the positional arguments: the batch dimension
            of each, an integer; "shared" or None for what is meant for the whole batch; or a
            pytree prefix of such. A tensor that is given as None and has the batch size along its
            first dimension is refused: say "shared" if it is meant for all. Tensors in keyword
            arguments are divided along dimension 0. What is not a tensor is shared; arrays and
            lists of numbers that look like one entry an input are refused.
        out_dims: the batch dimension of the outputs, likewise; at None, the result of the part
            asked first is passed through.

    Attributes:
        last_run: the :class:`Report` of the call that ended last, even by an error; None before
            the first. Where several threads call, :meth:`run` returns each its own.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: ``stragglers`` beside ``workers``; ``waiting`` for more stragglers than the code
            can lose; another name of ``ordering`` or ``link``.

    Calling raises:
        TypeError: a tensor cannot be coded, or no part's output can be decoded.
        ValueError: inputs differ in batch size, have not the dimension, are mixed and not finite,
            or there are none; no part's output has the batch size or, with ``link``, probabilities.
        NotEnoughResults: fewer good results than the code needs, or than ``waiting`` asks for; its
            cause is the error of the first part that had one. A
            :class:`~coded_torch.codes.DeadlineExceeded` at the deadline.
        Exception: of the module, where it fails on a row on two workers alike. Its ``rows``,
            ``answers`` (NaN in rows that were not computed) and ``report`` say what came.

    Note:
        By rows, the module's own work and what is asked for again; by columns, up to :math:`N / K`
        times the module's work. The answers depend on which results were received, not on the order
        in which they came: the same results give the same bits. (The results themselves may differ
        in their last bits where the module was run on batches of other sizes.) An empty batch goes
        to the module itself.

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

    last_run: Report | None

    def __init__(
        self,
        module: nn.Module,
        code: Code,
        *,
        workers: Workers | None = None,
        stragglers: Stragglers | None = None,
        waiting: Waiting | None = None,
        ordering: Any = "similarity",
        shuffle: bool | random.Random = True,
        link: str | None = None,
        surrogate: Any = (),
        in_dims: Any = 0,
        out_dims: Any = 0,
    ) -> None:
        instance(self, "module", module, nn.Module)
        super().__init__(module)
        instance(self, "code", code, Code)
        instance(self, "workers", workers, Workers, optional=True)
        if not isinstance(shuffle, random.Random):
            instance(self, "shuffle", shuffle, bool)
        if workers is not None and stragglers is not None:
            raise ValueError(
                "CodedWrapper: stragglers must be given to the workers themselves, "
                "got workers and stragglers"
            )
        instance(self, "link", link, str, optional=True)
        if link not in (None, "softmax"):
            raise ValueError(f"CodedWrapper: link must be None or 'softmax', got {link!r}")
        check_ordering(self, ordering)
        self.code = code
        self.workers = LocalWorkers(stragglers) if workers is None else workers
        self._check_waiting(waiting)
        self.waiting = waiting
        self.ordering = ordering
        self.shuffle = shuffle
        self.link = link
        self.surrogate = surrogates(surrogate)
        if self.surrogate and code.mixes:
            # Measured on two networks in ten settings: with a student, mixtures decoded this way
            # have more error than the student alone in seven (issue 28, section 2).
            raise ValueError(
                "CodedWrapper: surrogate must be left out with a code that mixes inputs, as the "
                f"surrogate alone errs less than what is decoded with its help, got one with {code}"
            )
        self.in_dims, self.out_dims = in_dims, out_dims
        self.last_run = None
        self._history, self._dealer = History(), random.Random(0)
        self._form: Stacked | None = None  # of the last results, for surrogates that answer alone

    def run(self, *args: Any, waiting: Waiting | None = None, **kwargs: Any) -> tuple[Any, Report]:
        """Answer, or raise, as a call does, and return the report of this very call beside.

        Args:
            args, kwargs: what the module is called with. Hooks of the wrapper do not run.
            waiting: for this call; None: as for every call.
        """
        self._check_waiting(waiting)
        report = Report()
        return self._call(self.module, report, waiting, args, kwargs), report

    def replace(self, **changes: Any) -> CodedWrapper:
        """Return another wrapper, made with other values for some arguments of the constructor."""
        if "stragglers" in changes:
            changes.setdefault("workers", None)
        names = inspect.signature(CodedWrapper).parameters.keys() - {"stragglers", *changes}
        return CodedWrapper(**{name: getattr(self, name) for name in names}, **changes)

    def _forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        report = Report()
        try:
            return self._call(module, report, None, args, kwargs)
        finally:
            self.last_run = report

    def _call(
        self,
        module: Any,
        report: Report,
        waiting: Waiting | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The answers; what goes into the report is put there as soon as it is known."""
        start = time.perf_counter()
        self._warn_of_batch_statistics()
        waiting = waiting or self._waiting()
        with report.timed("encode"), on_host():
            inputs = Inputs(args, kwargs, self.in_dims, self.code)
            units = self._divide(inputs, waiting) if inputs.batch_size else None
        if units is None:
            with report.timed("compute"):
                answers = module(*args, **kwargs)
            report.note_exact(0)
        else:
            with unchanged():  # a memory and a pool look at the weights
                answers = self._compute(module, waiting, inputs, units, report, start)
        report.failed = False
        return answers

    def _compute(
        self,
        module: Any,
        waiting: Waiting,
        inputs: Inputs,
        units: Units,
        report: Report,
        since: float,
    ) -> Any:
        pool = self.workers
        results = Results(units.task, self.link, units.not_finite, carries=not self.code.mixes)
        guesses = Guesses(self.surrogate, inputs, units, self.link, report)
        generations = [s.follow(self.module) for s in self.surrogate if isinstance(s, Memory)]
        left = functools.partial(seconds_left, pool, waiting, since)
        with report.timed("compute"):
            collected = collect(
                pool,
                module,
                waiting,
                self._history,
                units,
                results,
                report,
                since=since,
            )
        with report.timed("decode"), on_host():
            error = shortfall(waiting, units, results, report, collected)
            stacked = results.stack() if results.good else self._form
            if error is not None:
                return alone(waiting, units, stacked, guesses, self.link, report, error)
            assert stacked is not None
            if self.surrogate:
                self._form = stacked.form()
            whole = units.is_whole(stacked.units)
            chunk = 0 if whole else units.hasten(left(), self._history, report)
            answers = answer(inputs, units, stacked, guesses, self.link, report, generations)
        if chunk and not pool.simulated:
            self._history.decoded(report.decode_seconds, units.batch_size, chunk)
        report.warn(collected.why)
        return answers

    def _divide(self, inputs: Inputs, waiting: Waiting) -> Units:
        check_ordering(self, self.ordering)  # it may have been assigned
        if inputs.blind and waiting.predict and not self.surrogate:
            self._warn_once(BLIND)
        if not (waiting.at_once or self.code.mixes):
            return Rows(inputs, self.code, self.ordering, self.workers.num_machines, self.out_dims)
        return Columns(
            inputs,
            self.code,
            self.ordering,
            num_stragglers=self._num_stragglers(waiting),
            dealer=self._deal(),
            all_at_once=waiting.at_once,
            out_dims=self.out_dims,
        )

    def _deal(self) -> random.Random | None:
        """Return what the order of asking is drawn from."""
        if isinstance(self.shuffle, random.Random):
            return self.shuffle
        return self._dealer if self.shuffle else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedWrapper:
        """Surrogates go where the module goes, though they are none of its parts."""
        for surrogate in self.surrogate:
            if isinstance(surrogate, nn.Module):
                surrogate._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _is_local(self) -> bool:
        return self.workers.simulated  # others run replicas, or copies in other processes

    def _waiting(self) -> Waiting:
        """The policy in force for calls that bring none of their own."""
        if self.waiting is not None:
            return self.waiting
        return _AT_ONCE if self.workers.simulated else _AS_NEEDED

    def _num_stragglers(self, waiting: Waiting) -> int:
        """S, for the code and the workers that are there now."""
        lost = waiting.num_stragglers
        if lost is None:
            law = self.workers.stragglers
            lost = (law and law.num_stragglers) or 0
        return max(0, min(lost, most_stragglers(self.code)))

    def _check_waiting(self, waiting: Waiting | None) -> None:
        instance(self, "waiting", waiting, Waiting, optional=True)
        check_waiting(self.code, waiting)

    def extra_repr(self) -> str:
        return f"{self.code}, {self.workers}, waiting={self._waiting()}"
