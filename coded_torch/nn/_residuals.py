r"""Turns results into answers; with surrogates, the code decodes only what they leave unexplained.

Decoders are linear, so with any approximation s of the module f they may decode residuals:
:math:`s(x) + D_F\,[\,f(z) - s(z)\,]`, with an error that follows the variation of f - s. An answer
that is an input's own result stays that result, bit for bit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._transforms import outside, plain
from ..codes.batch_plan import BatchPlan, few_columns
from ..codes.plans import MeanPlan
from ..surrogates import Memory
from ..workers.pytrees import flatten, show, unflatten

if TYPE_CHECKING:
    from ._inputs import Inputs
    from ._results import Stacked
    from ._units import Units
    from .report import Report

__all__ = ["answer", "surrogates"]

logger = logging.getLogger("coded_torch.nn")

_RIDGE = 1.001  # of the surrogates' own squares, so that equal ones share their weight
_ROWS = 4096  # of results, that determine weights
# So many times what a surrogate of noise gains on average must be gained.
_CHANCE = 6


class _Guess(NamedTuple):
    """What a surrogate makes of one output, on the scale on which it is decoded.

    Attributes:
        batch: ``[B, ...]``, for the batch.
        coded: ``[F, R, ...]``, for the units with a good result.
    """

    batch: Tensor
    coded: Tensor


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


def surrogates(given: Any) -> tuple[Any, ...]:
    """One surrogate or several, as a tuple: as an attribute, a module becomes part of its owner.

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


def answer(
    inputs: Inputs,
    units: Units,
    stacked: Stacked,
    surrogates: Sequence[Any],
    link: str | None,
    report: Report,
    generations: Sequence[int] = (),
) -> Any:
    """The answers of one call, in the structure that the module gives them.

    Args:
        inputs: of the call.
        units: that were asked for.
        stacked: the good results.
        surrogates: of the wrapper; not asked unless something has to be predicted.
        link: of the wrapper.
        report: what is known of the answers is written there.
        generations: of the memories among the surrogates, since before the results were computed.
    """
    received, size = stacked.units, units.batch_size
    report.degraded = len(received) < units.least
    guesses: list[list[_Guess | None]] = []
    plan: BatchPlan | None = None
    source = torch.arange(size)
    if not units.is_whole(received):  # else the results are the answers, and nothing is fitted
        plan = MeanPlan(units.plan) if report.degraded else units.plan
        source = plan.source(received)
    report.predicted = predicted = source < 0
    if surrogates and bool(predicted.any()):
        guesses = _guess_all(surrogates, inputs, units, stacked, link, report)
    answers: list[Any] = []
    outputs = []
    choices = []
    for i, (leaf, dim) in enumerate(zip(stacked.leaves, stacked.dims, strict=True)):
        if dim is None or not isinstance(leaf, Tensor):
            answers.append(leaf)
            continue
        leaf = units.answering(leaf)
        if plan is None:
            output = _Output(leaf.squeeze(1), torch.zeros(size, dtype=torch.float64))
        else:
            output = _decode(leaf, plan, received, source, [g[i] for g in guesses], link)
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
    if guesses:
        report.surrogate_weights = tuple(output.weights for output in outputs)
    memories = (surrogate for surrogate in surrogates if isinstance(surrogate, Memory))
    for memory, generation in zip(memories, generations, strict=True):
        _remember(
            memory, generation, inputs, [output.answers for output in outputs], ~predicted, link
        )
    return unflatten(answers, stacked.spec)


def _decode(
    results: Tensor,
    plan: BatchPlan,
    received: Sequence[int],
    source: Tensor,
    guesses: Sequence[_Guess | None],
    link: str | None,
) -> _Output:
    """One output from results ``[F, R, ...]``; ``source`` is the plan's of what was received."""
    own = source >= 0
    scaled, rest = results, None
    if not bool(own.all()):
        scaled = _to_scale(results, link)
        rest = _rest(scaled, plan, received, guesses)
    weights = (0.0,) * len(guesses)
    if rest is None:
        answers = plan.decode(scaled, received)
    else:
        weights, scaled, known = rest
        answers = plan.decode(scaled, received) + known
    expected = plan.expected_errors(received, scaled) if link is None else None
    if scaled is not results:
        answers = _from_scale(answers, link).to(results.dtype)
        if bool(own.any()):
            at, own = source.clamp(min=0).to(results.device), own.to(results.device)
            of_own = results.flatten(0, 1).index_select(0, at)
            answers = torch.where(own.view(-1, *[1] * (answers.dim() - 1)), of_own, answers)
    return _Output(answers, expected, weights)


