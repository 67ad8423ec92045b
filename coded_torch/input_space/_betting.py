r"""Intervals for the mean of bounded numbers that hold at any number of rows, and at any look.

For each mean m that is possible, a gambler bets on each drawn row, at fair odds if m were the mean
of the data set: the expected number of the next row is the mean of the rows not drawn before it.
If m is the mean, the gambler's capital exceeds :math:`1 / \alpha` with a probability of at most
:math:`\alpha`, ever (Ville's inequality). So the interval holds every m against which nobody has
won as much. Bets follow Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", Journal of the Royal Statistical Society B 2024, arXiv:2010.09686, for draws without
replacement as in their arXiv:2006.04347.
"""

import math

import torch
from torch import Tensor

# The share of the capital that a bet may lose at most, as in the first paper.
_MOST = 0.5
_STEPS = 30  # of bisection: the ends are exact to 1e-9 of the range


def betting(x: Tensor, total: int, level: float) -> Tensor:
    """Return the ends of intervals, ``[2, C]``, that hold together at all numbers of rows.

    Args:
        x: ``[n, C]``, float64, between 0 and 1, the numbers of rows in the order of drawing.
        total: the number of rows from which they are drawn, without replacement, more than n.
        level: the probability, between 0 and 1, per column.
    """
    return torch.stack([_lowest(x, total, level), 1 - _lowest(1 - x, total, level)])


def _lowest(x: Tensor, total: int, level: float) -> Tensor:
    """Return the least mean, ``[C]``, against which bets on larger numbers have not won."""
    log_target = math.log(2 / (1 - level))  # half of the risk is for the other end
    number = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
    sums = x.cumsum(0)
    before = sums - x  # the sum of the rows drawn before each
    left = total - number + 1  # the rows that each is drawn from
    # The bets know only the rows before, and begin with the moments of a uniform number.
    centred = (x - (sums + 0.5) / (number + 1)).square()
    variances = (centred.cumsum(0) - centred + 0.25) / number
    bets = (2 * log_target / (variances * number * (number + 1).log())).sqrt()
    low = sums[-1] / total  # if the other rows are all 0
    high = low + (total - len(x)) / total
    for _ in range(_STEPS):
        middle = (low + high) / 2
        expected = (total * middle - before) / left
        bet = torch.minimum(bets, _MOST / expected.clamp(min=1e-300))
        is_won = (bet * (x - expected)).log1p().cumsum(0).amax(0) >= log_target
        low = torch.where(is_won, middle, low)
        high = torch.where(is_won, high, middle)
    return low


def bounded(
    found: Tensor,
    y: Tensor,
    is_share: Tensor,
    bounds: Tensor,
    total: int,
    *,
    level: float,
    at_looks: float,
) -> Tensor:
    """Return centres and half widths, ``[2, C]``, for columns between bounds.

    Each column gets the narrower of two intervals: that of bets, and ``found``, which is widened
    for the rows that were not drawn.

    Args:
        found: ``[2, C]``, of :func:`~._finite_mean.intervals`, at the level ``at_looks``.
        y: ``[n, C]``, float64, the numbers of rows in the order of drawing.
        is_share: ``[C]``, bool: the columns that can hold 0 and 1 only, of which none is missed.
        bounds: ``[2, C]``, float64. Columns whose bounds are infinite stay as they are found.
        total: the number of rows of the data set.
        level, at_looks: probabilities per column, of bets at all looks, and of any other look.
    """
    known = bounds.isfinite().all(0)
    low, high = bounds[:, known]
    rows = y[:, known]
    n = len(rows)
    # This share of all rows is missed with a probability of 1 - at_looks at most. As none of these
    # rows was drawn, their values may be anything between the bounds.
    unseen = (1 - (1 - at_looks) ** (1 / n)) * ~is_share[known]
    value, half = found[:, known]
    first = rows.amin(0)
    last = rows.amax(0)
    half = half.where(first < last, 0.0)  # equal rows are short of those that were missed only
    below = value - half - unseen * (first - low)
    above = value + half + unseen * (high - last)
    least, most = betting((rows - low) / (high - low), total, level) * (high - low) + low
    is_narrower = above - below < most - least
    # Rows that are not drawn are between the bounds, too.
    sums = rows.sum(0)
    possible = [(sums + (total - n) * bound) / total for bound in (low, high)]
    below = torch.where(is_narrower, below, least).clamp(*possible)
    above = torch.where(is_narrower, above, most).clamp(*possible)
    found = found.clone()
    found[:, known] = torch.stack([(below + above) / 2, (above - below) / 2])
    return found
