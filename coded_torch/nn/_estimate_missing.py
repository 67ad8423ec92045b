r"""Turns results into answers: missing ones are estimated, with the help of surrogates.

With an approximation s of the module f, decoders, which are linear, decode residuals:
:math:`s(x) + D_F\,[\,f(z) - s(z)\,]`. An input's own result stays its answer, bit for bit.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._changes import unchanged
from .._torch import as_called, device_of, flatten, on_host, outside, plain
from ..codes._base import BatchPlan, NotEnoughResults
from ..input_space._error_bounds import ErrorBounds
from ..input_space._regression import RowPlan, to_scale
from ..input_space._regressor import columns, few_columns
from ..input_space.metrics import Choice
from ..scheduling.policy import Waiting
from ..surrogates import Memory
from ..verification._verifier import Verifier
from ._division import Division
from ._finite import finite
from ._report import Report, logger
from ._result_checks import Stacked, show

Plan: TypeAlias = BatchPlan | RowPlan

# The factor of the surrogates' own squares, so that equal surrogates share their weight. It was not
# tuned.
_RIDGE = 1.001
#: A surrogate is used if it explains more than six times the squares that one of noise explains on
# average: none of noise is used then. (benchmarks surrogates, "useless")
CHANCE = 6
_ROUNDING = 4.0  # units in the last place; two cover outputs of 1e6 (test_estimate_missing.py)


class Answers:
    """Makes the answers of one call. Memories learn nothing if the module changes meanwhile."""

    def __init__(
        self, surrogates: Any, division: Division, report: Report, module: nn.Module, check: Any
    ) -> None:
        self._surrogates = surrogates
        self._division = division
        self._inputs = division.inputs
        self._link = division.link
        self._coverage = division.coverage
        self._report = report
        self._check: Verifier | None = check
        self._known = dict[int, tuple[list[Tensor], Tensor] | None]()  # the estimates of memories
        #: The places of results, and how odd these look if left out.
        self.oddness: list[tuple[int, float]] = []
        self._module = module
        self._memories = dict[Memory, int]()  # the generations of the module's weights in memories
        for surrogate in surrogates:
            if isinstance(surrogate, Memory):
                self._memories[surrogate] = surrogate.follow(module)

    def forget(self) -> None:
        """Clear memories, which also learn nothing from this call."""
        for memory in self._memories:
            memory.clear()

    def _plan(self) -> Plan:
        """Return the plan of the batch, which estimates nothing from infinite results."""
        plan: Plan = self._division.plan
        rows = None
        if self._division.infinite:
            rows = self._division.left_out
        if rows is not None and isinstance(plan, RowPlan):
            plan.leave_out(rows)
        return plan

    @on_host()
    def prepare(self, stacked: Stacked) -> None:
        """Plan, and fit regressions to the results so far, which may be all."""
        plan = self._plan()
        if isinstance(plan, RowPlan):
            for i in stacked.decoded:
                self._decoded(stacked, i, plan, plan.source(stacked.units), {}, False)

    def of(self, stacked: Stacked) -> Any:
        """Return the answers in the structure that the module gives them."""
        division = self._division
        report = self._report
        not_finite = division.left_out
        whole = division.is_whole(len(stacked.units))  # then the results are the answers
        plan: Plan | None = None
        if not whole:
            plan = self._plan()
        with outside():  # the report outlives a transform
            source: Any = None
            if plan:
                source = plan.source(stacked.units)
            is_estimated = plan is not None and bool((source < 0).any())
            report._note_source(source, stacked.later, division.task.unit_rows)
        approximations = []
        if self._surrogates and is_estimated:
            approximations = self._approximations(stacked)
        answers = dict[int, Tensor]()
        weights = list[tuple[float, ...]]()
        choices: list[Choice] = []
        for i in stacked.divided:
            own = stacked.leaves[i].flatten(0, 1)
            if plan is None or not (is_estimated and own.dtype.is_floating_point):
                answers[i] = own if plan is None else own.index_select(0, source.to(own.device))
                continue
            of_leaf = {j: x[i] for j, x in enumerate(approximations) if i in x}
            rows, used, bounds = self._decoded(stacked, i, plan, source, of_leaf, not answers)
            if not_finite is not None:  # nothing is known of their distances
                estimated = source < 0
                mean = own[source[~(estimated | not_finite)].to(own.device)].mean(0)
                rows = _filled(rows, estimated & not_finite, mean)
            if bounds is not None:  # of the first output
                self._note(bounds, rows)
            weights.append(tuple(used.get(j, 0.0) for j in range(len(approximations))))
            choices += [dataclasses.replace(x, output=len(weights) - 1) for x in plan.choices]
            answers[i] = rows
        floating = list(filter(torch.is_floating_point, answers.values()))
        if not is_estimated:
            bounds = ErrorBounds(division.batch_size)
            report._note_bounds(bounds, self._coverage, None, floating[0] if floating else None)
        if plan is not None and plan.note:  # the plan has been used, and knows now
            report.notes = (plan.note, *report.notes)
        report.distances = tuple(choices)
        report.surrogate_weights = tuple(weights) if approximations else ()
        if self._memories:
            self._remember(floating, report.estimated)
        return stacked.tree(answers)

    def of_whole(self, value: Any) -> Any:
        """Return the module's output for all rows, which is the answers as they are."""
        floating = [leaf for leaf in flatten(value)[0] if leaf.dtype.is_floating_point]
        self._report._note_whole(
            self._division.batch_size, self._coverage, floating[0] if floating else None
        )
        return value

    def of_surrogate(self, waiting: Waiting, stacked: Stacked | None, error: Exception) -> Any:
        """Return a surrogate's answers, in the form of earlier results if none came, or raise."""
        division = self._division
        report = self._report
        blamed = report.module_failed_rows and waiting.on_error == "raise"
        may = division.by_rows and waiting.may_estimate(True) and not blamed
        if stacked is None or not may or not isinstance(error, NotEnoughResults):
            raise error
        divided = stacked.divided
        found = self._approximations(stacked)
        able = [number for number, outputs in enumerate(found) if outputs.keys() >= set(divided)]
        shared = [x for i, x in enumerate(stacked.leaves) if i not in divided]
        if (
            not able
            or stacked.lists
            or (not stacked.units and any(isinstance(x, Tensor) for x in shared))
        ):
            raise error
        # Copies: the surrogate may return a tensor that it keeps, or the inputs themselves.
        own = found[able[0]]
        answers = {i: stacked.over(i, x.softmax(-1) if self._link else x) for i, x in own.items()}
        with outside():
            source = torch.full((division.batch_size,), -1)
            source[list(stacked.units)] = torch.arange(len(stacked.units))
        report._note_source(source, stacked.later)
        if divided:
            self._note(ErrorBounds.unknown(source < 0), answers[divided[0]])
        name = type(self._surrogates[able[0]]).__name__
        report.notes += (f"surrogate {able[0]} ({name}) answered alone: {error}",)
        return stacked.tree(answers)

    def _calibrated(self, bounds: ErrorBounds, answers: Tensor) -> ErrorBounds:
        """Return error bounds by the last memory that has enough rows, if one has."""
        for memory in self._memories:
            found = self._known_to(memory)
            if found is not None and found[0][0].shape == answers.shape:
                off = (columns(answers).cpu().double() - columns(found[0][0]).cpu()).norm(dim=1)
                more = bounds.calibrated(found[1], off)
                if more.enough(self._coverage):
                    bounds = more
        return bounds

    @outside()
    def _note(self, bounds: ErrorBounds, answers: Tensor) -> None:
        """Note error bounds. With too few results, a memory's rows calibrate them."""
        not_finite = self._inputs.not_finite
        if not self._link and not bounds.enough(self._coverage):
            bounds = self._calibrated(bounds, answers)
        if not_finite is not None:
            bounds = bounds.widened(torch.where(not_finite, math.inf, 0.0).double())
        self._report._note_bounds(bounds, self._coverage, self._link, answers)

    def _approximations(self, stacked: Stacked) -> list[dict[int, Tensor]]:
        """Return the outputs ``[B, ...]`` of each surrogate, by leaf; none if it failed."""
        found: list[dict[int, Tensor]] = []
        for number, surrogate in enumerate(self._surrogates):
            try:
                run = self._remembered if isinstance(surrogate, Memory) else self._outputs_of
                outputs = run(surrogate, stacked)
                if not all(map(finite, outputs.values())):
                    raise ValueError("it returned values that are not finite")
                found.append(outputs)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # the caller's code may raise anything
                name = getattr(surrogate, "__name__", type(surrogate).__name__)
                what = "".join(str(error).splitlines()[:1])
                note = f"surrogate {number} ({name}) was left out: {type(error).__name__}: {what}"
                logger.warning("%s", note, exc_info=True)
                self._report.notes += (note,)
                found.append({})
        return found

    def _remembered(self, memory: Memory, stacked: Stacked) -> dict[int, Tensor]:
        """Return a memory's estimates by leaf, where they have the shape of the results."""
        not_finite = self._inputs.not_finite
        estimated, _ = self._known_to(memory) or ((), None)
        pairs = zip(stacked.decoded, estimated, strict=False)
        alike = [(i, x) for i, x in pairs if x.shape[1:] == stacked.leaves[i].shape[2:]]
        return {i: _levelled(x, not_finite) for i, x in alike}

    def _known_to(self, memory: Memory) -> tuple[list[Tensor], Tensor] | None:
        """Return a memory's estimates of the batch, and its thresholds of their errors."""
        if id(memory) not in self._known:
            inputs = [plain("Memory", "leaf", leaf) for leaf in self._inputs.floating()]
            with outside():
                generation = self._memories[memory]
                found = memory.error_bounds(inputs, generation) if inputs else None
                self._known[id(memory)] = found
        return self._known[id(memory)]

    def _outputs_of(self, surrogate: Any, stacked: Stacked) -> dict[int, Tensor]:
        """Run a surrogate; raise a ValueError if its outputs have not the module's form."""
        inputs = self._inputs
        device = device_of(surrogate)

        def on_its_device(leaf: Tensor) -> Tensor:
            return plain("surrogate", "input", leaf).to(device or leaf.device, copy=True)

        args, kwargs = tree_map_only(Tensor, on_its_device, (inputs.args, inputs.kwargs))
        outputs = dict[int, Tensor]()
        with torch.no_grad(), outside():
            with as_called():
                leaves, spec = flatten(surrogate(*args, **kwargs))
            if spec != stacked.spec:
                raise ValueError(f"it returned {spec}, where the module returned {stacked.spec}")
            for i in stacked.decoded:
                leaf = leaves[i]
                result = stacked.leaves[i]
                dim = stacked.dims[i]
                shape = (inputs.batch_size, *result.shape[2:])
                fits = isinstance(leaf, Tensor) and leaf.dtype.is_floating_point
                if not (fits and leaf.dim() == len(shape) and leaf.movedim(dim, 0).shape == shape):
                    raise ValueError(f"it returned {show(leaf)}, where {shape} is needed")
                output = _levelled(leaf.movedim(dim, 0), inputs.not_finite)
                outputs[i] = to_scale(output, self._link).to(result.device)
        return outputs

    def _remember(self, answers: Sequence[Tensor], estimated: Any) -> None:
        """Have memories learn the rows of answers, ``[B, ...]`` each, that are exact."""
        not_finite = self._division.left_out
        check = self._check
        with outside():
            exact = ~estimated if not_finite is None else ~(estimated | not_finite)
            if check is not None:
                exact &= torch.tensor([row in check.credible for row in range(len(exact))])
        if not bool(exact.any()):
            return

        def rows(leaf: Tensor) -> Tensor:
            leaf = plain("Memory", "leaf", leaf)
            if bool(exact.all()):
                return leaf
            return leaf[exact.to(leaf.device)]

        with outside():
            inputs = [rows(leaf) for leaf in self._inputs.floating()]
            outputs = [to_scale(rows(leaf), self._link) for leaf in answers]
            with unchanged():  # a new look, as the weights may have changed during the call
                for memory, generation in self._memories.items():
                    memory.follow(self._module)
                    memory.observe(inputs, outputs, generation)

    def _decoded(
        self, stacked: Stacked, i: int, plan: Plan, source: Tensor, approximations: Any, first: bool
    ) -> tuple[Tensor, Mapping[int, float], ErrorBounds | None]:
        """Return answers ``[B, ...]``, weights of approximations, and error bounds, of a leaf."""
        results = stacked.leaves[i]
        received = stacked.units
        not_finite = self._division.left_out
        by_rows = isinstance(plan, RowPlan)
        scaled = results
        if not_finite is not None:
            scaled = _levelled(results, self._division.spread(not_finite)[list(received)])
        if by_rows:  # estimates are rounded once, at the end
            scaled = scaled.to(torch.promote_types(scaled.dtype, torch.float32))
        scaled = to_scale(scaled, self._link)
        weights, scaled, offsets = (
            _residuals(scaled, plan, self._division, received, approximations)
            if approximations
            else ({}, scaled, ())
        )
        # A memory is a regression, too, and leaves what the same metric and length estimate well.
        students = [j for j in weights if not isinstance(self._surrogates[j], Memory)]
        answers = plan.decode(scaled, received, search=not weights or bool(students))
        found = plan.error_bounds(answers, offsets) if first else None
        if offsets:
            answers = answers + offsets[1]
        if self._link:
            answers = answers.softmax(-1)
        if by_rows:  # estimates of masked scores may go beyond
            info = torch.finfo(results.dtype)
            answers = answers.clamp(info.min, info.max)
        if found is not None:
            self.oddness = found.oddness()
            found = _rounded(found, answers, results.dtype)
        if scaled is not results:
            own = results.flatten(0, 1).index_select(0, source.clamp(min=0).to(results.device))
            answers = _filled(own, source < 0, answers.to(results.dtype))
        return answers, weights, found