def _rest(
    results: Tensor, plan: BatchPlan, received: Sequence[int], guesses: Sequence[_Guess | None]
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
    found, by_chance = _least_squares(results, [guess.coded for guess in used], plan.used(received))
    if not any(found):
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


def _guess_all(
    surrogates: Sequence[Any],
    inputs: Inputs,
    units: Units,
    stacked: Stacked,
    link: str | None,
    report: Report,
) -> list[list[_Guess | None]]:
    """For every surrogate, its guess of each leaf that is decoded, None of all others.

    One that fails is left out, which the log and the report say.
    """
    guesses: list[list[_Guess | None]] = []
    for number, surrogate in enumerate(surrogates):
        try:
            guesses.append(_guess(surrogate, inputs, units, stacked, link))
        except Exception as error:
            name = getattr(surrogate, "__name__", type(surrogate).__name__)
            note = f"surrogate {number} ({name}) was left out: {_first_line(error)}"
            logger.warning("%s", note, exc_info=True)
            report.notes += (note,)
            guesses.append([None] * len(stacked.leaves))
    return guesses


def _to_scale(outputs: Tensor, link: str | None) -> Tensor:
    """What is decoded for outputs of the module: probabilities as their logarithms."""
    if link is None:
        return outputs
    # Of probabilities that are 0 in floating point, no logarithm is left.
    return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log()


def _from_scale(decoded: Tensor, link: str | None) -> Tensor:
    return decoded if link is None else decoded.softmax(dim=-1)


def _guess(
    surrogate: Any, inputs: Inputs, units: Units, stacked: Stacked, link: str | None
) -> list[_Guess | None]:
    received, plan = list(stacked.units), units.plan

    def ask(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> list[Tensor | None]:
        if isinstance(surrogate, Memory):
            leaves = pytree.tree_leaves((args, kwargs))
            return _remembered(surrogate, leaves, inputs.dims, stacked)
        return _outputs(surrogate, args, kwargs, size, stacked, link)

    whole = ask(inputs.args, inputs.kwargs, inputs.batch_size)
    if plan.code.mixes:
        args, kwargs = units.task.payload(received)
        coded = [
            leaf if leaf is None else units.answering(leaf.unflatten(0, (len(received), -1)))
            for leaf in ask(args, kwargs, len(received) * units.task.unit_rows)
        ]
    else:
        coded = [leaf if leaf is None else plan.encode(leaf)[received] for leaf in whole]
    return [
        None if batch is None or at is None else _Guess(batch, at)
        for batch, at in zip(whole, coded, strict=True)
    ]


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

        outputs = [_to_scale(rows(leaf), link) for leaf in answers]
        memory.observe([rows(leaf) for leaf in inputs.floating()], outputs, generation)


def _remembered(
    memory: Memory, leaves: Sequence[Any], dims: Sequence[int | None], stacked: Stacked
) -> list[Tensor | None]:
    """As :func:`_outputs`, of a memory: it looks at the floating-point leaves that are divided."""
    divided = [
        plain("Memory", "leaf", leaf).movedim(dim, 0)
        for leaf, dim in zip(leaves, dims, strict=True)
        if dim is not None and leaf.is_floating_point()
    ]
    with outside():
        predicted = iter((divided and memory.predict(divided)) or ())
    outputs: list[Tensor | None] = []
    for result, dim in zip(stacked.leaves, stacked.dims, strict=True):
        decoded = dim is not None and isinstance(result, Tensor)
        output = next(predicted, None) if decoded else None
        fits = output is not None and output.shape[1:] == result.shape[2:]
        outputs.append(output if fits else None)
    return outputs


def _outputs(
    surrogate: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    stacked: Stacked,
    link: str | None,
) -> list[Tensor | None]:
    """The surrogate's outputs, ``[size, ...]`` for every leaf that is decoded, None for others.

    Raises:
        TypeError, ValueError: they are not of the form of the module's.
    """

    def number(leaf: Any) -> Any:
        return plain("surrogate", "input", leaf) if isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_map(number, (args, kwargs))
    with torch.no_grad(), outside():
        leaves, spec = flatten(surrogate(*args, **kwargs))
        if spec != stacked.spec:
            raise ValueError(f"it returned {spec}, where the module returned {stacked.spec}")
        outputs: list[Tensor | None] = []
        for leaf, result, dim in zip(leaves, stacked.leaves, stacked.dims, strict=True):
            if dim is None or not isinstance(result, Tensor):
                outputs.append(None)
                continue
            shape = (size, *result.shape[2:])
            if not (
                isinstance(leaf, Tensor)
                and leaf.is_floating_point()
                and leaf.dim() == len(shape)
                and (leaf := leaf.movedim(dim, 0)).shape == shape
            ):
                raise ValueError(f"it returned {show(leaf)}, where {shape} is decoded")
            leaf = _to_scale(leaf, link).to(result.device)
            if not bool(leaf.isfinite().all()):
                raise ValueError("it returned values that are not finite")
            outputs.append(leaf)
        return outputs


def _least_squares(
    results: Tensor, guesses: Sequence[Tensor], rows: Tensor
) -> tuple[list[float], float]:
    """The weights of guesses ``[F, R, ...]`` in results ``[F, R, ...]``, both less their means.

    Args:
        results: the results.
        guesses: of every surrogate.
        rows: the results to look at, flat indices.

    Returns:
        The weights, and the share of the squares that as many guesses of noise would explain.
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
            weights = torch.zeros(len(guesses))
        return weights.tolist(), by_chance


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
