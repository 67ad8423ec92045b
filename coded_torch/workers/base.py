r"""What every pool of workers does: take one task, and yield the workers' results as they come."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .faults import Fault

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..stragglers import Stragglers

__all__ = ["Ambient", "Reply", "Task", "WorkerError", "Workers", "broadcast_dims"]

_LEAF = pytree.tree_structure(0)
_NO_FAULT = Fault()

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: Kinds of outputs that pass through, if they are the same wherever the module runs. A float is
#: none of them: it is a loss or a score, which depends on the inputs.
CONSTANTS = (type(None), bool, int, str, bytes, enum.Enum, torch.dtype, torch.device)


class WorkerError(RuntimeError):
    """What is wrong with one worker's result; where the worker raised, that is the cause.

    Attributes:
        worker: the worker.
        reason: what happened to it.
    """

    def __init__(self, worker: int, reason: str) -> None:
        self.worker = worker
        self.reason = reason
        super().__init__(f"worker {worker} {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.worker, self.reason)


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """One worker's answer: a value, or the error that stands in for it.

    Attributes:
        worker: the worker, ``0 .. N - 1``.
        latency: seconds from the request to this reply, on the clock of the pool.
        value: what the module returned, a pytree; tensors lie on the device of the task.
        error: what went wrong, or None.
    """

    worker: int
    latency: float
    value: Any = None
    error: WorkerError | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The module call that N workers make, each on its own coded inputs.

    Attributes:
        leaves: the leaves of ``(args, kwargs)``: a coded one is ``[N, G, ...]``, one coded input
            per worker and group, any other is the same for every worker.
        dims: per leaf, the dimension at which the module expects the batch; None: not coded.
        spec: the structure of ``(args, kwargs)``.
        num_workers: N.
        num_groups: G, the size of the batch that one worker computes.
        out_dims: the batch dimension of the module's outputs, a pytree prefix of them.
        device: where the coded inputs are, and the results go.
        positions: per worker, which of the N coded inputs is its own; by default its own number.
        faults: per worker, what goes wrong on purpose; None: nothing does.
    """

    leaves: Sequence[Any]
    dims: Sequence[int | None]
    spec: pytree.TreeSpec
    num_workers: int
    num_groups: int
    device: torch.device
    out_dims: Any = 0
    positions: Sequence[int] | None = None
    faults: Sequence[Fault] | None = None

    def position(self, worker: int) -> int:
        """Which of the N coded inputs a worker gets."""
        return worker if self.positions is None else self.positions[worker]

    def fault(self, worker: int) -> Fault:
        """What goes wrong with a worker's call on purpose, if anything does."""
        return _NO_FAULT if self.faults is None else self.faults[worker]

    def payload(self, worker: int) -> Arguments:
        """The ``(args, kwargs)`` of one worker: views of its coded inputs, a batch of G."""
        return self._arguments(
            leaf if dim is None else leaf[self.position(worker)]
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        )

    def stack(
        self, workers: Sequence[int], max_batch_size: int | None = None
    ) -> Iterator[Arguments]:
        """The ``(args, kwargs)`` of several workers as one batch, in their order.

        Args:
            workers: at least one worker.
            max_batch_size: the most rows of a batch; several batches where one is not enough.
        """
        positions = [self.position(worker) for worker in workers]
        whole = positions == list(range(self.num_workers))

        def chosen(leaf: Tensor) -> Tensor:  # [N, G, ...] -> [len(workers) G, ...]
            if not whole:
                leaf = leaf.index_select(0, torch.tensor(positions, device=leaf.device))
            return leaf.flatten(0, 1)

        rows = [
            leaf if dim is None else chosen(leaf)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        size = len(workers) * self.num_groups
        step = max_batch_size or size
        for start in range(0, size, step):
            yield self._arguments(
                row if dim is None else row[start : start + step]
                for row, dim in zip(rows, self.dims, strict=True)
            )

    def unstack(self, outputs: Sequence[Any], num_workers: int) -> list[Any]:
        """Cut the outputs on the batches of :meth:`stack` into one output per worker.

        Raises:
            ValueError: the batches' outputs differ in structure, kind or a constant, or a tensor
                has not one row per row of the batch.
        """
        flat, specs = zip(*map(flatten, outputs), strict=True)
        if any(spec != specs[0] for spec in specs):
            raise ValueError(
                "Task: the module must return the same structure for every batch, got "
                f"{' and '.join(sorted(set(map(str, specs))))}"
            )
        size = num_workers * self.num_groups
        columns: list[Sequence[Any]] = []
        for i, dim in enumerate(broadcast_dims("out_dims", self.out_dims, specs[0])):
            parts = [leaves[i] for leaves in flat]
            if dim is not None and any(kind(part) != kind(parts[0]) for part in parts):
                got = " and ".join(sorted({show(part) for part in parts}))
                raise ValueError(
                    f"CodedWrapper: {leaf_name('output', outputs[0], i)} must be the same for "
                    f"every batch, or a tensor of one dtype, got {got}"
                )
            if dim is None or not isinstance(parts[0], Tensor):
                columns.append(parts[:1] * num_workers)
                continue
            check_batch(outputs[0], i, parts[0], dim)
            leaf = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
            check_batch(outputs[0], i, leaf, dim, size)
            by_worker = leaf.unflatten(dim, (num_workers, self.num_groups))  # [..., N, G, ...]
            columns.append(by_worker.unbind(dim - (dim < 0)))
        return [
            pytree.tree_unflatten([column[n] for column in columns], specs[0])
            for n in range(num_workers)
        ]

    def _arguments(self, leaves: Iterable[Any]) -> Arguments:
        placed = [
            leaf if not dim else leaf.movedim(0, dim)
            for leaf, dim in zip(leaves, self.dims, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(placed, self.spec)
        return args, kwargs


class Workers(abc.ABC):
    """A pool that runs a module on N coded inputs, and yields each result when it is there.

    The number of workers is that of the task: a pool with fewer machines gives some of them several
    coded inputs. A machine starts a task when its last one has ended, wanted or not, and a result
    that nobody waited for is dropped, never delivered to a later request. The caller's grad mode,
    inference mode and autocast hold wherever the module runs.

    Pools may be shared between threads and wrappers. Subclasses implement :meth:`run`, and
    :meth:`close` if they hold anything.
    """

    #: The law by which the pool delays its workers, if it does.
    stragglers: Stragglers | None = None

    @abc.abstractmethod
    def run(
        self, module: nn.Module, task: Task, *, quorum: int, deadline: float | None = None
    ) -> Generator[Reply, None, None]:
        """Run ``module`` on the payload of every worker.

        Args:
            module: what to run.
            task: on what.
            quorum: how many results are expected to be enough; a hint, the caller may take more.
            deadline: seconds to wait for replies; who is later is a straggler, which is no error.
                None: as long as the pool itself allows; who is later has failed.

        Yields:
            Replies in order of arrival, at most one per worker, until no more will come. Closing
            the generator gives up the rest.
        """

    def close(self) -> None:  # noqa: B027 - most pools hold nothing
        """Let go of everything the pool holds; twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The caller's modes that a module call depends on, to hold in another thread as well."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    autocast_cache: bool
    default_device: torch.device

    @classmethod
    def capture(cls) -> Ambient:
        """The modes of this thread."""
        accelerator = torch.accelerator.current_accelerator()
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (kind, torch.get_autocast_dtype(kind))
                for kind in ("cpu", *([accelerator.type] if accelerator else []))
                if torch.is_autocast_enabled(kind)
            ),
            torch.is_autocast_cache_enabled(),
            torch.get_default_device(),
        )

    @contextlib.contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        """Let the modes hold in this thread, for a module on ``device``."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))  # inference mode sets it too
            for kind, dtype in self.autocast:
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, cache_enabled=self.autocast_cache)
                )
            # Who creates tensors on an accelerator by default means the one the module is on.
            if self.default_device.type != "cpu":
                stack.enter_context(device)
            yield


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As ``pytree.tree_flatten``, without its microseconds for a tree that is one tensor."""
    return ([tree], _LEAF) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)


def broadcast_dims(argument: str, dims: Any, spec: pytree.TreeSpec) -> list[int | None]:
    """The batch dimension of every leaf of ``spec``, from ``dims``, a pytree prefix of it.

    Raises:
        TypeError: ``dims`` has a leaf that is neither an integer nor None.
        ValueError: ``dims`` is not a prefix.
    """
    if dims is None or type(dims) is int:  # the same for all
        return [dims] * spec.num_leaves
    flat: list[int | None] = []
    tree = pytree.tree_unflatten([0] * spec.num_leaves, spec)

    def repeat(dim: Any, subtree: Any) -> None:
        if not (dim is None or (isinstance(dim, int) and not isinstance(dim, bool))):
            raise TypeError(f"CodedWrapper: {argument} must hold integers and None, got {dim!r}")
        flat.extend([dim] * pytree.tree_structure(subtree).num_leaves)

    try:
        pytree.tree_map_(repeat, dims, tree)
    except ValueError:
        raise ValueError(
            f"CodedWrapper: {argument} must be a pytree prefix of the values, "
            f"got {dims!r} for {pytree.tree_map(lambda _: '*', tree)}"
        ) from None
    return flat


def kind(leaf: Any) -> tuple[Any, ...]:
    """What must be the same wherever the module runs: all of a constant, else the type."""
    if isinstance(leaf, Tensor):
        return Tensor, leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, CONSTANTS) else (type(leaf),)


def show(leaf: Any) -> str:
    """A leaf for messages: the dtype and shape of a tensor, a constant, else the type."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, CONSTANTS) else type(leaf).__name__


def leaf_name(root: str, tree: Any, index: int) -> str:
    """The name of a leaf of ``tree``, as one would write it in Python."""
    path, _ = pytree.tree_flatten_with_path(tree)[0][index]
    return root + pytree.keystr(path)


def check_batch(output: Any, index: int, leaf: Tensor, dim: int, size: int | None = None) -> None:
    """Raise a ValueError unless ``leaf`` has a dimension ``dim``, of ``size`` if that is given.

    ``output`` and ``index`` say which leaf of the module's output it is.
    """
    if not -leaf.dim() <= dim < leaf.dim() or (size is not None and leaf.shape[dim] != size):
        rows = "a batch dimension" if size is None else f"size {size}, that of the batch,"
        raise ValueError(
            f"CodedWrapper: {leaf_name('output', output, index)} must have {rows} at dim {dim}, "
            f"got shape {tuple(leaf.shape)}"
        )
