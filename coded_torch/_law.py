r"""The base class of laws that make workers late, and laws made of a callable."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ._arguments import MOST_WORKERS, count, instance
from ._transforms import outside

__all__ = ["Drawn", "Law", "Stragglers", "law_of", "uniform"]


class Stragglers(abc.ABC):
    """A law of the latencies of N workers; subclasses implement ``_draw``.

    Laws can be pickled and copied; a copy goes on from the same state of its generator.

    Args:
        seed: of the law's own generator, an integer of 64 bits; by default a new one for every law.

    Attributes:
        num_stragglers: S, for laws where exactly S workers never answer, else None.
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
            generator: a CPU generator to draw from; by default the law's own.

        Returns:
            ``[N]``, float64, seconds; infinite for workers that never answer.

        Raises:
            TypeError: ``num_workers`` is not an integer, or ``generator`` is no generator.
            ValueError: ``num_workers`` is less than 1, or not what the law is for.
        """
        instance(self, "generator", generator, torch.Generator, optional=True)
        num_workers = count(self, "num_workers", num_workers, most=MOST_WORKERS)
        with outside():
            return self._draw(num_workers, self._generator if generator is None else generator)

    @abc.abstractmethod
    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        """The latencies of one request, ``[num_workers]``, float64."""

    def _lost(self, num_workers: int, workers: Tensor) -> Tensor:
        """Latencies of 0, and infinite for ``workers``, indices or a mask."""
        latencies = torch.zeros(num_workers, dtype=torch.float64)
        latencies[workers] = math.inf
        return latencies

    def __repr__(self) -> str:
        public = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(public)})"


class Drawn(Stragglers):
    """A law of one's own. Wherever a law is an argument, the callable alone will do.

    Args:
        draw: called with N and a generator, it returns the latencies of N workers in seconds, at
            least 0; infinite for workers that never answer.
        seed: of the law's own generator; by default a new one for every law.

    Raises:
        TypeError: ``draw`` is not callable, or ``seed`` not an integer.

    Example:
        >>> from coded_torch import stragglers
        >>> stragglers.Drawn(lambda n, generator: [0.1 * i for i in range(n)]).sample(3)
        tensor([0.0000, 0.1000, 0.2000], dtype=torch.float64)
    """

    def __init__(
        self,
        draw: Callable[[int, torch.Generator], Tensor | Sequence[float]],
        *,
        seed: int | None = None,
    ) -> None:
        instance(self, "draw", draw, Callable)
        super().__init__(seed)
        self.draw = draw

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        drawn = torch.as_tensor(self.draw(num_workers, generator), dtype=torch.float64)
        if drawn.shape != (num_workers,) or not bool((drawn >= 0).all()):  # NaN fails, too
            raise ValueError(
                f"Drawn: draw must return {num_workers} latencies of at least 0, "
                f"got {drawn.tolist()}"
            )
        return drawn


#: A law, or what :class:`Drawn` makes one of.
Law = Stragglers | Callable[[int, torch.Generator], Any]


def law_of(owner: object, argument: str, law: Law | None) -> Stragglers | None:
    """The law that an argument is.

    Raises:
        TypeError: it is neither a law nor a callable.
    """
    if callable(law) and not isinstance(law, type):
        return Drawn(law)
    instance(owner, argument, law, Stragglers, optional=True)
    return None if law is None else cast(Stragglers, law)


def uniform(num_workers: int, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), so that 1 minus it has a logarithm."""
    return torch.rand(num_workers, dtype=torch.float64, generator=generator)
