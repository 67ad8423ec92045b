r"""What every pool of workers does: compute parts of a task on its machines, asked one by one."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import operator
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .pytrees import (
    broadcast_dims,
    check_batch,
    flatten,
    kind,
    leaf_name,
    positional,
    show,
    unflatten,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..stragglers import Stragglers
    from .faults import Fault

__all__ = ["Began", "Part", "Reply", "Request", "Task", "WorkerError", "Workers"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class WorkerError(RuntimeError):
    """What is wrong with the result of one part; where the module raised, that is the cause.

    Attributes:
        part: the number of the part.
        machine: the machine that had it; -1: none had.
        reason: what happened, in words that go on after "machine 3" or "part 3".
        kind: "raised": the module raised, or what it was sent or returned did; "died": its machine
            ended, or was ended, while it ran; "": anything else.
    """

    def __init__(self, part: int, machine: int, reason: str, kind: str = "") -> None:
        self.part = part
        self.machine = machine
        self.reason = reason
        self.kind = kind
        super().__init__(f"part {part} {reason}" if machine < 0 else f"machine {machine} {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.part, self.machine, self.reason, self.kind)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one machine is asked for: some of the units of a task.

    Attributes:
        number: 0, 1, 2, ... within the request, in the order of asking.
        units: at least one, increasing.
        fault: an injected fault; ignored when parts are compared.
    """

    number: int
    units: tuple[int, ...]
    fault: Fault | None = dataclasses.field(default=None, compare=False)


class Began(NamedTuple):
    """A machine has begun a part.

    Attributes:
        part: what it has been asked for.
        machine: its place in the pool.
        at: when it got the part, in seconds on the clock of the request.
        fresh: whether it has not run this module before. Then it has to load, compile or warm up,
            and the time it takes is no measure of its speed.
    """

    part: Part
    machine: int
    at: float
    fresh: bool = False


