r"""Teaching a smaller network to imitate a module, without labels."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import count, instance, positive, real

__all__ = ["distill"]

_PIECES = 10  # into which one large batch is cut, to hold one out


def distill(
    student: nn.Module,
    module: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 100,
    learning_rate: float = 5e-3,
    rows: int = 64,
    noise: float = 0.03,
    augment: Callable[..., Any] | None = None,
    patience: int = 30,
    link: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> float:
    r"""Teach a student the outputs of a module, for ``CodedWrapper(..., surrogate=student)``.

    It learns from the module's own outputs, on inputs without labels: half of them as they are,
    half mixtures, as codes make them, all with some noise. What is minimised is the squared
    error over the variance of each output; a share of the batches is held out, and the weights that
    are best there are kept.

    Args:
        student: takes what the module takes and returns what it returns, but is cheap: a twentieth
            of the module's work is a good size. Trained in place, and left in evaluation mode.
        module: in the mode in which it answers.
        batches: inputs like those that will be answered, a few thousand rows; each is what the
            module is called with: an input, or a tuple of positional arguments. All tensors have
            the batch along dimension 0.
        epochs: at most so many passes over the inputs.
        learning_rate: of Adam at first; it falls to 0 along a cosine.
        rows: of a step.
        noise: its standard deviation at most, in that of each input; drawn anew for every step.
        augment: called with the arguments of a step before they are mixed, returns others like
            them, such as shifted pictures.
        patience: epochs without a better error on what is held out, after which it stops.
        link: as of the wrapper: "softmax" to compare the logarithms of outputs that are
            probabilities.
        seed: of order, mixtures and noise. The global random state is not touched.
        progress: show epochs and error, on terminals only.

    Returns:
        The error that it reached: the variance of f - s over that of f, on what is held out, the
        mean over the outputs. The squared error of coded answers falls by about this factor.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument is out of range, or there are too few rows to hold two out.
        RuntimeError: called in ``torch.inference_mode()``, or the student reaches no finite error.

    Example:
        >>> import torch
        >>> from coded_torch.surrogates import distill
        >>> _ = torch.manual_seed(0)
        >>> module, student = torch.nn.Tanh(), torch.nn.Linear(2, 2)
        >>> error = distill(student, module, [torch.randn(1000, 2)])
        >>> error < 0.2
        True
    """
    instance("distill", "student", student, nn.Module)
    instance("distill", "module", module, nn.Module)
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        what = type(batches).__name__
        raise TypeError(f"distill: batches must be a sequence of batches, such as [x], got {what}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("distill: leave torch.inference_mode(); torch.no_grad() does no harm")
    epochs, rows = count("distill", "epochs", epochs), count("distill", "rows", rows)
    patience = count("distill", "patience", patience)
    learning_rate = positive("distill", "learning_rate", learning_rate)
    noise = real("distill", "noise", noise, "at least 0 and finite", lambda x: 0 <= x < math.inf)
    if link not in (None, "softmax"):
        raise ValueError(f"distill: link must be None or 'softmax', got {link!r}")
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    pieces = _pieces([_Arguments.of(batch, device) for batch in batches])
    held_out = pieces[:: max(2, min(_PIECES, len(pieces)))]
    taught = _Arguments.together([p for p in pieces if all(p is not h for h in held_out)])
    with torch.no_grad():
        exact = [_outputs(module, piece, link) for piece in held_out]
        variances = [
            torch.cat(leaves).var(0).mean().clamp(min=1e-30) for leaves in zip(*exact, strict=True)
        ]
    generator = torch.Generator(device).manual_seed(seed)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, learning_rate)
    steps = -(-taught.size // rows)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    best, best_state, waited = math.inf, copy.deepcopy(student.state_dict()), 0
    for epoch in range(epochs):
        student.train()
        order = torch.randperm(taught.size, generator=generator, device=device)
        for some in order.split(rows):
            step = taught.at(some)
            if augment is not None:
                step = _Arguments.of(augment(*step.args), device)
            step = step.mixed(generator).noisy(noise, generator)
            with torch.no_grad():
                wanted = _outputs(module, step, link)
                finite = _finite_rows(wanted)
                if not bool(finite.all()):  # mixtures may lie where the module has no outputs
                    if not bool(finite.any()):
                        continue
                    step, wanted = step.at(finite), [leaf[finite] for leaf in wanted]
            with torch.enable_grad():
                got = _outputs(student, step, link)
                losses = [
                    (a - b).square().mean() / v
                    for a, b, v in zip(got, wanted, variances, strict=True)
                ]
                loss = torch.stack(losses).mean()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            schedule.step()
        error = _error(student.eval(), held_out, exact, variances, link)
        if error < best:
            best, best_state, waited = error, copy.deepcopy(student.state_dict()), 0
        else:
            waited += 1
        if progress and sys.stderr.isatty():
            print(
                f"\rdistill: epoch {epoch + 1} of {epochs}, error {best:.4f}",
                end="",
                file=sys.stderr,
            )
        if waited >= patience:
            break
    if progress and sys.stderr.isatty():
        print(file=sys.stderr)
    student.load_state_dict(best_state)
    if not math.isfinite(best):
        raise RuntimeError(
            "distill: student must reach a finite error, got none; take a smaller learning_rate, "
            "or batches for which the module's outputs are finite"
        )
    return best


class _Arguments:
    """Positional arguments, whose tensors have their batch along dimension 0."""

    def __init__(self, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self._leaves, self._spec = leaves, spec
        self.size = len(next(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    @classmethod
    def of(cls, batch: Any, device: torch.device) -> _Arguments:
        leaves, spec = pytree.tree_flatten(batch if isinstance(batch, tuple) else (batch,))
        leaves = [x.detach().to(device) if isinstance(x, Tensor) else x for x in leaves]
        sizes = {x.shape[:1] for x in leaves if isinstance(x, Tensor)}
        if len(sizes) != 1 or not all(sizes):
            raise ValueError(
                "distill: batches must hold tensors of one batch size along dimension 0, got "
                f"{[tuple(x.shape) for x in leaves if isinstance(x, Tensor)]}"
            )
        return cls(leaves, spec)

    @classmethod
    def together(cls, several: Sequence[_Arguments]) -> _Arguments:
        columns = zip(*(one._leaves for one in several), strict=True)
        return cls(
            [torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in columns], several[0]._spec
        )

    @property
    def args(self) -> tuple[Any, ...]:
        args: tuple[Any, ...] = pytree.tree_unflatten(self._leaves, self._spec)
        return args

    def _each(self, change: Callable[[Tensor], Tensor], floating: bool = True) -> _Arguments:
        return _Arguments(
            [
                change(x)
                if isinstance(x, Tensor) and (x.is_floating_point() or not floating)
                else x
                for x in self._leaves
            ],
            self._spec,
        )

    def at(self, rows: Tensor | slice) -> _Arguments:
        return self._each(lambda x: x[rows], floating=False)

    def mixed(self, generator: torch.Generator) -> _Arguments:
        """The second half mixed with the first, row by row, where all tensors can be mixed.

        Each is between two rows, and moved away from two others: the weights sum to one, and some
        are negative, as those of splines and rational functions are.
        """
        if not all(x.is_floating_point() for x in self._leaves if isinstance(x, Tensor)):
            return self
        half = self.size // 2
        share, beyond = torch.rand(2, half, generator=generator, device=generator.device)
        beyond = beyond * share * (1 - share)

        def mix(x: Tensor) -> Tensor:
            if not half:
                return x
            wide = x.to(torch.promote_types(x.dtype, torch.float32))  # sums may be too large
            w, v = (one.view(-1, *[1] * (x.dim() - 1)).to(wide.dtype) for one in (share, beyond))
            first, second = wide[-half:], wide[:half]
            away = first + second - first.roll(1, 0) - second.roll(1, 0)
            return torch.cat([x[:-half], (torch.lerp(first, second, w) + v * away).to(x.dtype)])

        return self._each(mix)

    def noisy(self, noise: float, generator: torch.Generator) -> _Arguments:
        """Every row with noise of a level of its own, up to ``noise``."""
        if not noise or self.size < 2:
            return self

        def change(x: Tensor) -> Tensor:
            shape = len(x), *[1] * (x.dim() - 1)
            level = torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
            drawn = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            return x + noise * x.std() * level * drawn

        return self._each(change)


def _pieces(batches: list[_Arguments]) -> list[_Arguments]:
    """At least two, so that one can be held out, of two rows at least."""
    if len(batches) == 1 and batches[0].size >= 4:
        number = min(_PIECES, batches[0].size // 2)
        return [batches[0].at(slice(i, None, number)) for i in range(number)]
    if len(batches) > 1 and min(batch.size for batch in batches) > 1:
        return batches
    sizes = [batch.size for batch in batches]
    raise ValueError(
        "distill: batches must hold four rows, or several batches two each, to hold some out, "
        f"got {f'{sum(sizes)} in {len(sizes)}' if sizes else 'no batch'}"
    )


def _outputs(module: nn.Module, arguments: _Arguments, link: str | None) -> list[Tensor]:
    """The floating-point outputs, on the scale on which they are decoded."""
    leaves = pytree.tree_leaves(module(*arguments.args))
    outputs = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if link is None:
        return outputs
    return [x.clamp(min=torch.finfo(x.dtype).tiny).log() for x in outputs]


def _finite_rows(leaves: Sequence[Tensor]) -> Tensor:
    """Where all leaves ``[n, ...]`` are finite, bool, ``[n]``."""
    rows = [
        leaf.isfinite().flatten(1).all(1) if leaf.dim() > 1 else leaf.isfinite() for leaf in leaves
    ]
    return torch.stack(rows).all(0)


@torch.no_grad()
def _error(
    student: nn.Module,
    pieces: Sequence[_Arguments],
    exact: Sequence[Sequence[Tensor]],
    variances: Sequence[Tensor],
    link: str | None,
) -> float:
    """The variance of what the student misses, over that of the outputs."""
    missed = [
        [f - s for f, s in zip(outputs, _outputs(student, piece, link), strict=True)]
        for piece, outputs in zip(pieces, exact, strict=True)
    ]
    shares = [
        torch.cat(leaves).var(0).mean() / variance
        for leaves, variance in zip(zip(*missed, strict=True), variances, strict=True)
    ]
    error = float(torch.stack(shares).mean())
    return error if math.isfinite(error) else math.inf
