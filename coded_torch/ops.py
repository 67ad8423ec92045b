r"""The torch operators: per operator, side by side, the call, its shape, its gradient, its vmap."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _extension  # noqa: F401 - loads the operators

__all__ = [
    "inner_products",
    "matern52",
    "matern52_among",
    "spline_apply",
    "squared_distances",
    "with_matrix",
]

_OPERATOR = torch.ops.coded_torch.spline_apply.default
_INTO = torch.ops.coded_torch.spline_apply_out.default
_MATERN = torch.ops.coded_torch.matern52_out.default
_MATERN_AMONG = torch.ops.coded_torch.matern52_among.default
_DISTANCES = torch.ops.coded_torch.squared_distances.default
_PRODUCTS = torch.ops.coded_torch.inner_products.default
_SHORTEST = 1e-30


def spline_apply(
    values: Tensor,
    coefficients: Tensor,
    schedule: Tensor,
    *,
    transpose: bool = False,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    num_rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Apply planned smoothing splines, or their transpose, to every column.

    With ``gather`` and ``scatter`` the groups are rows of a flat batch, read and written where they
    lie: the same as ``values[gather]`` before and ``out[scatter] = result`` after, without copies.

    Args:
        values: ``[n, G, m]``, values at the knots for G groups of m columns, any strides; or
            ``[N, G, m]`` where ``transpose``; or ``[R, m]`` with ``gather``. float64, float32,
            bfloat16 or float16.
        coefficients: ``[P, 12 n + 4 N]``, float64 for float64 values, else float32; one plan for
            all groups (P = 1) or one for each (P = G). :func:`with_matrix` appends the matrix.
        schedule: ``[P, n + 1 + N]``, int32. Both come from ``_plan.spline_plan``.
        transpose: apply the transpose.
        gather: ``[n, G]`` (``[N, G]`` where ``transpose``), int64: row i of group g is
            ``values[gather[i, g]]``. Rows may repeat; -1 stands for a row of zeros.
        scatter: ``[N, G]`` (``[n, G]`` where ``transpose``), int64: row j of group g becomes
            row ``scatter[j, g]`` of the result. No row may be named twice; -1 drops the row; rows
            of the result that are not named are 0.
        num_rows: the number of rows of the result, with ``scatter`` only. Defaults to the number
            of its entries, each of which must name a row then: nothing has to be set to 0, which
            saves three launches on CUDA.
        out: where the result is written: a tensor of its shape and of the dtype and device of the
            values, any row and group strides, apart from the values. Without derivatives only.

    Returns:
        ``[N, G, m]``; or ``[n, G, m]`` where ``transpose``; or ``[num_rows, m]`` with ``scatter``:
        ``out``, or a new contiguous tensor.

    Raises:
        RuntimeError: the arguments do not fit together, a derivative is asked of a call with
            ``out``, the schedule leads out of bounds, or an index is out of bounds or names a row
            of the result twice. Entries are checked on the CPU only. Elsewhere, an index out of
            bounds counts as -1, and of rows named twice either is kept; but a schedule that the
            planner did not make may lead anywhere in memory.

    Note:
        :math:`O(n + N)` per column. A new result of several megabytes asks for huge pages where the
        system grants them on request, since touching small ones for the first time takes longer
        than the arithmetic; memory that is there, in ``out``, costs neither. The call with the
        other ``transpose`` is the gradient with respect to the values, so every derivative exists,
        in reverse and forward mode, under ``torch.func`` too (compiled, ``torch.func`` has forward
        mode and ``vmap`` only). The plan has no gradient:
        :func:`coded_torch.functional.smoothing_spline` has, with respect to points and smoothing.
    """
    inputs = values, coefficients, schedule, transpose, gather, scatter, num_rows
    if out is not None:
        return _write(out, inputs)
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        transformed: Tensor = _Transformed.apply(*inputs)  # type: ignore[no-untyped-call]
        return transformed
    primal, tangent = forward_ad.unpack_dual(values)
    if tangent is not None:  # linear, so the tangent is mapped as the value is
        rest: dict[str, Any] = {"gather": gather, "scatter": scatter, "num_rows": num_rows}
        out = forward_ad.make_dual(
            spline_apply(primal, coefficients, schedule, transpose=transpose, **rest),
            spline_apply(tangent, coefficients, schedule, transpose=transpose, **rest),
        )
    elif compiling or (
        torch.is_grad_enabled() and (values.requires_grad or coefficients.requires_grad)
    ):
        out = _OPERATOR(*inputs)
    else:  # what the operator's own autograd layer would do, without its microseconds
        with torch._C._AutoDispatchBelowAutograd():
            out = _OPERATOR(*inputs)
    return out


