r"""Faults on purpose: for tests, and to measure the value of redundancy."""

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
from .._transforms import on_host
from ..stragglers import Stragglers
from .attacks import ATTACKS, Attack, Attacker
from .base import Began, Obstacle, Part, Reply, Request, Workers
from .task import Arguments, Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Fault", "FaultyWorkers", "compute"]

_DAY = 86_400.0  # seconds that a hung call sleeps


class InjectedCrash(RuntimeError):  # noqa: N818 - it stands for the end of a process
    """The end of a worker that is a thread, and so cannot end alone."""


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

    def around(self, call: Callable[[], Any], die: Callable[[], None] | None = None) -> Any:
        """Return a worker's result instead of ``call()``. A crash calls ``die``, or raises."""
        if self.delay > 0:
            time.sleep(min(self.delay, _DAY))
        if self.kind == "crash":
            if die is not None:
                die()
            raise InjectedCrash("an injected crash")
        return self.spoil(call())

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
    """Call a module as a worker must.

    Args:
        module: the module.
        arguments: a :meth:`Task.payload`. If it is None, the module is not called.
        fault: the fault of the part, or None.
        die: ends the worker. Defaults to None, if a worker cannot end alone.
    """
    if arguments is None:
        return None
    args, kwargs = arguments
    if fault is None:
        return module(*args, **kwargs)
    return fault.around(lambda: module(*args, **kwargs), die)


class FaultyWorkers(Workers):
    r"""A pool some of whose calls are late, hang, crash or return wrong results, by one seed.

    Faults happen where the module runs: a delayed call keeps its worker busy, a crash ends its
    process (a thread of :class:`~coded_torch.workers.DeviceWorkers` raises instead), a hung call
    stays until the pool kills it. On :class:`~coded_torch.workers.LocalWorkers` delays pass on the
    virtual clock.

    The faults of a part depend on the seed, the number of its request (in the order in which
    requests first ask) and its own number, not on timing. If a request asks for n parts first, part
    p has entry p modulo n of draw p // n for n workers. Laws with a state move on once a request.
    Only ``crash_every`` goes by the clock.

    Args:
        pool: the pool that computes. Closing this pool closes it.
        delays: the law of the seconds that the parts of a request take longer; infinite: they hang.
        rates: the probabilities of :attr:`Fault.KINDS` ("crash", "nan", "infinity", "shape",
            "dtype", "structure"), at most 1 in sum.
        seed: an integer, modulo 2^64.
        crash_every: seconds between further crashes: a drawn part of the first request after that
            time ends its worker. Defaults to None, no such crashes.
        attack: a change of the results of ``adversaries``, which stay well formed and
            finite; drawn from (seed, request, worker). "noise" and "offset" (the same for all) add
            ``strength`` standard deviations of the result; "scale" multiplies by 1 + strength / 2;
            "sign_flip"; "constant": the mean row; "permute": rows; "swap": the two largest outputs;
            "one_row": one row answers another; "one_output" and "block" do so with one number, and
            with a quarter of the outputs of all rows; "bit_flip": a bit in each row; "exponent" and
            "mantissa": a bit of one number; "copies": the results
            of one drawn input, alike on all workers; "replay": results of the request before;
            "shift": results of inputs that are shifted along their last dimension by an eighth.
            The last two call the module in this process. Or a callable that maps rows of a result,
            ``[rows, ...]``, and a generator to wrong rows.
        adversaries: the places of the workers that attack.
        strength: of the attack.
        attack_rate: the share of their parts that are attacked. Defaults to 1.
        relents: whether they are right whenever they are asked again in a request. Defaults to
            False.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a rate is no probability or has an unknown name, their sum exceeds 1, the attack
            is unknown, or there are adversaries without an attack.

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
        attack_rate: float = 1.0,
        relents: bool = False,
    ) -> None:
        instance(self, "pool", pool, Workers)
        instance(self, "delays", delays, Stragglers, optional=True)
        instance(self, "rates", rates, Mapping, optional=True)
        self.rates = {
            kind: probability(self, f"rates[{kind!r}]", rate)
            for kind, rate in (rates or {}).items()
        }
        for kind in self.rates:
            if kind not in Fault.KINDS:
                raise ValueError(
                    f"FaultyWorkers: rates must be of {', '.join(Fault.KINDS)}, got {kind!r}"
                )
        if not sum(self.rates.values()) <= 1:
            raise ValueError(f"FaultyWorkers: rates must be at most 1 in sum, got {self.rates}")
        self.pool, self.delays = pool, delays
        self.stragglers = pool.stragglers if delays is None else delays
        self.simulated, self.num_workers = pool.simulated, pool.num_workers
        self.seed = count(self, "seed", seed, least=None)
        self.crash_every = (
            None if crash_every is None else positive(self, "crash_every", crash_every)
        )
        if attack is not None and not callable(attack) and attack not in ATTACKS:
            raise ValueError(
                f"FaultyWorkers: attack must be one of {', '.join(ATTACKS)}, a callable or None, "
                f"got {attack!r}"
            )
        self.attack = attack
        self.strength = real(self, "strength", strength, "finite", math.isfinite)
        self.attack_rate = probability(self, "attack_rate", attack_rate)
        self.relents = relents
        self.adversaries = tuple(
            count(self, "adversaries", place, least=0) for place in adversaries
        )
        if self.adversaries and attack is None:
            raise ValueError(
                f"FaultyWorkers: adversaries must come with an attack, got {self.adversaries}"
            )
        self._requests = 0
        self._crashed: float | None = None  # until the first request
        self._last: Task | None = None  # for "replay"; of one request only, as tasks are large
        self._lock = threading.Lock()

    def open(self, module: nn.Module, task: Task) -> Request:
        return _FaultyRequest(self, module, task)

    @property
    def num_ready(self) -> int | None:
        return self.pool.num_ready

    @property
    def num_restarts(self) -> int:
        return self.pool.num_restarts

    def _begin(
        self, module: nn.Module, task: Task, num_parts: int
    ) -> tuple[Iterator[Fault], Attacker | None]:
        """Return the faults of the parts of a new request, without end, and the attack on it."""
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
        return faults, Attacker(self, module, task, request, earlier, num_parts)

    @on_host()
    def _draw(self, delays: Stragglers | None, num_parts: int, *key: int) -> list[Fault]:
        entropy = np.random.SeedSequence((self.seed % 2**64, *key))
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        seconds = [0.0] * num_parts
        if delays is not None:
            seconds = delays.sample(num_parts, generator).tolist()
        uniform = torch.rand(num_parts, dtype=torch.float64, generator=generator)
        return [
            Fault(*pair) for pair in zip(seconds, map(self._kind, uniform.tolist()), strict=True)
        ]

    def _kind(self, uniform: float) -> str | None:
        for kind, rate in self.rates.items():
            if uniform < rate:
                return kind
            uniform -= rate
        return None

    def start(self, *args: Any, **kwargs: Any) -> Self:
        """Start the pool."""
        self.pool.start(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that only the pool has: ``exclude``, ``restart``, ``pids``, ..."""
        if name.startswith("_") or name == "pool":  # our own, which does not exist yet
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
        self._begin = functools.partial(pool._begin, module, task)
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
