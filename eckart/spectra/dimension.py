"""Intrinsic dimension of a cloud of points, from their distances alone: by minimum spanning trees, by neighbours, by the first two neighbours.

None of them is the rank of the cloud: a curve in 300 directions has dimension 1. All are invariant to rotation and scale, all grow with the
number of points and with noise, and from a dimension of about 10 on a few hundred points give too little. Compare clouds of one size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Refused, UsageError
from ..seeds import generator

NEIGHBOURS = 20  # of the maximum likelihood estimate
SMALLEST = 40  # points in the smallest subsample, 7 sizes, 3 restarts, 7 draws: Tulchinskii et al. 2023 for single texts
SIZES = 7
RESTARTS = 3
DRAWS = 7
DRAWS_OF_LARGE = 3  # of subsamples of at least half of the points, which hardly differ


@dataclass(frozen=True)
class Growth:
    """How the length of the minimum spanning tree grows with the number of points.

    Args:
        dimension: power / (1 - slope); infinite where the slope is 1 or more.
        slope: of the logarithm of the length against that of the number of points, mean over the restarts.
        slopes: of each restart.
        sizes: points in the subsamples.
    """

    dimension: float
    slope: float
    slopes: tuple[float, ...]
    sizes: tuple[int, ...]


def distances(points: Tensor) -> Tensor:
    """Euclidean distances of all pairs.

    They are differences, not products of the points: two points that differ in the seventh digit keep their distance.

    Args:
        points: (n, d), floating point.

    Returns:
        (n, n) float64 on the CPU, symmetric, zero on the diagonal.

    Raises:
        Refused: not a matrix, or not finite.

    Example:
        >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
        [[0.0, 5.0], [5.0, 0.0]]
    """
    if points.ndim != 2 or not points.is_floating_point():
        raise Refused(f"dimension: expected real points of shape (n, d), found {points.dtype} of shape {tuple(points.shape)}.")
    if not bool(torch.isfinite(points).all()):
        raise Refused("dimension: the points hold NaN or Inf.")
    work = points.detach().cpu().to(torch.float64)
    return torch.cdist(work, work, compute_mode="donot_use_mm_for_euclid_dist")


def distinct(d: Tensor, tie: float = 0.0) -> Tensor:
    """Distances without repeated points: of points no farther apart than `tie` times the mean distance, the first one stays.

    Args:
        d: (n, n) distances.
        tie: 0 drops exact copies only; 1e-6 drops what float32 cannot tell apart.

    Returns:
        (k, k), k <= n.

    Example:
        >>> distinct(distances(torch.tensor([[0.0], [1.0], [0.0]]))).shape
        torch.Size([2, 2])
    """
    n = len(d)
    if n < 2:
        return d
    same = torch.tril(d <= tie * float(d.sum()) / (n * (n - 1)), -1)
    keep = ~same.any(1)
    return d[keep][:, keep]


def spanning_lengths(d: Tensor, subsets: Tensor) -> Tensor:
    """Edges of the minimum spanning tree of each subset of points, by Prim's algorithm on all subsets at once.

    Args:
        d: (n, n) distances.
        subsets: (b, k) indices of the points of each subset, k at least 1.

    Returns:
        (b, k - 1) lengths, in the order in which points join the tree.

    Example:
        >>> spanning_lengths(distances(torch.tensor([[0.0], [1.0], [3.0]])), torch.tensor([[0, 2, 1]])).tolist()
        [[1.0, 2.0]]
    """
    b, k = subsets.shape
    out = d.new_empty(b, k - 1)
    outside = torch.ones(b, k, dtype=torch.bool)
    best = d.new_full((b, k), math.inf)
    at = torch.zeros(b, 1, dtype=torch.int64)
    for step in range(k - 1):
        outside.scatter_(1, at, False)
        row = d[subsets.gather(1, at).squeeze(1)].gather(1, subsets)  # from the newest point of each tree to the others
        best = torch.minimum(best, row).masked_fill_(~outside, math.inf)
        length, at = best.min(1, keepdim=True)
        out[:, step] = length.squeeze(1)
    return out


def tree_growth(
    d: Tensor, *, power: float = 1.0, smallest: int = SMALLEST, sizes: int = SIZES, restarts: int = RESTARTS, seed: int = 0
) -> Growth:
    """Persistent homology dimension (PHD): from the growth of the minimum spanning tree with the number of points.

    The sum of edges^a of the tree of n points grows as n^(1 - a / dimension). For each of several sizes, the median over random subsamples;
    a line through the logarithms; the slope is averaged over restarts.

    Args:
        d: (n, n) distances, without repeated points.
        power: a, above 0 and below the dimension.
        smallest: points in the smallest subsample.
        sizes: how many sizes, evenly spaced from `smallest` to below n.
        restarts: independent repetitions.
        seed: of the subsamples.

    Returns:
        The growth; its `.dimension` is the estimate.

    Raises:
        UsageError: an option out of range.
        Refused: fewer than 2 * `smallest` points.

    Paper: Schweinhart 2020 (arXiv:1808.01079); for texts Tulchinskii et al. 2023 (arXiv:2306.04723), whose code returns 1 / (1 - slope)
    whatever the power: right for a = 1 only.

    Example:
        >>> from eckart.seeds import generator
        >>> square = torch.rand(400, 2, generator=generator(0, "square"))
        >>> 1.7 < tree_growth(distances(square)).dimension < 2.4
        True
    """
    if power <= 0 or smallest < 2 or sizes < 2 or restarts < 1:
        raise UsageError(
            f"PHD: expected power > 0, smallest >= 2, sizes >= 2, restarts >= 1; found {power}, {smallest}, {sizes}, {restarts}."
        )
    n = len(d)
    step = (n - smallest) // sizes
    if n < 2 * smallest or step < 1:
        raise Refused(f"PHD: expected at least {2 * smallest} distinct points, found {n}.")
    grid = [smallest + step * i for i in range(sizes)]
    random = generator(seed, "tree_growth")
    lengths = d.new_empty(restarts, sizes)
    for column, size in enumerate(grid):
        draws = DRAWS if n > 2 * size else DRAWS_OF_LARGE
        subsets = torch.stack([torch.randperm(n, generator=random)[:size] for _ in range(restarts * draws)])
        total = spanning_lengths(d, subsets).pow(power).sum(1).reshape(restarts, draws)
        lengths[:, column] = total.median(1).values
    x = torch.tensor(grid, dtype=torch.float64).log()
    x = x - x.mean()
    slopes = (lengths.log() @ x / (x @ x)).tolist()
    slope = math.fsum(slopes) / restarts
    return Growth(power / (1 - slope) if slope < 1 else math.inf, slope, tuple(slopes), tuple(grid))


def likelihood_dimension(d: Tensor, k: int = NEIGHBOURS) -> float:
    """Maximum likelihood estimate from k neighbours, averaged over points as 1 / dimension.

    Args:
        d: (n, n) distances, without repeated points.
        k: neighbours, at least 2.

    Raises:
        UsageError: k below 2.
        Refused: fewer than k + 1 points.

    Paper: Levina and Bickel 2004; averaged as MacKay and Ghahramani 2005 propose (Levina and Bickel average the dimensions, which is
    biased upwards). k - 1 terms, as both write; k - 2 would be without bias at a single point.

    Example:
        >>> from eckart.seeds import generator
        >>> square = torch.rand(400, 2, generator=generator(0, "square"))
        >>> 1.8 < likelihood_dimension(distances(square)) < 2.2
        True
    """
    if k < 2:
        raise UsageError(f"maximum likelihood dimension: expected at least 2 neighbours, found {k}.")
    near = _neighbours(d, k, "maximum likelihood dimension")
    inverse = (near[:, -1:] / near[:, :-1]).log().mean(1)
    mean = float(inverse.mean())
    return 1 / mean if mean > 0 else math.inf


def two_nn(d: Tensor, discard: float = 0.1) -> float:
    """TwoNN: from the ratio of the distances to the second and the first neighbour.

    The ratio r2 / r1 exceeds mu with probability mu^-dimension; a line through the origin is fitted to -log(1 - F) against log mu, without
    the largest ratios.

    Args:
        d: (n, n) distances, without repeated points.
        discard: share of the largest ratios left out; noise and borders live there.

    Raises:
        UsageError: a share outside [0, 1).
        Refused: fewer than 3 points, or 2 ratios that are kept.

    Paper: Facco et al. 2017 (doi:10.1038/s41598-017-11873-y).

    Example:
        >>> from eckart.seeds import generator
        >>> square = torch.rand(400, 2, generator=generator(0, "square"))
        >>> 1.8 < two_nn(distances(square)) < 2.3
        True
    """
    if not 0 <= discard < 1:
        raise UsageError(f"TwoNN: expected a share of ratios to discard in [0, 1), found {discard}.")
    near = _neighbours(d, 2, "TwoNN")
    x = (near[:, 1] / near[:, 0]).log().sort().values
    keep = int(len(x) * (1 - discard))
    if discard == 0:
        keep = len(x) - 1  # the largest ratio has F = 1
    if keep < 2:
        raise Refused(f"TwoNN: expected at least 2 ratios after discarding, found {keep}.")
    y = -torch.log1p(-torch.arange(1, keep + 1, dtype=torch.float64) / len(x))
    x = x[:keep]
    square = float(x @ x)
    return float(x @ y) / square if square > 0 else math.inf


def _neighbours(d: Tensor, k: int, what: str) -> Tensor:
    """(n, k) distances to the k nearest other points, ascending."""
    if len(d) < k + 1:
        raise Refused(f"{what}: expected at least {k + 1} distinct points, found {len(d)}.")
    others = d + torch.diag(d.new_full((len(d),), math.inf))
    return others.topk(k, largest=False).values
