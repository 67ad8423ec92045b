r"""What goes wrong on purpose: for tests, and to see what redundancy is worth."""

from __future__ import annotations

import copy
import dataclasses
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
from .._law import Law, law_of
from .._transforms import on_host
from ..stragglers import Stragglers
from .attacks import ATTACKS, Attack, Attacker, Liars
from .base import Began, Part, Reply, Request, Task, Workers

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Fault", "FaultyWorkers"]

_DAY = 86_400.0


class InjectedCrash(RuntimeError):  # noqa: N818 - it stands for the end of a process
    """The end of a machine that is a thread, and so cannot end alone."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong with one call of the module.

    Attributes:
        delay: seconds that the call takes longer; infinite: it hangs.
        kind: a name of :attr:`KINDS`, or None: the result is right.
    """

    #: What a fault may do, which is to end the machine, or to return what the module did not.
    KINDS: ClassVar = ("crash", "nan", "infinity", "shape", "dtype", "structure")

    delay: float = 0.0
    kind: str | None = None

    def __bool__(self) -> bool:
        """Whether anything goes wrong."""
        return self.delay > 0 or self.kind is not None

    def around(self, call: Callable[[], Any], die: Callable[[], None] | None = None) -> Any:
        """What a machine returns instead of ``call()``; ``die`` ends it, else an error."""
        if self.delay > 0:
            time.sleep(min(self.delay, _DAY))
        if self.kind == "crash":
            if die is not None:
                die()
            raise InjectedCrash("an injected crash")
        return self.spoil(call())

    def spoil(self, value: Any) -> Any:
        """The result, made wrong in the way of this fault."""
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