def with_matrix(coefficients: Tensor, schedule: Tensor, exact: Tensor | None = None) -> Tensor:
    """Append the dense matrix of a plan to its coefficients, for kernels that multiply by it.

    On CUDA, :func:`spline_apply` multiplies instead of sweeping wherever a plan for all groups has
    its matrix. On the CPU it ignores the matrix.

    Args:
        coefficients: ``[1, 12 n + 4 N]``, on the host, as for :func:`spline_apply`.
        schedule: ``[1, n + 1 + N]``.
        exact: the coefficients in float64. Defaults to ``coefficients``.

    Returns:
        ``[1, 12 n + 4 N + n N]``, the last number rounded up to a multiple of 4.
    """
    exact = coefficients.double() if exact is None else exact
    num_knots = (coefficients.shape[1] - 4 * (schedule.shape[1] - 1)) // 8
    num_points = schedule.shape[1] - 1 - num_knots
    fewer = min(num_knots, num_points)
    # The plan is a constant of whatever derivative or vmap is being computed.
    with torch._C._DisableFuncTorch(), torch._C._AutoDispatchBelowAutograd():
        identity = torch.eye(fewer, dtype=torch.float64, device="cpu").unsqueeze(1)
        matrix = _OPERATOR(identity, exact, schedule, num_points < num_knots)  # [., 1, fewer]
        matrix = matrix[:, 0] if num_points < num_knots else matrix[:, 0].T  # [n, N]
        entries = torch.nn.functional.pad(matrix.reshape(1, -1), (0, -matrix.numel() % 4))
        return torch.cat([coefficients, entries.to(coefficients)], 1)


def _write(out: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    values, coefficients, *_ = inputs
    compiling = torch.compiler.is_compiling()
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (values, coefficients, out))
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    if recorded or transformed or forward_ad.unpack_dual(values).tangent is not None:
        raise RuntimeError("spline_apply: out must be None where a derivative or vmap is asked for")
    if compiling:
        _INTO(*inputs, out)
        return out
    with torch._C._AutoDispatchBelowAutograd():
        _INTO(*inputs, out)
    torch.autograd.graph.increment_version(out)  # as any in-place operation
    return out


def _fake(
    values: Tensor,
    coefficients: Tensor,
    schedule: Tensor,
    transpose: bool,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    num_rows: int | None = None,
) -> Tensor:
    if scatter is not None:
        rows = scatter.numel() if num_rows is None else num_rows
        return values.new_empty((rows, values.shape[-1]))
    rows, groups = (values if gather is None else gather).shape[:2]
    return values.new_empty((schedule.shape[-1] - 1 - rows, groups, values.shape[-1]))


