"""How large the singular values are that rounding to a storage type alone puts into a difference of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding_edge(weight: Tensor) -> float:
    """Largest singular value to expect of the rounding errors of a stored matrix: their root mean square times sqrt(m) + sqrt(n).

    Errors are taken as uniform within half a unit in the last place and independent, as they are where nothing is rounded in common; the edge
    is that of a random matrix (Geman 1980), not a bound.

    Args:
        weight: (m, n) in its storage type.

    Returns:
        The edge, in the weight's unit; 0 for a zero matrix.

    Example:
        >>> w = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
        >>> round(rounding_edge(w) / (2**-7 / 12**0.5 * 4), 6)
        1.0
    """
    if weight.numel() == 0:
        return 0.0
    m, n = weight.shape
    _, exponent = torch.frexp(weight.to(torch.float64).abs())  # |w| = f 2^e with f in [1/2, 1)
    unit = torch.ldexp(torch.full_like(weight, torch.finfo(weight.dtype).eps, dtype=torch.float64), exponent - 1)
    unit = torch.where(weight != 0, unit, 0.0)
    return math.sqrt(float(unit.square().mean()) / 12) * (math.sqrt(m) + math.sqrt(n))
