r"""Teaching a smaller network to imitate a module, without labels."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure, tree_unflatten

from .._arguments import count, instance, nonnegative, positive, shown
from .._torch import random_numbers_kept
from ..input_space._regression import check_link, to_scale
from ._untuned import HELD_OUT


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
    progress: Callable[[range], Iterable[int]] = iter,
) -> float:
    """Teach a student the outputs of a module, for ``CodedWrapper(..., surrogate=student)``.

    It learns from the module's own outputs on noisy inputs, without labels. Returns the held-out
    variance of f - s over the variance of f, the mean over the outputs: the squared error of
    estimated answers falls by about this factor. The reference describes the other arguments.

    Args:
        student: a cheap module of the same inputs and outputs, which is trained in place.
        module: in the mode in which it answers.
        batches: inputs like the ones that will be answered, a few thousand rows. Each is an input,
            or a tuple of positional arguments, whose tensors have the batch along dimension 0.
    """
    instance("distill", "student", student, nn.Module)
    instance("distill", "module", module, nn.Module)
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            "distill: batches must be a sequence of batches, such as [x], got "
            f"{shown(type(batches))}"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("distill: leave torch.inference_mode(); torch.no_grad() is allowed")
    epochs = count("distill", "epochs", epochs)
    rows = count("distill", "rows", rows)
    patience = count("distill", "patience", patience)
    seed = count("distill", "seed", seed, 0, 2**64 - 2)
    instance("distill", "augment", augment, Callable, optional=True)
    learning_rate = positive("distill", "learning_rate", learning_rate)
    noise = nonnegative("distill", "noise", noise)
    check_link("distill", link)
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    inputs = _joined([_checked(batch, device) for batch in batches])
    places = torch.arange(len(_tensors(inputs)[0]), device=device)
    share = min(HELD_OUT, len(places) // 2)
    taught = places[places % share > 0]
    held_out = places[::share].split(rows)

    def outputs(network: nn.Module, args: Any) -> list[Tensor]:
        """Return the floating-point outputs, on the scale on which they are estimated."""
        args = tree_map_only(Tensor, Tensor.clone, args)  # the network may change its inputs
        return [to_scale(x, link) for x in _tensors(network(*args)) if x.dtype.is_floating_point]

    @torch.no_grad()
    def on_held_out(network: nn.Module) -> list[Tensor]:
        parts = [outputs(network, _rows(inputs, some)) for some in held_out]
        return [torch.cat(leaves) for leaves in zip(*parts, strict=True)]

    exact = on_held_out(module)
    found = on_held_out(student.eval())
    shapes, expected = ([tuple(x.shape) for x in each] for each in (found, exact))
    if shapes != expected:
        raise ValueError(
            f"distill: student must return shapes {expected}, as module, got {shown(shapes)}"
        )
    weights = [p for p in student.parameters() if p.requires_grad]
    if not (shapes and weights):
        raise ValueError(
            "distill: student must have weights to train, and module floating-point outputs, got "
            f"{shown((len(weights), len(shapes)))}"
        )
    variances = _variances(exact).clamp(min=1e-30)
    generator = torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.Adam(weights, learning_rate)
    steps = epochs * -(-len(taught) // rows)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def noisy(x: Tensor) -> Tensor:
        """Add noise to rows, of levels of their own."""
        if not x.dtype.is_floating_point:
            return x
        level = torch.empty(len(x), *[1] * (x.dim() - 1), device=device, dtype=x.dtype)
        level.uniform_(generator=generator)
        level *= noise * x.std(correction=0)
        unit = torch.empty(x.shape, device=device, dtype=x.dtype).normal_(generator=generator)
        return x + level * unit

    best = math.inf
    best_state = copy.deepcopy(student.state_dict())
    waited = 0
    devices = [device] if device.type == "cuda" else []
    # The student may draw numbers, too, of another stream than the generator's.
    with random_numbers_kept(devices, seed + 1):
        for _ in progress(range(epochs)):
            student.train()
            order = taught[torch.randperm(len(taught), generator=generator, device=device)]
            # No step of one row, of which a batch normalisation learns nothing, and raises.
            for some in order[: len(order) - (len(order) % rows == 1)].split(rows):
                step = _rows(inputs, some)
                if augment is not None:
                    step = _checked(augment(*step), device)
                step = tree_map_only(Tensor, noisy, step)
                with torch.no_grad():
                    wanted = outputs(module, step)
                    finite = [f.reshape(len(f), -1).isfinite().all(1) for f in wanted]
                    known = torch.stack(finite).all(0)
                    if not bool(known.any()):
                        continue  # noise may leave the domain of the module
                with torch.enable_grad():
                    pairs = zip(outputs(student, step), wanted, variances, strict=True)
                    errors = [(s - f)[known].square().mean() / v for s, f, v in pairs]
                    loss = torch.stack(errors).mean()
                    optimiser.zero_grad()
                    loss.backward()
                optimiser.step()
                schedule.step()
            found = on_held_out(student.eval())
            residuals = _variances([f - s for f, s in zip(exact, found, strict=True)])
            error = float((residuals / variances).mean())
            waited += 1
            if error < best:  # never, if it is NaN
                best = error
                best_state = copy.deepcopy(student.state_dict())
                waited = 0
            if waited >= patience:
                break
    student.load_state_dict(best_state)
    if not math.isfinite(best):
        remedy = "take a smaller learning_rate, or batches for which module's outputs are finite"
        raise RuntimeError(f"distill: student must reach a finite error, got none; {remedy}")
    return best


def _checked(batch: Any, device: torch.device) -> Any:
    """Return the arguments of a batch, on the device."""
    args = batch if isinstance(batch, tuple) else (batch,)
    shapes = [tuple(x.shape) for x in _tensors(args)]
    if len({shape[:1] for shape in shapes}) != 1 or not all(shapes):
        raise ValueError(
            "distill: batches must hold tensors of one batch size along dimension 0, got "
            f"{shown(shapes)}"
        )
    return tree_map_only(Tensor, lambda x: x.detach().to(device), args)


def _joined(batches: list[Any]) -> Any:
    """Return the rows of all batches as one."""
    size = sum(len(_tensors(batch)[0]) for batch in batches)
    if size < 4:
        raise ValueError(f"distill: batches must hold at least four rows, got {shown(size)}")
    try:
        columns = zip(*map(tree_leaves, batches), strict=True)
        leaves = [torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in columns]
    except (RuntimeError, ValueError) as error:
        requirement = "batches must differ in their sizes only"
        raise ValueError(f"distill: {requirement}, got some that are not: {error}") from None
    return tree_unflatten(leaves, tree_structure(batches[0]))


def _tensors(args: Any) -> list[Tensor]:
    return [x for x in tree_leaves(args) if isinstance(x, Tensor)]


def _rows(args: Any, rows: Tensor) -> Any:
    return tree_map_only(Tensor, lambda x: x[rows], args)


def _variances(leaves: list[Tensor]) -> Tensor:
    """Return the mean variance of each output."""
    return torch.stack([x.var(0).mean() for x in leaves])
