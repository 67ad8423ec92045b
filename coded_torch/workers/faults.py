r"""Injected faults: for tests, and to measure the value of redundancy."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import count, instance, positive, probability, real
from .._torch import on_host
from ..stragglers import Stragglers
from .attacks import ATTACKS, Attack, Attacker
from .base import Began, Obstacle, Part, Reply, Request, Workers
from .task import Arguments, Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Fault", "FaultyWorkers", "compute"]

_DAY = 86_400.0  # seconds that a hung call sleeps, longer than any call waits


class InjectedCrash(RuntimeError):  # noqa: N818 - it stands for the end of a process
    """The end of a worker that is a thread, which cannot end alone."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of one module call.

    Attributes:
        delay: seconds that the call takes longer; if infinite, it hangs.
        kind: an element of :attr:`KINDS`, or None if the result is right.
    """

    KINDS: ClassVar = ("crash", "nan", "infinity", "shape", "dtype", "structure")

    delay: float = 0.0
    kind: str | None = None

    def __bool__(self) -> bool:
        return self.delay > 0 or self.kind is not None

    def spoil(self, value: Any) -> Any:
        """Return the result, made wrong by this fault."""
        if self.kind == "structure":
            return [value, None]
        return pytree.tree_map_only(Tensor, self._spoil_leaf, value)

    def _spoil_leaf(self, leaf: Tensor) -> Tensor:
        if self.kind in ("nan", "infinity") and leaf.is_floating_point():
            return torch.full_like(leaf, math.nan if self.kind == "nan" else math.inf)
        if self.kind == "shape":
            return torch.cat([leaf, leaf])
        if self.kind == "dtype":
            return leaf.to(torch.float64 if leaf.dtype != torch.float64 else torch.float32)
        return leaf


def compute(
    module: nn.Module,
    arguments: Arguments | None,
    fault: Fault | None = None,
    die: Callable[[], None] | None = None,
) -> Any:
    """Call a module as a worker must, with the fault of the part.

    Args:
        module: the module.
        arguments: a :meth:`Task.payload`. If it is None, the module is not called.
        fault: the fault of the part, or None.
        die: a callable that ends the worker. Defaults to None, if a worker cannot end alone.

    Raises:
        InjectedCrash: the fault is a crash, and the worker cannot end alone.
    """
    if arguments is None:
        return None
    fault = fault or Fault()
    if fault.delay > 0:
        time.sleep(min(fault.delay, _DAY))
    if fault.kind == "crash":
        if die is not None:
            die()
        raise InjectedCrash("an injected crash")
    args, kwargs = arguments
    return fault.spoil(module(*args, **kwargs)) if fault.kind else module(*args, **kwargs)


class FaultyWorkers(Workers):
    r"""A pool whose calls are late, hang, crash or return wrong results, by one seed.

    Faults happen where the module runs: a delayed call keeps its worker busy, a crash ends its
    process (a thread of :class:`~coded_torch.workers.DeviceWorkers` raises instead), a hung call
    stays until the pool ends it. On :class:`~coded_torch.workers.LocalWorkers` delays pass on the
    virtual clock.

    The faults of a part depend on the seed, the number of its request (in the order in which
    requests first ask) and its own number, not on timing. If a request first asks for n parts, part
    p has entry p modulo n of draw p // n for n workers. Laws with a state move on once a request.

    Args:
        pool: the pool that computes. Closing this pool closes it.
        delays: the law of the seconds that the parts of a request take longer; infinite if they
            hang. Defaults to None, the law of the pool.
        rates: the probability of each of :attr:`Fault.KINDS` ("crash", "nan", "infinity", "shape",
            "dtype", "structure"), at most 1 in sum. Defaults to none.
        seed: an integer, modulo 2^64. Defaults to 0.
        crash_every: seconds between further crashes: a drawn part of the first request after that
            time ends its worker. Defaults to None, no such crashes.
        attack: a change of the results of ``adversaries`` that stays well formed and finite, drawn
            from (seed, request, worker). "noise" and "offset" (the same for all) add ``strength``
            standard deviations of the result; "scale" multiplies by 1 + strength / 2; "sign_flip";
            "constant": the mean row; "permute": rows; "swap": the two largest outputs; "one_row":
            one row answers another; "one_output" and "block" do so with one number, and with a
            quarter of the outputs of all rows; "bit_flip": a bit in each row; "exponent" and
            "mantissa": a bit of one number; "copies": the results of one drawn input, alike on all
            workers; "replay": results of the request before; "shift": results of inputs that are
            shifted along their last dimension by an eighth. The last two call the module in this
            process. A callable maps rows of a result, ``[rows, ...]``, and a generator to wrong
            rows. Defaults to None.
        adversaries: the places of the workers that attack. Defaults to none.
        strength: the strength of the attack, finite. Defaults to 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its domain, or there are adversaries without an attack.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.workers import FaultyWorkers, LocalWorkers
        >>> pool = FaultyWorkers(LocalWorkers(), rates={"nan": 0.3}, seed=2)
        >>> coded = CodedWrapper(torch.nn.ReLU(), ReplicationCode(2, 6), workers=pool)
        >>> coded(torch.tensor([[-1.0], [2.0]])).flatten().tolist()
        [0.0, 2.0]
        >>> len(coded.last_run.rejected)
        2
    """

    def __init__(
        self,
        pool: Workers,
        *,
        delays: Stragglers | None = None,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
        crash_every: float | None = None,
        attack: str | Attack | None = None,
        adversaries: Iterable[int] = (),
        strength: float = 1.0,
    ) -> None:
        instance(self, "pool", pool, Workers)
        instance(self, "delays", delays, Stragglers, optional=True)
        instance(self, "rates", rates, Mapping, optional=True)
        self.rates = {
            kind: probability(self, f"rates[{kind!r}]", rate)
            for kind, rate in (rates or {}).items()
        }
        if unknown := self.rates.keys() - set(Fault.KINDS):
            must = f"rates must be of {', '.join(Fault.KINDS)}"
            raise ValueError(f"FaultyWorkers: {must}, got {min(unknown)!r}")
        if not sum(self.rates.values()) <= 1:
            raise ValueError(f"FaultyWorkers: rates must be at most 1 in sum, got {self.rates}")
        if attack is not None and not callable(attack) and attack not in ATTACKS:
            must = f"attack must be one of {', '.join(ATTACKS)}, a callable or None"
            raise ValueError(f"FaultyWorkers: {must}, got {attack!r}")
        self.adversaries = tuple(count(self, "adversaries", each, least=0) for each in adversaries)
        if self.adversaries and attack is None:
            must = "adversaries must come with an attack"
            raise ValueError(f"FaultyWorkers: {must}, got {self.adversaries}")
        self.pool, self.delays, self.attack = pool, delays, attack
        self.stragglers = pool.stragglers if delays is None else delays
        self.simulated, self.num_workers = pool.simulated, pool.num_workers
        self.seed = count(self, "seed", seed, least=None)
        self.strength = real(self, "strength", strength, "finite", math.isfinite)
        if crash_every is not None:
            crash_every = positive(self, "crash_every", crash_every)
        self.crash_every = crash_every
        self._requests = 0
        self._crashed: float | None = None  # the time of the last crash, or of the first request
        self._last: Task | None = None  # a task to "replay": only one, as tasks are large
        self._lock = threading.Lock()

    def open(self, module: nn.Module, task: Task) -> Request:
        return _FaultyRequest(self, module, task)

    @property
    def num_ready(self) -> int | None:
        return self.pool.num_ready

    @property
    def num_restarts(self) -> int:
        return self.pool.num_restarts

    def begin(
        self, module: nn.Module, task: Task, num_parts: int
    ) -> tuple[Iterator[Fault], Attacker | None]:
        """Return the endless faults of the parts of a new request, and the attack on it."""
        with self._lock:
            request, self._requests = self._requests, self._requests + 1
            earlier, self._last = self._last, task if self.attack == "replay" else None
            first = self._draw(self.delays, num_parts, request, 0)
            now = time.monotonic()
            if self._crashed is None:
                self._crashed = now
            if self.crash_every is not None and now >= self._crashed + self.crash_every:
                self._crashed = now
                part = np.random.default_rng((self.seed % 2**64, request)).integers(num_parts)
                first[part] = dataclasses.replace(first[part], kind="crash")
            delays = copy.copy(self.delays)
        further = (self._draw(delays, num_parts, request, n) for n in itertools.count(1))
        faults = itertools.chain(first, itertools.chain.from_iterable(further))
        if not self.adversaries:
            return faults, None
        return faults, Attacker(self, module, task, request, earlier)

    @on_host()
    def _draw(self, delays: Stragglers | None, num_parts: int, *key: int) -> list[Fault]:
        entropy = np.random.SeedSequence((self.seed % 2**64, *key))
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        seconds = [0.0] * num_parts
        if delays is not None:
            seconds = delays.sample(num_parts, generator).tolist()
        uniform = torch.rand(num_parts, dtype=torch.float64, generator=generator)
        # A kind of the rate r takes an interval of the length r of [0, 1).
        ends = np.cumsum(list(self.rates.values()))
        places = np.searchsorted(ends, uniform.numpy(), side="right")
        kinds = [*self.rates, None]
        return [Fault(delay, kinds[i]) for delay, i in zip(seconds, places, strict=True)]

    def start(self, *args: Any, **kwargs: Any) -> Self:
        """Start the pool."""
        self.pool.start(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that only the pool has: ``exclude``, ``restart``, ``pids``, ..."""
        if name.startswith("_") or name == "pool":  # an own attribute, not yet assigned
            raise AttributeError(f"FaultyWorkers has no attribute {name!r}")
        return getattr(self.pool, name)

    def close(self) -> None:
        """Close the pool."""
        self.pool.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __repr__(self) -> str:
        return (
            f"FaultyWorkers({self.pool!r}, delays={self.delays!r}, rates={self.rates!r}, "
            f"seed={self.seed}, attack={self.attack!r}, adversaries={self.adversaries})"
        )