def _residuals(
    results: Tensor, plan: Plan, division: Division, received: Sequence[int], approximations: Any
) -> tuple[dict[int, float], Tensor, tuple[Tensor, ...]]:
    r"""Return weights of surrogates, residuals :math:`y - \sum_j w_j s_j`, and two sums.

    The first sum, ``[F R, ...]``, was subtracted from results. The second, ``[B, ...]``, is to be
    added to answers. There are no weights unless surrogates improve the estimates of results from
    each other by more than chance.
    """
    used = list(approximations.values())
    of_units = [division.spread(approximation)[list(received)] for approximation in used]
    numbers = [x.flatten(0, 1) for x in (results, *of_units)]
    with outside():
        places = torch.arange(len(numbers[0]))
        y, *of_y = (few_columns(places, x) for x in numbers)  # [F R, C], on the host
        if isinstance(plan, RowPlan):  # each input once
            source = plan.source(received)
            places = source[source >= 0]
        found, explained, by_chance = least_squares(y[places], [x[places] for x in of_y])
        if not explained > CHANCE * by_chance:  # another metric may win by chance, too
            return {}, results, ()
        before, after = plan.left_out_squares(received, y, y - _weighted(found, of_y))
        if not after < (1 - CHANCE * by_chance) * before:
            return {}, results, ()
    dtype = torch.promote_types(results.dtype, torch.float32)
    subtracted, known = (_weighted(found, [x.to(dtype) for x in each]) for each in (of_units, used))
    residuals = results.to(dtype) - subtracted
    if not finite(residuals):  # scores may be masked by numbers near the largest
        return {}, results, ()
    weights = dict(zip(approximations, found, strict=True))
    return weights, residuals, (subtracted.flatten(0, 1), known)


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    products = [weight * x for weight, x in zip(weights, values, strict=True)]
    return sum(products[1:], products[0])


