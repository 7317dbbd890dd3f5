"""From an orthonormal basis and its product with A to singular triples: the last step of every algorithm.

Here A is (m, n) with m <= n, a basis is held as rows Q (k, m), and its product as rows W = Q A (k, n).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..seeds import generator
from .factors import Factors, GapKind
from .operator import Operator
from .orth import complete

NORM_NOISE = {torch.float32: 1e-7, torch.float64: 1e-14}  # share of ‖A‖² that sums of squares of computed products are off by, at most
# Dividing a row of W by its length multiplies its rounding by sigma_1 / sigma_i: down to these ratios the quotient is orthonormal to about 1e-6.
PLAIN = 0.03  # float32 products
WIDE = 1e-4  # float64 products, float64 eigenvectors


@dataclass(frozen=True)
class Draft:
    """Triples and what is known about the spectrum around them; `certify.seal` turns it into Factors.

    Args:
        method: name of the algorithm.
        U: (m, r), compute dtype.
        S: (r,), float64, descending.
        Vh: (r, n), compute dtype.
        missed: upper figure for the squared norm that the best factors of this rank hold beyond these, rounding of A's products excluded.
        kind: what `missed` is.
        spectrum: squares of all singular values (m,), float64, descending, where they were computed.
        following: estimate of sigma_{r+1}, or None.
        passes: products with A.
        projected: whether the factors are Q Q^T A to first order, so that squared norms add. False for dense drivers.
        driver: dense driver used.
    """

    method: str
    U: Tensor
    S: Tensor
    Vh: Tensor
    missed: float
    kind: GapKind
    spectrum: Tensor | None = None
    following: float | None = None
    passes: int = 0
    projected: bool = True
    driver: str = ""

    def turned(self) -> Draft:
        """The triples of the transpose."""
        return replace(self, U=self.Vh.T, Vh=self.U.T)


def ritz(W: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values of A A^T on a basis (squares of Ritz singular values, descending) and their coordinates as columns, from W (k, n) in float64."""
    return descending(W @ W.T)


def descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not below 0, and eigenvectors as columns. The host takes over where a device driver gives up."""
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        if symmetric.device.type == "cpu":
            raise
        values, vectors = (t.to(symmetric.device) for t in torch.linalg.eigh(symmetric.cpu()))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def triples(
    Q: Tensor, W: Tensor, P: Tensor, rank: int, theta: Tensor | None = None, exact: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading Ritz triples (U (m, r), S (r,) float64, Vh (r, n)) of a basis.

    The coordinates need only span the right subspace: energy is lost to the second order in their error, and the values
    and the rotation inside come from the product itself, in float64.

    Args:
        Q: (k, m) orthonormal rows.
        W: (k, n) their product with A.
        P: (k, r or more) coordinates of the Ritz vectors as columns, float64.
        rank: r <= k.
        theta: (k,) Ritz values, descending, when P is exact for W. They spare the rotation, down to values of `WIDE` of the largest.
        exact: W in float64, with theta.
    """
    top = P[:, :rank]
    if theta is not None and exact is not None and W.dtype == torch.float32 and PLAIN**2 * theta[0] >= theta[rank - 1] > WIDE**2 * theta[0]:
        values = theta[:rank].sqrt()
        return Q.T @ top.to(Q.dtype), values, (top.T @ exact).div_(values[:, None]).to(W.dtype)
    rows = top.T.to(W.dtype) @ W
    if theta is not None and W.dtype == torch.float32 and theta[rank - 1] > PLAIN**2 * theta[0]:
        values = theta[:rank].sqrt()
        return Q.T @ top.to(Q.dtype), values, rows.div_(values.to(W.dtype)[:, None])
    wide = rows.to(torch.float64)
    if Q.dtype == torch.float32:
        theta, turn = ritz(wide)
        if theta[-1] > WIDE**2 * theta[0]:
            values = theta.sqrt()
            return Q.T @ (top @ turn).to(Q.dtype), values, (turn / values).T.to(Q.dtype) @ rows
    right, lower = torch.linalg.qr(wide.T)
    u, values, vh = torch.linalg.svd(lower.T, full_matrices=False)
    return Q.T @ (top @ u).to(Q.dtype), values, (vh @ right.T).to(Q.dtype)


def project(op: Operator, vectors: Tensor, squares: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triples (U, S, Vh) from eigenvectors of A A^T, with V orthonormal to rounding however small the singular values.

    Args:
        op: A (m, n).
        vectors: (m, r) leading eigenvectors of A A^T, float64.
        squares: (r,) their eigenvalues, descending.
        seed: of the directions that stand in for those of zero singular values.
    """
    dtype = op.dtype
    low, high = float(squares[-1]), float(squares[0])
    if dtype == torch.float32 and low > PLAIN**2 * high:
        U = vectors.to(dtype)
        rows = op.rmatmat(U).T
        values = squares.sqrt()
        return U, values, rows.div_(values.to(dtype)[:, None])
    rows = wide_product(op, vectors)
    if dtype == torch.float64:
        return triples(vectors.T, rows, torch.eye(len(squares), dtype=dtype, device=op.device), len(squares))
    head = int((squares > WIDE**2 * high).sum())
    values = squares.sqrt()
    rows[:head] /= values[:head, None]
    if head == len(squares):
        return vectors.to(dtype), values, rows.to(dtype)
    return _with_tail(vectors, values, rows, head, dtype, seed)


def _with_tail(vectors: Tensor, values: Tensor, rows: Tensor, head: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The triples below WIDE: a decomposition of their own, in the complement of the others."""
    lead, tail = rows[:head], rows[head:]
    tail = tail - (tail @ lead.T) @ lead
    u, s, vh = torch.linalg.svd(tail.T, full_matrices=False)  # tall; u are the right vectors of `tail`
    weak = s <= 1e-12 * values[0]
    right = u.T - (u.T @ lead.T) @ lead
    lengths = torch.linalg.vector_norm(right, dim=1)
    weak |= lengths < 0.5
    right = right / lengths.clamp_min(0.5)[:, None]
    everything = torch.cat([lead, right])
    mask = torch.cat([torch.zeros(head, dtype=torch.bool, device=rows.device), weak])
    everything = complete(everything, mask, generator(seed, "null directions"))
    left = torch.cat([vectors[:, :head], vectors[:, head:] @ vh.T], dim=1)
    squeezed = torch.cat([values[:head], torch.minimum(s, values[head - 1])])
    return left.to(dtype), squeezed, everything.to(dtype)


def wide_product(op: Operator, vectors: Tensor) -> Tensor:
    """vectors^T A in float64, (k, n), whatever the dtype of the operator's own products."""
    if op.dtype == torch.float64:
        return op.rmatmat(vectors).T.contiguous()
    total = torch.zeros(vectors.shape[1], op.shape[1], dtype=torch.float64, device=op.device)
    start = 0
    for block in op.row_blocks():
        stop = start + block.shape[0]
        total.addmm_(vectors[start:stop].T, block.to(torch.float64))
        start = stop
    return total


def fix_signs(factors: Factors) -> Factors:
    """The largest entry of each column of U made positive, the first of equals; writes into the tensors it is given."""
    if factors.rank == 0:
        return factors
    peak = factors.U.abs().argmax(0, keepdim=True)
    flip = factors.U.gather(0, peak)[0] < 0
    factors.U[:, flip] *= -1
    factors.Vh[flip] *= -1
    return factors
