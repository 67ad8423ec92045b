"""The torch operators; each has its call, fake, gradient and vmap side by side.

Every derivative of :func:`spline_apply` with respect to the values exists, in reverse and forward
mode, and under ``torch.func`` (compiled: ``vmap``, and after torch 2.10 forward mode). The plan has
none. Rows of the result that ``scatter`` does not name are 0; by default each entry names a row.

It raises a RuntimeError if the arguments do not fit together, or entries on the CPU are out of
bounds or name a row twice. On CUDA an index out of bounds counts as -1, and a wrong schedule may
lead anywhere in memory.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _extension  # noqa: F401 - loads the operators
from ._torch import tangent_of

_OPERATOR = torch.ops.coded_torch.spline_apply.default
_SHORTEST = 1e-30  # length of a covariance, the shortest whose inverse float32 holds


def spline_apply(
    values: Tensor,
    coefficients: Tensor,
    schedule: Tensor,
    *,
    transpose: bool = False,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """Apply planned smoothing splines, or their transpose, to every column.

    Args:
        values: at the knots, ``[n, G, m]``, for G groups of m columns, any strides; ``[N, G, m]``
            with ``transpose``; ``[R, m]`` with ``gather``. float64, float32, bfloat16 or float16.
        coefficients: ``[P, 12 n + 4 N]``, float64 for float64 values, else float32; one plan for
            all groups (P = 1) or one for each (P = G). :func:`with_matrix` appends the matrix.
        schedule: ``[P, n + 1 + N]``, int32. ``_plan.spline_plan`` makes both.
        gather: ``[n, G]`` (``[N, G]`` with ``transpose``), int64: row i of group g is
            ``values[gather[i, g]]``. Rows may repeat; -1 is a row of zeros.
        scatter: ``[N, G]`` (``[n, G]`` with ``transpose``), int64: row j of group g becomes row
            ``scatter[j, g]`` of the result ``[num_rows, m]``, each at most once; -1 drops it.
    """
    return _apply(values, coefficients, schedule, transpose, gather, scatter, num_rows)


def _apply(values: Tensor, *plan: Any) -> Tensor:
    """Do as :func:`spline_apply`, whose other arguments in their order are the ``plan``."""
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        transformed: Any = _Transformed  # its apply has a type for some releases of Python
        out: Tensor = transformed.apply(values, *plan)
    elif (tangent := tangent_of(values)) is not None:  # linear: it is mapped as the value is
        primal = forward_ad.unpack_dual(values).primal
        out = forward_ad.make_dual(_apply(primal, *plan), _OPERATOR(tangent, *plan))
    elif compiling or (torch.is_grad_enabled() and (values.requires_grad or plan[0].requires_grad)):
        out = _OPERATOR(values, *plan)
    else:
        with torch._C._AutoDispatchBelowAutograd():  # saves the microseconds of the autograd layer
            out = _OPERATOR(values, *plan)
    return out


def with_matrix(coefficients: Tensor, schedule: Tensor) -> Tensor:
    """Append the dense matrix of one plan to its coefficients, ``[1, 12 n + 4 N + n N]``.

    ``n N`` is rounded up to a multiple of 4. On CUDA, :func:`spline_apply` then multiplies by the
    matrix instead of sweeping.
    """
    exact = coefficients.double()
    num_knots = (coefficients.shape[1] - 4 * (schedule.shape[1] - 1)) // 8
    # The plan is a constant of any derivative or vmap under way.
    with torch._C._DisableFuncTorch(), torch._C._AutoDispatchBelowAutograd():
        unit = torch.eye(num_knots, dtype=torch.float64, device="cpu").unsqueeze(1)
        matrix = _OPERATOR(unit, exact, schedule, False)[:, 0].T.reshape(1, -1)
        entries = torch.nn.functional.pad(matrix, (0, -matrix.numel() % 4))
        return torch.cat([coefficients, entries.to(coefficients)], 1)


def _fake(values: Tensor, _: Tensor, schedule: Tensor, transpose: bool, *where: Any) -> Tensor:
    """Return an empty tensor of the result's shape, for tracing."""
    gather, scatter, num_rows = (*where, None, None, None)[:3]  # defaults may be left out
    if scatter is not None:
        rows = scatter.numel() if num_rows is None else num_rows
        return values.new_empty((rows, values.shape[-1]))
    rows, groups = (values if gather is None else gather).shape[:2]
    return values.new_empty((schedule.shape[-1] - 1 - rows, groups, values.shape[-1]))


