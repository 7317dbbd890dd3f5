"""Power-law tails of positive numbers, mostly squared singular values: three estimators that go by the name "alpha", kept apart.

They differ in one thing, the point where the tail starts: where the Kolmogorov-Smirnov distance is smallest (`clauset`), at the median
(`hill`), or near the peak of the histogram (`fixed_finger`). From there on all three are the maximum-likelihood exponent of a density
x^-alpha. On one matrix they may be 3 and 9: a number without its estimator's name says nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from .numbers import squares

LEAST = 10  # values in a tail, below which its exponent has a standard error of more than 0.3 (alpha - 1)
EDGE = 0.1146  # Kolmogorov-Smirnov distance from a square-root edge, which every pure noise has, to the nearest power law
FAR = 0.25  # the same for a start that was not chosen by distance: a quarter of the tail lies elsewhere
STEEP = 8.0  # WeightWatcher calls a layer under-trained beyond 6; the largest values of 384 x 1536 noise give 8.6 to 11
ABSOLUTE = 1e-5  # values up to here are left out by WeightWatcher, whatever the scale
SMALL = 20  # WeightWatcher's small-sample branch takes over below this many values, with tails of at least SMALL_TAIL
SMALL_TAIL = 8
COARSE = 24  # places of a tail where a lower bound of its distance is taken
ROWS = 48  # tails whose distance is taken in full at a time
TABLE = 1 << 20  # numbers in a table of distances at most: 8 MB

Convention = Literal["plfit", "weightwatcher"]
Fingers = Literal["intended", "alphapruning", "weightwatcher"]


@dataclass(frozen=True)
class Tail:
    """A fitted tail. Not a statement that there is one: `doubt` looks for reasons against.

    Args:
        alpha: exponent of the density x^-alpha.
        xmin: where the tail starts.
        count: values in it, the one at xmin included.
        total: positive values that were offered.
        distance: Kolmogorov-Smirnov distance: largest gap between the fitted distribution and the share of smaller values in the tail.
    """

    alpha: float
    xmin: float
    count: int
    total: int
    distance: float

    @property
    def error(self) -> float:
        """Standard error (alpha - 1) / sqrt(count): of independent values and a given xmin. The choice of xmin adds to it."""
        return (self.alpha - 1) / math.sqrt(self.count)

    def doubt(self, far: float = EDGE) -> str:
        """Why the exponent says nothing, or an empty string.

        Args:
            far: largest distance at which it still counts as a power law's; by default a bare edge of noise does not.
        """
        if self.count < LEAST:
            return f"only {self.count} values in the tail, at least {LEAST} are needed"
        if self.distance > far:
            return f"no power law: Kolmogorov-Smirnov distance {self.distance:.3f}, above {far:g}"
        if self.alpha > STEEP:
            return f"alpha {self.alpha:.1f} is above {STEEP:g}: an edge, not a tail"
        return ""


def clauset(values: Tensor, *, low: float = 0.0, high: float = math.inf, convention: Convention = "plfit") -> Tail | None:
    """The tail whose distribution is nearest to a power law (Clauset, Shalizi and Newman, SIAM Review 51, 2009, section 3.3).

    Every value but the largest is tried as xmin, in one table: exact, though most tails are ruled out by a bound of their distance.

    Args:
        values: (n,) in any order; those that are not positive are left out.
        low: smallest xmin that is tried.
        high: largest xmin that is tried.
        convention: "plfit", the authors' own program: each distinct value once, shares 0, 1/k, ..., (k - 1)/k. "weightwatcher" is
            WeightWatcher 0.7.7's default fit: values up to 1e-5 are left out, equal values are tried apart, and below 20 values the
            exponent is 1 + (k - 1)/sum, for tails of at least 8.

    Returns:
        The tail, or None: fewer than two distinct values between the bounds.

    Example:
        >>> x = (1 - (torch.arange(2000) + 0.5) / 2000) ** (-1 / 1.5)  # quantiles of the power law with alpha 2.5
        >>> round(clauset(x).alpha, 2)
        2.5
    """
    if convention not in ("plfit", "weightwatcher"):
        raise UsageError(f'clauset: convention is "plfit" or "weightwatcher", found {convention!r}.')
    compat = convention == "weightwatcher"
    logs = _logs(values, ABSOLUTE if compat else 0.0)
    n = len(logs)
    if n < 2:
        return None
    slopes = _slopes(logs)
    starts = torch.arange(n - 1)
    tried = (slopes < math.inf) & (logs[:-1] >= (math.log(low) if low > 0 else -math.inf)) & (logs[:-1] <= _log(high))
    if not compat:
        tried[1:] &= logs[1:-1] > logs[:-2]
    elif n < SMALL:
        if n < SMALL_TAIL:  # one tail then: all values
            tried &= starts == 0
        else:
            tried &= starts <= n - SMALL_TAIL
        slopes = slopes * (n - starts - 1) / (n - starts)
    starts = starts[tried]
    if len(starts) == 0:
        return None
    at, distance = _nearest(logs, slopes, starts)
    return _tail(logs, at, float(slopes[at]), distance)


def hill(values: Tensor, *, start: int | None = None) -> Tail | None:
    """The tail from the median on (Hill, Annals of Statistics 3, 1975), as AlphaPruning and FARMS take it.

    1 + k / sum(ln(x / xmin)) over the k = n - n // 2 largest values. Hill's own count is k - 1: the value at xmin adds nothing to the sum.

    Args:
        values: (n,) in any order; those that are not positive are left out.
        start: position of xmin among the n values in ascending order; None is n // 2.

    Returns:
        The tail, or None: fewer than two values, or all of them equal from there on.

    Example:
        >>> x = (1 - (torch.arange(4000) + 0.5) / 4000) ** (-1 / 1.5)
        >>> round(hill(x).alpha, 2)
        2.5
    """
    logs = _logs(values)
    at = len(logs) // 2 if start is None else start
    if not 0 <= at < len(logs) - 1:
        return None
    slope = float(_slopes(logs)[at])
    if math.isinf(slope):
        return None
    return _tail(logs, at, slope, float(_distances(logs, torch.tensor([slope], dtype=torch.float64), torch.tensor([at]))[0]))


def fixed_finger(values: Tensor, *, bins: int = 100, convention: Fingers = "intended") -> Tail | None:
    """The nearest tail among those that start at the peak of the histogram of log10 x: isolated large values ("fingers") cannot steer it.

    WeightWatcher's `fix_fingers="xmin_peak"` and AlphaPruning's default. With p the left edge of the fullest bin, xmin is tried from
    0.95 p to 1.5 p.

    Args:
        values: (n,) in any order; those that are not positive are left out.
        bins: of the histogram.
        convention: "intended" is the above. "alphapruning" is what the released programs do: their lower bound is log10(0.95 p), compared
            with x itself, so that it binds nothing. "weightwatcher" leaves out values up to 1e-5 too, which moves the bins, and does not try
            the last value in the range, as powerlaw does not.

    Returns:
        The tail, or None: fewer than two distinct values, or none between the bounds.

    Example:
        >>> x = torch.cat([torch.linspace(0.1, 1, 300), (1 - (torch.arange(3000) + 0.5) / 3000) ** (-1 / 1.5)])
        >>> round(fixed_finger(x).alpha, 1)
        2.5
    """
    if convention not in ("intended", "alphapruning", "weightwatcher"):
        raise UsageError(f'fixed_finger: convention is "intended", "alphapruning" or "weightwatcher", found {convention!r}.')
    x = _logs(values, ABSOLUTE if convention == "weightwatcher" else 0.0).exp()
    if len(x) < 2 or float(x[0]) == float(x[-1]):
        return None
    first, last = math.log10(float(x[0])), math.log10(float(x[-1]))
    fullest = int(torch.histc(x.log10(), bins, first, last).argmax())
    peak = 10 ** (first + (last - first) * fullest / bins)
    low, high = 0.95 * peak if convention == "intended" else math.log10(0.95 * peak), 1.5 * peak
    if convention == "weightwatcher":
        inside = x[x <= high]
        if len(inside) < 2:
            return None
        high = float(inside[-2]) * (1 + 1e-12)
    return clauset(x, low=low, high=high)


@lru_cache(maxsize=4)
def tail_of(s: Tensor) -> Tail | None:
    """`clauset` of the squares of singular values that are not rounding. Remembered for the last few spectra, by identity.

    Args:
        s: (k,) singular values; must not be changed afterwards.
    """
    return clauset(squares(s))


def _logs(values: Tensor, above: float = 0.0) -> Tensor:
    """Logarithms of the values above a bound, ascending, on the host in float64."""
    x = values.detach().to("cpu", torch.float64).flatten()
    return x[x > above].log().sort().values


def _log(x: float) -> float:
    return math.inf if math.isinf(x) else math.log(x)


def _slopes(logs: Tensor) -> Tensor:
    """alpha - 1 of the tail from each value but the last on: k over the sum of ln(x / xmin). Infinite where the tail is one repeated value."""
    n = len(logs)
    left = torch.arange(n - 1, 0, -1, dtype=torch.float64)  # values right of each gap: summed by gaps, nothing cancels
    sums = (left * logs.diff()).flip(0).cumsum(0).flip(0)
    return (left + 1) / sums


def _nearest(logs: Tensor, slopes: Tensor, starts: Tensor) -> tuple[int, float]:
    """(start, distance) of the tail with the smallest distance, the longest one among equals."""
    bounds = _bounds(logs, slopes, starts)
    order = bounds.argsort(stable=True)
    starts, bounds = starts[order], bounds[order]
    rows = max(1, min(ROWS, TABLE // len(logs)))
    best = (math.inf, -1)
    for i in range(0, len(starts), rows):
        if float(bounds[i]) > best[0]:
            break
        chunk = starts[i : i + rows]
        found = _distances(logs, slopes[chunk], chunk)
        least = float(found.min())
        best = min(best, (least, int(chunk[found == least].min())))
    return best[1], best[0]


def _bounds(logs: Tensor, slopes: Tensor, starts: Tensor) -> Tensor:
    """Lower bounds of the distances, from a few places of each tail."""
    counts = (len(logs) - starts)[:, None]
    ranks = torch.arange(COARSE) * counts // COARSE
    gaps = logs[starts[:, None] + ranks] - logs[starts][:, None]
    return (1 - torch.exp(-slopes[starts][:, None] * gaps) - ranks.double() / counts).abs().amax(1)


def _distances(logs: Tensor, slopes: Tensor, starts: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of each tail, in one table (starts, n)."""
    first, n = int(starts.min()), len(logs)
    ranks = torch.arange(first, n) - starts[:, None]
    gaps = logs[first:] - logs[starts][:, None]
    away = 1 - torch.exp(-slopes[:, None] * gaps.clamp_min(0)) - ranks.double() / (n - starts)[:, None]
    return away.abs().masked_fill(ranks < 0, 0.0).amax(1)


def _tail(logs: Tensor, at: int, slope: float, distance: float) -> Tail:
    return Tail(1 + slope, math.exp(float(logs[at])), len(logs) - at, len(logs), distance)
