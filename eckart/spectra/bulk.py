"""What a matrix of pure noise looks like: the Marchenko-Pastur law, its edge, and what stands beyond it.

A matrix W (m, n) of independent entries of variance v has the squared singular values of this law, in units of v max(m, n), with the ratio
q = min(m, n) / max(m, n): between (1 - sqrt q)^2 and (1 + sqrt q)^2. The largest one exceeds the edge by a Tracy-Widom variable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TRACY_WIDOM = 2.0234  # 99% quantile of the law for real matrices: Johnstone, Annals of Statistics 29, 2001, table 1
LEAST = 20  # values that noise is estimated from
GRID = 2049  # angles of a table that is interpolated
CROWD = 0.25  # share of outliers from which the middle of the rest says nothing of noise
MISFIT = 0.05  # distance between distributions that still counts as noise ...
NOISE_MISFIT = 4.0  # ... and of k values of true noise, times k: 99% of Gaussian matrices stay below


@dataclass(frozen=True)
class Bulk:
    """The noise that best explains the middle of a spectrum. Whether noise explains it at all is what `misfit` says.

    Args:
        noise: standard deviation of an entry.
        edge: largest singular value of such noise in the limit of large matrices; `lower` the smallest one.
        lower: see `edge`.
        threshold: singular value that the noise of this size exceeds in one matrix of a hundred.
        outliers: singular values above it.
        detached: outliers above the first gap, counted from the edge on, that is wider than `threshold` is above `edge`, in squares.
        misfit: largest gap between the distribution of the values that are no outliers and the law.
        total: values of the spectrum.
    """

    noise: float
    edge: float
    lower: float
    threshold: float
    outliers: int
    detached: int
    misfit: float
    total: int

    def doubt(self) -> str:
        """Why this noise does not explain the spectrum, or an empty string."""
        if self.outliers > CROWD * self.total:
            return f"no bulk: {self.outliers} of {self.total} values stand beyond the edge"
        most = max(MISFIT, NOISE_MISFIT / (self.total - self.outliers))
        if self.misfit > most:
            return f"the bulk is not that of noise: its distribution is off by {self.misfit:.3f}, more than {most:.3f}"
        return ""


def survival(x: Tensor, ratio: float) -> Tensor:
    """Share of the Marchenko-Pastur law above x, in closed form; float64.

    Args:
        x: (k,) squared singular values over v max(m, n).
        ratio: min(m, n) / max(m, n), in (0, 1].

    Example:
        >>> survival(torch.tensor([0.0, 1.0, 4.0]), 1.0).tolist()[::2]
        [1.0, 0.0]
    """
    root = math.sqrt(ratio)
    cosine = ((x.to(torch.float64) - 1 - ratio) / (2 * root)).clamp(-1, 1)
    return _above(torch.arccos(cosine), root).clamp(0, 1)


def quantile(share: Tensor, ratio: float) -> Tensor:
    """The x below which that share of the Marchenko-Pastur law lies, to about 1e-6; float64.

    Args:
        share: (k,) in [0, 1].
        ratio: min(m, n) / max(m, n), in (0, 1].

    Example:
        >>> quantile(torch.tensor([0.5]), 1.0).round(decimals=4).tolist()  # Gavish and Donoho's mu of a square matrix
        [0.6528]
    """
    root = math.sqrt(ratio)
    angles = torch.linspace(0, math.pi, GRID, dtype=torch.float64)  # the share above x grows with the angle
    table = _above(angles, root)
    wanted = 1 - share.to(torch.float64)
    right = torch.searchsorted(table, wanted).clamp(1, GRID - 1)
    part = (wanted - table[right - 1]) / (table[right] - table[right - 1])
    return 1 + ratio + 2 * root * ((right - 1 + part) * (math.pi / (GRID - 1))).cos()


def fit(s: Tensor, shape: tuple[int, int]) -> Bulk | None:
    """Match the middle half of the values that are no outliers to the law's, until the count of outliers settles.

    Gavish and Donoho (IEEE Trans. Inf. Theory 60, 2014) match the median of all values; the middle half scatters half as much, and leaving
    out what was found to be an outlier makes it hold for spikes in number. Place and scale of the largest noise value are Johnstone's (2001).

    Args:
        s: (min(m, n),) all singular values, descending.
        shape: (m, n).

    Returns:
        The fit, or None: fewer than 20 values that are no outliers, or half of these are zero.

    Example:
        >>> from eckart.linalg import svdvals
        >>> found = fit(svdvals(torch.randn(200, 300, generator=torch.Generator().manual_seed(0))), (200, 300))
        >>> found.outliers, round(found.noise, 2)
        (0, 1.0)
    """
    square = s.to("cpu", torch.float64).square()
    variance, outliers = _variance(square, shape, 0), 0
    seen: set[int] = set()
    while variance is not None and outliers not in seen:  # a count that comes back is settled, or takes turns with its neighbour
        seen.add(outliers)
        outliers = int((square > variance * largest(len(square) - outliers, max(shape) - outliers)).sum())
        variance = _variance(square, shape, outliers)
    if variance is None:
        return None
    few, many = len(square) - outliers, max(shape) - outliers
    centre, spread = variance * (many + few), 2 * variance * math.sqrt(many * few)
    threshold = variance * largest(few, many)
    wide = torch.nonzero(square[:outliers] - square[1 : outliers + 1] > threshold - centre - spread)
    above = survival(square[outliers:] / (variance * many), few / many)
    steps = torch.arange(few + 1, dtype=torch.float64) / few
    return Bulk(
        noise=math.sqrt(variance),
        edge=math.sqrt(centre + spread),
        lower=math.sqrt(centre - spread),
        threshold=math.sqrt(threshold),
        outliers=outliers,
        detached=int(wide[-1]) + 1 if len(wide) else 0,
        misfit=float(torch.maximum((above - steps[:-1]).abs(), (above - steps[1:]).abs()).max()),
        total=len(square),
    )


def _variance(square: Tensor, shape: tuple[int, int], outliers: int) -> float | None:
    """Of an entry, from the middle half of what is left without the outliers; None where that is too little, or half of it rounding."""
    rest, many = square[outliers:].flip(0), max(shape) - outliers
    few = len(rest)
    if few < LEAST or float(rest[few // 2]) <= len(square) * torch.finfo(torch.float64).eps * float(square[0]):
        return None
    shares = (torch.arange(few, dtype=torch.float64) + 0.5) / few
    middle = slice(few // 4, few - few // 4)
    return float(rest[middle].sum() / quantile(shares[middle], few / many).sum()) / many


def largest(few: int, many: int, deviation: float = TRACY_WIDOM) -> float:
    """A quantile of the largest squared singular value of unit noise (few, many): Johnstone's centre plus `deviation` times his scale."""
    a, b = math.sqrt(max(many - 1, 1)), math.sqrt(few)
    return (a + b) ** 2 + deviation * (a + b) * (1 / a + 1 / b) ** (1 / 3)


def _above(angle: Tensor, root: float) -> Tensor:
    """The law's share above x = 1 + q^2 + 2 q cos(angle), q = root: its density in the angle is 2/pi sin^2 / x."""
    q2 = root * root
    tangent = torch.arctan((1 - root) / (1 + root) * torch.tan(angle / 2)) if root < 1 else torch.zeros_like(angle)
    return ((1 + q2) * angle - 2 * root * angle.sin() - 2 * (1 - q2) * tangent) / (2 * math.pi * q2)
