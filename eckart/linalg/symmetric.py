"""Symmetric operators known by their products: extreme eigenvalues (Lanczos), density (stochastic Lanczos quadrature), trace.

Every function asks only for A X of thin blocks. The basis is kept and reorthogonalised in full, so no eigenvalue appears twice by rounding
alone; coefficients and Ritz values are float64 whatever the dtype of the products.
Lanczos 1950; Golub and Welsch 1969; Ubaru, Chen and Saad 2017 (doi:10.1137/16M1104974); Meyer et al. 2021 (arXiv:2010.09649).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import Refused, UsageError
from ..progress import track
from ..seeds import generator
from .operator import Operator, as_operator
from .orth import orth

SPREAD = 6.0  # standard deviations of a smoothing kernel inside the grid of a density: 2e-9 of its mass lies beyond


@dataclass(frozen=True, eq=False)
class Run:
    """A Lanczos run: Q^T A Q is the symmetric tridiagonal T, float64.

    Args:
        alpha: (k,) diagonal of T.
        beta: (k,) its off-diagonal; the last one leads out of the basis, and is 0 when the basis is closed under A.
        basis: (k, n) orthonormal rows; (0, n) where they were let go.
    """

    alpha: Tensor
    beta: Tensor
    basis: Tensor

    def ritz(self) -> tuple[Tensor, Tensor]:
        """(values (k,) ascending, coordinates (k, k) as columns)."""
        k = len(self.alpha)
        T = torch.diag(self.alpha)
        if k > 1:
            T = T + torch.diag(self.beta[: k - 1], 1) + torch.diag(self.beta[: k - 1], -1)
        values, vectors = torch.linalg.eigh(T)
        return values, vectors

    def residuals(self, vectors: Tensor) -> Tensor:
        """‖A y - theta y‖ of every Ritz pair, free from the last coefficient; not below the rounding of a product."""
        size = float(self.alpha.abs().max() + 2 * self.beta[:-1].max()) if len(self.alpha) > 1 else float(self.alpha.abs().max())
        return (self.beta[-1] * vectors[-1].abs()).clamp_min(torch.finfo(self.basis.dtype).eps * size)

    def bare(self) -> Run:
        """The run without its basis: k n numbers less."""
        return replace(self, basis=self.basis[:0])

    def extremes(self, top: int, bottom: int, *, tol: float, vectors: bool = False) -> Eigen:
        """The outermost Ritz values of this run as eigenvalues, at most as many as it has.

        Args:
            top: number from the upper end.
            bottom: number from the lower end.
            tol: allowed residual, relative to the largest Ritz value in modulus.
            vectors: whether Ritz vectors are returned; the basis must be there.
        """
        theta, P = self.ritz()
        k = len(theta)
        top, bottom = min(top, k), min(bottom, k - min(top, k))
        picked = torch.cat([torch.arange(k - 1, k - 1 - top, -1), torch.arange(bottom)])
        residuals = self.residuals(P)[picked]
        settled = bool((residuals <= tol * theta.abs().max()).all())
        full = (P[:, picked].T.to(self.basis) @ self.basis).T if vectors else None
        return Eigen(theta[picked], residuals, full, top, k, settled)


@dataclass(frozen=True, eq=False)
class Eigen:
    """Extreme eigenvalues of a symmetric operator.

    Args:
        values: (k,) float64, the upper ones first, descending, then the lower ones, ascending.
        residuals: (k,) ‖A y - theta y‖: some eigenvalue lies within this distance of each value, whatever was missed.
        vectors: (n, k) in the dtype of the operator, or None.
        top: how many of the values are from the upper end.
        steps: products with A.
        converged: whether every residual met the tolerance.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor | None
    top: int
    steps: int
    converged: bool


