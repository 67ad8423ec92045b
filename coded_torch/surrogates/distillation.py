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
from ..input_space.regression import check_link, to_scale

__all__ = ["distill"]

# One batch of ten, or a tenth of a single batch, is held out. It was not tuned.
_SETS = 10


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
    half mixtures of them, all with some noise. It minimises the squared error over the variance of
    each output. A share of the batches is held out, and the weights that are best there are kept.

    Args:
        student: a cheap module of the same inputs and outputs, such as a twentieth of the work.
            It is trained in place, and left in evaluation mode.
        module: in the mode in which it answers.
        batches: inputs like the ones that will be answered, a few thousand rows. Each is an input,
            or a tuple of positional arguments, whose tensors have the batch along dimension 0.
        epochs: the most passes over the inputs. Defaults to 100.
        learning_rate: of Adam at first; it falls to 0 along a cosine. Defaults to 5e-3.
        rows: of a step. Defaults to 64.
        noise: the largest standard deviation, over each input's. Defaults to 0.03.
        augment: returns such arguments as a step has, such as shifted pictures.
        patience: epochs without a better held-out error, after which it stops. Defaults to 30.
        link: "softmax" to compare the logarithms of probabilities. Defaults to None.
        seed: of order, mixtures, noise and all that training draws. Training does not touch the
            global random state. Defaults to 0.
        progress: show epochs and error, on terminals only. Defaults to True.

    Returns:
        The error that it reached: the held-out variance of f - s over the variance of f, the
        mean over the outputs. The squared error of predicted answers falls by about this factor.

    Raises:
        ValueError: the student returns other shapes than the module.
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
    check_link("distill", link)
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    taught, held_out = _divided([_checked(batch, device) for batch in batches])
    with torch.no_grad():
        exact = [_outputs(module, args, link) for args in held_out]
        found = _outputs(student.eval(), held_out[0], link)
    shapes, must = ([tuple(x.shape) for x in each] for each in (found, exact[0]))
    if shapes != must:
        raise ValueError(f"distill: student must return shapes {must}, as module, got {shapes}")
    weights = [p for p in student.parameters() if p.requires_grad]
    if not (shapes and weights):
        needs = "student must have weights to train, and module floating-point outputs"
        raise ValueError(f"distill: {needs}, got {len(weights)} and {len(shapes)}")
    variances = _variances(exact).clamp(min=1e-30)
    generator = torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.Adam(weights, learning_rate)
    size = len(_tensors(taught)[0])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-size // rows))

    def learn(some: Tensor) -> None:
        step = _rows(taught, some)
        if augment is not None:
            step = _checked(augment(*step), device)
        step = _noisy(_mixed(step, generator), noise, generator)
        with torch.no_grad():
            wanted = _outputs(module, step, link)
        finite = torch.stack([x.isfinite().unsqueeze(1).flatten(1).all(1) for x in wanted]).all(0)
        if not bool(finite.all()):  # mixtures may lie where the module has no outputs
            if not bool(finite.any()):
                return
            step, wanted = _rows(step, finite), [leaf[finite] for leaf in wanted]
        with torch.enable_grad():
            pairs = zip(_outputs(student, step, link), wanted, variances, strict=True)
            loss = torch.stack([(got - y).square().mean() / v for got, y, v in pairs]).mean()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        schedule.step()

    shown = progress and sys.stderr.isatty()
    best, best_state, waited = math.inf, copy.deepcopy(student.state_dict()), 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the student may draw numbers, too
        torch.default_generator.manual_seed(seed + 1)  # another stream than the generator's
        for each in devices:
            torch.cuda.default_generators[each.index].manual_seed(seed + 1)
        for epoch in range(epochs):
            student.train()
            order = torch.randperm(size, generator=generator, device=device)
            # No step of one row, of which a batch normalisation learns nothing, and raises.
            for some in order[: size - (size % rows == 1 < size)].split(rows):
                learn(some)
            student.eval()
            with torch.no_grad():
                outputs = [_outputs(student, args, link) for args in held_out]
                pairs = zip(exact, outputs, strict=True)
                residuals = [[f - s for f, s in zip(*pair, strict=True)] for pair in pairs]
                error = float((_variances(residuals) / variances).mean())
            waited += 1
            if error < best:  # never, if it is NaN
                best, best_state, waited = error, copy.deepcopy(student.state_dict()), 0
            if shown:
                line = f"\rdistill: epoch {epoch + 1} of {epochs}, error {best:.4f}"
                print(line, end="", file=sys.stderr)
            if waited >= patience:
                break
    if shown:
        print(file=sys.stderr)
    student.load_state_dict(best_state)
    if not math.isfinite(best):
        raise RuntimeError(
            "distill: student must reach a finite error, got none; take a smaller learning_rate, "
            "or batches for which the module's outputs are finite"
        )
    return best