class FaultyWorkers(Workers):
    r"""Any pool, some of whose calls are delayed, hang, crash or return rubbish, from one seed.

    Faults happen where the module runs: a delayed call keeps its machine busy, a crash ends its
    process (a thread of :class:`~coded_torch.workers.DeviceWorkers` raises instead), a hung one
    stays until the pool kills it. On :class:`~coded_torch.workers.LocalWorkers` delays pass on the
    virtual clock.

    The faults of a part depend on the seed, the number of its request (in the order in which
    requests first ask) and its own number, so on nothing that timing changes: of a request that
    asks for n parts first, part p has entry p modulo n of a draw for n workers, from a generator
    of (seed, request, p // n). Laws with a state (:class:`~coded_torch.stragglers.Markov`,
    :class:`~coded_torch.stragglers.Trace`) move on once a request, by the first draw; the others
    of a request are made by a copy of the law that goes on from there. ``crash_every`` alone goes
    by the clock.

    Args:
        pool: the pool that computes; closing this one closes it.
        delays: the law of the seconds that the parts of a request take longer; infinite: they hang.
            Or a callable, see :class:`~coded_torch.stragglers.Drawn`.
        rates: how often a part meets each of :attr:`Fault.KINDS`: "crash", "nan", "infinity",
            "shape", "dtype", "structure" (probabilities, at most 1 in sum).
        seed: of all of it, modulo 2^64.
        crash_every: seconds from one crash to the next, beside those of ``rates``: a part that is
            drawn of the first request after that many ends its machine. None: there are none.
        attack: what machines that lie do to every result of theirs, which stays well formed and
            finite; drawn from (seed, request, machine). "noise", "offset" (the same for all): add
            ``strength`` times the standard deviation of the result; "scale": multiply by
            1 + strength / 2. "sign_flip"; "constant": the mean row for all; "permute": rows;
            "swap": the two largest outputs; "one_row": one row answers another; "bit_flip": a bit
            in each row; "copies": one input that is drawn for the request is answered wrongly,
            alike by all that lie. "replay": results of other inputs of the last request, in the
            first of this one; "shift": of inputs that are shifted along their last dimension by an
            eighth. These two call the module in this process. Or a callable, which is given rows
            of a result, ``[rows, ...]``, and a generator, and returns what to answer instead.
        adversaries: the machines that lie, by their places in the pool.
        strength: of the attack, as said.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: a rate is no probability or has another name, or their sum exceeds 1; another
            name of an attack, adversaries without one.

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
        delays: Law | None = None,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
        crash_every: float | None = None,
        attack: str | Attack | None = None,
        adversaries: Iterable[int] = (),
        strength: float = 1.0,
    ) -> None:
        instance(self, "pool", pool, Workers)
        delays = law_of(self, "delays", delays)
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
        self.pool = pool
        self.delays = delays
        self.stragglers = pool.stragglers if delays is None else delays
        self.simulated, self.num_machines = pool.simulated, pool.num_machines
        self.seed = count(self, "seed", seed, least=None)
        self.crash_every = (
            None if crash_every is None else positive(self, "crash_every", crash_every)
        )
        self._crashed: float | None = None  # until the first request
        self.attack = attack
        self.strength = real(self, "strength", strength, "finite", math.isfinite)
        self.adversaries = tuple(
            count(self, "adversaries", machine, least=0) for machine in adversaries
        )
        if attack is not None and not callable(attack) and attack not in ATTACKS:
            raise ValueError(
                f"FaultyWorkers: attack must be one of {', '.join(ATTACKS)}, a callable or None, "
                f"got {attack!r}"
            )
        if self.adversaries and attack is None:
            raise ValueError(
                f"FaultyWorkers: adversaries must come with an attack, got {self.adversaries}"
            )
        self._liars = (
            Liars(attack, self.adversaries, self.strength, self.seed)
            if attack is not None and self.adversaries
            else None
        )
        self._requests = 0
        self._lock = threading.Lock()

    def open(self, module: nn.Module, task: Task) -> Request:
        def attacker(number: int) -> Attacker | None:
            return self._liars.attacker(module, task, number) if self._liars else None

        return _FaultyRequest(self.pool.open(module, task), self._begin, attacker)

    def memory(self, num_bytes: int) -> Tensor | None:
        return self.pool.memory(num_bytes)

    @property
    def num_ready(self) -> int | None:
        return self.pool.num_ready

    @property
    def num_restarts(self) -> int:
        return self.pool.num_restarts

    def _begin(self, num_parts: int) -> tuple[int, Iterator[Fault]]:
        """The number of a new request, and the faults of its parts, without end."""
        with self._lock:
            request, self._requests = self._requests, self._requests + 1
            first = self._draw(self.delays, num_parts, request, 0)
            now = time.monotonic()
            if self._crashed is None:
                self._crashed = now
            if self.crash_every is not None and now >= self._crashed + self.crash_every:
                self._crashed = now
                part = np.random.default_rng((self.seed % 2**64, request)).integers(num_parts)
                first[part] = dataclasses.replace(first[part], kind="crash")
            delays = copy.copy(self.delays)
        return request, itertools.chain(first, self._further(delays, num_parts, request))

    def _further(self, delays: Stragglers | None, num_parts: int, request: int) -> Iterator[Fault]:
        for block in itertools.count(1):
            yield from self._draw(delays, num_parts, request, block)

    @on_host()
    def _draw(
        self, delays: Stragglers | None, num_parts: int, request: int, block: int
    ) -> list[Fault]:
        entropy = np.random.SeedSequence((self.seed % 2**64, request, block))
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
        """What only the pool has, such as ``exclude``, ``restart`` and ``pids``."""
        if name.startswith("_") or name == "pool":  # of this one, and not there yet
            raise AttributeError(f"FaultyWorkers has no attribute {name!r}")
        return getattr(self.pool, name)

    def close(self) -> None:
        """Close the pool."""
        self.pool.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __repr__(self) -> str:
        return (
            f"FaultyWorkers({self.pool!r}, delays={self.delays!r}, rates={self.rates!r}, "
            f"seed={self.seed}, attack={self.attack!r}, adversaries={self.adversaries})"
        )


class _FaultyRequest(Request):
    """A request of another pool, whose parts get their faults here, and whose replies lies."""

    def __init__(
        self,
        request: Request,
        begin: Callable[[int], tuple[int, Iterator[Fault]]],
        attacker: Callable[[int], Attacker | None],
    ) -> None:
        self._request, self._begin, self._attacker = request, begin, attacker
        self._further: Iterator[Fault] | None = None
        self._faults: list[Fault] = []
        self._attack: Attacker | None = None

    def ask(self, parts: Sequence[Part]) -> None:
        if self._further is None:
            number, self._further = self._begin(len(parts))
            self._attack = self._attacker(number)
        missing = 1 + max((part.number for part in parts), default=-1) - len(self._faults)
        self._faults += itertools.islice(self._further, max(missing, 0))
        faults = (self._faults[part.number] for part in parts)
        self._request.ask(
            [
                dataclasses.replace(part, fault=fault or None)
                for part, fault in zip(parts, faults, strict=True)
            ]
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

    def status(self) -> str:
        return self._request.status()

    def close(self) -> None:
        self._request.close()

    def abandon(self) -> None:
        self._request.abandon()


def kill_own_process() -> None:
    """End this process as a crash of compiled code would: at once, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)
