r"""Metrics from the gradients of a module, or of a regression on its outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .._arguments import arguments, shown
from .._torch import device_of, exactly, on_host, placed
from ._gaussian_process import LENGTH, RowProcess
from ._untuned import FLOOR, LEAST_ROWS, NOISE, NOTHING

# Of each output tensor with more numbers, so many random projections are differentiated.
_MOST_OUTPUTS = 16
# Inputs of more numbers per row are measured in the span of at most 512 gradients.
_WIDE = 1024
_MOST_ROWS = 512
_CHUNK = 64  # rows whose gradients are in memory together
# Copies had .43 to 1.02 of the squared error without the metric on power, vowels and appliances,
# and .55 to 1.03 with one round. (measured once; benchmarks gradients has other networks)
_ROUNDS = 3


class GradientMetric:
    r"""A metric by which a module's outputs change: features whose distances are measured as is.

    The features are :math:`x M^p`, up to a rotation, where :math:`M` is the mean of
    :math:`J^\top J`. :func:`from_gradients` and :func:`from_outputs` make it, with p = 1/2.
    """

    def __init__(
        self,
        mean: Tensor,
        directions: Tensor,
        values: Tensor,
        sizes: list[int],
        power: float,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._fit = mean, directions, values, sizes  # [d], [d, r], [r]; numbers per row
        self._power = power
        self._seen = seen  # features [n, r] and outputs [n, C] of rows
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.__name__ = "gradients" if power == 0.5 else "gradients_root"

    @property
    def competing(self) -> tuple[GradientMetric, GradientMetric]:
        """This metric, and its root: p = 1/2 and p = 1/4."""
        return GradientMetric(*self._fit, 0.5), GradientMetric(*self._fit, 0.25)

    @functools.cached_property
    def for_orders(self) -> GradientMetric:
        """The metric by which rows are ordered: outputs predicted for the rows count, too."""
        return self if self._seen is None else _WithOutputs(self, *self._seen)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return features, ``[B, r]``, of the floating-point inputs, ``[B, ...]`` each."""
        sizes = self._fit[3]
        found = [x.shape[1:].numel() for x in inputs]
        if found != sizes:
            raise ValueError(
                f"GradientMetric: inputs must have {sizes} numbers per row, as the rows that it "
                f"is made from, got {found}"
            )
        return self._features(torch.cat([_numbers(x) for x in inputs], 1))

    def _features(self, x: Tensor) -> Tensor:
        """Return the features of rows ``[B, d]``."""
        mean, directions, values, _ = self._fit

        def make() -> tuple[Tensor, Tensor]:
            weighted = directions * values**self._power
            return mean.to(x.device, x.dtype), weighted.to(x.device, x.dtype)

        centre, weighted = placed(self, self._copies, x.device, make, x.dtype)
        with exactly(x.device.type):
            return (x - centre) @ weighted

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self._fit, self._power, self._seen)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GradientMetric):
            return NotImplemented
        same = self._power == other._power
        return same and all(x is y for x, y in zip(self._fit, other._fit, strict=True))

    def __hash__(self) -> int:
        return hash((id(self._fit[1]), self._power))

    def __repr__(self) -> str:
        return f"GradientMetric(power={self._power})"


