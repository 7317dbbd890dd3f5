"""What a factorisation returns: three tensors and a statement of how good they are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UsageError

ROUNDING = {
    "float32": 1e-6,
    "float64": 1e-13,
}  # backward error of a dense factorisation over the Frobenius norm: eps times a margin of 8 and up
GapKind = Literal["bound", "estimate", "exact"]
Balance = Literal["even", "left", "right"]
SEPARATION = 1e-3  # relative distance of sigma_{r+1} from sigma_r below which the subspace is not identified


@dataclass(frozen=True)
class Certificate:
    """How near the factors are to A, and to the best factors of their rank. Norms are Frobenius norms unless said otherwise.

    Args:
        method: the algorithm whose factors these are: "full", "gram", "krylov", "subspace" or "warm".
        shape: (m, n) of A.
        rank: r.
        norm: ‖A‖.
        error: ‖A - Â‖ that was achieved, exact to rounding of the compute dtype. Never an estimate.
        shortfall: upper figure for error² - optimum², where optimum is the smallest ‖A - B‖ over all B of rank r.
        gap_kind: what `shortfall`, `gap` and `excess` are. "bound": proved, or computed from the whole spectrum, rounding included.
            "estimate": from residuals, under the premise that no direction was missed. "exact": nothing is left to choose (full rank, or A = 0).
        optimum: the smallest possible error, where the whole spectrum was computed; else None. To 1e-6 of the norm or better.
        spectral: upper bound of the spectral norm ‖A - Â‖₂, or None when not asked for.
        spectral_failure: probability, over the seed, that `spectral` is too small.
        identified: False when sigma_r and sigma_{r+1} differ by less than 0.1%: then the error is determined but the subspace is not.
            None when sigma_{r+1} is not known.
        passes: products with A or its transpose that were made, a Gram counting as one.
        seed: of the random numbers; the same seed gives the same factors.
        compute_dtype: of the products with A.
        accumulate_dtype: of Grams, small eigenproblems and norms.
        driver: dense driver that gave the result, with those that failed before it.
    """

    method: str
    shape: tuple[int, int]
    rank: int
    norm: float
    error: float
    shortfall: float
    gap_kind: GapKind
    optimum: float | None = None
    spectral: float | None = None
    spectral_failure: float | None = None
    identified: bool | None = None
    passes: int = 0
    seed: int = 0
    compute_dtype: str = "float32"
    accumulate_dtype: str = "float64"
    driver: str = ""

    @property
    def relative_error(self) -> float:
        """error / norm; 0 for the zero matrix."""
        return self.error / self.norm if self.norm > 0 else 0.0

    @property
    def floor(self) -> float:
        """Lower figure for the optimum that error and shortfall imply; a lower bound when `gap_kind` is not "estimate"."""
        return math.sqrt(max(0.0, self.error**2 - self.shortfall))

    @property
    def excess(self) -> float:
        """Upper figure for error - optimum, in units of the norm of A. Always finite."""
        return 0.0 if self.gap_kind == "exact" else self.error - self.floor

    @property
    def gap(self) -> float:
        """Upper figure for (error - optimum) / optimum. Infinite when the optimum cannot be told from zero: then read `excess`."""
        if self.gap_kind == "exact" or self.error == 0:
            return 0.0
        return self.excess / self.floor if self.floor > 0 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a report; an infinite gap is None, which strict JSON can hold."""
        gap = self.gap if math.isfinite(self.gap) else None
        return {**asdict(self), "shape": list(self.shape), "relative_error": self.relative_error, "gap": gap, "excess": self.excess}