@dataclass(frozen=True, eq=False)
class Quadrature:
    """A spectral density as Gauss nodes and weights, a row for each random start. Weights of a row add up to 1.

    Args:
        nodes: (runs, k) float64, rows ascending; a run that ended early repeats its last node with weight 0.
        weights: (runs, k) float64.
        size: n, order of the operator.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def moment(self, power: int) -> Estimate:
        """n times the mean of lambda^power: the trace of A^power. Unbiased while 2k - 1 >= power."""
        each = self.size * (self.weights * self.nodes**power).sum(1)
        return _mean(each)

    def density(self, points: int = 512, width: float | None = None) -> tuple[Tensor, Tensor]:
        """The nodes smoothed by Gaussians, on a grid wide enough to hold all of their mass. Integrates to 1.

        Args:
            points: of the grid, at least 2.
            width: standard deviation of the Gaussians; None takes 1% of the range of the nodes. At least one step of the grid is used, below
                which a sum over the grid would no longer be an integral.

        Returns:
            (grid (points,), density (points,)), float64.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        wanted = width if width is not None else 0.01 * (high - low)
        least = (high - low) / max(1.0, points - 1 - 2 * SPREAD)
        sigma = max(wanted, least, 1e-12 * max(abs(low), abs(high)), 1e-30)
        grid = torch.linspace(low - SPREAD * sigma, high + SPREAD * sigma, points, dtype=torch.float64)
        bells = torch.exp(-0.5 * ((grid[:, None, None] - self.nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return grid, (bells * self.weights).sum(2).mean(1)


@dataclass(frozen=True)
class Estimate:
    """A random estimate with its standard error.

    Args:
        value: the mean of the samples.
        error: standard error of it; None for a single sample, 0 when nothing was left to estimate.
        samples: number of independent samples.
    """

    value: float
    error: float | None
    samples: int


def lanczos(op: Tensor | Operator, start: Tensor, steps: int) -> Run:
    """`steps` products from one start, or fewer when the basis closes under A. Not restarted, and blind to what is orthogonal to the start.

    Args:
        op: symmetric, (n, n).
        start: (n,) not zero.
        steps: at most n.

    Raises:
        Refused: not square, or a product that is not finite.

    Example:
        >>> run = lanczos(torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.ones(3), 3)
        >>> [round(float(v), 5) for v in run.ritz()[0]]
        [1.0, 2.0, 3.0]
    """
    A = _square(op)
    basis, alpha, beta = _room(A, min(steps, A.shape[0]))
    basis[0] = _unit(start.to(A.device, A.dtype))
    k = 0
    for k in range(1, basis.shape[0] + 1):
        following, left = _step(A, basis, alpha, beta, k)
        if k < basis.shape[0]:
            if left == 0:
                break
            basis[k] = following
    return Run(alpha[:k].clone(), beta[:k].clone(), basis[:k].clone() if k < len(basis) else basis)


def eigsh(
    op: Tensor | Operator,
    top: int = 1,
    bottom: int = 0,
    *,
    tol: float = 1e-6,
    steps: int | None = None,
    vectors: bool = False,
    seed: int = 0,
    label: str = "Lanczos",
) -> Eigen:
    """The largest and smallest eigenvalues (algebraically), by Lanczos with full reorthogonalisation and free residuals.

    Not a count of multiplicities: of a repeated eigenvalue one copy is found, and more only when the basis closes and a fresh direction is drawn.

    Args:
        op: symmetric, (n, n).
        top: number from the upper end.
        bottom: number from the lower end.
        tol: allowed residual, relative to the largest Ritz value in modulus.
        steps: most products; None means min(n, 20 (top + bottom) + 20). Each keeps a vector of n numbers.
        vectors: whether eigenvectors are returned.
        seed: of the start.
        label: of the progress bar.

    Returns:
        `Eigen`; `converged` is False when the steps did not suffice, and the residuals then say how far off the values may be.

    Raises:
        UsageError: nothing, or more than n, asked for.
        Refused: not square, or a product that is not finite.

    Example:
        >>> found = eigsh(torch.diag(torch.tensor([5.0, -3.0, 1.0, 0.0])), top=1, bottom=1)
        >>> [round(float(v), 4) for v in found.values]
        [5.0, -3.0]
    """
    A = _square(op)
    n, want = A.shape[0], top + bottom
    if top < 0 or bottom < 0 or not 1 <= want <= n:
        raise UsageError(f"eigsh: expected 1 to {n} eigenvalues of a matrix of order {n}, found top={top}, bottom={bottom}.")
    most = min(n, 20 * want + 20 if steps is None else max(steps, want))
    basis, alpha, beta = _room(A, most)
    source = generator(seed, "eigsh")
    basis[0] = _unit(torch.randn(n, generator=source, dtype=A.dtype).to(A.device))
    closed, found = 0, None
    for k in track(range(1, most + 1), label, most):
        following, left = _step(A, basis, alpha, beta, k)
        closed += left == 0
        if k >= want and (k % 5 == 0 or k == most or left == 0):
            found = Run(alpha[:k], beta[:k], basis[:k])
            settled = found.extremes(top, bottom, tol=tol).converged
            # a closed basis says nothing of what is orthogonal to it; each fresh direction shows one more copy of a repeated eigenvalue
            if settled and (closed == 0 or closed >= want):
                break
        if k < most:
            basis[k] = following if left > 0 else _fresh(basis[:k], source)
    assert found is not None
    return found.extremes(top, bottom, tol=tol, vectors=vectors)


def slq(op: Tensor | Operator, steps: int = 30, runs: int = 3, *, seed: int = 0, label: str = "Lanczos quadrature") -> Quadrature:
    """Stochastic Lanczos quadrature: the spectral density of A seen from random starts of independent signs.

    Not the eigenvalues: a node stands for the mass around it, and only extreme ones are close to eigenvalues.

    Args:
        op: symmetric, (n, n).
        steps: k, nodes of each run.
        runs: random starts; their scatter is the uncertainty.
        seed: of the starts.
        label: of the progress bar.

    Raises:
        UsageError: steps or runs below 1.
        Refused: not square, or a product that is not finite.

    Example:
        >>> q = slq(torch.diag(torch.tensor([1.0, 1.0, 4.0])), steps=3, runs=2)
        >>> q.weights.sum(1).tolist(), round(q.moment(1).value, 5)
        ([1.0, 1.0], 6.0)
    """
    A = _square(op)
    n = A.shape[0]
    if steps < 1 or runs < 1:
        raise UsageError(f"slq: expected at least one step and one run, found steps={steps}, runs={runs}.")
    starts = (signs(n, 1, seed, "slq", str(i))[:, 0] for i in range(runs))
    return quadrature([lanczos(A, start, steps).bare() for start in track(starts, label, runs)], n)


def quadrature(runs: list[Run], size: int) -> Quadrature:
    """The density of runs that are already made. They must have started from independent random signs for `moment` to be unbiased."""
    width = max(len(r.alpha) for r in runs)
    nodes = torch.zeros(len(runs), width, dtype=torch.float64)
    weights = torch.zeros(len(runs), width, dtype=torch.float64)
    for i, run in enumerate(runs):
        theta, P = run.ritz()
        nodes[i] = theta[-1]
        nodes[i, : len(theta)] = theta.cpu()
        share = P[0].square().cpu()
        weights[i, : len(theta)] = share / share.sum()
    return Quadrature(nodes, weights, size)


def hutchinson(op: Tensor | Operator, samples: int = 30, *, block: int = 8, seed: int = 0, label: str = "trace") -> Estimate:
    """Trace of a symmetric operator: mean of v^T A v over random signs v. Unbiased.

    Args:
        op: symmetric, (n, n).
        samples: number of vectors, at least 2 for an error.
        block: vectors in a product.
        seed: of the signs.
        label: of the progress bar.

    Example:
        >>> hutchinson(torch.diag(torch.tensor([1.0, 2.0])), samples=2).value
        3.0
    """
    A = _square(op)
    if samples < 1:
        raise UsageError(f"hutchinson: expected at least one sample, found {samples}.")
    parts = []
    for at in track(range(0, samples, block), label):
        V = signs(A.shape[0], min(block, samples - at), seed, "hutchinson", str(at)).to(A.device, A.dtype)
        parts.append(_dots(V, _finite(A.matmat(V))))
    return _mean(torch.cat(parts))


def hutchpp(op: Tensor | Operator, products: int = 30, *, seed: int = 0) -> Estimate:
    """Trace by Hutch++: exact on a sketched subspace of a third of the products, Hutchinson on what is left. Better where the spectrum decays.

    Args:
        op: symmetric, (n, n).
        products: with A in all, at least 6.
        seed: of the signs.

    Returns:
        The estimate; its error is that of the second part, the first has none.

    Example:
        >>> round(hutchpp(torch.diag(torch.tensor([9.0, 0.0, 0.0, 0.0])), products=6).value, 4)
        9.0
    """
    A = _square(op)
    n, third = A.shape[0], products // 3
    if third < 2:
        raise UsageError(f"hutchpp: expected at least 6 products, found {products}.")
    third = min(third, n)
    Q = orth(_finite(A.matmat(signs(n, third, seed, "hutch++ sketch").to(A.device, A.dtype))))
    held = float(_dots(Q, _finite(A.matmat(Q))).sum())
    if third == n:
        return Estimate(held, 0.0, n)
    V = signs(n, products - 2 * third, seed, "hutch++").to(A.device, A.dtype)
    V = V - Q @ (Q.T @ V)
    rest = _mean(_dots(V, _finite(A.matmat(V))))
    return Estimate(held + rest.value, rest.error, rest.samples)


def signs(n: int, k: int, seed: int, *names: str) -> Tensor:
    """(n, k) independent signs, float32, on the CPU."""
    return torch.randint(0, 2, (n, k), generator=generator(seed, *names)).float().mul_(2).sub_(1)


def _square(op: Tensor | Operator) -> Operator:
    A = as_operator(op, "symmetric operator")
    if A.shape[0] != A.shape[1]:
        raise Refused(f"symmetric operator: expected a square matrix, found shape {tuple(A.shape)}.")
    return A


def _room(A: Operator, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    if steps < 1:
        raise UsageError(f"Lanczos: expected at least one step, found {steps}.")
    basis = torch.empty(steps, A.shape[0], dtype=A.dtype, device=A.device)
    return basis, torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)


def _step(A: Operator, basis: Tensor, alpha: Tensor, beta: Tensor, k: int) -> tuple[Tensor, float]:
    """Multiply the k-th row of the basis; write alpha and beta; return the next row and how much of the product led out of the basis."""
    v = basis[k - 1]
    w = _finite(A.matmat(v[:, None]))[:, 0]
    alpha[k - 1] = _dot(v, w)
    scale = float(torch.linalg.vector_norm(w, dtype=torch.float64))
    for _ in range(2):
        w = w - (basis[:k] @ w) @ basis[:k]
    left = float(torch.linalg.vector_norm(w, dtype=torch.float64))
    if left <= 16 * torch.finfo(A.dtype).eps * max(scale, float(alpha[:k].abs().max())):
        left = 0.0
    beta[k - 1] = left
    return (w / left if left > 0 else w), left


def _fresh(rows: Tensor, source: torch.Generator) -> Tensor:
    w = torch.randn(rows.shape[1], generator=source, dtype=rows.dtype).to(rows.device)
    for _ in range(3):
        w = w - (rows @ w) @ rows
        w = w / torch.linalg.vector_norm(w)
    return w


def _unit(v: Tensor) -> Tensor:
    length = float(torch.linalg.vector_norm(v, dtype=torch.float64))
    if not (math.isfinite(length) and length > 0):
        raise UsageError(f"Lanczos: expected a start of finite positive length, found {length}.")
    return v / length


def _finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise Refused("symmetric operator: a product is not finite. Check the weights and the data, or compute in float64.")
    return x


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.to(torch.float64) * y.to(torch.float64)).sum())


def _dots(X: Tensor, Y: Tensor) -> Tensor:
    return (X.to(torch.float64) * Y.to(torch.float64)).sum(0).cpu()


def _mean(samples: Tensor) -> Estimate:
    count = len(samples)
    error = float(samples.std(correction=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(samples.mean()), error, count)