class _WithOutputs(GradientMetric):
    """A metric's features, and the outputs that a regression on them predicts.

    Both have the same variance. With two or three times the weight of outputs, or with roots of
    features, splines were as good: on LeNet-5 with tanh, digits, power, vowels and appliances, they
    had .50 of the squared error in the order by distances, .57 of it without predicted outputs, and
    .39 with the true ones (measured once; benchmarks gradients has other networks).
    """

    def __init__(self, metric: GradientMetric, features: Tensor, outputs: Tensor) -> None:
        super().__init__(*metric._fit, metric._power)
        self._process = RowProcess(features, outputs.double(), LENGTH, outputs.shape[1])
        self._units = _spread(features), _spread(outputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        features = super().__call__(*inputs)
        predicted = self._process.estimate_at(features.cpu().float())[0].to(features)
        return torch.cat([features / self._units[0], predicted / self._units[1]], 1)


@on_host()
def from_gradients(module: Callable[..., Any], rows: Any) -> GradientMetric:
    r"""Return a metric by which inputs are near if the module's outputs are.

    The squared distance is :math:`d^\top M d`, where M is the mean of :math:`J^\top J` over rows,
    and J is the derivative of the outputs by the floating-point inputs.

    Args:
        module: differentiable, in the mode in which it answers. Gradients of its weights stay.
        rows: some 300 typical inputs: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments, with the batch along dimension 0. At most 512 are used, and moved to
            the module's device. Rows whose gradients are not finite are left out.

    Raises a ValueError if no output has gradients. The module runs here, once, and never in calls.
    """
    is_module = isinstance(module, nn.Module)
    args, kwargs = arguments(rows, module if is_module else None)
    with torch.inference_mode(False), torch.enable_grad():
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if _is_numbers(x)]
        size = 0
        if tensors:
            size = len(tensors[0])
        if not size:
            raise ValueError(
                "from_gradients: rows must hold a floating-point tensor with at least one row, got "
                f"{shown(rows)}"
            )
        device = device_of(module)
        leaves = tree_map_only(Tensor, lambda x: x.detach().to(device or x.device).clone(), leaves)
        batched = [isinstance(x, Tensor) and x.shape[:1] == (size,) for x in leaves]
        found = [x for x, b in zip(leaves, batched, strict=True) if b and x.is_floating_point()]
        some = torch.linspace(0, size - 1, min(size, _MOST_ROWS), dtype=torch.float64).long()
        gradients = _Gradients(sum(x.shape[1:].numel() for x in found), len(some))
        seen = list[Tensor]()  # the rows of each chunk
        answers = list[list[Tensor]]()
        for places in some.split(_CHUNK):
            chunk = [
                x.index_select(0, places.to(x.device)) if b else x
                for x, b in zip(leaves, batched, strict=True)
            ]
            sources = [
                x.requires_grad_()
                for x, b in zip(chunk, batched, strict=True)
                if b and x.is_floating_point()
            ]
            copies = tree_map_only(Tensor, Tensor.clone, chunk)  # for in-place code
            part_args, part_kwargs = tree_unflatten(copies, spec)
            outputs = tree_leaves(module(*part_args, **part_kwargs))
            numbers = [
                y.reshape(len(places), -1)
                for y in outputs
                if isinstance(y, Tensor) and y.requires_grad and y.shape[:1] == places.shape
            ]
            gradients.add(sources, numbers)
            with torch.no_grad():
                seen.append(torch.cat([_numbers(x).cpu() for x in sources], 1))
                answers.append([_few(y) for y in numbers])
        directions, values = gradients.directions()
        by_output = [torch.cat(x) for x in zip(*answers, strict=True)]
    sizes = [x.shape[1:].numel() for x in found]
    inputs = torch.cat(seen)
    finite_rows = inputs[inputs.isfinite().all(1)]
    mean = (finite_rows.sum(0, dtype=torch.float64) / max(len(finite_rows), 1)).float()
    metric = GradientMetric(mean, directions, values, sizes, 0.5)
    finite = torch.stack([x.isfinite().all(1) for x in (inputs, *by_output)]).all(0)
    return _with_outputs(metric, inputs[finite], [x[finite] for x in by_output])


def _with_outputs(metric: GradientMetric, rows: Tensor, by_output: list[Tensor]) -> GradientMetric:
    """Return a metric that can predict outputs, if rows ``[n, d]`` and outputs can teach it."""
    outputs = _varying(rows, by_output)
    if outputs is None:
        return metric
    features = metric._features(rows)
    if not _spread(features) > 0:
        return metric
    return GradientMetric(*metric._fit, 0.5, (features, outputs))


