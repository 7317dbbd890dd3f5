"""Products of single samples' weight gradients, summed: through the gradient itself, or through the products of its tokens where these are fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from .moments import product_type

ROWS = 4096  # rows multiplied at once; fixed, because other chunks round otherwise
PANELS = 8  # of a wide product, whose lower half is mirrored: 9/16 of the multiplications; at width 1536 faster than 4 or 12 (measured)
PANEL = 96  # least columns of a panel; at width 384 narrower ones gain nothing (measured)


def gradient_products(calls: Sequence[tuple[Tensor, Tensor]], sides: Sequence[str]) -> dict[str, Tensor]:
    """Sums over samples of G^T G ("in") and G G^T ("out"), where G = sum over calls of g^T x is a sample's gradient of the weight.

    Args:
        calls: x (B, t, n) and g (B, t, m) of each call of the module.
        sides: those that are wanted.

    Returns:
        For each side (n, n) or (m, m), exactly symmetric, float64 on the CPU.

    Example:
        >>> x, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]])
        >>> {k: v.tolist() for k, v in gradient_products([(x, g)], ("in", "out")).items()}
        {'in': [[9.0, 18.0], [18.0, 36.0]], 'out': [[45.0]]}
    """
    if calls[0][0].device.type == "mps":  # it has no float64
        calls = [(x.cpu(), g.cpu()) for x, g in calls]
    x, g = (torch.cat([c[i].detach() for c in calls], 1) if len(calls) > 1 else calls[0][i].detach() for i in (0, 1))
    n, m = x.shape[-1], g.shape[-1]
    live = (g != 0).any(-1)  # padding has no gradient
    sizes = live.sum(1).tolist()
    dtype = product_type(max(n, m))
    sums = {side: _Sum.empty(n if side == "in" else m, x.device) for side in sides}
    for rows, grads in zip(x[live].split(sizes), g[live].split(sizes), strict=True):
        rows, grads = rows.to(dtype), grads.to(dtype)
        formed = through_gradient(len(rows), n, m, sides)
        gradient = grads.T @ rows if formed else None
        for side in sides:
            near, far = (rows, grads) if side == "in" else (grads, rows)
            if gradient is not None and side in formed:
                half = gradient if side == "in" else gradient.T
                sums[side].add(half, half)
            else:
                sums[side].add(near, far @ far.T @ near)
    return {side: found.finish() for side, found in sums.items()}


def through_gradient(t: int, n: int, m: int, sides: Sequence[str]) -> tuple[str, ...]:
    """The sides for which a sample's gradient (m, n) of t tokens is formed, which all of them share; by multiplications alone.

    Args:
        t: tokens.
        n: inputs.
        m: outputs.
        sides: those that are wanted.

    Example:
        >>> [through_gradient(t, 30, 30, ("in", "out")) for t in (10, 40)]
        [(), ('in', 'out')]
    """
    width, depth = {"in": n, "out": m}, {"in": m, "out": n}

    def cost(formed: tuple[str, ...]) -> int:
        each = (depth[s] * width[s] ** 2 if s in formed else t * (t * (m + n) + width[s] ** 2) for s in sides)
        return sum(each) + (t * m * n if formed else 0)

    return min((c for k in range(len(sides) + 1) for c in combinations(sides, k)), key=cost)


@dataclass
class _Sum:
    """A sum of symmetric products a^T b, of many pairs at once; below the diagonal blocks it is not kept up."""

    total: Tensor
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device) -> _Sum:
        return cls(torch.zeros(width, width, dtype=torch.float64, device=device))

    def add(self, a: Tensor, b: Tensor) -> None:
        """a, b (r, width)."""
        if self.rows + len(a) > ROWS:
            self._multiply()
        self.pairs.append((a, b))
        self.rows += len(a)

    def finish(self) -> Tensor:
        """The whole matrix."""
        self._multiply()
        for at, stop in self._panels():
            self.total[stop:, at:stop] = self.total[at:stop, stop:].T
            block = self.total[at:stop, at:stop]
            block.copy_((block + block.T) / 2)
        return self.total.cpu()

    def _multiply(self) -> None:
        if self.rows:
            a, b = (torch.cat([p[i] for p in self.pairs]) if len(self.pairs) > 1 else self.pairs[0][i] for i in (0, 1))
            for at, stop in self._panels():
                self.total[at:stop, at:] += a[:, at:stop].T @ b[:, at:]
        self.pairs, self.rows = [], 0

    def _panels(self) -> list[tuple[int, int]]:
        width = len(self.total)
        step = max(PANEL, -(-width // PANELS))
        return [(at, min(at + step, width)) for at in range(0, width, step)]
