r"""A module that stands in for another: its state dict, its mode and its compilation."""

import asyncio
import contextlib
import contextvars
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from torch import nn

from .._arguments import arguments, count
from .._torch import in_training
from ..workers._live import INTERRUPTION, Ambient, Interruption, in_thread
from ._mean import Interval, Looks

Call: TypeAlias = Callable[..., tuple[Any, Any]]


class ModuleProxy(nn.Module):
    """A wrapper with the state dict and the mode of the module inside."""

    run: Call  #: returns the answers and the report of a call
    _run: Call  # the same, of a call that began at a time of `perf_counter`, its first argument

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = in_training(module)

    async def arun(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Await :meth:`run`, which runs in a thread of its own.

        A deadline counts from the await. Context variables and torch's modes of gradients,
        inference and autocast hold in the thread. If the task is cancelled, the call ends, and
        parts that no worker has begun never begin.
        """
        run = functools.partial(self._run, time.perf_counter())
        call, interruption = _carried(run, Ambient.here())
        call = functools.partial(contextvars.copy_context().run, call, *args, **kwargs)
        # asyncio's own threads are few, and all that await one wait in one queue.
        done = in_thread(call, "coded_torch arun")
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            interruption.set()
            raise

    def map(
        self, batches: Iterable[Any], *, in_flight: int = 4, waiting: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the answers and the report of each batch, in order.

        No batch is taken from the iterable before it can be computed. If a call or the iterable
        fails, the exception's attribute ``batch`` is the number of the batch.

        Args:
            batches: inputs, tuples of positional arguments, or bound arguments.
            in_flight: the number of calls that are open at once, which keeps the workers busy.
                ``LocalWorkers`` are never busy, and run one call at a time.
            waiting: the policy of these calls. Defaults to the wrapper's own.
        """
        in_flight = count("map", "in_flight", in_flight)
        # The calls together have a part for each worker. More parts cost more: with two workers,
        # 64 images for LeNet-5 took 1.3 times as long in two parts as in one.
        own: Any = self
        parts = own.parts or -(-(own.workers.num_workers or 1) // in_flight)
        run = functools.partial(self.run, waiting=waiting, parts=parts)
        if own.workers.simulated:
            # Calls compute in this process. One at a time, they and the batches draw their random
            # numbers in order; together they would be no faster.
            in_flight = 1
        return _map_batches(run, batches, in_flight)

    def mean(
        self,
        inputs: Any,
        of: Callable[..., Any] | None = None,
        *,
        half_width: Any = None,
        max_rows: int | None = None,
        bounds: Any = None,
        level: float = 0.95,
        anytime: bool = False,
        seed: int | None = None,
    ) -> Iterator[Interval]:
        """Yield ever narrower intervals for the means over all rows, from few computed rows.

        Rows are drawn at random. Regression narrows the interval of plain sampling where it can. A
        drawn row is computed, or the call raises. The reference describes the other arguments.

        Args:
            inputs: tensors ``[N, ...]``, as of a call; a tuple holds positional arguments. Or a
                sequence of batches of one size; the last may have fewer rows.
            of: a function of outputs of some rows and the rows' numbers, int64, such as for labels.
                It returns finite numbers ``[rows, C]``. Defaults to the outputs as they are.
            half_width: positive, for all columns or ``[C]``. Defaults to None, no end by width.
        """
        looks = Looks(
            self,
            inputs,
            of,
            max_rows=max_rows,
            bounds=bounds,
            level=level,
            anytime=anytime,
            seed=seed,
        )
        return looks.until(half_width)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the module inside, with the arguments of :func:`torch.compile`."""
        self.module.compile(*args, **kwargs)

    # The state dict is the module's own. Overriding is enough for a wrapper on its own; as a part
    # of a bigger module, loading recurses into `module`, under whose name the keys must then be.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in list(state_dict):
            state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _carried(run: Call, ambient: Ambient) -> tuple[Call, Interruption]:
    """Return a function for another thread that runs in the caller's modes, and can be ended."""
    interruption = Interruption()

    def carried(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        INTERRUPTION.set(interruption)  # holds in the context of this call
        with ambient.restored(ambient.default_device):
            return run(*args, **kwargs)

    return carried, interruption


def _map_batches(run: Call, batches: Iterable[Any], in_flight: int) -> Iterator[tuple[Any, Any]]:
    """Do as :meth:`ModuleProxy.map`; ``in_flight`` batches with their results exist at once."""
    ambient = Ambient.here()
    threads = ThreadPoolExecutor(in_flight, "coded_torch map")

    def begin() -> Iterator[tuple[Future[Any], Interruption]]:
        try:
            for batch in batches:
                call, interruption = _carried(run, ambient)
                args, kwargs = arguments(batch)
                context = contextvars.copy_context()
                yield threads.submit(context.run, call, *args, **kwargs), interruption
        except Exception as error:  # the batches before it are answered first
            future = Future[Any]()
            future.set_exception(error)
            yield future, Interruption()

    begun = begin()
    calls = deque[tuple[Future[Any], Interruption]]()
    try:
        for number in itertools.count():
            calls.extend(itertools.islice(begun, in_flight - len(calls)))
            if not calls:
                return
            try:
                found = calls[0][0].result()
            except BaseException as error:
                note = f"CodedWrapper.map: at batch {number}; the {number} batches before it"
                with contextlib.suppress(Exception):  # a class may have slots
                    error.batch = number  # type: ignore[attr-defined]
                    # Python 3.10 has no add_note.
                    notes = getattr(error, "__notes__", ())
                    error.__notes__ = [*notes, f"{note} were answered"]
                raise
            calls.popleft()
            yield found
            del found
    except KeyboardInterrupt:  # nothing may be left that keeps the next call waiting
        for _, interruption in calls:
            interruption.set(abandon=True)
        raise
    finally:
        for future, interruption in calls:
            future.cancel()
            interruption.set()
        threads.shutdown(wait=False)