def _varying(rows: Tensor, by_output: list[Tensor]) -> Tensor | None:
    """Return outputs ``[n, C]`` that vary, joined, each in units of its spread.

    Return None if none varies, or if the rows ``[n, d]`` are few or equal.
    """
    if len(rows) < LEAST_ROWS or not _spread(rows) > 0:
        return None
    varying = [x / _spread(x) for x in by_output if _spread(x) > 0]
    return torch.cat(varying, 1) if varying else None


@on_host()
def from_outputs(rows: Any, outputs: Any) -> GradientMetric:
    r"""Return a metric by which inputs are near if their outputs are, without the module.

    A kernel regression learns the outputs, and is differentiated in place of the module, in rounds,
    as a recursive feature machine does (arXiv:2212.13881). Raises a ValueError if fewer than 8 rows
    are finite, or if all rows or outputs are equal.

    Args:
        rows: some 300 typical inputs: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments, with the batch along dimension 0. At most 512 are used. Rows that are
            not finite, or whose outputs are not, are left out.
        outputs: the module's outputs for these rows: a tensor, or several in any structure.
    """
    args, kwargs = arguments(rows, None)
    leaves = [x for x in tree_leaves((args, kwargs)) if _is_numbers(x)]
    answers = [x for x in tree_leaves(outputs) if _is_numbers(x)]
    lengths = {len(x) for x in (*leaves, *answers)}
    if not leaves or not answers or len(lengths) > 1:
        raise ValueError(
            "from_outputs: rows and outputs must be floating-point tensors with the same rows, got "
            f"{shown(rows)} and {shown(outputs)}"
        )
    size = lengths.pop()
    some = torch.linspace(0, size - 1, min(size, _MOST_ROWS), dtype=torch.float64).long()
    inputs = torch.cat([_numbers(x[some.to(x.device)]).cpu() for x in leaves], 1)
    by_output = [_few(x[some.to(x.device)].reshape(len(some), -1)) for x in answers]
    finite = torch.stack([x.isfinite().all(1) for x in (inputs, *by_output)]).all(0)
    inputs = inputs[finite]
    by_output = [x[finite] for x in by_output]
    learnt = _varying(inputs, by_output)
    if learnt is None:
        raise ValueError(
            f"from_outputs: at least {LEAST_ROWS} rows must be finite, and rows and outputs must "
            f"differ, got {len(inputs)} finite rows; leave metric= at its default"
        )
    centre = inputs.mean(0, dtype=torch.float64)
    # The regression's gradients lie in the span of the rows.
    coordinates, lengths_along, span = torch.linalg.svd(inputs - centre, full_matrices=False)
    kept = lengths_along > NOTHING * lengths_along[0]
    coordinates = coordinates[:, kept] * lengths_along[kept]
    matrix = torch.eye(coordinates.shape[1], dtype=torch.float64)
    for _ in range(_ROUNDS):
        matrix = _products_of_gradients(coordinates, learnt.double(), matrix)
    values, vectors = torch.linalg.eigh(matrix)
    directions = (span[kept].T @ vectors).float()
    values = (values.clamp(min=0) / values[-1] + FLOOR).float()
    sizes = [x.shape[1:].numel() for x in leaves]
    metric = GradientMetric(centre.float(), directions, values, sizes, 0.5)
    return _with_outputs(metric, inputs, by_output)


def _products_of_gradients(x: Tensor, outputs: Tensor, matrix: Tensor) -> Tensor:
    r"""Return the mean of :math:`J^\top J` of a regression on rows ``[n, r]`` in a metric.

    The kernel is :math:`e^{-d / L}`, where L is the median of the distances d.
    """
    weighted = x @ matrix
    norms = (weighted * x).sum(1)
    distances = (norms[:, None] + norms - 2 * weighted @ x.T).clamp(min=0).sqrt()
    apart = distances > NOTHING * distances.max()
    length = distances[apart].median()
    kernel = torch.exp(-distances / length)
    noise = torch.eye(len(x), dtype=x.dtype) * NOISE
    weights = torch.linalg.solve(kernel + noise, outputs - outputs.mean(0))
    # The kernel has no gradient where two rows are one.
    slopes = torch.where(apart, kernel / (length * distances), 0)
    total = torch.zeros_like(matrix)
    for weight in weights.T:
        pulls = slopes * weight
        gradients = (pulls @ x - pulls.sum(1, keepdim=True) * x) @ matrix
        total += gradients.T @ gradients
    return total * (len(total) / total.trace())


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.is_floating_point()