@dataclasses.dataclass(eq=False, slots=True)
class Reply:
    """What came of a part: a value, or the error that stands in for it.

    Attributes:
        part: what was asked for.
        machine: the machine that had it, its place in the pool; -1: none had.
        at: when the reply arrived, in seconds on the clock of the request.
        latency: seconds since the machine began the part; infinite where none did.
        value: what the module returned for the rows of the part, a pytree; tensors lie on the
            device of the task.
        error: what went wrong, or None.
    """

    part: Part
    machine: int
    at: float
    latency: float
    value: Any = None
    error: WorkerError | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A call of the module, cut into units; a machine is asked for some of them, a part.

    A unit is a row of a batch (then R = 1), or one of N columns of coded inputs, of one row per
    group.

    Attributes:
        leaves: the leaves of ``(args, kwargs)``: a divided one is a tensor ``[U, R, ...]`` of any
            dtype, any other is the same for every part.
        dims: per leaf, the dimension at which the module expects the batch; None: not divided.
        spec: the structure of ``(args, kwargs)``.
        num_units: U
        unit_rows: R
        device: where the divided leaves are, and the results go.
        out_dims: the batch dimension of the module's outputs, a pytree prefix of them.
    """

    leaves: Sequence[Any]
    dims: Sequence[int | None]
    spec: pytree.TreeSpec
    num_units: int
    unit_rows: int
    device: torch.device
    out_dims: Any = 0

    def payload(self, units: Sequence[int]) -> Arguments:
        """The ``(args, kwargs)`` of some units, one batch of ``len(units) * R`` rows.

        Args:
            units: at least one. Of consecutive ones the batch is a view, of others a copy.
        """
        (payload,) = self.payloads(units)
        return payload

    def payloads(self, units: Sequence[int], max_rows: int | None = None) -> Iterator[Arguments]:
        """The :meth:`payload` in batches of at most ``max_rows`` rows."""
        run = range(units[0], units[0] + len(units))

        def chosen(leaf: Tensor) -> Tensor:  # [U, R, ...] -> [len(units) R, ...]
            if all(map(operator.eq, units, run)):
                leaf = leaf[run.start : run.stop]
            else:
                leaf = leaf.index_select(0, torch.tensor(units, device=leaf.device))
            return leaf.flatten(0, 1)

        rows = [
            leaf if dim is None else chosen(leaf)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        size = len(units) * self.unit_rows
        step = max_rows or size
        for start in range(0, size, step):
            batch = [
                leaf if dim is None else leaf[start : start + step].movedim(0, dim)
                for leaf, dim in zip(rows, self.dims, strict=True)
            ]
            yield (tuple(batch), {}) if self._is_positional else unflatten(batch, self.spec)

    @functools.cached_property
    def _is_positional(self) -> bool:
        """Whether the arguments are the leaves by position: made in a tenth of the time."""
        return bool(self.spec == positional(len(self.leaves))[0])

    def cut(self, outputs: Sequence[Any], counts: Sequence[int]) -> list[Any]:
        """Cut what the module returned for the batches of :meth:`payloads` into parts.

        Args:
            outputs: one per batch.
            counts: how many units each part has.

        Returns:
            One output per part, of ``count * R`` rows.

        Raises:
            ValueError: the outputs of the batches differ in structure, kind or a constant, or a
                tensor has not one row per row of its batch.
        """
        flat, specs = zip(*map(flatten, outputs), strict=True)
        if any(spec != specs[0] for spec in specs):
            raise ValueError(
                "Task: the module must return the same structure for every batch, got "
                f"{' and '.join(sorted(set(map(str, specs))))}"
            )
        sizes = [count * self.unit_rows for count in counts]
        columns: list[Sequence[Any]] = []
        for i, dim in enumerate(broadcast_dims("out_dims", self.out_dims, specs[0])):
            pieces = [leaves[i] for leaves in flat]
            if dim is not None and any(kind(piece) != kind(pieces[0]) for piece in pieces):
                got = " and ".join(sorted({show(piece) for piece in pieces}))
                raise ValueError(
                    f"CodedWrapper: {leaf_name('output', outputs[0], i)} must be the same for "
                    f"every batch, or a tensor of one dtype, got {got}"
                )
            if dim is None or not isinstance(pieces[0], Tensor):
                columns.append(pieces[:1] * len(counts))
                continue
            check_batch(outputs[0], i, pieces[0], dim)
            leaf = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
            check_batch(outputs[0], i, leaf, dim, sum(sizes))
            columns.append(leaf.split(sizes, dim))
        return [unflatten([column[n] for column in columns], specs[0]) for n in range(len(counts))]


class Request(abc.ABC):
    """A task at a pool, while it is open: parts are asked for, and what comes of them arrives.

    Of every part that is asked for comes, unless it is dropped before:

    * :class:`Began` when a machine gets it, and later one :class:`Reply`; or
    * one :class:`Reply` with an error, where no machine ever gets it.

    A reply with an error comes no later than the pool's ``timeout`` seconds after the part was
    asked for; what arrives after that is dropped. A request is used by one thread, and closed by
    it; :meth:`close` is called where a ``with`` statement ends.
    """

    @abc.abstractmethod
    def ask(self, parts: Sequence[Part]) -> None:
        """Have parts computed, in this order, each by the next machine that is free.

        May be called again while the request is open, and never waits for a machine.

        Args:
            parts: numbered on from the last ones. They may share units with earlier ones.

        Raises:
            RuntimeError: the request is closed. Where the pool is, the parts fail.
        """

    @abc.abstractmethod
    def wait(self, until: float = math.inf) -> Began | Reply | None:
        """The next thing that happens.

        Args:
            until: a time on the clock of the request. What has happened already is returned even
                if that is past.

        Returns:
            None: that time has come, or nothing more can happen before another part is asked for.
        """

    @abc.abstractmethod
    def drop(self, parts: Iterable[Part]) -> None:
        """Parts whose answers are not needed any more: those that have not begun never will.

        The others go on, and their replies arrive.
        """

    @abc.abstractmethod
    def now(self) -> float:
        """Seconds since the request was opened."""

    @property
    @abc.abstractmethod
    def idle(self) -> int:
        """How many machines would begin a part at once if it were asked for now."""

    def status(self) -> str:
        """Why parts that were asked for have not begun, as far as the pool can say: "" or, say,
        "6 of 6 processes are at earlier tasks (grace 30 s)"."""
        return ""

    @abc.abstractmethod
    def close(self) -> None:
        """Drop all that has not begun, and whatever arrives from now on; twice is fine."""

    def abandon(self) -> None:
        """Close, and end even what machines are at, where the pool can."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # Ctrl-C is to leave nothing behind that keeps the next call waiting.
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.abandon()
        else:
            self.close()


