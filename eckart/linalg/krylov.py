"""One-sided block Lanczos on A A^T with full reorthogonalisation, stopped by its own residuals.

The basis Q (d, m) and its product W = Q A (d, n) are kept, so no final pass is needed. The projected matrix T = W W^T is block tridiagonal; only
those blocks are formed, in float64. A A^T leads out of the basis only in its last block, so the residual of every Ritz pair is known for free.
Musco and Musco 2015 (arXiv:1504.05477); Meyer, Musco and Musco 2024 (arXiv:2305.02535): small blocks suffice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..seeds import generator
from .certify import residual
from .choose import Rates, block_width
from .factors import ROUNDING
from .finish import NORM_NOISE, Draft, descending, triples
from .operator import Operator, gram_of
from .orth import whiten
from .rank import Target
from .subspace import iterate

GROWTH = 1.2  # of the basis between two looks at the Ritz values: their cubic cost then sums to 2.4 times the last
GIVE_UP = 0.4  # share of the exact route's cost after which it is taken instead
HOPE = 2.0  # that share may grow by this factor when the rate seen so far predicts convergence within it
SAFETY = 2.0  # on the figure for what was missed: it is an estimate, and low by up to 1.6 in the first steps on a flat spectrum
DRIFT = {torch.float32: 4e-6, torch.float64: 1e-14}  # of ‖A‖: rounding of the products turns the smallest directions by so much
STEEP = 1e-6  # theta_r / theta_1 below which the blocks of T that are zero to rounding only do count


@dataclass(frozen=True)
class Look:
    """What the Ritz values say.

    Args:
        dimension: d, size of the basis.
        theta: (d,) Ritz values of A A^T, descending.
        P: (d, d) their coordinates.
        rank: r chosen on them, or None when they hold too little.
        missed: figure for the squared norm that the best rank-r factors hold beyond these.
        rest: ‖A‖² that the whole basis does not hold.
    """

    dimension: int
    theta: Tensor
    P: Tensor
    rank: int | None
    missed: float
    rest: float


class Lanczos:
    """The growing basis. One `step` multiplies A and its transpose once by a block."""

    def __init__(self, op: Operator, total: float, block: int, limit: int, seed: int) -> None:
        m, n = op.shape
        self.op, self.norm, self.block, self.limit = op, math.sqrt(total), block, limit
        self.generator = generator(seed, "krylov")
        self.Q = torch.empty(limit, m, dtype=op.dtype, device=op.device)
        self.W = torch.empty(limit, n, dtype=op.dtype, device=op.device)
        self.T = torch.zeros(limit, limit, dtype=torch.float64, device=op.device)
        self.last = torch.empty(0, n, dtype=torch.float64, device=op.device)
        self.size = 0
        self.passes = 1
        self.broken = False  # a direction was lost: repeated singular values, or the matrix is exhausted
        self.coupling = torch.zeros(0, 0, dtype=torch.float64, device=op.device)
        start = op.matmat(torch.randn(n, block, generator=self.generator, dtype=op.dtype).to(op.device)).T
        longest = float(torch.linalg.vector_norm(start, dim=1).max())
        self.next = self._against(whiten(start, 1e-6 * longest)[0])
        self._pad()

    @property
    def exhausted(self) -> bool:
        """The basis spans all of the smaller side."""
        return self.size == self.op.shape[0]

    def step(self) -> None:
        """Take the next block into the basis and make the one after it."""
        low, high = self.size, self.size + self.next.shape[0]
        eps = torch.finfo(self.op.dtype).eps
        self.Q[low:high] = self.next
        images = self.op.rmatmat(self.next.T).T
        self.W[low:high] = images
        wide = images.to(torch.float64)
        self.T[low:high, low:high] = wide @ wide.T
        if low:
            before = low - self.last.shape[0]
            self.T[low:high, before:low] = wide @ self.last.T
            self.T[before:low, low:high] = self.T[low:high, before:low].T
        self.last = wide
        self.size = high
        product = self.op.matmat(images.T).T
        self.passes += 2
        recent = self.Q[max(0, low - self.block) : high]
        product = product - (product @ recent.T) @ recent  # the three-term recurrence; older blocks are met after scaling
        floor = 16 * eps * self.norm * float(torch.linalg.vector_norm(images, dim=1).max())  # rounding of the products
        found, self.coupling = whiten(product, floor)
        self.next = self._against(found)
        if self.next.shape[0] < high - low:
            self.broken = True
        self._pad()

    def look(self, target: Target, total: float) -> Look:
        """Ritz values, the rank on them, and the figure for what they miss."""
        d = self.size
        theta, P = descending(self.T[:d, :d])
        rest = max(0.0, total - float(theta.sum()))
        rank = target.pick(theta, total)
        if rank is None or (rank >= d and not self.exhausted):
            return Look(d, theta, P, None, math.inf, rest)
        missed = 0.0
        if not self.exhausted:
            missed = SAFETY * _missed(theta, self._residuals(P), rank, torch.finfo(self.op.dtype).eps) + DRIFT[self.op.dtype] ** 2 * total
        return Look(d, theta, P, rank, missed, rest)

    def _residuals(self, P: Tensor) -> Tensor:
        """‖A A^T u - theta u‖ of every Ritz pair: only the last block of coordinates reaches outside the basis."""
        last = self.coupling.shape[0]
        return torch.linalg.vector_norm(self.coupling.T @ P[self.size - last : self.size], dim=0)

    def _against(self, rows: Tensor, floor: float = 0.1) -> Tensor:
        """The part of orthonormal rows that is orthogonal to the basis, orthonormal again; rows that lie in its span are dropped."""
        for _ in range(4):
            if rows.shape[0] == 0:
                return rows
            overlap = rows @ self.Q[: self.size].T
            rows, _ = whiten(rows - overlap @ self.Q[: self.size], floor)
            if self.size == 0 or float(overlap.abs().max()) < 0.05:
                return rows
            floor = 0.1
        return rows

    def _pad(self) -> None:
        """Fill the block with random directions: blocks keep their width, and a repeated singular value shows all its copies."""
        m = self.op.shape[0]
        want = min(self.block, m - self.size, self.limit - self.size)
        self.next = self.next[:want]
        for _ in range(8):
            lack = want - self.next.shape[0]
            if lack <= 0:
                return
            fresh = torch.randn(lack, m, generator=self.generator, dtype=self.op.dtype).to(self.op.device)
            together = torch.cat([self.next, fresh])
            self.next = self._against(whiten(together, 1e-6)[0], 1e-4)


def krylov(op: Operator, target: Target, total: float, *, tol: float, rates: Rates, seed: int, give_up: bool) -> Draft | None:
    """Leading triples of A (m, n), m <= n, or None when an exact route is the better use of the flops.

    Args:
        op: the matrix.
        target: rank, or share of energy.
        total: ‖A‖².
        tol: allowed relative excess of the Frobenius error.
        rates: of the machine that the costs are counted for.
        seed: of the starting block.
        give_up: whether None may be returned; otherwise the basis grows until it is converged or complete.
    """
    m, n = op.shape
    guess = target.rank if target.rank is not None else max(1, m // 16)
    block = block_width(guess, m)
    exact = rates.exact_gram(m, n, guess)
    soft = _affordable(rates, m, n, block, GIVE_UP * exact) if give_up else m
    limit = _affordable(rates, m, n, block, HOPE * GIVE_UP * exact) if give_up else m
    if limit < min(m, guess + 2 * block):
        return None
    lanczos = Lanczos(op, total, block, limit, seed)
    look_at = guess + max(2 * block, guess // 2) if target.rank is not None else 3 * block
    before: Look | None = None
    while True:
        while lanczos.size < min(look_at, limit):
            lanczos.step()
        now = lanczos.look(target, total)
        if now.rank is not None and _accepted(now, total, tol, lanczos):
            return _draft(lanczos, now, total, tol)
        if lanczos.broken and now.rank is not None and now.rest <= 1e-6 * total:
            draft = _whole(op, _draft(lanczos, now, total, tol), total)
            if draft is not None:
                return draft
        if lanczos.size >= limit or (give_up and lanczos.broken):
            return None
        needed = _predicted(before, now, total, tol, block)
        if lanczos.size >= soft and (needed is None or needed > limit):
            return None
        step = max(lanczos.size + block, int(lanczos.size * GROWTH))
        look_at = step if needed is None else max(lanczos.size + block, min(needed, step))
        if lanczos.size < soft < look_at:
            look_at = max(soft, lanczos.size + block)
        before = now


def _accepted(now: Look, total: float, tol: float, lanczos: Lanczos) -> bool:
    """Whether the figure for what is missed allows the tolerance, and nothing can hide below it."""
    assert now.rank is not None
    if lanczos.exhausted:
        return True
    if lanczos.broken and now.rest > float(now.theta[now.rank - 1]):
        return False  # a lost direction may belong to a larger value than the last one kept
    held = float(now.theta[: now.rank].sum())
    best = max(total - held - now.missed, float(now.theta[now.rank :].sum()))
    return now.missed <= ((1 + tol) ** 2 - 1) * best


def _missed(theta: Tensor, residuals: Tensor, rank: int, eps: float) -> float:
    """Upper figure for the sum over i <= r of lambda_i - theta_i.

    For every cut k >= r, sum over i <= k of residual_i² / (theta_k - nu) bounds it, where nu is the largest eigenvalue on the complement of the
    first k Ritz vectors. nu is taken as theta_{k+1} plus its residual: the unproved part. The best cut counts, so ties at r do no harm.
    """
    squares = residuals.square().cumsum(0)
    following = theta[1:] + residuals[1:]
    gaps = (theta[:-1] - following)[rank - 1 :]
    sums = squares[:-1][rank - 1 :]
    rounding = eps * float(theta[0])
    tiny = sums <= (64 * rounding) ** 2
    figures = torch.where(tiny, sums / gaps.clamp_min(rounding), torch.where(gaps > 0, sums / gaps, math.inf))
    return float(figures.min()) if figures.shape[0] else math.inf


def _predicted(before: Look | None, now: Look, total: float, tol: float, block: int) -> int | None:
    """The size of basis at which the tolerance should be met, from two figures; None while they do not fall."""
    if before is None or now.rank is None or not math.isfinite(before.missed) or not math.isfinite(now.missed):
        return None
    if not 0 < now.missed < 0.5 * before.missed or now.rank != before.rank:
        return None
    aim = ((1 + tol) ** 2 - 1) * max(total - float(now.theta[: now.rank].sum()), float(now.theta[now.rank :].sum()))
    if aim <= 0:
        return None
    slope = math.log(before.missed / now.missed) / (now.dimension - before.dimension)
    more = math.log(max(now.missed / aim, 1.0)) / slope
    return now.dimension + max(1, math.ceil(more / block)) * block


def _draft(lanczos: Lanczos, now: Look, total: float, tol: float) -> Draft:
    assert now.rank is not None
    r, d = now.rank, now.dimension
    P = now.P
    if lanczos.exhausted or now.theta[r - 1] < STEEP * now.theta[0]:
        P = descending(gram_of(lanczos.W[:d]))[1]
    U, S, Vh = triples(lanczos.Q[:d], lanczos.W[:d], P, r)
    # Sure whatever was missed: the best rank-r factors hold at most what these hold plus everything outside the basis (Ky Fan).
    best = float(now.theta[r:].sum())
    sure = now.rest + NORM_NOISE[lanczos.op.dtype] * total
    proved = lanczos.exhausted or sure <= ((1 + tol) ** 2 - 1) * best
    return Draft(
        "krylov",
        U,
        S,
        Vh,
        missed=sure if proved else now.missed,
        kind="bound" if proved else "estimate",
        following=math.sqrt(float(now.theta[r])) if r < d else None,
        passes=lanczos.passes,
    )


def _whole(op: Operator, draft: Draft, total: float) -> Draft | None:
    """The draft, polished by a pass, if it is the whole matrix to rounding: then nothing was missed, whatever the spectrum below."""
    rank = draft.S.shape[0]
    polished = iterate(op, draft.Vh.T, False, rank, total, tol=1.0, passes=1, most=1, method="krylov")
    if polished is None:
        return None
    left = residual(op, polished, torch.float64)
    rounding = ROUNDING[str(op.dtype).removeprefix("torch.")]
    if left > rounding**2 * total:
        return None
    return replace(polished, missed=left, kind="bound", following=math.sqrt(left), passes=draft.passes + 2)


def _affordable(rates: Rates, m: int, n: int, block: int, seconds: float) -> int:
    """The largest basis whose counted cost stays within `seconds`."""
    steps = 0
    while steps * block < m and rates.krylov(m, n, block, steps + 1) <= seconds:
        steps += 1
    return min(m, steps * block)
