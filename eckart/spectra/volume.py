"""The trace-log condition of SETOL: the leading eigenvalues whose product is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Volume:
    """The largest values whose product, after scaling all values to mean 1, is the first to fall below 1.

    Args:
        count: how many, the one that brings the product below 1 included.
        smallest: the smallest of them, in the values' own unit.
    """

    count: int
    smallest: float


def trace_log(values: Tensor) -> Volume | None:
    """Walk from the largest value down until the sum of logarithms of the scaled values falls below 0.

    The same walk as WeightWatcher's `detX_constraint`, which multiplies the values themselves and so overflows on long spectra.

    Args:
        values: (n,) squared singular values in any order, zeros included.

    Returns:
        The values that the walk passed; None where all are equal, since every product is 1 then.

    Example:
        >>> trace_log(torch.tensor([4.0, 1.0, 0.5, 0.5]))
        Volume(count=3, smallest=0.5)
    """
    x = values.to("cpu", torch.float64).sort(descending=True).values
    if len(x) < 2 or float(x[-1]) >= float(x[0]) * (1 - 1e-12):
        return None
    below = torch.nonzero((x / x.mean()).log().cumsum(0) < 0)
    count = int(below[0]) + 1 if len(below) else len(x)
    return Volume(count, float(x[count - 1]))