torch.library.register_fake("coded_torch::spline_apply", _fake)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the derivatives of :func:`spline_apply` need."""
    values, coefficients, schedule, ctx.transpose, gather, scatter, ctx.num_rows = inputs
    if coefficients.requires_grad:
        raise ValueError("spline_apply: coefficients must not require a gradient, they have none")
    ctx.rows_in = values.shape[0]
    ctx.save_for_backward(coefficients, schedule, gather, scatter)
    ctx.save_for_forward(coefficients, schedule, gather, scatter)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of the values, by the transpose, and None for all other arguments."""
    coefficients, schedule, gather, scatter = ctx.saved_tensors
    grad = _apply(grad, coefficients, schedule, not ctx.transpose, scatter, None, None)  # [n, G, m]
    if gather is not None:  # rows may repeat, so they add up; one more row takes index -1
        inside = (gather >= 0) & (gather < ctx.rows_in)
        rows = gather.where(inside, ctx.rows_in).flatten()
        added = grad.flatten(0, 1)
        grad = grad.new_zeros((ctx.rows_in + 1, grad.shape[2]))
        # In the same order at every call: index_add has none on CUDA, index_put none on the CPU.
        if grad.is_cuda:
            grad = grad.index_put((rows,), added, accumulate=True)[:-1]
        else:
            grad = grad.index_add(0, rows, added)[:-1]
    return grad, *[None] * 6


torch.library.register_autograd("coded_torch::spline_apply", _backward, setup_context=_set_up)


def _vmap(_: Any, in_dims: tuple[int | None, ...], values: Tensor, *plan: Any) -> Any:
    """Apply one plan to a batch of values."""
    if in_dims[0] is None or any(in_dim is not None for in_dim in in_dims[1:]):
        raise NotImplementedError("spline_apply: vmap over plans or indices is not supported")
    # The batch becomes further columns: [..., m] -> [..., B m].
    last = values.dim() - 2
    batch = values.movedim(in_dims[0], last)
    out = _apply(batch.flatten(last), *plan)
    return out.unflatten(-1, batch.shape[-2:]), out.dim() - 1


torch.library.register_vmap("coded_torch::spline_apply", _vmap)


class _Transformed(torch.autograd.Function):
    """The operator under ``torch.func``, which cannot use the registered gradient."""

    backward = staticmethod(_backward)
    setup_context = staticmethod(_set_up)
    vmap = staticmethod(_vmap)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = _OPERATOR(*inputs)
        return out

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        coefficients, schedule, gather, scatter = ctx.saved_tensors
        return _apply(tangent, coefficients, schedule, ctx.transpose, gather, scatter, ctx.num_rows)


def _normally(name: str) -> Any:
    """Return an operator, which runs outside inference mode: torch's threads do not know of it."""
    operator = getattr(torch.ops.coded_torch, name).default

    def call(*args: Any) -> Any:
        """Run the operator."""
        if not torch.is_inference_mode_enabled():
            return operator(*args)
        with torch.inference_mode(False):
            return operator(*args)

    return call


# Operators of the CPU alone, without gradients; csrc/ops/library.cpp has what each takes.
fit_metrics = _normally("fit_metrics")
typical_rows = _normally("typical_rows")
squared_distances = _normally("squared_distances")
choose_regression = _normally("choose_regression")
path_variances = _normally("path_variances")
regress = _normally("regress")
estimate = _normally("estimate")
coefficients = _normally("coefficients")
error_bounds = _normally("error_bounds")
error_radii = _normally("error_radii")
error_thresholds = _normally("error_thresholds")


def matern52(squared_distances: Tensor, length: float, *, out: Tensor | None = None) -> Tensor:
    r"""Return the Matern covariance of smoothness 5/2, in one pass over the distances.

    .. math:: (1 + s + s^2 / 3) \, e^{-s}, \qquad s = \sqrt 5 \, r / l

    It is 0 below 2e-16 in float32, 1e-147 in float64, since subnormal products cost many times the
    time. Squared distances are float64 or float32; infinity gives 0, NaN and negatives give NaN.
    The memory ``out`` is contiguous, and may be the squared distances' own.
    """
    squared = squared_distances.contiguous()
    if out is None:
        out = torch.empty_like(squared)
    scale = math.sqrt(5) / max(length, _SHORTEST)
    torch.ops.coded_torch.matern52_out.default(squared, scale, out)
    return out
