"""How the matrix is factorised: the place where a recipe's metric meets `linalg`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Choice
from .protocols import Parts

if TYPE_CHECKING:
    from ..linalg.psd import Weight


@dataclass(frozen=True)
class SVD(Choice):
    """Truncated singular value decomposition in the metric: the optimum of Eckart, Young and Mirsky.

    Args:
        certify: what the certificate must hold: "free", "spectral" or "optimum".
    """

    kind: ClassVar[str] = "svd"
    axis: ClassVar[str] = "factor"
    gives: ClassVar[frozenset[str]] = frozenset({"triples"})

    certify: str = "free"

    def factorise(self, op: Any, sides: tuple[Weight | None, Weight | None], cap: int, algorithm: str, seed: int) -> Parts:
        from ..linalg import weighted

        best = weighted.solve(op, *sides, rank=cap, method=algorithm, certify=self.certify, seed=seed)
        certificate = best.factors.certificate
        facts = (certificate.as_dict() if certificate is not None else {}) | {"total": best.total, **best.record}
        return Parts(best.left, best.right, best.spectrum, facts)