class _FaultyRequest(Request):
    """A request of another pool. It adds faults to the parts, and attacks the replies."""

    def __init__(self, pool: FaultyWorkers, module: nn.Module, task: Task) -> None:
        self._request = pool.pool.open(module, task)
        self._begin = functools.partial(pool.begin, module, task)
        self._further: Iterator[Fault] | None = None
        self._faults: list[Fault] = []
        self._attack: Attacker | None = None

    def ask(self, parts: Sequence[Part]) -> None:
        if self._further is None:
            self._further, self._attack = self._begin(len(parts))
        missing = 1 + max((part.number for part in parts), default=-1) - len(self._faults)
        self._faults += itertools.islice(self._further, max(missing, 0))
        self._request.ask(
            [dataclasses.replace(p, fault=self._faults[p.number] or None) for p in parts]
        )

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        event = self._request.wait(until)
        if self._attack is not None and isinstance(event, Reply):
            return self._attack(event)
        return event

    def drop(self, parts: Iterable[Part]) -> None:
        self._request.drop(parts)

    def now(self) -> float:
        return self._request.now()

    @property
    def idle(self) -> int:
        return self._request.idle

    @property
    def obstacle(self) -> Obstacle | None:
        return self._request.obstacle

    def close(self) -> None:
        self._request.close()

    def abandon(self) -> None:
        self._request.abandon()


def kill_own_process() -> None:
    """End this process at once, as a crash of compiled code would."""
    os.kill(os.getpid(), signal.SIGKILL)
