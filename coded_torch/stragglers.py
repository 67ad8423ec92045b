r"""Laws of lateness: how long each of N workers takes to answer one request.

Every law draws from a ``torch.Generator``, its own or the one it is given, never from the global
random state. Latencies are in seconds; infinite means that the worker never answers. An argument of
another type raises a TypeError, one out of its domain a ValueError.
"""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._arguments import MOST_WORKERS, count, instance, positive, probability, real, real_array
from ._transforms import outside

__all__ = [
    "Bernoulli",
    "Contiguous",
    "Markov",
    "Pareto",
    "ShiftedExponential",
    "Stragglers",
    "Trace",
    "Uniform",
]


class Stragglers(abc.ABC):
    """A law of the latencies of N workers. A law of your own implements ``_draw``.

    Laws can be pickled and copied. A copy goes on from the same state of its generator.

    Args:
        seed: seeds the law's own generator, an integer of 64 bits. Defaults to None, a new seed.

    Attributes:
        num_stragglers: S, if exactly S workers never answer, else None.

    Example:
        >>> from coded_torch import stragglers
        >>> class Staggered(stragglers.Stragglers):
        ...     def _draw(self, num_workers, generator):
        ...         return [0.1 * i for i in range(num_workers)]
        >>> Staggered().sample(3)
        tensor([0.0000, 0.1000, 0.2000], dtype=torch.float64)
    """

    num_stragglers: int | None = None

    def __init__(self, seed: int | None = None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(count(self, "seed", seed, -(2**63), 2**64 - 1))

    def sample(self, num_workers: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the latencies of one request.

        Args:
            num_workers: N, at least 1.
            generator: a CPU generator. Defaults to the law's own.

        Returns:
            ``[N]``, float64, seconds; infinite for workers that never answer.

        Raises:
            TypeError: ``num_workers`` is not an integer, or ``generator`` is no generator.
            ValueError: the law cannot have ``num_workers`` workers.
        """
        instance(self, "generator", generator, torch.Generator, optional=True)
        num_workers = count(self, "num_workers", num_workers, most=MOST_WORKERS)
        with outside():
            drawn = self._draw(num_workers, self._generator if generator is None else generator)
            drawn = torch.as_tensor(drawn, dtype=torch.float64)
        if drawn.shape != (num_workers,) or not bool((drawn >= 0).all()):  # NaN fails, too
            raise ValueError(
                f"{type(self).__name__}: _draw must return {num_workers} latencies of at least 0, "
                f"got {drawn.tolist()}"
            )
        return drawn

    @abc.abstractmethod
    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor | Sequence[float]:
        """Return the latencies of one request, ``[num_workers]``."""

    def _lost(self, num_workers: int, workers: Tensor) -> Tensor:
        """Return latencies of 0, and infinite ones for ``workers``, indices or a mask."""
        latencies = torch.zeros(num_workers, dtype=torch.float64)
        latencies[workers] = math.inf
        return latencies

    def __repr__(self) -> str:
        public = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(public)})"


def _uniform(num_workers: int, generator: torch.Generator) -> Tensor:
    """Return numbers in [0, 1), so that 1 minus them has a logarithm."""
    return torch.rand(num_workers, dtype=torch.float64, generator=generator)


class _FixedNumber(Stragglers):
    """A law where exactly S workers never answer."""

    def __init__(self, num_stragglers: int, *, seed: int | None = None) -> None:
        super().__init__(seed)
        self.num_stragglers: int = count(self, "num_stragglers", num_stragglers, 0, MOST_WORKERS)

    def sample(self, num_workers: int, generator: torch.Generator | None = None) -> Tensor:
        num_workers = count(self, "num_workers", num_workers, least=max(1, self.num_stragglers))
        return super().sample(num_workers, generator)


class Uniform(_FixedNumber):
    r"""S workers, drawn uniformly, never answer; the others answer at once.

    "At once" is a latency of 0, as the law says which are late and not how long the model takes.

    Args:
        num_stragglers: S, at least 0, and at most the number of workers.
        seed: seeds the law's own generator. Defaults to None, a new seed.

    Example:
        >>> from coded_torch import stragglers
        >>> stragglers.Uniform(2, seed=0).sample(5).isinf().sum()
        tensor(2)
    """

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        order = torch.randperm(num_workers, generator=generator)
        return self._lost(num_workers, order[: self.num_stragglers])


class Contiguous(_FixedNumber):
    r"""A block of S neighbouring workers never answers; the others answer at once.

    The block starts at a uniform worker and goes on at worker 0 after the last: a rack that fails,
    the worst case for a curve.

    Args:
        num_stragglers: S, at least 0, and at most the number of workers.
        seed: seeds the law's own generator. Defaults to None, a new seed.

    Example:
        >>> from coded_torch import stragglers
        >>> stragglers.Contiguous(5, seed=0).sample(5)
        tensor([inf, inf, inf, inf, inf], dtype=torch.float64)
    """

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        start = torch.randint(num_workers, (), generator=generator)
        return self._lost(num_workers, (start + torch.arange(self.num_stragglers)) % num_workers)


class Bernoulli(Stragglers):
    r"""Every worker, independently, is late with probability p, else it answers at once.

    Args:
        p: the probability, in [0, 1].
        latency: the latency of a late worker, in seconds, at least 0. Defaults to infinity.
        seed: seeds the law's own generator. Defaults to None, a new seed.

    Example:
        >>> from coded_torch import stragglers
        >>> stragglers.Bernoulli(0.0).sample(3)
        tensor([0., 0., 0.], dtype=torch.float64)
    """

    def __init__(self, p: float, *, latency: float = math.inf, seed: int | None = None) -> None:
        super().__init__(seed)
        self.p = probability(self, "p", p)
        self.latency = real(self, "latency", latency, "at least 0", lambda x: x >= 0)

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        late = _uniform(num_workers, generator) < self.p
        return torch.where(late, self.latency, 0.0).to(torch.float64)


class ShiftedExponential(Stragglers):
    r"""Latencies of a fixed time and an exponential one, independent from worker to worker.

    .. math:: P(T > t) = \exp(-\mathrm{rate}\,(t - \mathrm{shift})), \qquad t \ge \mathrm{shift}

    Args:
        shift: the least latency, in seconds, at least 0 and finite.
        rate: per second, positive and finite; the mean latency is ``shift + 1 / rate``.
        seed: seeds the law's own generator. Defaults to None, a new seed.

    Reference:
        K. Lee et al., *Speeding up distributed machine learning using codes*, IEEE Trans. Inf.
        Theory 64 (2018).

    Example:
        >>> from coded_torch import stragglers
        >>> bool((stragglers.ShiftedExponential(shift=1.0, rate=1.0).sample(100) >= 1).all())
        True
    """

    def __init__(self, shift: float, rate: float, *, seed: int | None = None) -> None:
        super().__init__(seed)
        self.shift = real(
            self, "shift", shift, "at least 0 and finite", lambda x: 0 <= x < math.inf
        )
        self.rate = positive(self, "rate", rate)

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        return self.shift - torch.log1p(-_uniform(num_workers, generator)) / self.rate


class Pareto(Stragglers):
    r"""Latencies with a heavy tail, independent from worker to worker.

    .. math:: P(T > t) = (\mathrm{scale} / t)^{\mathrm{shape}}, \qquad t \ge \mathrm{scale}

    Args:
        shape: the exponent of the tail, positive and finite; the mean is infinite up to 1.
        scale: the least latency, in seconds, positive and finite.
        seed: seeds the law's own generator. Defaults to None, a new seed.

    Example:
        >>> from coded_torch import stragglers
        >>> bool((stragglers.Pareto(shape=2.0, scale=0.1).sample(100) >= 0.1).all())
        True
    """

    def __init__(self, shape: float, scale: float, *, seed: int | None = None) -> None:
        super().__init__(seed)
        self.shape = positive(self, "shape", shape)
        self.scale = positive(self, "scale", scale)

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        return self.scale * (1 - _uniform(num_workers, generator)) ** (-1 / self.shape)


class Markov(Stragglers):
    r"""Workers that are good or bad, and mostly stay so from one request to the next.

    Before every request but the first, a good worker turns bad with probability ``fail`` and a bad
    one good with probability ``recover``. The first request finds each worker bad with the
    stationary probability ``fail / (fail + recover)``. A spell of bad requests lasts ``1 /
    recover`` on average.

    The law has state: one bit per worker, :attr:`state`, moved on by every sample.

    Args:
        fail: in [0, 1].
        recover: in [0, 1]; not 0 together with ``fail``.
        good: the latency of a good worker, in seconds, at least 0.
        bad: the latency of a bad worker, in seconds, at least 0.
        seed: seeds the law's own generator. Defaults to None, a new seed.

    Example:
        >>> from coded_torch import stragglers
        >>> law = stragglers.Markov(fail=1.0, recover=1.0, good=0.1, bad=2.0, seed=0)
        >>> sorted((law.sample(1) + law.sample(1)).tolist())
        [2.1]
    """

    def __init__(
        self,
        fail: float,
        recover: float,
        *,
        good: float = 0.0,
        bad: float = math.inf,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        self.fail = probability(self, "fail", fail)
        self.recover = probability(self, "recover", recover)
        if self.fail + self.recover == 0:
            raise ValueError("Markov: fail and recover must not both be 0, got 0 and 0")
        self.good = real(self, "good", good, "at least 0", lambda x: x >= 0)
        self.bad = real(self, "bad", bad, "at least 0", lambda x: x >= 0)
        self._state: Tensor | None = None

    @property
    def state(self) -> Tensor | None:
        """Which workers were bad at the last request, boolean ``[N]``; None before the first."""
        return self._state

    def reset(self) -> None:
        """Forget the state: the next sample is a first request again. The generator goes on."""
        self._state = None

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        numbers = _uniform(num_workers, generator)
        if self._state is None:
            bad = numbers < self.fail / (self.fail + self.recover)
        elif len(self._state) == num_workers:
            bad = torch.where(self._state, numbers >= self.recover, numbers < self.fail)
        else:
            raise ValueError(
                f"Markov: num_workers must be {len(self._state)}, as at the last request, "
                f"got {num_workers}; reset() starts anew"
            )
        self._state = bad
        latencies = torch.full((num_workers,), self.good, dtype=torch.float64)
        latencies[bad] = self.bad
        return latencies


class Trace(Stragglers):
    r"""Measured latencies, one request after the other, from the start again after the last.

    The law has state, :attr:`position`, and draws nothing at random.

    Args:
        source: the path of a text file with one request a line, the latencies of all N workers in
            seconds, separated by spaces or commas, ``inf`` for one that never answered; blank
            lines are skipped. Or the same as a sequence of rows, ``[requests, N]``.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line or row is not N latencies, numbers that are at least 0 or infinite; or
            there is none.

    Example:
        >>> from coded_torch import stragglers
        >>> law = stragglers.Trace([[0.1, 0.2], [0.3, float("inf")]])
        >>> [law.sample(2)[0].item() for _ in range(3)]
        [0.1, 0.3, 0.1]
    """

    def __init__(self, source: str | os.PathLike[str] | Iterable[Iterable[float]]) -> None:
        super().__init__()
        rows: Iterator[tuple[int, Iterable[str | float]]]
        if isinstance(source, (str, os.PathLike)):
            rows, place = _lines(Path(source)), f"line {{}} of {os.fspath(source)}"
        else:
            instance(self, "source", source, Iterable)
            if isinstance(source, (Tensor, np.ndarray)):
                source = np.atleast_1d(real_array(self, "source", source))
            rows, place = enumerate(source, 1), "row {} of source"
        requests: list[list[float]] = []
        for number, row in rows:
            try:
                request = [float(latency) for latency in row]
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"Trace: {place.format(number)} is not latencies: {error}"
                ) from None
            # Negated, so that NaN fails.
            if not request or not all(latency >= 0 for latency in request):
                raise ValueError(
                    f"Trace: {place.format(number)} must be latencies of at least 0, got {request}"
                )
            if requests and len(request) != len(requests[0]):
                raise ValueError(
                    f"Trace: {place.format(number)} must have {len(requests[0])} latencies "
                    f"as the first has, got {len(request)}"
                )
            requests.append(request)
        if not requests:
            raise ValueError(f"Trace: source must have at least one request, got {source!r}")
        self._latencies = torch.tensor(requests, dtype=torch.float64, device="cpu")
        self.num_requests, self.num_workers = self._latencies.shape
        self.position = 0

    def reset(self) -> None:
        """Go back to the first request."""
        self.position = 0

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        if num_workers != self.num_workers:
            raise ValueError(
                f"Trace: num_workers must be {self.num_workers}, as in the trace, got {num_workers}"
            )
        latencies = self._latencies[self.position].clone()
        self.position = (self.position + 1) % self.num_requests
        return latencies


def _lines(path: Path) -> Iterator[tuple[int, Iterable[str | float]]]:
    """The numbers, from 1, and the fields of the lines that are not blank."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.replace(",", " ").split()
            if fields:
                yield number, fields