class _Gradients:
    """The gradients of each output tensor: their products, or themselves if they are wide."""

    def __init__(self, width: int, rows: int) -> None:
        self._is_wide = width > _WIDE
        self._projections = _MOST_OUTPUTS
        if self._is_wide:
            self._projections = min(max(_MOST_ROWS // rows, 1), _MOST_OUTPUTS)
        self._generator = torch.Generator().manual_seed(0)
        self._found = dict[int, list[Tensor]]()

    def add(self, sources: list[Tensor], outputs: list[Tensor]) -> None:
        """Add the gradients of outputs, ``[rows, C]`` each, by their rows of sources."""
        for i, output in enumerate(outputs):
            for direction in self._directions(*output.shape):
                grads = torch.autograd.grad(
                    output,
                    sources,
                    direction.to(output),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                rows = torch.cat([_numbers(x).cpu() for x in grads], 1)
                rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)
                self._add(self._found.setdefault(i, []), rows)

    def _directions(self, rows: int, columns: int) -> Iterator[Tensor]:
        """Yield the outputs by which gradients are taken: each alone, or random sums of many."""
        if columns <= self._projections:
            yield from torch.eye(columns)[:, None].expand(-1, rows, -1)
            return
        for _ in range(self._projections):  # random signs have unit covariance
            signs = torch.randint(0, 2, (rows, columns), generator=self._generator)
            yield signs.float() * 2 - 1

    def _add(self, found: list[Tensor], rows: Tensor) -> None:
        """Add rows of gradients to the others, or to the sum of their products."""
        if self._is_wide:
            found.append(rows)
            return
        wide = rows.double()
        product = wide.T @ wide
        found[:] = [found[0] + product] if found else [product]

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvectors of M, ``[d, r]``, and their values over the largest, float32."""
        # Every output tensor counts alike, whatever its unit.
        parts = []
        for found in self._found.values():
            squares = float(found[0].trace()) if not self._is_wide else _squares(found)
            if squares > 0:
                parts += [x / (squares**0.5 if self._is_wide else squares) for x in found]
        if not parts:
            raise ValueError(
                "from_gradients: module must have outputs with gradients by its floating-point "
                "inputs, got none that are finite and not 0; leave metric= at its default"
            )
        if not self._is_wide:
            values, vectors = torch.linalg.eigh(torch.stack(parts).sum(0))
            return vectors.float(), (values.clamp(min=0) / values[-1] + FLOOR).float()
        factor = torch.cat(parts)
        factor = factor[factor.any(1)]
        factor = factor[:: -(-len(factor) // _MOST_ROWS)]
        values, vectors = torch.linalg.eigh((factor @ factor.T).double())
        kept = values > NOTHING * values[-1]
        values = values[kept]
        span = factor.T @ (vectors[:, kept] * values.rsqrt()).to(factor.dtype)
        return span.float(), (values / values[-1] + FLOOR).float()


def _squares(rows: list[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in rows)


def _few(outputs: Tensor) -> Tensor:
    """Return outputs ``[B, C]`` in float32 on the host, or some projections of many."""
    outputs = outputs.detach().float().cpu()
    columns = outputs.shape[1]
    if columns <= _MOST_OUTPUTS:
        return outputs
    generator = torch.Generator().manual_seed(columns)  # the same for all chunks
    return outputs @ (torch.randint(0, 2, (columns, _MOST_OUTPUTS), generator=generator) * 2.0 - 1)


def _spread(x: Tensor) -> float:
    """Return the root of the sum of the variances of columns ``[n, C]``."""
    return float(x.double().var(0, correction=0).sum().sqrt())


def _numbers(x: Tensor) -> Tensor:
    """Return ``[B, d]`` numbers in float32 or float64."""
    return x.detach().reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))