# Batches are tuples of positional arguments, whose tensors have the batch along dimension 0.


def _checked(batch: Any, device: torch.device) -> Any:
    """Return the arguments of a batch, on the device."""
    args = batch if isinstance(batch, tuple) else (batch,)
    shapes = [tuple(x.shape) for x in _tensors(args)]
    if len({shape[:1] for shape in shapes}) != 1 or not all(shapes):
        raise ValueError(
            f"distill: batches must hold tensors of one batch size along dimension 0, got {shapes}"
        )
    return pytree.tree_map_only(Tensor, lambda x: x.detach().to(device), args)


def _tensors(args: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]


def _rows(args: Any, rows: Tensor | slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x[rows], args)


def _mixed(args: Any, generator: torch.Generator) -> Any:
    """Return arguments whose second half is mixed: between two rows, and away from two others."""
    half = len(_tensors(args)[0]) // 2
    if not half or not all(x.is_floating_point() for x in _tensors(args)):
        return args
    share, beyond = torch.rand(2, half, generator=generator, device=generator.device)
    beyond = beyond * share * (1 - share)

    def mix(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # sums may be too large
        w, v = (one.view(-1, *[1] * (x.dim() - 1)).to(wide.dtype) for one in (share, beyond))
        first, second = wide[-half:], wide[:half]
        away = first + second - first.roll(1, 0) - second.roll(1, 0)
        return torch.cat([x[:-half], (torch.lerp(first, second, w) + v * away).to(x.dtype)])

    return pytree.tree_map_only(Tensor, mix, args)


def _noisy(args: Any, noise: float, generator: torch.Generator) -> Any:
    """Return arguments whose rows have noise of levels of their own, up to ``noise``."""
    if not noise or len(_tensors(args)[0]) < 2:
        return args

    def change(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        how: Any = {"generator": generator, "device": x.device, "dtype": x.dtype}
        level = torch.rand(len(x), *[1] * (x.dim() - 1), **how)
        return x + noise * x.std() * level * torch.randn(x.shape, **how)

    return pytree.tree_map_only(Tensor, change, args)


def _divided(batches: list[Any]) -> tuple[Any, list[Any]]:
    """Return the training rows, and held-out batches or parts of one, two rows each."""
    sets, sizes = batches, [len(_tensors(batch)[0]) for batch in batches]
    if len(batches) == 1 and sizes[0] >= 4:
        number = min(_SETS, sizes[0] // 2)
        sets = [_rows(batches[0], slice(i, None, number)) for i in range(number)]
    elif len(batches) < 2 or min(sizes) < 2:
        raise ValueError(
            "distill: batches must hold four rows, or several batches two each, to hold some out, "
            f"got {f'{sum(sizes)} in {len(sizes)}' if sizes else 'no batch'}"
        )
    step = max(2, min(_SETS, len(sets)))
    columns = zip(*(pytree.tree_leaves(x) for i, x in enumerate(sets) if i % step), strict=True)
    taught = [torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in columns]
    return pytree.tree_unflatten(taught, pytree.tree_structure(sets[1])), sets[::step]


def _outputs(module: nn.Module, args: Any, link: str | None) -> list[Tensor]:
    """Return the floating-point outputs, on the scale on which they are predicted."""
    args = pytree.tree_map_only(Tensor, Tensor.clone, args)  # the module may change its inputs
    return [to_scale(x, link) for x in _tensors(module(*args)) if x.is_floating_point()]


def _variances(sets: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the mean variance of each output, over the rows of all sets."""
    return torch.stack([torch.cat(x).var(0).mean() for x in zip(*sets, strict=True)])
