r"""The contract of all pools: the parts of a task, how a worker computes one, and its faults."""

from __future__ import annotations

import abc
import dataclasses
import math
import operator
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from .._arguments import arguments, instance, positive, sparing_logger, warn
from .._layout import SIZES, Layout, dependent_output, difference, prove, proved_of, structure
from .._table import Began, Part, Reply, Units, WorkerError
from .._torch import (
    has_rows,
    in_training,
    is_texts,
    positional,
    random_numbers_kept,
    sample,
    to_device,
    unflatten,
)
from ..stragglers import Stragglers
from ._untuned import PROOF_PATIENCE, ROWS_OF_PROOF

if TYPE_CHECKING:
    from typing_extensions import Self

logger = sparing_logger("coded_torch.workers")

# Of the four rows of a proof, those of a part by its size. Parts of two and of three rows share
# two, in another order.
_UNITS_OF_PROOF = {1: Units((2,)), 2: Units((2, 3)), 3: Units((0, 1, 2))}

_DAY = 86_400.0  # seconds that a hung call sleeps, longer than any call waits

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A module call, cut into units. A worker is asked for some of them, a part.

    A unit is a row of a batch (R = 1), or one of N columns of coded inputs, with a row per group.
    """

    #: The leaves of ``(args, kwargs)``: tensors ``[U R, ...]`` of any dtype if divided, the rows of
    #: each unit side by side.
    leaves: Sequence[Any]
    dims: Sequence[int | None]  #: the batch dimension of each leaf; None if the same for every part
    spec: TreeSpec  #: the structure of ``(args, kwargs)``
    num_units: int  #: U
    unit_rows: int  #: R
    device: torch.device  #: the device of the divided leaves and the results
    out_dims: Any = 0  #: the batch dimensions of the module's outputs, a pytree prefix of them
    layout: Layout | None = None  #: the layout of the module's outputs, if it is proved
    #: The strings of leaves that have one per row, by place; such a leaf is the numbers of rows.
    texts: Mapping[int, Sequence[str]] = dataclasses.field(default_factory=dict)

    def few(self, rows: Sequence[int]) -> Task:
        """Return the task of some rows."""
        leaves = list(self.leaves)
        for i, dim in enumerate(self.dims):
            if dim is not None:
                leaves[i] = torch.stack([leaves[i][row].detach() for row in rows])
        return dataclasses.replace(self, leaves=leaves, num_units=len(rows), unit_rows=1)

    def lengths(self) -> list[int]:
        """Return the length of each of the first rows: its characters and its numbers but 0."""
        lengths = torch.zeros(ROWS_OF_PROOF, dtype=torch.int64, device="cpu")
        for i, dim in enumerate(self.dims):
            if dim is None:
                continue
            rows = self.leaves[i][:ROWS_OF_PROOF].detach()
            lengths = lengths[: len(rows)]
            if i in self.texts:
                characters = [len(self.texts[i][row]) for row in rows.tolist()]
                lengths += torch.tensor(characters, device="cpu")
            else:
                lengths += (rows != 0).reshape(len(rows), -1).sum(1).cpu()
        return [int(length) for length in lengths]

    def payload(self, units: Sequence[int], copied: bool = False) -> Arguments:
        """Return the ``(args, kwargs)`` of ``len(units) * R`` rows.

        Rows of consecutive units are views, and shared tensors the caller's own, unless they are
        ``copied`` for a module in the caller's process, which may change them.
        """
        run = range(units[0], units[0] + len(units))
        is_run = units[-1] == run[-1]
        is_run = is_run and (isinstance(units, Units) or all(map(operator.eq, units, run)))
        array = units.array if isinstance(units, Units) else units
        size = self.unit_rows

        def chosen(leaf: Tensor) -> Tensor:
            if is_run:
                leaf = leaf[run.start * size : run.stop * size]
                return leaf.clone() if copied else leaf
            own: Tensor = leaf.unflatten(0, (-1, size))
            (places,) = to_device([torch.tensor(array, device="cpu")], leaf.device)
            return own.index_select(0, places).flatten(0, 1)

        def shared(leaf: Any) -> Any:
            if not copied:
                return leaf
            if isinstance(leaf, np.ndarray):
                return leaf.copy()
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        pairs = zip(self.leaves, self.dims, strict=True)
        batch = [shared(leaf) if dim is None else chosen(leaf) for leaf, dim in pairs]
        for i, texts in self.texts.items():
            batch[i] = [texts[row] for row in batch[i].tolist()]
        if any(self.dims):  # moving nothing takes microseconds
            moved = zip(batch, self.dims, strict=True)
            batch = [leaf.movedim(0, dim) if dim else leaf for leaf, dim in moved]
        is_positional = self.spec is positional(len(batch))[0]  # true, a tenth of the time
        return (tuple(batch), {}) if is_positional else unflatten(batch, self.spec)


class InjectedCrash(RuntimeError):  # noqa: N818 - it stands for the end of a process
    """The end of a worker. A process ends by it, and a thread, which cannot, goes on."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of one module call."""

    KINDS: ClassVar = ("crash", "nan", "infinity", "shape", "dtype", "structure")

    delay: float = 0.0  #: seconds that the call takes longer; if infinite, it hangs
    kind: str | None = None  #: an element of :attr:`KINDS`, or None if the result is right

    def __bool__(self) -> bool:
        return self.delay > 0 or self.kind is not None

    def spoil(self, value: Any) -> Any:
        """Return the result that the fault makes of a module's output, a pytree."""
        if self.kind == "structure":
            return [value, None]
        return tree_map_only(Tensor, self._spoil_leaf, value)

    def _spoil_leaf(self, leaf: Tensor) -> Tensor:
        """Return a tensor with the fault."""
        if self.kind in ("nan", "infinity") and (
            leaf.dtype.is_floating_point or leaf.dtype.is_complex
        ):
            return torch.full_like(leaf, math.nan if self.kind == "nan" else math.inf)
        if self.kind == "dtype":
            return leaf.to(torch.float64 if leaf.dtype != torch.float64 else torch.float32)
        if self.kind == "shape":
            return torch.cat([leaf, leaf])
        return leaf


