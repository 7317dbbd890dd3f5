"""How much of several matrices one common left basis of rank r can hold, predicted while matrices are added one by one.

Blocks A_j (m, n_j) with equal rows; M = [A_1 ... A_K]. The best basis keeps sum_{i<=r} sigma_i(M)²; each predictor below never says more than that:
- `Norm`: singular values of a part never exceed those of the whole (Weyl). O(1) per block.
- `Residuals`: M is block triangular in the basis that grows by what each block adds, so the energies of the diagonal blocks count (pinching).
- `Truncated`: an incremental truncated SVD of M M^T. Tight where the blocks do share directions, which is where the other two are loose.

Concatenated matrix SVD: bounds, incremental approximation, error-constrained clustering (2026). The published norm bound takes the whole norm of a
first block that has more than r columns, and is then no bound; here its r largest singular values count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import Refused
from .operator import sum_of_squares
from .psd import eigh_psd

TOLERANCE = 1e-12  # share of a block's norm below which a direction of its residual is rounding
Predictor = Literal["norm", "residuals", "truncated"]


@dataclass(frozen=True)
class State:
    """What a predictor knows of the blocks so far. Make one with `start`, go on with `add`; both are pure.

    Args:
        rank: r of the common basis.
        total: squared norm of all blocks.
        kept: squared norm that the best basis of rank r holds, at least (`Truncated`: an estimate that never over-claims).
    """

    rank: int
    total: float
    kept: float

    @property
    def error(self) -> float:
        """Relative Frobenius error of the common basis, at most: sqrt(1 - kept / total); 0 for blocks of zeros."""
        return max(0.0, 1 - self.kept / self.total) ** 0.5 if self.total > 0 else 0.0

    def add(self, block: Tensor) -> State:
        """The state with one more block."""
        raise NotImplementedError


@dataclass(frozen=True)
class Norm(State):
    """Blocks are joined exactly while their columns number at most r; every other one only adds to what is lost."""

    columns: int = 0
    open: bool = True

    def add(self, block: Tensor) -> Norm:
        energy = sum_of_squares(block)
        total, columns = self.total + energy, self.columns + block.shape[1]
        if self.open and columns <= self.rank:
            return replace(self, total=total, kept=self.kept + energy, columns=columns)
        if self.columns == 0:  # the first block alone has more than r columns
            return replace(self, total=total, kept=float(_energies(block)[: self.rank].sum()), columns=columns, open=False)
        return replace(self, total=total, open=False)


@dataclass(frozen=True)
class Residuals(State):
    """The basis of everything seen so far, and the r largest energies of what each block added to it."""

    basis: Tensor | None = None
    pool: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def residual(self, block: Tensor) -> Tensor:
        """The part of a block outside the basis, projected twice."""
        work = block.to(torch.float64)
        for _ in range(2 if self.basis is not None else 0):
            assert self.basis is not None
            work = work - self.basis @ (self.basis.T @ work)
        return work

    def add(self, block: Tensor) -> Residuals:
        rest = self.residual(block)
        fresh, energies, _ = _range(rest, TOLERANCE * sum_of_squares(block) ** 0.5)
        pool = torch.cat([self.pool, energies]).sort(descending=True).values[: self.rank]
        basis = fresh if self.basis is None else torch.cat([self.basis, fresh], dim=1)
        return replace(self, total=self.total + sum_of_squares(block), kept=float(pool.sum()), basis=basis, pool=pool)


@dataclass(frozen=True)
class Truncated(State):
    """M M^T ~ Q diag(values) Q^T, cut to `rank + oversample` after every block: energy is only ever lost, so nothing is over-claimed."""

    oversample: int = 5
    basis: Tensor | None = None
    values: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def residual(self, block: Tensor) -> Tensor:
        """The part of a block outside the basis."""
        work = block.to(torch.float64)
        return work if self.basis is None else work - self.basis @ (self.basis.T @ work)

    def add(self, block: Tensor) -> Truncated:
        work = block.to(torch.float64)
        norm = sum_of_squares(block) ** 0.5
        inside = work.new_zeros(0, work.shape[1]) if self.basis is None else self.basis.T @ work
        fresh, _, outside = _range(self.residual(block), TOLERANCE * norm)
        stacked = torch.cat([inside, outside])  # the block in the basis [Q, fresh]
        middle = stacked @ stacked.T
        k = len(self.values)
        middle[:k, :k] += torch.diag(self.values)
        values, vectors = eigh_psd(middle, "joint")
        size = min(self.rank + self.oversample, len(values))
        basis = (fresh if self.basis is None else torch.cat([self.basis, fresh], dim=1)) @ vectors[:, :size]
        kept = float(values[: self.rank].sum())
        return replace(self, total=self.total + norm**2, kept=kept, basis=basis, values=values[:size])


def start(predictor: Predictor, rank: int, block: Tensor, oversample: int = 5) -> State:
    """The state of a predictor after its first block.

    Args:
        predictor: "norm", "residuals" or "truncated".
        rank: r, at least 1.
        block: (m, n).
        oversample: "truncated" only: directions carried beyond r.

    Example:
        >>> a = torch.eye(3)[:, :1]
        >>> [round(start(p, 1, a).add(2 * a).error, 3) for p in ("norm", "residuals", "truncated")]
        [0.894, 0.894, 0.0]
    """
    kinds: dict[str, State] = {
        "norm": Norm(rank, 0.0, 0.0),
        "residuals": Residuals(rank, 0.0, 0.0),
        "truncated": Truncated(rank, 0.0, 0.0, oversample),
    }
    return kinds[predictor].add(block)


def kept_energy(blocks: Sequence[Tensor], rank: int) -> float:
    """sum_{i<=r} sigma_i([A_1 ... A_K])², from the sum of the Grams: what the predictors predict.

    Raises:
        Refused: blocks whose numbers of rows differ.
    """
    if len({b.shape[0] for b in blocks}) != 1:
        raise Refused(f"joint: expected blocks with equal rows, found {[tuple(b.shape) for b in blocks]}.")
    total = torch.zeros(blocks[0].shape[0], blocks[0].shape[0], dtype=torch.float64, device=blocks[0].device)
    for block in blocks:
        work = block.to(torch.float64)
        total += work @ work.T
    return float(eigh_psd(total, "joint")[0][:rank].sum())


def _energies(block: Tensor) -> Tensor:
    """Squared singular values, descending, from the Gram of the smaller side."""
    work = block.to(torch.float64)
    return eigh_psd(work @ work.T if work.shape[0] <= work.shape[1] else work.T @ work, "joint")[0]


def _range(block: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """(Q (m, k) orthonormal, energies (k,), Q^T block (k, n)): directions longer than `floor` of a float64 block."""
    left, lengths, right = torch.linalg.svd(block, full_matrices=False)
    good = lengths > max(floor, 0.0)
    return left[:, good], lengths[good].square(), lengths[good, None] * right[good]