class Workers(abc.ABC):
    """A pool of machines that run a module, each on one part of a task at a time.

    A pool must keep this:

    1. :meth:`open` returns at once. It raises what makes the whole task impossible (a module that
       cannot be sent, gradients that cannot pass, a closed pool). The caller's grad mode, inference
       mode and autocast at that moment hold wherever the module runs.
    2. Parts wait in one queue, in the order of asking, whatever request they are of. A machine that
       is free takes the first that is still wanted: its request is open and it is not dropped. From
       then on it has begun, which the request reports with the machine and the time.
    3. A machine that is at a part ends it, wanted or not, before it takes another. A result that
       is not wanted any more is dropped, and reaches no other request.
    4. Every part that has begun ends in one reply, by an error at the latest when the pool's own
       ``timeout`` is over. Where the module raises, the machine dies or the result cannot be sent,
       the reply has a :class:`WorkerError` with that cause, and other parts go on. Its ``kind``
       tells the first two apart.
    5. The value of a reply is what the module returns for :meth:`Task.payload` of the part's units,
       as it is, on the device of the task: whether it can be believed is not the pool's affair.
       :attr:`Part.fault` is applied where the module runs, by :meth:`Fault.around`.
    6. Machines are numbered by their places, 0 to :attr:`num_machines` - 1; one that replaces
       another has the other's number.
    7. Pools may be shared between threads and wrappers, copied and pickled (without what they
       hold). :meth:`close` lets go of everything, and so does the end of a pool that is not closed;
       open requests get an error for each part that is missing.

    Subclasses implement :meth:`open`, and :meth:`close` if they hold anything. A pool on real time
    gets all of its request but the machines from :class:`~coded_torch.workers.live.LiveRequest`.
    ``tests/workers/test_threads.py`` is a small one, :mod:`coded_torch.testing.workers` tests any.
    """

    #: The law by which the pool delays its machines, if it does.
    stragglers: Stragglers | None = None
    #: Whether time is virtual, so that waiting and computing cost none.
    simulated: bool = False
    #: How many machines there are; None where there are as many as parts are asked for.
    num_machines: int | None = None

    @property
    def num_ready(self) -> int | None:
        """The number of machines that are up now; None where :attr:`num_machines` is."""
        return self.num_machines

    @property
    def num_restarts(self) -> int:
        """The number of machines that have ended so far and that the pool replaced."""
        return 0

    @abc.abstractmethod
    def open(self, module: nn.Module, task: Task) -> Request:
        """Begin a request: its clock starts, and nothing is asked for yet.

        Args:
            module: what to run.
            task: on what.
        """

    def memory(self, num_bytes: int) -> Tensor | None:
        """Memory of this machine that those of the pool read where it is.

        What is encoded into it need not be written again for them. A machine that is late may read
        there until it ends, and what it writes there is seen by no other; so the memory is used
        again when the result and all its views are gone, and every machine is done with it.

        Args:
            num_bytes: at least 1.

        Returns:
            uint8, ``[num_bytes]``; None: the pool has none, or all of it is in use, and any other
            memory will do.
        """
        return None

    @final
    def run(
        self, module: nn.Module, task: Task, *, deadline: float = math.inf
    ) -> Generator[Reply, None, None]:
        """Ask for every unit at once, as a part of its own.

        Args:
            module: what to run.
            task: on what.
            deadline: seconds to wait for replies; by default as long as the pool itself allows.

        Yields:
            Replies in order of arrival. Closing the generator closes the request.
        """
        with self.open(module, task) as request:
            request.ask([Part(n, (n,)) for n in range(task.num_units)])
            while (event := request.wait(deadline)) is not None:
                if isinstance(event, Reply):
                    yield event

    def start(
        self, module: nn.Module | None = None, example: Any = None, *, timeout: float = 120.0
    ) -> Self:
        """Bring up what the first request would else bring up, and wait for it.

        Args:
            module: what is loaded by every machine, where machines load modules.
            example: what each machine calls the module with: an input or a tuple of positional
                arguments.
            timeout: seconds.
        """
        return self

    def close(self) -> None:  # noqa: B027 - most pools hold nothing
        """Let go of everything the pool holds; twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