@dataclass(frozen=True, eq=False)
class Factors:
    """Â = U diag(S) Vh, thin, S descending, the largest entry of each column of U positive. Not differentiable.

    Args:
        U: (m, r) with orthonormal columns.
        S: (r,) not negative.
        Vh: (r, n) with orthonormal rows.
        certificate: how good Â is; None for factors that were edited or split off.

    Example:
        >>> import torch
        >>> f = Factors(torch.eye(2), torch.tensor([2.0, 1.0]), torch.eye(2))
        >>> f.truncate(1).dense()
        tensor([[2., 0.],
                [0., 0.]])
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    certificate: Certificate | None = None

    @property
    def rank(self) -> int:
        """Number of triples, zeros among S included."""
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        return self.U.shape[0], self.Vh.shape[1]

    @property
    def T(self) -> Factors:
        """Factors of the transpose. The sign rule then holds for Vh."""
        turned = None if self.certificate is None else replace(self.certificate, shape=self.certificate.shape[::-1])
        return Factors(self.Vh.T, self.S, self.U.T, turned)

    def dense(self) -> Tensor:
        """Â (m, n)."""
        return (self.U * self.S) @ self.Vh

    def truncate(self, r: int) -> Factors:
        """The leading r triples. Their certificate follows from this one.

        Raises:
            UsageError: r is not between 1 and the rank.
        """
        if not 1 <= r <= self.rank:
            raise UsageError(f"truncate: expected a rank from 1 to {self.rank}, found {r}.")
        return self if r == self.rank else Factors(self.U[:, :r], self.S[:r], self.Vh[:r], self._certificate_of(r))

    def split(self, k: int) -> tuple[Factors, Factors]:
        """(top, rest): the leading k triples and the others, which share no direction. `rest` carries no certificate.

        Raises:
            UsageError: k is not between 1 and rank - 1.
        """
        if not 1 <= k < self.rank:
            raise UsageError(f"split: expected 1 to {self.rank - 1} leading triples, found {k}.")
        return self.truncate(k), Factors(self.U[:, k:], self.S[k:], self.Vh[k:])

    def balance(self, mode: Balance = "even") -> tuple[Tensor, Tensor]:
        """(L (m, r), R (r, n)) with L R = Â.

        Args:
            mode: who carries the singular values: "even" both by their root, "left" L, "right" R.
        """
        if mode == "even":
            half = self.S.sqrt()
            return self.U * half, half[:, None] * self.Vh
        if mode == "left":
            return self.U * self.S, self.Vh
        if mode == "right":
            return self.U, self.S[:, None] * self.Vh
        raise UsageError(f'balance: expected "even", "left" or "right", found {mode!r}.')

    def refactor(self) -> Factors:
        """Singular value decomposition of the product U diag(S) Vh, for factors whose tensors were edited (`dataclasses.replace`).

        Costs O((m + n) r²): the product itself is never formed. The certificate is dropped, since it spoke of the old factors.
        """
        from .finish import fix_signs

        wide = torch.float64
        left, upper = torch.linalg.qr(self.U.to(wide))
        right, lower = torch.linalg.qr(self.Vh.to(wide).T)
        u, s, vh = torch.linalg.svd((upper * self.S.to(wide)) @ lower.T, full_matrices=False)
        dtype = self.S.dtype
        return fix_signs(Factors((left @ u).to(dtype), s.to(dtype), (vh @ right.T).to(dtype)))

    def _certificate_of(self, r: int) -> Certificate | None:
        """The part that is cut off is orthogonal to the rest of the error: squares add; what was missed stays missed."""
        old = self.certificate
        if old is None:
            return None
        tail = float(torch.linalg.vector_norm(self.S[r:], dtype=torch.float64))
        noise = ROUNDING[old.compute_dtype] * old.norm
        # at full rank nothing was left to choose; a cut has a choice, and only rounding can be wrong with it
        shortfall = old.shortfall if old.gap_kind != "exact" else old.error**2 + 2 * noise * tail + noise**2
        shortfall += ROUNDING[old.compute_dtype] * tail**2
        kind: GapKind = "bound" if old.gap_kind == "exact" else old.gap_kind
        whole = old.method in ("full", "gram") and old.optimum is not None
        return replace(
            old,
            rank=r,
            error=math.hypot(old.error, tail),
            shortfall=shortfall if old.norm > 0 else 0.0,
            gap_kind=kind if old.norm > 0 else "exact",
            optimum=math.hypot(old.optimum, tail) if whole and old.optimum is not None else None,
            spectral=None if old.spectral is None else math.hypot(old.spectral, float(self.S[r])),
            identified=separated(float(self.S[r - 1]), float(self.S[r])),
        )


def separated(here: float, following: float) -> bool:
    """Whether sigma_r stands clear of sigma_{r+1}, so that the leading subspace is determined."""
    return here > 0 and following < (1 - SEPARATION) * here
