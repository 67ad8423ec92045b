"""What surrogates of the module say of a call: asked once, and dropped where they fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._logging import sparing_logger
from .._transforms import as_called, outside, plain
from .._weights import device_of
from ..surrogates import Memory
from ..workers.pytrees import flatten, show
from ._leaves import decodable, levelled

if TYPE_CHECKING:
    from ._inputs import Inputs
    from ._results import Stacked
    from ._units import Units
    from .report import Report

__all__ = ["Guess", "Guesses", "from_scale", "surrogates", "to_scale"]

logger = sparing_logger("coded_torch.nn")


class Guess(NamedTuple):
    """What a surrogate makes of one output, on the scale on which it is decoded.

    Attributes:
        batch: ``[B, ...]``, for the batch.
        coded: ``[F, R, ...]``, for the units with a good result.
    """

    batch: Tensor
    coded: Tensor


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


class Guesses:
    """What surrogates make of the inputs of one call, when it is first wanted.

    Args:
        surrogates: of the wrapper.
        inputs: of the call.
        units: that were asked for.
        link: of the wrapper.
        report: where it is written which of them failed.
    """

    def __init__(
        self,
        surrogates: Sequence[Any],
        inputs: Inputs,
        units: Units,
        link: str | None,
        report: Report,
    ) -> None:
        self.surrogates = surrogates
        self._inputs, self._units, self._link, self._report = inputs, units, link, report
        self._made: tuple[tuple[int, ...], list[list[Guess | None]]] = (), []

    def of(self, stacked: Stacked) -> list[list[Guess | None]]:
        """For every surrogate, its guess of each leaf that is decoded, None of all others.

        One that fails is left out, which the log and the report say. If fewer units are left than
        last time, none is asked again.
        """
        units, made = self._made
        if not made or not set(stacked.units) <= set(units):
            units, made = (
                stacked.units,
                [
                    self._of(number, surrogate, stacked)
                    for number, surrogate in enumerate(self.surrogates)
                ],
            )
            self._made = units, made
        if units == stacked.units:
            return made
        left = [units.index(unit) for unit in stacked.units]
        return [[guess and guess._replace(coded=guess.coded[left]) for guess in x] for x in made]

    def _of(self, number: int, surrogate: Any, stacked: Stacked) -> list[Guess | None]:
        try:
            return _guess(surrogate, self._inputs, self._units, stacked, self._link)
        except Exception as error:  # whatever a surrogate raises: the call goes on without it
            name = getattr(surrogate, "__name__", type(surrogate).__name__)
            note = f"surrogate {number} ({name}) was left out: {_first_line(error)}"
            logger.warning("%s", note, exc_info=True)
            if note not in self._report.notes:
                self._report.notes += (note,)
            return [None] * len(stacked.leaves)


def to_scale(outputs: Tensor, link: str | None) -> Tensor:
    """What is decoded for outputs of the module: probabilities as their logarithms."""
    if link is None:
        return outputs
    # Of probabilities that are 0 in floating point, no logarithm is left.
    return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log()


def from_scale(decoded: Tensor, link: str | None) -> Tensor:
    """Outputs of the module from what was decoded."""
    return decoded if link is None else decoded.softmax(dim=-1)


def _guess(
    surrogate: Any, inputs: Inputs, units: Units, stacked: Stacked, link: str | None
) -> list[Guess | None]:
    received = list(stacked.units)

    if isinstance(surrogate, Memory):
        whole = _remembered(surrogate, inputs.leaves, inputs.dims, stacked, inputs.not_finite)
    else:
        args, kwargs, size = inputs.args, inputs.kwargs, inputs.batch_size
        whole = _outputs(surrogate, args, kwargs, size, stacked, link, inputs.not_finite)
    if units.by_rows:
        coded = [leaf if leaf is None else leaf[received].unsqueeze(1) for leaf in whole]
    else:
        plan = units.plan
        coded = [leaf if leaf is None else plan.encode(leaf)[received] for leaf in whole]
    return [
        None if batch is None or at is None else Guess(batch, at)
        for batch, at in zip(whole, coded, strict=True)
    ]


def _remembered(
    memory: Memory,
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    stacked: Stacked,
    not_finite: Tensor | None,
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
        output = next(predicted, None) if decodable(result, dim) else None
        fits = output is not None and output.shape[1:] == result.shape[2:]
        outputs.append(levelled(output, not_finite) if output is not None and fits else None)
    return outputs


def _outputs(
    surrogate: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    stacked: Stacked,
    link: str | None,
    not_finite: Tensor | None,
) -> list[Tensor | None]:
    """The surrogate's outputs, ``[size, ...]`` for every leaf that is decoded, None for others.

    Raises:
        TypeError, ValueError: they are not of the form of the module's.
    """

    device = device_of(surrogate)  # it went with the wrapper, and the batch may be on the host

    def number(leaf: Tensor) -> Tensor:
        return plain("surrogate", "input", leaf).to(device or leaf.device)

    args, kwargs = pytree.tree_map_only(Tensor, number, (args, kwargs))
    with torch.no_grad(), outside():
        with as_called():
            leaves, spec = flatten(surrogate(*args, **kwargs))
        if spec != stacked.spec:
            raise ValueError(f"it returned {spec}, where the module returned {stacked.spec}")
        outputs: list[Tensor | None] = []
        for leaf, result, dim in zip(leaves, stacked.leaves, stacked.dims, strict=True):
            if dim is None or not decodable(result, dim):
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
            leaf = to_scale(levelled(leaf, not_finite), link).to(result.device)
            if not bool(leaf.isfinite().all()):
                raise ValueError("it returned values that are not finite")
            outputs.append(leaf)
        return outputs


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
