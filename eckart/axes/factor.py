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


@dataclass(frozen=True)
class Ordered(SVD):
    """Factors that are trained so that any first few of their triples do best alone: Maestro's ordered dropout, from the SVD on.

    At every step one matrix, drawn at random, runs with its first b triples, b drawn evenly, and all others in full. The loss adds `lasso` times
    the norms of all tails of both factors, which lets triples that nothing needs die out. Without a model at hand, as `solve` alone has none,
    this is the SVD that training starts from.

    Args:
        steps: optimiser steps, one calibration batch each.
        lr: of Adam.
        lasso: weight of the hierarchical group lasso, summed over matrices.
    """

    kind: ClassVar[str] = "ordered"

    steps: int = 300
    lr: float = 1e-3
    lasso: float = 1e-6

    def __post_init__(self) -> None:
        from ..errors import UsageError

        if self.steps < 1 or self.lr <= 0 or self.lasso < 0:
            raise UsageError(
                f"factor.ordered: expected at least one step and no negative weight, found {self.steps}, {self.lr:g} and {self.lasso:g}."
            )