def compute(module: nn.Module, arguments: Arguments | None, fault: Fault | None = None) -> Any:
    """Call a module for a :meth:`Task.payload` as a worker must, with the fault of the part.

    Arguments of None stand for no call. A crash raises an InjectedCrash, which ends a process.
    """
    if arguments is None:
        return None
    args, kwargs = arguments
    if fault is None:
        return module(*args, **kwargs)
    time.sleep(min(fault.delay, _DAY))
    if fault.kind == "crash":
        raise InjectedCrash("an injected crash")
    return fault.spoil(module(*args, **kwargs))


class Request(abc.ABC):
    """A task that is open at a pool: parts are asked for, and events arrive.

    A part that a worker gets causes :class:`Began`, and then one :class:`Reply`. One that no worker
    gets causes only a reply with an error, and one that is dropped before it begins nothing. A part
    that is handed back begins again. One thread uses a request, and closes it.
    """

    timeout = math.inf  #: seconds after which a part that was asked for and has not replied fails
    versions: Mapping[int, str] = {}  #: the version of the model, by worker
    #: The number of replies that a pool may gather before :meth:`wait` returns the first event,
    #: unless time passes, a part fails or has run for ``late`` seconds, or fewer can come.
    together = 0
    late = math.inf
    parts: Sequence[Part] = ()  #: of a :meth:`round` of which something has to be decided

    @abc.abstractmethod
    def ask(self, parts: Sequence[Part]) -> None:
        """Have parts computed, in this order, each by the next idle worker, without waiting.

        Parts are numbered on from the last ones, and may share units. They fail if the pool is
        closed; a closed request raises a RuntimeError.
        """

    def round(
        self, units: Sequence[Any], until: float, join: Callable[[Any], bool] | None
    ) -> Sequence[tuple[int, float, float]]:
        """Have the first parts computed and joined in one step, if the pool can do that.

        ``units`` has the :class:`Units` of each part, and ``join`` gets the outputs of all units.
        If ``join`` returns True, return the worker of each part and when it began and ended.
        Otherwise return nothing. Then :attr:`parts` holds the parts if they were asked for as by
        :meth:`ask`, because something has to be decided before all have ended, there is no
        ``join``, or fewer replies are wanted :attr:`together`. Else nothing has happened.
        """
        return ()

    @abc.abstractmethod
    def wait(self, until: float = math.inf) -> Began | Reply | None:
        """Return the next event, or None at the time ``until`` of the request's clock.

        Events that have happened are returned even later. None also means that nothing more can
        happen before another part is asked for.
        """

    def gather(self, events: list[Began | Reply], until: float, wanted: int) -> None:
        """Append the events that happen together, up to a time, to ``events``.

        No more replies are taken than have the ``wanted`` units.
        """
        while (event := self.wait(until)) is not None:
            events.append(event)
            if isinstance(event, Began) or event.error or not self.together:
                until = -math.inf  # next, events that have happened
            if isinstance(event, Reply):
                wanted -= len(event.part.units)
                if wanted <= 0:
                    return
                if self.together:
                    self.together = wanted

    def replies(self, until: float = math.inf) -> Iterator[Reply]:
        """Yield the replies up to a time, as long as one can come."""
        while (event := self.wait(until)) is not None:
            if isinstance(event, Reply):
                yield event

    @abc.abstractmethod
    def drop(self, parts: Iterable[Part]) -> None:
        """Drop parts. Parts that have begun go on, and reply. The others never begin."""

    @abc.abstractmethod
    def now(self) -> float:
        """Return the seconds since the request was opened."""

    @property
    @abc.abstractmethod
    def idle(self) -> int:
        """The number of workers that would begin a part at once."""

    def status(self) -> str:
        """Return why parts have not begun, as "6 of 6 processes are at earlier tasks", or ""."""
        return ""

    @abc.abstractmethod
    def close(self) -> None:
        """Drop all parts that have not begun, and every later event. May be called twice."""

    def abandon(self) -> None:
        """Close the request, and end even the workers that compute its parts, if the pool can."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # After Ctrl-C, nothing may be left that keeps the next call waiting.
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.abandon() if interrupted else self.close()


class Workers(abc.ABC):
    """A pool of workers that run a module, each on one part of a task at a time.

    A pool must keep these rules:

    1. :meth:`open` returns at once. It raises an error that makes the whole task impossible. The
       caller's grad mode, inference mode and autocast at that moment hold where the module runs.
    2. Parts of all requests wait in one queue, in the order of asking. An idle worker takes the
       first part whose request is open, that is not dropped, and that need not avoid this worker.
       If a part failed on some workers, it waits for another one, unless no other is up. If a part
       spares a worker, one more worker must be idle when it begins, as long as a part that it
       stands in for is computed, or has ended a worker that has no successor yet. If a part must
       avoid all workers that are left, it fails.
    3. A worker ends its part, wanted or not, before it takes another one.
    4. Each part that has begun ends in one reply, at the latest after the ``timeout`` of the pool.
       If the module raises, the worker dies, or the result cannot be sent, the reply has an error
       with that cause. Other parts go on.
    5. The value of a reply is the module's output for :meth:`Task.payload` of the part's units,
       on the device of the task. The module must not see the task's own tensors, which it might
       change. Call it by :func:`compute`, which applies :attr:`Part.fault`.
    6. The places of workers are 0, 1, 2, ... A worker that replaces another one, or comes after one
       that was drained, has its place.
    7. Pools may be shared between threads and wrappers, copied and pickled, without their workers.
       :meth:`close`, and the end of a pool that is not closed, release everything. The missing
       parts of open requests fail.
    """

    stragglers: Stragglers | None = None  #: the delay distribution of its workers
    simulated: bool = False  #: true if time is virtual, so that waiting and computing take none
    num_workers: int | None = None  #: the number of workers; None if there is one for each part
    num_restarts: int = 0  #: how many workers were lost, not at interrupted calls, and replaced
    starts_late: bool = False  #: true if the first request starts the workers
    mixed: bool = False  #: true if its results differ by as much as different hardware's
    concurrency: int = 1  #: the number of parts that a worker computes at a time
    names: Mapping[int, str] = MappingProxyType({})  #: the names of places that have one
    #: The state by place, "idle", "busy", "excluded" or "down", and the process id or 0, if known.
    states: Mapping[int, tuple[str, int]] = MappingProxyType({})
    #: Give the worker at a place no more parts until it is restarted; None if the pool cannot.
    exclude: Callable[[int], None] | None = None
    #: Replace the worker at a place, excluded or not; None if the pool cannot.
    restart: Callable[[int], None] | None = None

    @property
    def places(self) -> Collection[int]:
        """The places of the workers; empty if there is one for each part."""
        return range(self.num_workers or 0)

    @property
    def num_ready(self) -> int | None:
        """The number of workers that are up now; None if :attr:`num_workers` is."""
        return self.num_workers

    @abc.abstractmethod
    def open(self, module: nn.Module, task: Task) -> Request:
        """Open a request for a module and its inputs. Its clock starts."""

    def start(
        self, module: nn.Module | None = None, example: Any = None, *, timeout: float = 120.0
    ) -> Self:
        """Start all workers and have them load a module, which else the first request does.

        Raises a WorkerError if a worker cannot load or call the module, and a RuntimeError if not
        all workers, but for excluded ones, have loaded it in time.

        Args:
            module: the module that every worker loads before this returns. Defaults to none.
            example: an input, a tuple of positional arguments, a mapping of keyword arguments, or
                bound arguments, with which every worker calls the module. A warning names an output
                of a row that depends on another row. Defaults to None.
            timeout: seconds.
        """
        instance(self, "module", module, nn.Module, optional=True)
        timeout = positive(self, "timeout", timeout)
        if module is None and self.starts_late:
            module = nn.Identity()
        if module is None:
            return self
        leaves, spec = tree_flatten(arguments(example, module), is_texts)
        leaves = [list(x) if is_texts(x) else x for x in leaves]  # as calls give them
        calls = int(example is not None)
        if self.num_workers is None:
            if calls:
                with torch.no_grad(), random_numbers_kept():
                    self._examine(module, leaves, spec, frozenset(), timeout)
            return self
        task = _Loading(leaves, [None] * len(leaves), spec, calls, 1, torch.device("cpu"))
        with torch.no_grad(), self.open(module, task) as request:
            places = frozenset(self.places)
            states = self.states
            wanted = sorted(p for p in places if states.get(p, ("",))[0] != "excluded")
            started = 0
            error = None
            request.timeout = math.inf
            request.ask([Part(n, Units((0,)), avoid=places - {p}) for n, p in enumerate(wanted)])
            for reply in request.replies(timeout):
                if reply.error and reply.error.worker >= 0:
                    raise reply.error
                # A place that was given up meanwhile is not missing.
                error = None if reply.part.avoid.issuperset(self.places) else reply.error
                if error:
                    break
                started += 1
            if started < len(wanted):
                why = error.reason if error else request.status() or "the others are loading"
                what = f"only {started} of {len(wanted)} workers started within {timeout:g} s"
                raise RuntimeError(f"{type(self).__name__}: {what}; {why}")
            if calls:
                left = max(timeout - request.now(), 0.0)
                self._examine(module, leaves, spec, places - {*wanted[:1]}, left)
        return self

    def _examine(
        self, module: nn.Module, leaves: list[Any], spec: Any, avoid: frozenset[int], timeout: float
    ) -> None:
        """Say what calls on an example will refuse, and which rows depend on each other.

        If strings are the only leaves with rows, row numbers replace them in ``leaves``.
        """
        end = time.monotonic() + timeout
        texts = {i: x for i, x in enumerate(leaves) if is_texts(x)}
        if len(texts) > 1 or any(map(has_rows, leaves)):
            texts = {}  # calls say in in_dims which strings are rows
        for i, x in texts.items():
            leaves[i] = torch.arange(len(x), device="cpu")
        note = self._check_rows(module, leaves, spec, avoid, timeout, texts)
        left = max(end - time.monotonic(), 0.0)
        self._prove_rows(module, leaves, spec, left, note, texts)

    def _check_rows(
        self,
        module: nn.Module,
        leaves: Any,
        spec: Any,
        avoid: frozenset[int],
        timeout: float,
        texts: Mapping[int, Sequence[str]],
    ) -> str:
        """Warn if two rows of an example, computed by one worker, depend on each other.

        Return what each call has to note then, else "".
        """

        def compute(inputs: list[Any], batches: list[tuple[int, ...]]) -> list[Any]:
            dims = [0 if has_rows(x) else None for x in inputs]
            first = inputs[dims.index(0)]
            task = Task(inputs, dims, spec, len(first), 1, first.device, texts=texts)
            if self.simulated:  # one request would compute all parts together
                values = list[Any]()
                for units in batches:
                    args, kwargs = task.payload(units, copied=True)
                    try:
                        values.append(module(*args, **kwargs))
                    except Exception as raised:  # other pools reply with it, whatever it is
                        raise RuntimeError(str(raised)) from raised
                return values
            with self.open(module, task) as request:
                request.ask([Part(n, Units(each), avoid=avoid) for n, each in enumerate(batches)])
                replies = sorted(request.replies(timeout), key=lambda reply: reply.part.number)
            for error in [reply.error for reply in replies if reply.error]:
                raise error
            if len(replies) < len(batches):
                raise RuntimeError(f"there was no answer within {timeout:g} s")
            return [reply.value for reply in replies]

        try:
            found = dependent_output(leaves, compute)
        except RuntimeError as error:
            what = "%s: whether rows depend on each other was not checked: %s"
            logger.warning(what, type(self).__name__, str(error).partition("\n")[0])
            return ""
        if found:
            warn(f"{type(self).__name__}: {found}; parts get other answers than the batch")
        return found or ""

    @torch.no_grad()
    def prove(self, module: nn.Module, task: Task, seconds: float = math.inf) -> Layout | str:
        """Return the layout of a module's outputs, or why there is no proof, from small parts.

        One part has the longest of some rows and then the two shortest. Another part has only the
        two shortest, in reverse order. So both rows change their distances to the ends, and are
        padded to another length. Different workers compute the parts. If these tell nothing, parts
        have one row several times. Raises a ValueError if outputs do not follow the rows of parts.
        """
        end = time.monotonic() + seconds
        # Without parameters, the module may be a server's, of any precision.
        narrowest = min((weight.dtype.itemsize for weight in module.parameters()), default=0)
        is_half = narrowest < 4 or torch.is_autocast_enabled(task.device.type)
        pairs = zip(task.leaves, task.dims, strict=True)
        size = len(next(leaf for leaf, dim in pairs if dim is not None))
        lengths = task.lengths()
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        shortest = order[0]
        longest = max(order[2:] or order, key=lengths.__getitem__)
        mixed = [longest, shortest, order[1 % len(order)], shortest]
        refusal: ValueError | None = None
        why = "no small parts were answered in time"
        for number, rows in enumerate((mixed, [size - 1] * 4, [size // 2] * 4)):
            sizes = SIZES if rows is mixed else (1, *SIZES)
            left = end - time.monotonic()
            replies, doubtful = self._few(module, task.few(rows), sizes, number, left)
            raised = {n: x for n, x in replies.items() if isinstance(x, Exception)}
            errors = [*raised.values(), *doubtful]
            if errors:
                text = str(errors[0]).partition("\n")[0]
                why = f"the module raised on small parts: {text}"
            if len(replies) == 3 and raised.keys() == {*SIZES}:
                raise ValueError(
                    f"CodedWrapper: the module computes one row, but not two or three: {why}; give "
                    'inputs for the whole batch as "shared" in in_dims'
                )
            if len(replies) < len(sizes) and seconds < math.inf:  # no time for another round
                break
            if raised or len(replies) < len(sizes):
                continue
            pair = [replies[n] for n in SIZES]
            try:
                layout = prove(pair, task.out_dims)
            except ValueError as error:
                refusal = refusal or error
                continue
            # One row several times does not tell whether a tensor is the same for all rows.
            if rows is not mixed and refusal is not None and layout.constants:
                continue
            note = ""
            if rows is mixed:
                note = difference(pair, layout, task.out_dims, is_half)
            if note:
                # A wrong worker is no reason to doubt the module. So others compute both parts
                # again, and parts of one worker are compared, too.
                again, _ = self._few(module, task.few(rows), SIZES, 1, end - time.monotonic())
                others = [again.get(n) for n in SIZES]
                if not any(x is None or isinstance(x, Exception) for x in others):
                    crossed = [others, [pair[0], others[1]], [others[0], pair[1]]]
                    differs = (difference(x, layout, task.out_dims, is_half) for x in crossed)
                    layout.note = note if all(differs) else ""
            return layout
        if refusal is not None:
            raise refusal
        return why

    def _few(
        self, module: nn.Module, task: Task, sizes: Sequence[int], shift: int, seconds: float
    ) -> tuple[dict[int, Any], list[Exception]]:
        """Return the outputs or the errors that came in time, by the size of the part.

        Beside them, return errors that only one worker raised: this worker may be faulty.
        """
        found = dict[int, Any]()
        if self.simulated:
            devices = [task.device] if task.device.type == "cuda" else []
            with random_numbers_kept(devices):
                for n in sizes:
                    try:
                        args, kwargs = task.payload(_UNITS_OF_PROOF[n], copied=True)
                        found[n] = module(*args, **kwargs)
                    except Exception as error:
                        found[n] = error
            return found, []
        # Elsewhere the caller may draw numbers meanwhile, and would draw them again.
        places = sorted(self.places)
        halves = [frozenset(places[i::2]) for i in (0, 1)]
        doubtful = dict[int, WorkerError]()
        with self.open(module, task) as request:
            asked = list[int]()
            # If a part is late or has failed, another worker is asked for it.
            for attempt, patience in enumerate(PROOF_PATIENCE):
                parts = list[Part]()
                for place, n in enumerate(sizes):
                    if n in found:
                        continue
                    part = Part(len(asked), _UNITS_OF_PROOF[n])
                    # Preferred, not required: half of the workers may be down.
                    if n in doubtful:
                        part.tried = frozenset({doubtful[n].worker})
                    elif shift < 2:
                        part.tried = halves[(place + shift + attempt) % 2]
                    asked.append(n)
                    parts.append(part)
                request.ask(parts)
                for reply in request.replies(max(min(seconds, request.now() + patience), 0.0)):
                    n = asked[reply.part.number]
                    failure = reply.error
                    if failure is None:
                        found[n] = reply.value
                    elif failure.kind == "raised":
                        first = doubtful.setdefault(n, failure)
                        if len(places) < 2 or first.worker != failure.worker:
                            found.setdefault(n, failure)
                    if len(found) == len(sizes):
                        return found, []
        return found, list(doubtful.values())

    def _prove_rows(
        self,
        module: nn.Module,
        leaves: Any,
        spec: Any,
        seconds: float,
        note: str,
        texts: Mapping[int, Sequence[str]],
    ) -> None:
        """Prove which outputs of an example have rows, if it has two, so that no call has to.

        ``note`` is what calls note if the proof finds no dependence between rows.
        """
        dims = [0 if has_rows(leaf) else None for leaf in leaves]
        sizes = {len(leaf) for leaf, dim in zip(leaves, dims, strict=True) if dim is not None}
        if len(sizes) != 1 or max(sizes) < 2:
            return
        first = leaves[dims.index(0)]
        task = Task(leaves, dims, spec, len(first), 1, first.device, texts=texts)
        try:
            found = self.prove(module, task, seconds)
        except (TypeError, ValueError, RuntimeError) as error:
            # Calls raise it, unless their wrapper says where the rows are.
            text = str(error).removeprefix("CodedWrapper: ")
            logger.warning("%s: calls will be refused: %s", type(self).__name__, text)
            return
        if isinstance(found, Layout):
            found.note = found.note or note
            proved_of(module)[structure(leaves, dims, spec, 0, in_training(module))] = found

    def start_on(self, module: nn.Module, batch: Any) -> None:
        """Have every worker that starts run a module on two different rows of a batch.

        ``batch`` is an example of :meth:`start`, all of whose leaves have rows. If a worker does
        not start, a warning says why. Raises a WorkerError if the module raises or ends a worker.
        """
        try:
            self.start(module, sample(batch))
            logger.info("workers that have run the model: %s", self.num_workers or "all")
        except RuntimeError as error:
            if isinstance(error, WorkerError) and error.kind in ("raised", "died"):
                raise
            logger.warning("not every worker has run the model: %s", error)

    def resize(self, num_workers: int) -> None:
        """Let the pool have another number of workers, at least 1, while calls are open.

        Returns at once. New workers take free places, and the last places are drained. Raises a
        NotImplementedError if the pool cannot start or end workers.
        """
        raise NotImplementedError(f"{type(self).__name__}: the pool cannot be resized")

    def drain(self, worker: int) -> None:
        """Let the worker at a place end its part, take no other, and leave, without a successor.

        Returns at once. If no worker is left, parts wait until there is one again.
        """
        raise NotImplementedError(f"{type(self).__name__}: workers cannot be drained")

    def close(self) -> None:  # noqa: B027 - some pools hold nothing
        """Release everything that the pool holds. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_workers or ''})"


class _Loading(Task):  # None stands for no call, as the arguments of a module are not known
    def payload(self, *_: Any, **__: Any) -> Arguments | None:  # type: ignore[override]
        leaves = tree_map_only(Tensor, Tensor.clone, self.leaves)
        return unflatten(leaves, self.spec) if self.num_units else None
