r"""Turns results into answers; with surrogates, the code decodes only what they leave unexplained.

Decoders are linear, so with any approximation s of the module f they may decode residuals:
:math:`s(x) + D_F\,[\,f(z) - s(z)\,]`, with an error that follows the variation of f - s. An answer
that is an input's own result stays that result, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._transforms import outside, plain
from ..codes.batch_plan import BatchPlan, few_columns
from ..codes.errors import NotEnoughResults
from ..surrogates import Memory
from ..workers.pytrees import unflatten
from ._guesses import from_scale, to_scale
from ._leaves import decodable, filled, levelled

if TYPE_CHECKING:
    from ..scheduling.waiting import Waiting
    from ._guesses import Guess, Guesses
    from ._inputs import Inputs
    from ._results import Stacked
    from ._units import Units
    from .report import Report

__all__ = ["alone", "answer"]

_RIDGE = 1.001  # of the surrogates' own squares, so that equal ones share their weight
_ROWS = 4096  # of results, that determine weights
# So many times what a surrogate of noise gains on average must be gained, and explained.
_CHANCE = 6


class _Output(NamedTuple):
    """One output, decoded.

    Attributes:
        answers: ``[B, ...]``.
        expected_errors: ``[B]``, or None where the code cannot say.
        weights: of each surrogate.
    """

    answers: Tensor
    expected_errors: Tensor | None
    weights: tuple[float, ...] = ()


def answer(
    inputs: Inputs,
    units: Units,
    stacked: Stacked,
    guesses: Guesses,
    link: str | None,
    report: Report,
    generations: Sequence[int] = (),
) -> Any:
    """The answers of one call, in the structure that the module gives them.

    Args:
        inputs: of the call.
        units: that were asked for.
        stacked: the good results.
        guesses: of the surrogates, which are not asked unless something has to be predicted.
        link: of the wrapper.
        report: what is known of the answers is written there.
        generations: of the memories among the surrogates, since before the results were computed.
    """
    received, size = stacked.units, units.batch_size
    guessed: list[list[Guess | None]] = []
    plan: BatchPlan | None = None
    source = torch.arange(size)
    if not units.is_whole(received):  # else the results are the answers, and nothing is fitted
        plan = units.plan
        source = plan.source(received)
    report.predicted = predicted = source < 0
    known, odd = ~predicted, None
    if units.not_finite is not None and inputs.not_finite is not None:
        known &= ~inputs.not_finite
        odd = units.not_finite[list(received)]
    if guesses.surrogates and bool(predicted.any()):
        guessed = guesses.of(stacked)
    answers: list[Any] = []
    outputs = []
    choices = []
    for i, (leaf, dim) in enumerate(zip(stacked.leaves, stacked.dims, strict=True)):
        if dim is None or not isinstance(leaf, Tensor):
            answers.append(leaf)
            continue
        exact = torch.zeros(size, dtype=torch.float64)
        if plan is None:
            output = _Output(leaf.squeeze(1), exact)
        elif not decodable(leaf, dim):
            output = _Output(leaf.flatten(0, 1)[source.to(leaf.device)], exact)
        else:
            output = _decode(leaf, plan, received, source, [g[i] for g in guessed], link, odd)
            if inputs.not_finite is not None:  # nothing is known of their distances
                rows = leaf.flatten(0, 1)
                mean = rows[source[known].to(rows.device)].mean(0)
                lost = predicted & inputs.not_finite
                output = output._replace(answers=filled(output.answers, lost, mean))
        outputs.append(output)
        choices.append(() if plan is None else plan.choices)
        moved = output.answers.movedim(0, dim)
        answers.append(moved.contiguous(memory_format=stacked.formats[i]))
    if plan is not None and plan.note:  # the plan has been used, and knows now
        report.notes = (plan.note, *report.notes)
    report.distances = tuple(
        dataclasses.replace(choice, output=i) for i, some in enumerate(choices) for choice in some
    )
    report.expected_errors = outputs[0].expected_errors if outputs else None
    if report.expected_errors is not None and inputs.not_finite is not None:
        report.expected_errors[predicted & inputs.not_finite] = math.inf
    if guessed:
        report.surrogate_weights = tuple(output.weights for output in outputs)
    memories = (surrogate for surrogate in guesses.surrogates if isinstance(surrogate, Memory))
    remembered = [output.answers for output in outputs if output.answers.is_floating_point()]
    for memory, generation in zip(memories, generations, strict=True):
        _remember(memory, generation, inputs, remembered, known, link)
    return unflatten(answers, stacked.spec)


def alone(
    waiting: Waiting,
    units: Units,
    stacked: Stacked | None,
    guesses: Guesses,
    link: str | None,
    report: Report,
    error: Exception,
) -> Any:
    """What a surrogate answers where too few results came to predict from.

    Args:
        waiting, units, guesses, link, report: of the call.
        stacked: the results that came, or the form of earlier ones; None: there are none.
        error: what else is raised.

    Raises:
        Exception: ``error``, where no surrogate can, or may, answer.
    """
    blamed = report.refused and waiting.on_error == "raise"
    if stacked is None or not (units.by_rows and waiting.predict) or blamed:
        raise error
    if not isinstance(error, NotEnoughResults):
        raise error
    divided = [
        i
        for i, (leaf, dim) in enumerate(zip(stacked.leaves, stacked.dims, strict=True))
        if dim is not None and isinstance(leaf, Tensor)
    ]
    each = enumerate(guesses.of(stacked))
    able = (x for x in each if all(x[1][i] is not None for i in divided))
    if (first := next(able, None)) is None:
        raise error
    number, said = first
    answers, received = list(stacked.leaves), list(stacked.units)
    for i in divided:
        leaf, guess, dim = stacked.leaves[i], said[i], stacked.dims[i]
        assert guess is not None
        assert dim is not None
        guessed = from_scale(guess.batch, link).to(leaf.device, leaf.dtype)
        # A copy: the surrogate may return what it keeps, or the inputs themselves.
        whole = guessed.clone(memory_format=torch.contiguous_format)
        if received:
            whole[received] = leaf.squeeze(1)
        answers[i] = whole.movedim(0, dim).contiguous(memory_format=stacked.formats[i])
    report.predicted = torch.ones(units.batch_size, dtype=torch.bool)
    report.predicted[received] = False
    name = type(guesses.surrogates[number]).__name__
    report.notes += (f"surrogate {number} ({name}) answered alone: {error}",)
    return unflatten(answers, stacked.spec)


def _decode(
    results: Tensor,
    plan: BatchPlan,
    received: Sequence[int],
    source: Tensor,
    guesses: Sequence[Guess | None],
    link: str | None,
    odd: Tensor | None,
) -> _Output:
    """Decode one output.

    Args:
        results: ``[F, R, ...]``.
        plan: that decodes.
        received: the units that they are of.
        source: the plan's, of these.
        guesses: of the surrogates.
        link: of the wrapper.
        odd: bool ``[F, R]``, the results of inputs that are not finite; None: there is none.
    """
    own = source >= 0
    scaled, rest = levelled(results, odd), None
    if not bool(own.all()):
        scaled = to_scale(scaled, link)
        rest = _rest(scaled, plan, received, guesses)
    weights = (0.0,) * len(guesses)
    if rest is None:
        answers = plan.decode(scaled, received)
    else:
        weights, scaled, known = rest
        answers = plan.decode(scaled, received) + known
    expected = plan.expected_errors(received, scaled) if link is None else None
    if scaled is not results:
        answers = from_scale(answers, link).to(results.dtype)
        if bool(own.any()):
            at, own = source.clamp(min=0).to(results.device), own.to(results.device)
            of_own = results.flatten(0, 1).index_select(0, at)
            answers = torch.where(own.view(-1, *[1] * (answers.dim() - 1)), of_own, answers)
    return _Output(answers, expected, weights)


def _rest(
    results: Tensor, plan: BatchPlan, received: Sequence[int], guesses: Sequence[Guess | None]
) -> tuple[tuple[float, ...], Tensor, Tensor] | None:
    r"""What guesses :math:`s_j` leave of results, :math:`y - \sum_j w_j s_j`, where that helps.

    The weights are those of least squares; it helps if results are predicted better from each
    other, by more than chance has it.

    Returns:
        Weights, what is left, ``[F, R, ...]``, and what is known of the batch, ``[B, ...]``.
    """
    used = [guess for guess in guesses if guess is not None]
    if not used:
        return None
    found, explained, by_chance = _least_squares(
        results, [guess.coded for guess in used], plan.used(received)
    )
    if not explained > _CHANCE * by_chance:  # else another metric may win, and seem to help
        return None
    results = results.to(torch.promote_types(results.dtype, torch.float32))
    rest, known = results, torch.zeros((), device=results.device)
    for weight, guess in zip(found, used, strict=True):
        rest = rest - weight * guess.coded
        known = known + weight * guess.batch
    least = 1 - _CHANCE * by_chance
    if not plan.left_out_square(rest, received) < least * plan.left_out_square(results, received):
        return None
    weights = iter(found)
    return tuple(0.0 if guess is None else next(weights) for guess in guesses), rest, known


def _remember(
    memory: Memory,
    generation: int,
    inputs: Inputs,
    answers: Sequence[Tensor],
    exact: Tensor,
    link: str | None,
) -> None:
    """Have the exact answers remembered, on the scale on which they are decoded."""
    if not bool(exact.any()):
        return
    with outside():

        def rows(leaf: Tensor) -> Tensor:
            leaf = plain("Memory", "leaf", leaf)
            return leaf if bool(exact.all()) else leaf[exact.to(leaf.device)]

        outputs = [to_scale(rows(leaf), link) for leaf in answers]
        memory.observe([rows(leaf) for leaf in inputs.floating()], outputs, generation)


def _least_squares(
    results: Tensor, guesses: Sequence[Tensor], rows: Tensor
) -> tuple[list[float], float, float]:
    """The weights of guesses ``[F, R, ...]`` in results ``[F, R, ...]``, both less their means.

    Args:
        results: the results.
        guesses: of every surrogate.
        rows: the results to look at, flat indices.

    Returns:
        The weights, the share of the squares that the guesses explain, and the share that as many
        guesses of noise would explain.
    """

    def centred(values: Tensor) -> Tensor:
        flat = plain("decode", "results", values).flatten(0, 1)
        sample = few_columns(flat[rows.to(flat.device)][:, None])
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
