"""Where a polygon turns: Ramer-Douglas-Peucker for points in any number of dimensions, all tolerances at once."""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

from ..errors import Refused


def split_order(points: Tensor) -> tuple[list[int], Tensor]:
    """The points of a polygon in the order in which Ramer-Douglas-Peucker keeps them, and the tolerance up to which it keeps each.

    The segment whose farthest point is farthest is split first, so the first k points of the order are nested in the first k + 1; and the
    points kept at a tolerance eps are those whose tolerance is above eps, as by recursion. The distance is to the segment, not to the line
    through it. Not a smoothing: points are kept or dropped, never moved.

    Args:
        points: (n, d), n at least 2, floating point.

    Returns:
        (order: indices of all inner points; tolerance: (n,) float64, infinite at both ends, 0 where a point lies on its segment).

    Raises:
        Refused: fewer than 2 points, or not finite.

    Paper: Ramer 1972 (doi:10.1016/S0146-664X(72)80017-0), Douglas and Peucker 1973 (doi:10.3138/FM57-6770-U75U-7727).

    Example:
        >>> order, tolerance = split_order(torch.tensor([[0.0, 0], [1, 1], [2, 3], [3, 0]]))
        >>> order, tolerance.isinf().tolist()
        ([2, 1], [True, False, False, True])
    """
    if points.ndim != 2 or len(points) < 2:
        raise Refused(f"trajectory: expected at least 2 points of shape (n, d), found shape {tuple(points.shape)}.")
    p = points.detach().cpu().to(torch.float64)
    if not bool(torch.isfinite(p).all()):
        raise Refused("trajectory: the points hold NaN or Inf.")
    tolerance = torch.full((len(p),), math.inf, dtype=torch.float64)
    order: list[int] = []
    reached = math.inf
    segments = [_farthest(p, 0, len(p) - 1)] if len(p) > 2 else []
    while segments:
        negative, at, first, last = heapq.heappop(segments)
        reached = min(reached, -negative)  # a point is kept only while the segments around it are split
        tolerance[at] = reached
        order.append(at)
        for i, j in ((first, at), (at, last)):
            if j - i > 1:
                heapq.heappush(segments, _farthest(p, i, j))
    return order, tolerance


def _farthest(p: Tensor, i: int, j: int) -> tuple[float, int, int, int]:
    """(-distance, index, i, j) of the point between i and j that is farthest from their segment."""
    chord = p[j] - p[i]
    inner = p[i + 1 : j] - p[i]
    square = float(chord @ chord)
    t = (inner @ chord / square).clamp(0, 1) if square > 0 else torch.zeros(len(inner), dtype=torch.float64)
    distance = (inner - t[:, None] * chord).square().sum(1).sqrt()
    at = int(distance.argmax())
    return -float(distance[at]), i + 1 + at, i, j
