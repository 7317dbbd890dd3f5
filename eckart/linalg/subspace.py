"""Subspace iteration with Rayleigh-Ritz on every pass: a few passes for an initialisation, one pass from a basis that is nearly right.

Halko, Martinsson and Tropp 2011 (arXiv:0909.4061). Its trailing vectors converge slowly on flat spectra: `krylov` needs fewer products for accuracy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..seeds import generator
from .choose import PROBES
from .finish import NORM_NOISE, Draft, ritz, triples
from .operator import Operator, sum_of_squares
from .orth import orth

PASSES = 3  # before the first look; each multiplies by A and by its transpose
MOST = 12


def subspace(op: Operator, rank: int, total: float, *, tol: float, seed: int, passes: int = PASSES, most: int = MOST) -> Draft | None:
    """Leading triples of A (m, n), m <= n, from a random start; None when `most` passes do not reach the tolerance.

    Args:
        op: the matrix.
        rank: r.
        total: ‖A‖².
        tol: allowed relative excess of the Frobenius error, judged by an estimate.
        seed: of the start.
        passes: made in any case.
        most: passes after which it stops trying; equal to `passes` for a fixed cost whatever the outcome.
    """
    width = min(op.shape[0], rank + PROBES)
    start = torch.randn(op.shape[1], width, generator=generator(seed, "subspace"), dtype=op.dtype).to(op.device)
    return iterate(op, start, False, rank, total, tol=tol, passes=passes, most=most, method="subspace")


def iterate(
    op: Operator, start: Tensor, basis: bool, rank: int, total: float, *, tol: float, passes: int, most: int, method: str
) -> Draft | None:
    """Passes from the columns of `start` (n, k), k >= r, until the energy of the leading r triples stands still. Any orientation of A.

    Args:
        basis: whether the leading r columns of the start are an orthonormal basis, whose energy then counts as the first figure.
    """
    X, held, last_gain = start, 0.0, math.inf
    noise = NORM_NOISE[op.dtype] * total  # smaller gains cannot be seen
    done = 0
    while True:
        done += 1
        Y = op.matmat(X)
        if basis and done == 1:
            held = sum_of_squares(Y[:, :rank])
        Q = orth(Y).T.contiguous()
        W = op.rmatmat(Q.T).T
        wide = W.to(torch.float64)
        theta, P = ritz(wide)
        now = float(theta[:rank].sum())
        gain = max(0.0, now - held)
        missed = _to_come(gain, last_gain, done) + noise
        best = max(total - now - missed, float(theta[rank:].sum()))
        settled = math.isfinite(missed) and missed <= ((1 + tol) ** 2 - 1) * best
        if done >= passes and (settled or done >= most):
            break
        held, last_gain = now, gain
        floor = torch.finfo(op.dtype).eps ** 2 * float(theta[0])  # directions below it are rounding: they stay small
        X = ((P / theta.clamp_min(floor).sqrt()).T.to(op.dtype) @ W).T
    if not settled and passes < most:
        return None
    U, S, Vh = triples(Q, W, P, rank, theta, wide)
    sure = max(0.0, total - float(theta.sum())) + noise  # as in krylov: nothing outside the basis can add more than what is there
    proved = sure <= ((1 + tol) ** 2 - 1) * float(theta[rank:].sum())
    following = math.sqrt(float(theta[rank])) if len(theta) > rank else None
    return Draft(method, U, S, Vh, sure if proved else missed, "bound" if proved else "estimate", following=following, passes=2 * done)


def _to_come(gain: float, last_gain: float, done: int) -> float:
    """Energy that further passes would still find, from what the last two found; the last gain at the least.

    Gains of a decaying spectrum fall geometrically; those of a flat one like 1/passes², which the second figure covers. After one pass from a
    1% stale basis the rest was 0.5 (flat) to 0.02 (power law) of the gain.
    """
    ratio = gain / last_gain if math.isfinite(last_gain) and last_gain > 0 else 0.5
    geometric = ratio / (1 - ratio) if ratio < 0.9 else 9.0
    return gain * max(geometric, float(done))
