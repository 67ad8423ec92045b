r"""A module that runs any other module on unreliable workers."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._arguments import instance
from .._transforms import on_host
from .._weights import unchanged
from ..codes.base import Code
from ..input_space.regression import Regression
from ..scheduling.latency_history import CHUNKS, History
from ..scheduling.waiting import Waiting
from ..workers.base import Workers
from ..workers.local import LocalWorkers
from .call_errors import error_of, holding
from .division import Columns, Division, Rows
from .execute import execute, seconds_left
from .inputs import Inputs
from .module_proxy import ModuleProxy
from .predict_missing import Surrogates, answer, answer_alone, checked_surrogates
from .report import Report
from .result_checks import Results, Stacked
from .settings import check_settings, check_waiting
from .verify import Check, Verifier

__all__ = ["CodedWrapper"]

_BLIND = (
    "no input is floating-point, so there are no distances, and missing answers are predicted by "
    "the mean of the others; give a callable, such as predictor=Regression(metric=features), that "
    "makes features such as pooled embeddings, or give the wrapper a surrogate"
)
_CHECKED = ("code", "workers", "waiting", "parts", "predictor", "surrogate", "verify")


class CodedWrapper(ModuleProxy):
    r"""Run a module on unreliable workers.

    Answers from workers that reply in time are exact. The rest are predicted. There are two uses:

    - Without a code, the batch is divided by *rows*: each is computed once, late parts are hedged,
      and the rows that are missing in the end are predicted from the others by ``predictor``.
    - With a code, the batch is divided by *columns*. The batch is put in order and cut into groups
      :math:`X` of K inputs; column n holds one coded input of every group. With the code's encoder
      :math:`E` (N x K) and, for the received set :math:`F`, its decoder :math:`D_F` (K x \|F\|), a
      group is answered by

      .. math:: D_F \, [\, f(E_n X) \,]_{n \in F}.

      With ``Waiting.first(S)``, the default, all N columns are asked at once, and the call ends
      with the first N - S results. With ``Waiting()``, N - S columns are asked first, and the other
      S stand in for late ones.

    Answers come back in the caller's order.

    The wrapper stands in for the module: ``state_dict``, ``train``, ``to``, hooks, autograd,
    autocast, pickling and deep copies work as they do for it. The names of its parameters begin
    with ``module.``. Compiling the wrapper compiles the module, for workers in this process only.

    Tensors of the inputs and outputs may be nested in any pytree. A result that is an error, not
    finite, of another batch size, or unlike most in structure, shape or dtype, counts as missing
    and is rejected: mask logits with a large negative number, not ``-inf``. By rows, and with codes
    that repeat inputs, rows with NaN or infinity are computed, too; if the result of such a row is
    missing, its answer is the mean of the others, with an infinite expected error.

    Args:
        module: the module; its outputs are floating-point tensors with a batch dimension, and
            plain constants that are the same for every part. By rows, and with codes that repeat
            inputs, tensors of other dtypes too, which are never predicted.
        code: the code. Codes that mix inputs need floating-point ones. Defaults to None: by rows.
        workers: the pool that computes. Defaults to :class:`~coded_torch.workers.LocalWorkers` with
            a code; required without one.
        waiting: what to ask for, when, and when to stop. Defaults to ``Waiting.first()`` with a
            code, and ``Waiting()`` without one.
        parts: the number of parts that a batch is divided into by rows. Defaults to one for each
            worker; required for ``LocalWorkers``, which has no number of workers.
        predictor: predicts missing rows. Defaults to ``Regression()``.
        surrogate: cheap approximations of the module, one or a sequence: callables of its inputs
            whose outputs are like its own, such as a smaller network
            (:func:`coded_torch.surrogates.distill`), or a
            :class:`~coded_torch.surrogates.Memory`, which learns from exact answers. If something
            is missing, their residuals are predicted; a surrogate that does not help gets weight 0.
            They run in this process, where the batch is, without gradients. Defaults to none;
            refused with codes that mix inputs.
        verify: the share of rows, such as 0.02, that a second worker computes, to find workers that
            return wrong results: these are corrected, and such workers excluded. By rows, on pools
            of at least three workers; with two, disputes are only reported. Defaults to None, none.
        in_dims: as in :func:`torch.func.vmap`, for the positional arguments: the batch dimension
            of each, an integer; "shared" or None for a value that is meant for the whole batch; or
            a pytree prefix of such. A tensor that is given as None and has the batch size along
            its first dimension is refused: say "shared" if it is meant for all. Tensors in keyword
            arguments are divided along dimension 0. Defaults to 0.
        out_dims: the batch dimension of the outputs, in the same form; at None, the result of the
            part asked first is passed through. Defaults to 0.

    Attributes:
        last_run: the :class:`Report` of the call that ended last, even by an error; None before
            the first. If several threads call, :meth:`run` returns each its own.

    The arguments are attributes. An assigned value is checked; a new pool or module begins with an
    empty history of latencies.

    Raises:
        TypeError, ValueError: an argument is of another kind than said, or does not fit others.

    Calling raises:
        TypeError: a tensor cannot be coded, or no part's output can be decoded.
        ValueError: inputs differ in batch size, have not the dimension, are mixed and not finite,
            or there are none; no part's output has the batch size or, with ``link``, probabilities.
        NotEnoughResults: fewer good results than the code needs, or than ``waiting`` asks for; its
            cause is the error of the first part that had one. A
            :class:`~coded_torch.codes.DeadlineExceeded` at the deadline.
        Exception: of the module, if it fails on a row on two workers alike. Its ``rows``,
            ``answers`` (NaN in rows that were not computed) and ``report`` say what came.

    Note:
        By rows, the module's own work and the hedges; by columns, up to :math:`N / K` times the
        module's work. The same results give the same bits, in whatever order they came. An empty
        batch goes to the module itself.

    Reference:
        Moradi, Tahmasebi, Maddah-Ali, "Coded Computing for Resilient Distributed Computing: A
        Learning-Theoretic Framework", NeurIPS 2024, arXiv:2406.00300.

    Example:
        >>> import torch
        >>> from coded_torch import CodedWrapper, codes, stragglers, workers
        >>> double = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(double.weight, 2.0)
        >>> pool = workers.LocalWorkers(stragglers.Uniform(2))
        >>> coded = CodedWrapper(double, codes.ReplicationCode(2, 6), workers=pool)
        >>> coded(torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist()
        [2.0, 4.0, 6.0]
        >>> len(coded.last_run.received), len(coded.last_run.missing), coded.last_run.num_groups
        (4, 2, 2)
    """

    code: Code | None
    workers: Workers
    last_run: Report | None

    def __init__(
        self,
        module: nn.Module,
        code: Code | None = None,
        *,
        workers: Workers | None = None,
        waiting: Waiting | None = None,
        parts: int | None = None,
        predictor: Regression | None = None,
        surrogate: Any = (),
        verify: float | None = None,
        in_dims: Any = 0,
        out_dims: Any = 0,
    ) -> None:
        instance(self, "module", module, nn.Module)
        super().__init__(module)
        if workers is None:
            if code is None:
                raise ValueError("CodedWrapper: workers must be given without a code, got None")
            workers = LocalWorkers()
        self.code, self.workers, self.waiting = code, workers, waiting
        self.parts, self.predictor, self.surrogate = parts, predictor, surrogate
        self.verify = verify
        self.in_dims, self.out_dims = in_dims, out_dims
        self.last_run = None
        self._dealer = random.Random(0)
        self._form: Stacked | None = None  # of the last results, for surrogates that answer alone
        check_settings(self)
        self._is_made = True
        self._verifier = Verifier(self.workers, verify) if verify else None

    def run(self, *args: Any, waiting: Waiting | None = None, **kwargs: Any) -> tuple[Any, Report]:
        """Return the answers and the report of a call with its own policy; hooks do not run."""
        check_waiting(self.code, waiting)
        report = Report()
        return self._call(self.module, report, waiting, args, kwargs), report

    def replace(self, **changes: Any) -> CodedWrapper:
        """Return another wrapper, made with other values for some arguments of the constructor."""
        names = inspect.signature(CodedWrapper).parameters.keys() - changes.keys()
        return CodedWrapper(**{name: getattr(self, name) for name in names}, **changes)

    # One call.

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
        """Return the answers; the report is written as soon as something is known."""
        since = time.perf_counter()
        if self.training:
            self._warn_of_batch_statistics()
        waiting = waiting or self._waiting()
        with report.timed("encode"), on_host():
            mixing = self.code if self.code is not None and self.code.mixes else None
            inputs = Inputs(args, kwargs, self.in_dims, mixing)
            if inputs.batch_size:
                division, reserve = self._divide(inputs, waiting, since)
        if inputs.batch_size:
            with unchanged():  # a memory and a pool look at the weights
                answers = self._compute(module, waiting, inputs, division, report, since, reserve)
        else:
            with report.timed("compute"):
                answers = module(*args, **kwargs)
            report.note_exact(0)
        report.failed = False
        return answers

    def _divide(self, inputs: Inputs, waiting: Waiting, since: float) -> tuple[Division, float]:
        """Return the parts of a batch, and the seconds to keep for predictions."""
        code, pool = self.code, self.workers
        reserve, by_distances = 0.0, code is None or code.uses_geometry
        chunk = CHUNKS[0]
        if by_distances:
            left = seconds_left(pool, waiting, since)
            chunk, reserve = self._history.predictions.reserve(inputs.batch_size, left)
            if waiting.predict and not self.surrogate and not inputs.floating():
                metric = getattr(code or self.predictor, "metric", None)
                if not any(map(callable, metric if isinstance(metric, list | tuple) else [metric])):
                    self._warn_once(_BLIND)
        division: Division
        if code is None:
            parts = self.parts or pool.num_workers or 1
            predictor = self.predictor or _PREDICTOR
            division = Rows(inputs, predictor, chunk=chunk, parts=parts, out_dims=self.out_dims)
        else:
            dealer: Any = self._dealer if code.shuffle is True else code.shuffle or None
            division = Columns(
                inputs,
                code,
                num_stragglers=self._num_stragglers(code, waiting),
                all_at_once=waiting.at_once,
                dealer=dealer,
                out_dims=self.out_dims,
            )
        return division, reserve

    def _compute(
        self,
        module: Any,
        waiting: Waiting,
        inputs: Inputs,
        division: Division,
        report: Report,
        since: float,
        reserve: float,
    ) -> Any:
        link = (self.code or self.predictor or _PREDICTOR).link
        carries = self.code is None or not self.code.mixes
        results = Results(division.task, link, division.not_finite, carries=carries)
        surrogates = Surrogates(self.surrogate, inputs, link, report, self.module)
        with report.timed("compute"):
            executed = execute(
                self.workers,
                module,
                waiting,
                self._history,
                division,
                results,
                report,
                since=since,
                reserve=reserve,
                check=Check(self._verifier, inputs) if self._verifier is not None else None,
            )
            surrogates.learn_owners(executed.owners)
        with report.timed("decode"), on_host():
            error = error_of(waiting, division, results, report, executed)
            stacked = results.stack() if results.good else self._form
            if error is not None:
                return answer_alone(waiting, division, stacked, surrogates, report, error)
            assert stacked is not None
            if self.surrogate:
                self._form = stacked.form()
            if isinstance(division, Rows) and not division.is_whole(stacked.units):
                left = seconds_left(self.workers, waiting, since)
                if note := division.keep_deadline(left, self._history.predictions):
                    report.notes += (note,)
            try:
                answers = answer(inputs, division, stacked, surrogates, report)
            except Exception as raised:  # of the caller's code: the answers that came are in it
                holding(raised, division, results, report)
                raise
        # On a simulated clock, predictions take no time.
        timed = not self.workers.simulated and not division.is_whole(stacked.units)
        if timed and isinstance(division, Rows):
            seconds, size = report.decode_seconds, division.batch_size
            self._history.predictions.add(seconds, size, division.chunk)
        report.warn(executed.why)
        return answers

    # Settings.

    def __setattr__(self, name: str, value: Any) -> None:
        before: Any = vars(self).get(name)
        if name == "surrogate":
            value = checked_surrogates(value)
        super().__setattr__(name, value)
        if name in _CHECKED and "_is_made" in vars(self):
            try:
                check_settings(self)
            except (TypeError, ValueError):
                super().__setattr__(name, before)
                raise
        if name in ("workers", "module"):
            self._history = History()  # of this module on this pool
        if name in ("workers", "module", "verify") and "_is_made" in vars(self):
            self._verifier = Verifier(self.workers, self.verify) if self.verify else None

    def _waiting(self) -> Waiting:
        """Return the policy in force for calls that bring none of their own."""
        if self.waiting is not None:
            return self.waiting
        return _AS_NEEDED if self.code is None else _AT_ONCE

    def _num_stragglers(self, code: Code, waiting: Waiting) -> int:
        """Return S, for the code and the pool in force."""
        lost = waiting.num_stragglers
        if lost is None:
            law = self.workers.stragglers
            lost = (law and law.num_stragglers) or 0
        return max(0, min(lost, code.num_workers - code.min_received))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedWrapper:
        """Move surrogates along with the module, though they are not its submodules."""
        for surrogate in self.surrogate:
            if isinstance(surrogate, nn.Module):
                surrogate._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _is_local(self) -> bool:
        return self.workers.simulated

    def extra_repr(self) -> str:
        how = f"parts={self.parts}" if self.code is None else str(self.code)
        return f"{how}, {self.workers}, waiting={self._waiting()}"


_AT_ONCE, _AS_NEEDED, _PREDICTOR = Waiting.first(), Waiting(), Regression()
