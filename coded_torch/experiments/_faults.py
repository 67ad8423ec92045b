r"""Faults on purpose, and attacks, which are callables of the caller: to measure redundancy."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .._arguments import count, instance, positive, probability, shown
from .._layout import Layout
from .._table import Began, Part, Reply
from .._torch import broadcast_dims, flatten, on_host, outside, unflatten
from ..stragglers import Stragglers
from ..workers._base import Fault, Request, Task, Workers

if TYPE_CHECKING:
    from typing_extensions import Self

#: Maps rows of a result, ``[rows, ...]``, and a generator of the worker to wrong rows.
Attack = Callable[[Tensor, torch.Generator], Tensor]
_lock = threading.Lock()  # guards the state of all pools with faults


class FaultyWorkers(Workers):
    r"""A pool whose calls are late, hang, crash or return wrong results, by one seed.

    Faults happen where the module runs: a delayed call keeps its worker busy, and a hung call stays
    until the pool ends it. A crash ends its process; a thread raises instead. On
    :class:`~coded_torch.workers.LocalWorkers` delays pass on the virtual clock.

    The faults of a part depend on the seed, on the number of its request and on its own number.
    Requests are numbered in the order in which they first ask. If a request first asks for n parts,
    part p has entry p modulo n of draw p // n for n workers. Distributions with a state move on
    once per request.

    Args:
        pool: the pool that computes, and is closed with this one.
        delays: the distribution of the seconds that parts take longer; infinite if they hang.
            Defaults to None, the pool's own.
        rates: the probability of "crash", "nan", "infinity", "shape", "dtype" and "structure", at
            most 1 in sum. Defaults to none.
        seed: an integer, modulo 2^64. Defaults to 0.
        crash_every: seconds between further crashes: a drawn part of the first request after that
            time ends its worker. Defaults to None, no such crashes.
        attack: maps rows of a floating-point output of ``adversaries`` and a generator that
            (seed, request, worker) seed, to wrong rows. Defaults to None.
        adversaries: places of the pool, whose workers attack. Defaults to none.
    """

    def __init__(
        self,
        pool: Workers,
        *,
        delays: Stragglers | None = None,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
        crash_every: float | None = None,
        attack: Attack | None = None,
        adversaries: Iterable[int] = (),
    ) -> None:
        instance(self, "pool", pool, Workers)
        instance(self, "delays", delays, Stragglers, optional=True)
        instance(self, "rates", rates, Mapping, optional=True)
        instance(self, "attack", attack, Callable, optional=True)
        self.rates = {
            kind: probability(self, f"rates[{kind!r}]", rate)
            for kind, rate in (rates or {}).items()
        }
        self.adversaries = tuple(count(self, "adversaries", each, least=0) for each in adversaries)
        unknown = {*self.rates} - {*Fault.KINDS}
        strange = {*self.adversaries} - {*(pool.places or self.adversaries)}
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: rates must be of {', '.join(Fault.KINDS)}, got "
                f"{shown(sorted(unknown))}"
            )
        if sum(self.rates.values()) > 1:
            raise ValueError(
                f"{type(self).__name__}: rates must be at most 1 in sum, got {shown(self.rates)}"
            )
        if self.adversaries and attack is None:
            raise ValueError(
                f"{type(self).__name__}: adversaries must come with an attack, got "
                f"{self.adversaries}"
            )
        if strange:
            raise ValueError(
                f"{type(self).__name__}: adversaries must be places of the pool, got "
                f"{shown(sorted(strange))}"
            )
        self.pool = pool
        self.delays = delays
        self.attack = attack
        self.stragglers = delays or pool.stragglers
        self.simulated = pool.simulated
        self.seed = count(self, "seed", seed, least=None)
        self.crash_every = math.inf
        if crash_every is not None:
            self.crash_every = positive(self, "crash_every", crash_every)
        self._requests = 0
        self._crashed = math.inf  # the time of the last crash, or of the first request

    def open(self, module: nn.Module, task: Task) -> Request:
        return _FaultyRequest(self, self.pool.open(module, task), task)

    def prove(self, *args: Any, **kwargs: Any) -> Layout | str:
        """Prove the rows of outputs on the pool inside, without faults."""
        return self.pool.prove(*args, **kwargs)

    def begin(self, num_parts: int) -> tuple[int, Iterator[Fault]]:
        """Return the number of a new request, and the endless faults of its parts."""
        with _lock:
            request = self._requests
            self._requests = self._requests + 1
            first = self._draw(self.delays, num_parts, request, 0)
            now = time.monotonic()
            self._crashed = min(self._crashed, now)
            if now >= self._crashed + self.crash_every:
                self._crashed = now
                part = np.random.default_rng((self.seed % 2**64, request)).integers(num_parts)
                first[part] = dataclasses.replace(first[part], kind="crash")
            delays = copy.copy(self.delays)
        further = (self._draw(delays, num_parts, request, n) for n in itertools.count(1))
        return request, itertools.chain(first, itertools.chain.from_iterable(further))

    def generator(self, *key: int) -> torch.Generator:
        """Return a generator that the seed of the pool and a key determine."""
        entropy = np.random.SeedSequence((self.seed % 2**64, *key))
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    @outside()
    def _draw(self, delays: Stragglers | None, num_parts: int, *key: int) -> list[Fault]:
        """Return the faults of so many parts, which the seed and a key determine."""
        generator = self.generator(*key)
        seconds = [0.0] * num_parts
        if delays is not None:
            seconds = delays.sample(num_parts, generator).tolist()
        uniform = torch.rand(num_parts, dtype=torch.float64, generator=generator)
        # A kind of the rate r takes an interval of the length r of [0, 1).
        ends = np.cumsum(list(self.rates.values()))
        places = np.searchsorted(ends, uniform.numpy(), side="right")
        return [Fault(s, [*self.rates, None][i]) for s, i in zip(seconds, places, strict=True)]

    def start(self, *args: Any, **kwargs: Any) -> Self:
        self.pool.start(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "pool":  # an own attribute, not yet assigned
            raise AttributeError(f"FaultyWorkers has no attribute {name!r}")
        return getattr(self.pool, name)


# The base class has defaults of these.
for _name in (
    "close", "concurrency", "drain", "exclude", "mixed", "names", "num_ready", "num_restarts",
    "num_workers", "places", "resize", "restart", "states",
):  # fmt: skip
    setattr(FaultyWorkers, _name, property(attrgetter(f"pool.{_name}")))


class _FaultyRequest(Request):
    """A request of another pool. It adds faults to the parts, and attacks the replies."""

    def __init__(self, pool: FaultyWorkers, request: Request, task: Task) -> None:
        self._pool = pool
        self._request = request
        self._task = task
        self._number = -1  # until it first asks
        self._further: Iterator[Fault]
        self._faults: list[Fault] = []

    def ask(self, parts: Sequence[Part]) -> None:
        """Ask for parts with their faults."""
        if self._number < 0:
            self._number, self._further = self._pool.begin(len(parts) or 1)
        missing = 1 + max((part.number for part in parts), default=-1) - len(self._faults)
        self._faults += itertools.islice(self._further, max(missing, 0))
        for part in parts:
            part.fault = self._faults[part.number] or None
        self._request.ask(parts)

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        """Return the next event; replies of adversaries have attacked values."""
        event = self._request.wait(until)
        lies = event is not None and event.worker in self._pool.adversaries
        if lies and isinstance(event, Reply) and event.error is None:
            event.value = self._attacked(event.value, event.worker)
        return event

    @torch.no_grad()
    @on_host()
    def _attacked(self, value: Any, worker: int) -> Any:
        """Return a worker's output with attacked rows in its floating-point tensors."""
        attack: Any = self._pool.attack  # adversaries come with an attack
        leaves, spec = flatten(value)
        dims = broadcast_dims("out_dims", self._task.out_dims, spec)
        for i, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
            if dim is not None and isinstance(leaf, Tensor) and leaf.dtype.is_floating_point:
                draws = self._pool.generator(self._number, 1, 1 + worker)
                made = attack(leaf.movedim(dim, 0), draws)
                instance(self._pool, "what attack returns", made, Tensor)
                leaves[i] = made.to(leaf.dtype).movedim(0, dim)
        return unflatten(leaves, spec)

    drop: Any = property(attrgetter("_request.drop"))
    now: Any = property(attrgetter("_request.now"))
    idle: Any = property(attrgetter("_request.idle"))
    versions: Any = property(attrgetter("_request.versions"))
    status: Any = property(attrgetter("_request.status"))
    close: Any = property(attrgetter("_request.close"))
    abandon: Any = property(attrgetter("_request.abandon"))