def least_squares(y: Tensor, approximations: Sequence[Tensor]) -> tuple[list[float], float, float]:
    """Return weights of approximations, and the share of the results' variance they explain.

    The last number is the share that noise in place of the approximations would explain.
    """
    y = y - y.mean(0)
    s = torch.stack([(x - x.mean(0)).flatten() for x in approximations])  # [J, n C]
    products = s @ s.T
    right = s @ y.flatten()
    varies = products.diagonal() > 0
    products.diagonal().mul_(_RIDGE).masked_fill_(~varies, 1.0)
    weights = torch.linalg.solve(products, right.masked_fill(~varies, 0.0))
    # Outputs that vary together are as few as this, and no more.
    num_columns = float(y.square().sum().square() / (y.T @ y).square().sum().clamp(min=1e-300))
    by_chance = int(varies.sum()) / (len(y) * max(num_columns, 1.0))
    if not bool(weights.isfinite().all()):
        return [0.0] * len(approximations), 0.0, by_chance
    explained = float(right @ weights / y.square().sum().clamp(min=1e-300))
    return weights.tolist(), explained, by_chance


@outside()
def _rounded(bounds: ErrorBounds, answers: Tensor, dtype: torch.dtype) -> ErrorBounds:
    """Return the error bounds of answers ``[B, ...]`` that are computed in a dtype, or rounded."""
    info = torch.finfo(dtype)
    most = 0.5 if answers.dtype != dtype else _ROUNDING
    norms = torch.linalg.vector_norm(columns(answers), dim=1, dtype=torch.float64).cpu()
    return bounds.widened((norms + info.tiny * answers[0].numel() ** 0.5) * (info.eps * most))


def _levelled(values: Tensor, rows: Tensor | None) -> Tensor:
    """Replace some rows of values, bool, by the mean of the others."""
    if rows is None:
        return values
    return _filled(values, rows, values[~rows.to(values.device)].mean(0))


def _filled(values: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Return values with others, or one value for all, in some rows, bool."""
    rows = rows.to(values.device)
    return torch.where(rows.view(*rows.shape, *[1] * (values.dim() - rows.dim())), others, values)
