r"""Turns results into answers: missing ones are predicted, with the help of surrogates.

Decoders are linear, so with any approximation s of the module f they may decode residuals:
:math:`s(x) + D_F\,[\,f(z) - s(z)\,]`, with an error that follows the variation of f - s. An answer
that is an input's own result stays that result, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._logging import sparing_logger
from .._transforms import as_called, outside, plain
from .._weights import device_of
from ..codes.plans import BatchPlan, NotEnoughResults
from ..input_space.coverage import ErrorBars
from ..input_space.regression import RowPlan
from ..input_space.selection import few_columns
from ..surrogates import Memory
from ..workers.pytrees import flatten, show, unflatten
from .result_checks import Stacked, decodable

if TYPE_CHECKING:
    from ..scheduling.waiting import Waiting
    from .division import Division, Inputs
    from .report import Report

__all__ = ["Surrogates", "answer", "answer_alone", "checked_surrogates"]

logger = sparing_logger("coded_torch.nn")

_RIDGE = 1.001  # of the surrogates' own squares, so that equal ones share their weight
_ROWS = 4096  # results that determine weights: more cost time and change no weight noticeably
# A surrogate is used if it explains more than six times the squares that one of noise explains on
# average: none of noise is used then (benchmarks/surrogates.py, "useless").
_CHANCE = 6


def checked_surrogates(given: Any) -> tuple[Any, ...]:
    """Return one surrogate or several as a tuple: as an attribute, a module would be a submodule.

    Raises:
        TypeError: they are neither callables nor memories.
    """
    several = tuple(given) if isinstance(given, list | tuple) else (given,)
    for surrogate in several:
        if not (callable(surrogate) or isinstance(surrogate, Memory)):
            raise TypeError(
                "CodedWrapper: surrogate must be a callable of the module's inputs, a Memory, or a "
                f"list of such, got {type(surrogate).__name__}"
            )
    return several


class Surrogates:
    """The surrogates in one call; they are asked only if something is missing."""

    def __init__(
        self,
        surrogates: Sequence[Any],
        inputs: Inputs,
        link: str | None,
        report: Report,
        module: nn.Module,
    ) -> None:
        self.each = surrogates
        self.link = link
        self._inputs, self._report = inputs, report
        self.owners: Tensor | None = None
        # Since before results are computed: they are not remembered if the module changes then.
        self._memories = [(s, s.follow(module)) for s in surrogates if isinstance(s, Memory)]

    def outputs(self, stacked: Stacked) -> list[list[Tensor | None]]:
        """Return the outputs of each surrogate, on the scale on which results are decoded.

        Returns:
            For each surrogate and leaf ``[B, ...]``; None if the leaf is not decoded, or the
            surrogate failed, which is logged. Only a lack of memory is raised, as all suffer by it.
        """
        found: list[list[Tensor | None]] = []
        for number, surrogate in enumerate(self.each):
            try:
                if isinstance(surrogate, Memory):
                    found.append(self._remembered(surrogate, stacked))
                else:
                    found.append(self._computed(surrogate, stacked))
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # of the caller's code
                name = getattr(surrogate, "__name__", type(surrogate).__name__)
                what = "".join(str(error).splitlines()[:1])
                note = f"surrogate {number} ({name}) was left out: {type(error).__name__}: {what}"
                logger.warning("%s", note, exc_info=True)
                self._report.notes += (note,)
                found.append([None] * len(stacked.leaves))
        return found

    def _remembered(self, memory: Memory, stacked: Stacked) -> list[Tensor | None]:
        divided = [plain("Memory", "leaf", leaf) for leaf in self._inputs.floating()]
        with outside():
            predicted = iter((divided and memory.predict(divided)) or ())
        outputs: list[Tensor | None] = []
        for result, dim in zip(stacked.leaves, stacked.dims, strict=True):
            output = next(predicted, None) if decodable(result, dim) else None
            if output is not None:
                fits = output.shape[1:] == result.shape[2:]
                output = _levelled(output, self._inputs.not_finite) if fits else None
            outputs.append(output)
        return outputs

    def _computed(self, surrogate: Any, stacked: Stacked) -> list[Tensor | None]:
        """Run a surrogate.

        Raises:
            ValueError: its outputs have not the form of the module's.
        """
        device = device_of(surrogate)  # it went with the wrapper, and the batch may be on the host

        def number(leaf: Tensor) -> Tensor:
            return plain("surrogate", "input", leaf).to(device or leaf.device)

        inputs = self._inputs
        args, kwargs = pytree.tree_map_only(Tensor, number, (inputs.args, inputs.kwargs))
        with torch.no_grad(), outside():
            with as_called():
                leaves, spec = flatten(surrogate(*args, **kwargs))
            if spec != stacked.spec:
                raise ValueError(f"it returned {spec}, where the module returned {stacked.spec}")
            return [
                self._checked(leaf, result, dim) if decodable(result, dim) else None
                for leaf, result, dim in zip(leaves, stacked.leaves, stacked.dims, strict=True)
            ]

    def _checked(self, leaf: Any, result: Tensor, dim: Any) -> Tensor:
        shape = (self._inputs.batch_size, *result.shape[2:])
        fits = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == len(shape)
        if not fits or (leaf := leaf.movedim(dim, 0)).shape != shape:
            raise ValueError(f"it returned {show(leaf)}, where {shape} is decoded")
        output = _to_scale(_levelled(leaf, self._inputs.not_finite), self.link).to(result.device)
        if not bool(output.isfinite().all()):
            raise ValueError("it returned values that are not finite")
        return output

    def learn_owners(self, owners: Tensor | None) -> None:
        """Note the workers of all rows, ``[B]``, -1 in doubt; memories forget excluded ones."""
        self.owners = owners
        for worker in self._report.excluded:
            self._memories = [(m, m.forget(worker, at)) for m, at in self._memories]

    def remember(self, answers: Sequence[Tensor], exact: Tensor) -> None:
        """Have memories learn the rows of answers, ``[B, ...]`` each, that are exact."""
        if self.owners is not None:
            exact = exact & (self.owners >= 0)
        if not self._memories or not bool(exact.any()):
            return

        def rows(leaf: Tensor) -> Tensor:
            leaf = plain("Memory", "leaf", leaf)
            return leaf if bool(exact.all()) else leaf[exact.to(leaf.device)]

        with outside():
            inputs = [rows(leaf) for leaf in self._inputs.floating()]
            outputs = [_to_scale(rows(leaf), self.link) for leaf in answers]
            owners = None if self.owners is None else self.owners[exact]
            for memory, generation in self._memories:
                memory.observe(inputs, outputs, generation, workers=owners)


class _Output(NamedTuple):
    """One output, decoded."""

    answers: Tensor  # [B, ...]
    bars: ErrorBars | None  # None if the code has none
    weights: tuple[float, ...] = ()  # of each surrogate


def answer(
    inputs: Inputs,
    division: Division,
    stacked: Stacked,
    surrogates: Surrogates,
    report: Report,
    coverage: float,
) -> Any:
    """Return the answers of one call, in the structure that the module gives them."""
    received, size = stacked.units, division.batch_size
    plan: BatchPlan | RowPlan | None = None
    source = torch.arange(size)
    if not division.is_whole(received):  # else the results are the answers, and nothing is fitted
        plan = division.plan()
        source = plan.source(received)
    report.predicted = predicted = source < 0
    odd = inputs.not_finite
    known = ~predicted if odd is None else ~predicted & ~odd
    helped = bool(surrogates.each) and bool(predicted.any())
    outputs_of = surrogates.outputs(stacked) if helped else []
    answers: list[Any] = []
    outputs: list[_Output] = []
    choices = []
    for i, (leaf, dim) in enumerate(zip(stacked.leaves, stacked.dims, strict=True)):
        if dim is None or not isinstance(leaf, Tensor):
            answers.append(leaf)
            continue
        if plan is None:
            output = _Output(leaf.squeeze(1), ErrorBars(size))
        elif not decodable(leaf, dim):
            rows = leaf.flatten(0, 1)[source.to(leaf.device)]
            output = _Output(rows, ErrorBars(size))
        else:
            guesses = [guesses[i] for guesses in outputs_of]
            output = _decode(
                leaf,
                plan,
                division,
                received,
                source,
                guesses,
                surrogates.link,
                bars=not outputs,
            )
            if odd is not None:  # nothing is known of their distances
                rows = leaf.flatten(0, 1)
                mean = rows[source[known].to(rows.device)].mean(0)
                output = output._replace(answers=_filled(output.answers, predicted & odd, mean))
            choices.append(plan.choices)
        outputs.append(output)
        moved = output.answers.movedim(0, dim)
        answers.append(moved.contiguous(memory_format=stacked.formats[i]))
    if plan is not None and plan.note:  # the plan has been used, and knows now
        report.notes = (plan.note, *report.notes)
    report.distances = tuple(
        dataclasses.replace(choice, output=i) for i, some in enumerate(choices) for choice in some
    )
    if outputs and (bars := outputs[0].bars) is not None:
        if odd is not None:
            bars.lose(predicted & odd)
        report.note_bars(bars, coverage, surrogates.link)
    if outputs_of:
        report.surrogate_weights = tuple(output.weights for output in outputs)
    floating = [output.answers for output in outputs if output.answers.is_floating_point()]
    surrogates.remember(floating, known)
    return unflatten(answers, stacked.spec)


def answer_alone(
    waiting: Waiting,
    division: Division,
    stacked: Stacked | None,
    surrogates: Surrogates,
    report: Report,
    error: Exception,
) -> Any:
    """Return a surrogate's answers for missing rows if there are too few results to predict from.

    If no surrogate can, or may, answer, ``error`` is raised. ``stacked`` holds the results that
    came, or the form of earlier ones; None if there are none.
    """
    blamed = report.refused and waiting.on_error == "raise"
    may = division.by_rows and waiting.predict and not blamed
    if stacked is None or not may or not isinstance(error, NotEnoughResults):
        raise error
    divided = [
        i
        for i, (leaf, dim) in enumerate(zip(stacked.leaves, stacked.dims, strict=True))
        if dim is not None and isinstance(leaf, Tensor)
    ]
    each = enumerate(surrogates.outputs(stacked))
    able = (x for x in each if all(x[1][i] is not None for i in divided))
    if (first := next(able, None)) is None:
        raise error
    number, outputs = first
    answers, received = list(stacked.leaves), list(stacked.units)
    for i in divided:
        leaf, output, dim = stacked.leaves[i], outputs[i], stacked.dims[i]
        assert output is not None
        assert dim is not None
        output = _from_scale(output, surrogates.link).to(leaf.device, leaf.dtype)
        # A copy: the surrogate may return a tensor that it keeps, or the inputs themselves.
        whole = output.clone(memory_format=torch.contiguous_format)
        if received:
            whole[received] = leaf.squeeze(1)
        answers[i] = whole.movedim(0, dim).contiguous(memory_format=stacked.formats[i])
    report.predicted = torch.ones(division.batch_size, dtype=torch.bool)
    report.predicted[received] = False
    name = type(surrogates.each[number]).__name__
    report.notes += (f"surrogate {number} ({name}) answered alone: {error}",)
    return unflatten(answers, stacked.spec)


def _decode(
    results: Tensor,
    plan: BatchPlan | RowPlan,
    division: Division,
    received: Sequence[int],
    source: Tensor,
    guesses: Sequence[Tensor | None],
    link: str | None,
    *,
    bars: bool,
) -> _Output:
    """Decode one output, ``[F, R, ...]``, with the outputs of the surrogates, ``[B, ...]``.

    Error bars are found only if ``bars``.
    """
    own, odd = source >= 0, division.not_finite
    scaled = results if odd is None else _levelled(results, odd[list(received)])
    all_own = bool(own.all())
    rest = None
    if not all_own:
        scaled = _to_scale(scaled, link)
        rest = _residuals(scaled, plan, division, received, guesses)
    weights = (0.0,) * len(guesses)
    offsets: tuple[Tensor, Tensor] | None = None
    if rest is not None:
        weights, scaled, offsets = rest
    answers = plan.decode(scaled, received)
    found = plan.error_bars(received, scaled, answers, offsets) if bars else None
    if offsets is not None:
        answers = answers + offsets[1]
    if scaled is not results:
        answers = _from_scale(answers, link).to(results.dtype)
        if all_own or bool(own.any()):
            at, own = source.clamp(min=0).to(results.device), own.to(results.device)
            of_own = results.flatten(0, 1).index_select(0, at)
            answers = torch.where(own.view(-1, *[1] * (answers.dim() - 1)), of_own, answers)
    return _Output(answers, found, weights)


def _residuals(
    results: Tensor,
    plan: BatchPlan | RowPlan,
    division: Division,
    received: Sequence[int],
    guesses: Sequence[Tensor | None],
) -> tuple[tuple[float, ...], Tensor, tuple[Tensor, Tensor]] | None:
    r"""Return the residuals of surrogates :math:`s_j`, :math:`y - \sum_j w_j s_j`, if they help.

    The weights are those of least squares. Surrogates help if results are predicted better from
    each other with them, by more than chance has it.

    Returns:
        Weights, residuals ``[F, R, ...]``, and the weighted surrogates at these results, and for
        the batch, ``[B, ...]``.
    """
    used = [guess for guess in guesses if guess is not None]
    if not used:
        return None
    of_units = [division.of_units(guess, received) for guess in used]  # [F, R, ...]
    found, explained, by_chance = _least_squares(results, of_units, plan.used(received))
    if not explained > _CHANCE * by_chance:  # else another metric may win, and seem to help
        return None
    results = results.to(torch.promote_types(results.dtype, torch.float32))
    zero = torch.zeros((), device=results.device)
    known = sum((weight * x for weight, x in zip(found, used, strict=True)), zero)
    subtracted = sum((weight * x for weight, x in zip(found, of_units, strict=True)), zero)
    rest = results - subtracted
    least = 1 - _CHANCE * by_chance
    if not plan.left_out_square(rest, received) < least * plan.left_out_square(results, received):
        return None
    weights = iter(found)
    return (
        tuple(0.0 if guess is None else next(weights) for guess in guesses),
        rest,
        (subtracted, known),
    )


def _least_squares(
    results: Tensor, guesses: Sequence[Tensor], rows: Tensor
) -> tuple[list[float], float, float]:
    """Return the weights of guesses in results, ``[F, R, ...]`` each, less their means.

    Only the results at ``rows``, flat indices, are looked at.

    Returns:
        The weights, the share of the squares that the guesses explain, and the share that as many
        guesses of noise would explain.
    """

    def centred(values: Tensor) -> Tensor:
        flat = plain("decode", "results", values).flatten(0, 1)
        sample = few_columns(flat, rows)
        return sample - sample.mean(0)  # [n, C]

    with outside():
        rows = rows[:: max(1, len(rows) // _ROWS)]
        y, s = centred(results), torch.stack([centred(g).flatten() for g in guesses])  # [J, n C]
        products, right = s @ s.T, s @ y.flatten()
        varies = products.diagonal() > 0
        products.diagonal().mul_(_RIDGE).masked_fill_(~varies, 1.0)
        weights = torch.linalg.solve(products, right.masked_fill(~varies, 0.0))
        # Outputs that vary together are as few as this, and no more.
        num_columns = float(y.square().sum().square() / (y.T @ y).square().sum().clamp(min=1e-300))
        by_chance = int(varies.sum()) / (len(rows) * max(num_columns, 1.0))
        if not bool(weights.isfinite().all()):
            return [0.0] * len(guesses), 0.0, by_chance
        explained = float(right @ weights / y.square().sum().clamp(min=1e-300))
        return weights.tolist(), explained, by_chance


def _to_scale(outputs: Tensor, link: str | None) -> Tensor:
    """Return outputs of the module as they are decoded: probabilities as their logarithms."""
    if link is None:
        return outputs
    # Of probabilities that are 0 in floating point, no logarithm is left.
    return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log()


def _from_scale(decoded: Tensor, link: str | None) -> Tensor:
    return decoded if link is None else decoded.softmax(dim=-1)


def _levelled(values: Tensor, odd: Tensor | None) -> Tensor:
    """Replace the rows of values that are ``odd`` by the mean of the others; None: no row is."""
    return values if odd is None else _filled(values, odd, values[~odd.to(values.device)].mean(0))


def _filled(values: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """Return values ``[..., *value.shape]`` with one value in some rows, bool ``[...]``."""
    return torch.where(rows.to(values.device).view(*rows.shape, *[1] * value.dim()), value, values)