torch.library.register_fake("coded_torch::spline_apply", _fake)
torch.library.register_fake("coded_torch::spline_apply_out", lambda *_: None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, coefficients, schedule, ctx.transpose, gather, scatter, ctx.num_rows = inputs
    if coefficients.requires_grad:
        raise ValueError("spline_apply: coefficients must not require a gradient, they have none")
    ctx.rows_in = values.shape[0]
    ctx.save_for_backward(coefficients, schedule, gather, scatter)
    ctx.save_for_forward(coefficients, schedule, gather, scatter)


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Add each of ``values`` to its row of ``total``, in the same order whenever that is asked.

    ``index_add`` adds rows that repeat in any order on CUDA; ``index_put`` sorts them there, and
    has no order on the CPU.
    """
    if total.is_cuda:
        return total.index_put((rows,), values, accumulate=True)
    return total.index_add(0, rows, values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, schedule, gather, scatter = ctx.saved_tensors
    grad = spline_apply(
        grad, coefficients, schedule, transpose=not ctx.transpose, gather=scatter
    )  # [n, G, m]
    if gather is not None:  # rows may repeat, so they add up; one more row takes those of -1
        rows = torch.where(gather < 0, ctx.rows_in, gather).flatten()
        total = grad.new_zeros((ctx.rows_in + 1, grad.shape[2]))
        grad = add_rows(total, rows, grad.flatten(0, 1))[:-1]
    return grad, None, None, None, None, None, None


torch.library.register_autograd(
    "coded_torch::spline_apply", _backward, setup_context=_setup_context
)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    values: Tensor,
    coefficients: Tensor,
    schedule: Tensor,
    transpose: bool,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    num_rows: int | None = None,
) -> tuple[Tensor, int]:
    if gather is not None or scatter is not None:
        if in_dims[0] is None or any(in_dim is not None for in_dim in in_dims[1:]):
            raise NotImplementedError(
                "spline_apply: vmap over plans or indices is not supported with gather or scatter"
            )
        # A row's columns stay together: the batch becomes further columns.
        last = values.dim() - 2
        v = values.movedim(in_dims[0], last)  # [..., B, m]
        out = spline_apply(
            v.flatten(last), coefficients, schedule,
            transpose=transpose, gather=gather, scatter=scatter, num_rows=num_rows,
        )  # fmt: skip
        return out.unflatten(-1, v.shape[-2:]), out.dim() - 1

    size = info.batch_size

    def batched(tensor: Tensor, in_dim: int | None, at: int) -> Tensor:
        if in_dim is None:
            return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
        return tensor.movedim(in_dim, at)

    v = batched(values, in_dims[0], 1)  # [n, B, G, m]
    groups = v.shape[2]
    if in_dims[1] is None and in_dims[2] is None and coefficients.shape[0] == 1:
        plans = [coefficients, schedule]
    else:  # [B, P, .] -> [B * G, .], a plan for each group of each element of the batch
        plans = [
            batched(t, d, 0).expand(size, groups, -1).reshape(size * groups, -1)
            for t, d in ((coefficients, in_dims[1]), (schedule, in_dims[2]))
        ]
    out = spline_apply(v.flatten(1, 2), *plans, transpose=transpose)
    return out.unflatten(1, (size, groups)), 1


torch.library.register_vmap("coded_torch::spline_apply", _vmap)


class _Transformed(torch.autograd.Function):
    """The operator under ``torch.func``, which cannot use the gradient that is registered."""

    backward = staticmethod(_backward)
    setup_context = staticmethod(_setup_context)
    vmap = staticmethod(_vmap)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = _OPERATOR(*inputs)
        return out

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        coefficients, schedule, gather, scatter = ctx.saved_tensors
        return spline_apply(
            tangent, coefficients, schedule,
            transpose=ctx.transpose, gather=gather, scatter=scatter, num_rows=ctx.num_rows,
        )  # fmt: skip


def matern52(squared_distances: Tensor, length: float, *, out: Tensor | None = None) -> Tensor:
    r"""The Matern covariance of smoothness 5/2, in one pass over the distances.

    .. math:: (1 + s + s^2 / 3) \, e^{-s}, \qquad s = \sqrt 5 \, r / l

    Args:
        squared_distances: :math:`r^2`, any shape, at least 0, float64 or float32; infinite gives 0.
        length: :math:`l`, positive.
        out: where the covariances go: a contiguous tensor of the same shape, dtype and device,
            apart from the squared distances or, where these are contiguous, that very tensor.

    Returns:
        The covariances: ``out``, or a new contiguous tensor. To within a few roundings, but 0 where
        they are less than 2e-16 in float32, 1e-147 in float64, so that no product of two is
        subnormal, which costs many times the time. NaN of NaN and of what is negative.

    Raises:
        RuntimeError: the arguments do not fit together, or a derivative is asked for: it has none.
    """
    if torch.is_grad_enabled() and squared_distances.requires_grad:
        raise RuntimeError("matern52: squared_distances must not require a gradient, it has none")
    if out is None:
        out = torch.empty_like(squared_distances, memory_format=torch.contiguous_format)
    _MATERN(squared_distances.contiguous(), math.sqrt(5) / max(length, _SHORTEST), out)
    return out


torch.library.register_fake("coded_torch::matern52_out", lambda *_: None)


def matern52_among(
    squared_distances: Tensor, rows: Tensor, columns: Tensor, length: float
) -> Tensor:
    """:func:`matern52` of some rows and columns of a matrix, still in one pass.

    Args:
        squared_distances: ``[n, m]``, contiguous, otherwise as for :func:`matern52`.
        rows: ``[R]``, int64.
        columns: ``[C]``, int64.
        length: positive.

    Returns:
        ``[R, C]``.

    Raises:
        RuntimeError: as for :func:`matern52`; on the CPU, for an index out of bounds, too.
    """
    if torch.is_grad_enabled() and squared_distances.requires_grad:
        raise RuntimeError("matern52: squared_distances must not require a gradient, it has none")
    scale = math.sqrt(5) / max(length, _SHORTEST)
    covariances: Tensor = _MATERN_AMONG(squared_distances, rows, columns, scale)
    return covariances


torch.library.register_fake(
    "coded_torch::matern52_among",
    lambda squared, rows, columns, *_: squared.new_empty(len(rows), len(columns)),
)


def squared_distances(rows: Tensor, squares: Tensor, nothing: float) -> Tensor:
    r"""The squared distances of all rows from each other, each from the differences of the numbers.

    So every distance is as exact as a few roundings allow, however small, and they are those of
    points. Symmetric, with zeros on the diagonal, and wherever there is at most ``nothing`` times
    :math:`1 + s_a + s_b`.

    Args:
        rows: ``[n, L]``, contiguous, finite, float64 or float32.
        squares: ``[n]``, s, of the same dtype: the squared lengths of the rows.
        nothing: at least 0.

    Returns:
        ``[n, n]``, of the dtype of the rows.

    Raises:
        RuntimeError: the arguments do not fit together, or a derivative is asked for: it has none.

    Note:
        :math:`O(n^2 L)`.
    """
    if torch.is_grad_enabled() and rows.requires_grad:
        raise RuntimeError("squared_distances: rows must not require a gradient, it has none")
    distances: Tensor = _DISTANCES(rows, squares, nothing)
    return distances


def inner_products(rows: Tensor) -> Tensor:
    """The inner products of all rows, ``[n, n]``: symmetric to the bit, for half of the work.

    Args:
        rows: ``[n, L]``, contiguous, float64 or float32.

    Raises:
        RuntimeError: of another kind, or a derivative is asked for: it has none.
    """
    if torch.is_grad_enabled() and rows.requires_grad:
        raise RuntimeError("inner_products: rows must not require a gradient, it has none")
    products: Tensor = _PRODUCTS(rows)
    return products


def _fake_pairs(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(len(rows), len(rows))


torch.library.register_fake("coded_torch::squared_distances", _fake_pairs)
torch.library.register_fake("coded_torch::inner_products", _fake_pairs)
