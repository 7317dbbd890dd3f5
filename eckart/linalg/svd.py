"""The one singular value decomposition of the library: any matrix, any rank rule, with a certificate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import Refused, UsageError, did_you_mean
from .certify import seal, spectrum_of
from .choose import CERTIFY, DIRECT, METHODS, Certify, Method, choose, rates
from .factors import Factors
from .finish import Draft, fix_signs
from .full import full
from .gram import gram
from .krylov import krylov
from .operator import Operator, as_operator, upper_gram_of
from .rank import Target, target
from .subspace import subspace
from .warm import basis_of, warm_start

if TYPE_CHECKING:
    from .psd import Weight

SAFE = (1e-12, 1e12)  # norms within which float32 products of products neither overflow nor vanish; others are scaled by a power of two


@torch.no_grad()
def svd(
    A: Tensor | Operator,
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    tol: float = 1e-3,
    metric: tuple[Weight | None, Weight | None] | None = None,
    warm: Factors | Tensor | None = None,
    method: Method = "auto",
    certify: Certify = "free",
    seed: int = 0,
    name: str = "matrix",
) -> Factors:
    """Leading singular triples of a matrix, and a certificate of how good they are. Not differentiable, not batched.

    At most one of `rank`, `energy` and `error` chooses how many triples; with none of them all are returned.

    Args:
        A: (m, n) tensor or `Operator`. Half precision is upcast to float32 once; float32 and float64 compute in themselves.
        rank: number of triples, 1 to min(m, n).
        energy: keep the fewest triples that hold this share of the squared Frobenius norm, in (0, 1].
        error: keep the fewest triples whose relative Frobenius error is at most this, in [0, 1).
        tol: allowed relative excess of the Frobenius error over the best error at that rank. 0 asks for an exact route.
        metric: (out, in) metrics, each a `psd.Weight` or None: decompose So A Si instead (see `weighted.solve` for the matrix itself).
        warm: factors of a matrix that was nearly this one, or its right basis (n, k).
        method: "auto", or an algorithm to force: "full", "gram", "krylov", "subspace" (fixed passes), "warm".
        certify: "free", "spectral" (adds a bound of the spectral norm of the error) or "optimum" (adds the best possible error).
        seed: of every random number; equal calls give equal bytes.
        name: what messages call the matrix.

    Returns:
        `Factors` with S descending and the largest entry of each column of U positive.

    Raises:
        Refused: empty, not two-dimensional, not real, or not finite.
        UsageError: options that are out of range or exclude each other.

    Example:
        >>> A = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0, 0.0]))
        >>> f = svd(A, rank=1)
        >>> round(float(f.S[0]), 5), f.certificate.error < 1e-5
        (5.0, True)
    """
    _check_options(tol, method, certify, warm)
    if metric is not None:
        from . import weighted

        if isinstance(A, Operator):
            raise UsageError(f"{name}: a metric needs the matrix itself; call operator.to_dense() or use linalg.weighted(op, left, right).")
        return weighted.svd_in_metric(
            A, metric, rank=rank, energy=energy, error=error, tol=tol, warm=warm, method=method, certify=certify, seed=seed, name=name
        )
    op = as_operator(A, name)
    goal = target(min(op.shape), rank, energy, error, name)
    total = op.fro2()
    if not SAFE[0] ** 2 < total < SAFE[1] ** 2:  # NaN included
        scaled = _rescaled(op, name)
        if scaled is None:
            return _zero(op, goal, seed)
        smaller, power = scaled
        return _unscaled(
            svd(smaller, rank, energy=energy, error=error, tol=tol, warm=warm, method=method, certify=certify, seed=seed, name=name),
            power,
            name,
        )
    wide = op if op.shape[0] <= op.shape[1] else op.T
    draft = _solve(op, wide, goal, total, tol, warm, method, certify, seed, name)
    if wide is not op and draft.method != "warm":
        draft = draft.turned()
    return fix_signs(seal(op, draft, total, certify=certify, seed=seed))


@torch.no_grad()
def svdvals(A: Tensor | Operator, *, tol: float | None = None, wide: bool = False, name: str = "matrix") -> Tensor:
    """All singular values (min(m, n),), descending.

    Args:
        A: (m, n) tensor or `Operator`.
        tol: allowed absolute error of a value, relative to the largest. Default 1e-6, and 1e-13 for float64 input. From 1e-7 on the
            float64 Gram of the smaller side serves, which on a wide matrix costs a fifth of the dense driver.
        wide: compute and return in float64 whatever the input's type: ratios of small values then hold to more than float32's digits.
        name: what messages call the matrix.

    Returns:
        Values in the compute dtype: float32, or float64 for float64 input or `wide`.

    Raises:
        Refused: empty, not two-dimensional, not real, or not finite.

    Example:
        >>> svdvals(torch.diag(torch.tensor([3.0, -4.0])))
        tensor([4., 3.])
    """
    if wide and tol is None and isinstance(A, Tensor):
        gram = smaller_gram(A)
        if gram is not None:
            return values_of_gram(gram)
    op = as_operator(A, name)
    if tol is None:
        tol = 1e-13 if op.dtype == torch.float64 else 1e-6
    total = op.fro2()
    if not SAFE[0] ** 2 < total < SAFE[1] ** 2:
        scaled = _rescaled(op, name)
        if scaled is None:
            return torch.zeros(min(op.shape), dtype=torch.float64 if wide else op.dtype, device=op.device)
        return svdvals(scaled[0], tol=tol, wide=wide, name=name) * scaled[1]
    if tol >= 1e-7 and min(op.shape) > DIRECT:
        return spectrum_of(op).sqrt().to(torch.float64 if wide else op.dtype)
    matrix = op.to_dense().to(torch.float64) if wide else op.to_dense()
    return torch.linalg.svdvals(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T.contiguous())


def smaller_gram(A: Tensor) -> Tensor | None:
    """The float64 Gram of the smaller side straight from the tensor, for `values_of_gram`: no float32 copy of half precision, no pass for its norm.

    What stands below its diagonal is no result. None where that is no way to the singular values: a small or float64 matrix, no strided one, or
    one that is not finite.

    Example:
        >>> smaller_gram(torch.ones(2, 3, dtype=torch.float64)) is None
        True
    """
    if A.ndim != 2 or min(A.shape) <= DIRECT or A.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    if A.is_meta or A.layout != torch.strided:
        return None
    gram = upper_gram_of(A.detach() if A.shape[0] <= A.shape[1] else A.detach().T)
    return gram if bool(torch.isfinite(gram.trace())) else None


def values_of_gram(gram: Tensor) -> Tensor:
    """Singular values, descending, of the matrix with this Gram; only the triangle above the diagonal is read.

    Example:
        >>> values_of_gram(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
        tensor([4., 3.])
    """
    return torch.linalg.eigvalsh(gram, UPLO="U").flip(0).clamp_min(0).sqrt()


def _solve(
    op: Operator,
    wide: Operator,
    goal: Target,
    total: float,
    tol: float,
    warm: Factors | Tensor | None,
    method: Method,
    certify: Certify,
    seed: int,
    name: str,
) -> Draft:
    """Run the algorithm that was asked for, or those the cost model names until one is good enough."""
    m, n = wide.shape
    rank = goal.rank if goal.share is None else None
    if warm is not None and method in ("auto", "warm"):
        if rank is None:
            raise UsageError(f"{name}: a warm start needs a rank; energy and error leave it open.")
        draft = warm_start(op, basis_of(warm, op.shape, name), rank, total, tol=tol, seed=seed)
        if draft is not None:
            return draft
    speed = rates(op.device.type, str(op.dtype).removeprefix("torch."))
    if method in ("auto", "warm"):
        first = choose(m, n, rank, dtype=str(op.dtype).removeprefix("torch."), device=op.device.type, tol=tol, certify=certify).method
    else:
        first = method
    if first == "subspace":
        if rank is None:
            raise UsageError(f"{name}: subspace iteration needs a rank; energy and error leave it open.")
        forced = method == "subspace"
        draft = subspace(wide, rank, total, tol=tol, seed=seed, most=3) if forced else subspace(wide, rank, total, tol=tol, seed=seed)
        if draft is not None:
            return draft
    if first in ("krylov", "subspace"):
        open_goal = goal if goal.rank is not None or goal.share is not None else Target(rank=m)
        draft = krylov(wide, open_goal, total, tol=tol, rates=speed, seed=seed, give_up=method != "krylov")
        if draft is not None:
            return draft
    if first == "full" or (method != "gram" and m <= DIRECT):
        return full(wide, goal, name=name)
    draft = gram(wide, goal, total, seed=seed)
    return draft if method == "gram" or _fine_enough(draft, op.dtype, total, tol, goal) else full(wide, goal, name=name)


def _fine_enough(draft: Draft, dtype: torch.dtype, total: float, tol: float, goal: Target) -> bool:
    """Whether rounding of a float64 Gram leaves the tolerance. For float32 input its tail is below what the factors can hold anyway."""
    if dtype != torch.float64 or draft.spectrum is None:
        return True
    eps = 64 * torch.finfo(torch.float64).eps * total
    tail = float(draft.spectrum[draft.S.shape[0] :].sum())
    if goal.share is not None and (1 - goal.share) * total < 1e3 * eps:
        return False
    return tail > 0 and eps <= ((1 + tol) ** 2 - 1) * tail and draft.S.shape[0] < min(draft.U.shape[0], draft.Vh.shape[1])


def _check_options(tol: float, method: str, certify: str, warm: object) -> None:
    if method not in METHODS:
        raise UsageError(f"unknown method={method!r}; known are {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    if certify not in CERTIFY:
        raise UsageError(f"unknown certify={certify!r}; known are {', '.join(CERTIFY)}.{did_you_mean(certify, CERTIFY)}")
    if not (math.isfinite(tol) and tol >= 0):
        raise UsageError(f"tol is an allowed relative excess, 0 or more, found {tol}.")
    if method == "warm" and warm is None:
        raise UsageError('method="warm" needs warm=: the factors, or the right basis, of a matrix that was nearly this one.')


def _rescaled(op: Operator, name: str) -> tuple[Operator, float] | None:
    """(the matrix over a power of two near its largest entry, that power); None for the zero matrix.

    Raises:
        Refused: an entry is not finite.
    """
    matrix = op.to_dense()
    finite = torch.isfinite(matrix)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite)
        row, col = (int(i) for i in bad[0])
        raise Refused(
            f"{name}: holds {len(bad)} entries that are NaN or Inf, the first at [{row}, {col}]. A factorisation needs finite numbers."
        )
    peak = float(matrix.abs().max())
    if peak == 0:
        return None
    power = math.frexp(peak)[1]
    half = -power // 2  # in two steps: 2^148 itself is no float32
    return as_operator(matrix * 2.0**half * 2.0 ** (-power - half), name), 2.0**power


def _unscaled(factors: Factors, power: float, name: str) -> Factors:
    old = factors.certificate
    assert old is not None
    grown = replace(
        old,
        norm=old.norm * power,
        error=old.error * power,
        shortfall=old.shortfall * power**2,
        optimum=None if old.optimum is None else old.optimum * power,
        spectral=None if old.spectral is None else old.spectral * power,
    )
    S = (factors.S.to(torch.float64) * power).to(factors.S.dtype)
    if not bool(torch.isfinite(S).all()):
        raise Refused(
            f"{name}: its singular values are beyond the largest {str(S.dtype).removeprefix('torch.')}. Hand it over in float64, or scaled."
        )
    return Factors(factors.U, S, factors.Vh, grown)


def _zero(op: Operator, goal: Target, seed: int) -> Factors:
    """Unit vectors and zeros: any basis serves, this one is as good as another and the same every time."""
    (m, n), r = op.shape, goal.rank or (1 if goal.share is not None else min(op.shape))
    U = torch.eye(m, r, dtype=op.dtype, device=op.device)
    Vh = torch.eye(r, n, dtype=op.dtype, device=op.device)
    return seal(op, Draft("full", U, torch.zeros(r, dtype=torch.float64, device=op.device), Vh, 0.0, "exact"), 0.0, seed=seed)
