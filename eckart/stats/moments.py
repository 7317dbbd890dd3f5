"""Count, mean and second moments of rows, summed so that neither a large mean nor many rows cost precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this width the products are float64 as well: they then cost less than the forward pass that made the rows, and the
# singular values of the Gram are good to 1% down to 1.5e-7 of the largest, against 1.5e-4 with float32 products (measured).
WIDTH_OF_F64_PRODUCTS = 2048
ROWS = 4096  # rows multiplied at once; fixed, because another chunk rounds otherwise
PANELS = 4  # column panels of a wide Gram, of which the lower half is mirrored: 5/8 of the products


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of vectors of n channels, float64 on the CPU. Sums, not averages.

    Args:
        count: sum of the weights of the rows: without token weights, their number.
        total: (n,) weighted sum of the rows.
        gram: (n, n) weighted sum of x x^T, exactly symmetric.

    Example:
        >>> m = moments(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> m.mean.tolist(), m.covariance().tolist()
        ([2.0, 2.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    count: float
    total: Tensor
    gram: Tensor

    @property
    def mean(self) -> Tensor:
        """(n,) mean."""
        return self.total / self.count

    def second(self) -> Tensor:
        """(n, n) mean of x x^T."""
        return self.gram / self.count

    def covariance(self) -> Tensor:
        """(n, n) mean of (x - mean)(x - mean)^T, divided by the count and not by count - 1.

        The sums were taken about the mean, chunk by chunk, so only this last float64 subtraction cancels: its error is about
        1e-16 of the squared mean, whatever the precision of the rows.
        """
        mean = self.mean
        out = self.second().addr_(mean, mean, alpha=-1)
        out.diagonal().clamp_(min=0)
        return out


@dataclass(frozen=True, eq=False)
class Centred:
    """Partial moments about their own mean: what is summed while collecting. float64.

    Args:
        count: sum of the weights.
        mean: (n,).
        scatter: (n, n) weighted sum of (x - mean)(x - mean)^T.
    """

    count: float
    mean: Tensor
    scatter: Tensor

    def moments(self) -> Moments:
        """The same as plain sums."""
        gram = self.scatter.addr(self.mean, self.mean, alpha=self.count)
        return Moments(self.count, self.mean * self.count, (gram + gram.T).mul_(0.5))


def combine(a: Centred, b: Centred) -> Centred:
    """Moments of the union of two sets of rows (Chan, Golub, LeVeque 1983)."""
    count = a.count + b.count
    step = b.mean - a.mean
    scatter = (a.scatter + b.scatter).addr_(step, step, alpha=a.count * b.count / count)
    return Centred(count, a.mean + step * (b.count / count), scatter)


def centred(rows: Tensor, weights: Tensor | None = None) -> Centred | None:
    """Moments of the rows, on their device, in fixed chunks.

    Args:
        rows: (t, n), any floating type.
        weights: optional (t,), not negative.

    Returns:
        The partial moments on the CPU (on the meta device for rows without data), or None when there is no row or no weight.
    """
    if rows.device.type == "mps":  # it has no float64
        rows, weights = rows.cpu(), None if weights is None else weights.cpu()
    out: Centred | None = None
    for at in range(0, len(rows), ROWS):
        part = _chunk(rows[at : at + ROWS], None if weights is None else weights[at : at + ROWS])
        if part is not None:
            out = part if out is None else combine(out, part)
    if out is None or rows.is_meta:
        return out
    return Centred(out.count, out.mean.cpu(), out.scatter.cpu())


def product_type(width: int) -> torch.dtype:
    """Type in which rows of that width are multiplied; their sums are float64 in any case."""
    return torch.float64 if width <= WIDTH_OF_F64_PRODUCTS else torch.float32


def _chunk(rows: Tensor, weights: Tensor | None) -> Centred | None:
    work = rows.to(product_type(rows.shape[1]))
    if weights is None:
        count = float(len(rows))
        mean = work.sum(0, dtype=torch.float64) / count
    else:
        weights = weights.to(work.dtype)
        count = weights.sum(dtype=torch.float64).item()
        if count == 0:
            return None
        mean = (work * weights[:, None]).sum(0, dtype=torch.float64) / count
    work = work - mean.to(work.dtype)
    if weights is not None:
        work = work * weights.sqrt()[:, None]
    return Centred(count, mean, _gram(work).to(torch.float64))


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows, by panels of columns: only products on and above the block diagonal are taken."""
    n = rows.shape[1]
    if n < 128 * PANELS:
        return rows.T @ rows
    out = rows.new_empty(n, n)
    step = -(-n // PANELS)
    for at in range(0, n, step):
        stop = min(at + step, n)
        out[at:stop, at:] = rows[:, at:stop].T @ rows[:, at:]
        out[stop:, at:stop] = out[at:stop, stop:].T
    return out


def moments(rows: Tensor, weights: Tensor | None = None) -> Moments:
    """Moments of rows that are all at hand.

    Args:
        rows: (t, n), t at least 1.
        weights: optional (t,), not negative, not all zero.

    Raises:
        ValueError: no row has a weight.
    """
    out = centred(rows, weights)
    if out is None:
        raise ValueError("moments: expected at least one row with a positive weight, found none.")
    return out.moments()
