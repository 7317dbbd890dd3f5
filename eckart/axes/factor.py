"""How the matrix is factorised: the place where a recipe's metric meets `linalg`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .base import FactorChoice
from .protocols import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg.psd import Weight


@dataclass(frozen=True)
class SVD(FactorChoice):
    """Truncated singular value decomposition in the metric: the optimum of Eckart, Young and Mirsky.

    Args:
        certify: what the certificate must hold: "free", "spectral" or "optimum".
    """

    kind: ClassVar[str] = "svd"
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
    trains: ClassVar[bool] = True

    steps: int = 300
    lr: float = 1e-3
    lasso: float = 1e-6

    def __post_init__(self) -> None:
        from ..errors import UsageError

        if self.steps < 1 or self.lr <= 0 or self.lasso < 0:
            raise UsageError(
                f"factor.ordered: expected at least one step and no negative weight, found {self.steps}, {self.lr:g} and {self.lasso:g}."
            )


def _refuse_metric(kind: str, sides: tuple[Weight | None, Weight | None]) -> None:
    from ..errors import UsageError

    if sides != (None, None):
        raise UsageError(
            f"factor.{kind}: takes the matrix as it is, and the metric is none of identity. Set metric.kind=identity, or factor.kind=svd."
        )


@dataclass(frozen=True)
class LDU(FactorChoice):
    """W = L diag(d) U with row pivots, for branches. Triples come in the order of elimination, not of size, and their first few are no
    approximation."""

    kind: ClassVar[str] = "ldu"
    takes: ClassVar[frozenset[str]] = frozenset({"branch"})
    gives: ClassVar[frozenset[str]] = frozenset({"triples"})

    def triples(self, op: Tensor, sides: tuple[Weight | None, Weight | None], cap: int, algorithm: str, seed: int, name: str) -> Parts:
        from ..linalg.ldu import ldu

        _refuse_metric(self.kind, sides)
        left, d, right = ldu(op, name)
        return Parts(left[:, :cap], right[:cap], d[:cap].abs(), values=d[:cap])


@dataclass(frozen=True)
class Nystrom(FactorChoice):
    """Leading columns and rows of W with a matrix between them, for branches with a dense core. Not the best approximation, but free.

    Args:
        middle: "inverse" is the regularised pseudoinverse of the block where rows and columns cross, with which their product has these rows
            and columns; "block" is that block itself.
        ridge: of the pseudoinverse, as a share of the block's largest singular value.
    """

    kind: ClassVar[str] = "nystrom"
    takes: ClassVar[frozenset[str]] = frozenset({"branch"})
    gives: ClassVar[frozenset[str]] = frozenset({"triples"})
    nested: ClassVar[bool] = False
    """The matrix in the middle at a rank is no part of that at a higher one."""

    middle: Literal["inverse", "block"] = "inverse"
    ridge: float = 0.0

    def __post_init__(self) -> None:
        from ..errors import UsageError

        if not self.ridge >= 0:
            raise UsageError(f"factor.nystrom: expected a ridge of at least 0, found {self.ridge:g}.")

    def triples(self, op: Tensor, sides: tuple[Weight | None, Weight | None], cap: int, algorithm: str, seed: int, name: str) -> Parts:
        import torch

        from ..linalg.ldu import nystrom

        _refuse_metric(self.kind, sides)
        left, core, right = nystrom(op, cap, self.ridge, name)
        if self.middle == "block":
            core = right[:, :cap]
        ones = torch.ones(cap, dtype=left.dtype, device=left.device)
        return Parts(left, right, ones, values=ones, core=core)


@dataclass(frozen=True)
class Kronecker(FactorChoice):
    """W = sum of s_k A_k (x) B_k, for the form `kron`: the singular value decomposition of W's entries laid out as (A, B).

    The optimum among sums of as many Kronecker products of these shapes; see `linalg.kronecker`.
    """

    kind: ClassVar[str] = "kronecker"
    takes: ClassVar[frozenset[str]] = frozenset({"kron"})
    gives: ClassVar[frozenset[str]] = frozenset({"triples", "kronecker"})

    def triples(self, op: Tensor, sides: tuple[Weight | None, Weight | None], cap: int, algorithm: str, seed: int, name: str) -> Parts:
        from ..linalg import svd
        from ..linalg.kronecker import laid_out
        from ..linalg.weighted import TOL

        _refuse_metric(self.kind, sides)
        method: Any = algorithm
        laid = laid_out(op)
        found = svd(laid, min(cap, *laid.shape), method=method, tol=TOL, seed=seed, name=name)
        facts = found.certificate.as_dict() if found.certificate is not None else {}
        return Parts(found.U, found.Vh, found.S, facts, values=found.S)
