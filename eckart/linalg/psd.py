"""Symmetric positive semidefinite matrices: eigenvalues, and powers that never form an inverse unless one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import Refused


def eigh_psd(matrix: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, negatives from rounding set to 0) and eigenvectors of a symmetric matrix, in float64.

    Args:
        matrix: (k, k), symmetric up to rounding; the mean with its transpose is taken.
        name: used in messages.

    Returns:
        (values (k,), vectors (k, k) as columns).

    Raises:
        Refused: not square, or not finite.

    Example:
        >>> import torch
        >>> eigh_psd(torch.diag(torch.tensor([1.0, 4.0])))[0]
        tensor([4., 1.], dtype=torch.float64)
    """
    work = _symmetric(matrix, name)
    try:
        values, vectors = torch.linalg.eigh(work)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  # a device driver may give up where LAPACK on the host does not
        values, vectors = (t.to(work.device) for t in torch.linalg.eigh(work.cpu()))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    """The mean with its transpose, float64; refused where it is not square or not finite."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise Refused(f"{name}: expected a square matrix, found shape {tuple(matrix.shape)}.")
    work = matrix.to(torch.float64)
    work = (work + work.T) / 2
    if not bool(torch.isfinite(work).all()):
        raise Refused(f"{name}: holds NaN or Inf; a Gram matrix must be finite. Check the calibration data and the model's dtype.")
    return work


@dataclass(frozen=True)
class Weight:
    """A metric on one side of a matrix: the norm of v is ‖S v‖ with S = matrix^power. Not a square root itself: `root` makes one.

    Args:
        matrix: (k,) the diagonal, or (k, k) symmetric positive semidefinite; a tuple of these is their block diagonal matrix.
        power: 1/2 makes a second moment the metric of squared errors on that data.
        clamp: eigenvalues below `clamp` times the largest (of their block) are raised to it. 0 leaves them: enough as long as the side is
            not inverted.
        name: used in messages.
        one_hot: `matrix` holds the probabilities of one-hot vectors; the metric is their covariance diag(p) - p p^T, never formed.
        option: where a recipe sets `clamp`; used in messages.
    """

    matrix: Tensor | tuple[Tensor, ...]
    power: float = 0.5
    clamp: float = 0.0
    name: str = "metric"
    one_hot: bool = False
    option: str = "metric.clamp"

    @property
    def size(self) -> int:
        """k, over all blocks."""
        blocks = self.matrix if isinstance(self.matrix, tuple) else (self.matrix,)
        return sum(b.shape[0] for b in blocks)

    def to(self, device: torch.device | str) -> Weight:
        """The same metric on another device."""
        moved = tuple(b.to(device) for b in self.matrix) if isinstance(self.matrix, tuple) else self.matrix.to(device)
        return replace(self, matrix=moved)


@dataclass(frozen=True)
class Root:
    """S = weight.matrix ^ power in factored form, float64. `values` are its eigenvalues (or its diagonal), `vectors` is None when diagonal."""

    values: Tensor
    vectors: Tensor | None
    raised: int

    def apply(self, x: Tensor) -> Tensor:
        """S @ x, x (k, c)."""
        return self._with(self.values, x)

    def solve(self, x: Tensor) -> Tensor:
        """S^-1 @ x, x (k, c). Only defined when every eigenvalue is positive: see `condition`."""
        return self._with(1 / self.values, x)

    def _with(self, values: Tensor, x: Tensor) -> Tensor:
        x = x.to(values.dtype)
        if self.vectors is None:
            return values[:, None] * x
        return self.vectors @ (values[:, None] * (self.vectors.T @ x))

    @property
    def zero(self) -> bool:
        """Whether S is zero; of a block diagonal one, whether a block is."""
        return not bool(self.values.any())

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of S; infinite when one is zero."""
        low = float(self.values.min())
        return float(self.values.max()) / low if low > 0 else float("inf")


@dataclass(frozen=True)
class Blocks(Root):
    """The root of a block diagonal metric, block by block."""

    parts: tuple[Root, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Root]) -> Blocks:
        """From the roots of the blocks, in order."""
        return cls(torch.cat([p.values for p in parts]), None, sum(p.raised for p in parts), tuple(parts))

    def _split(self, x: Tensor) -> list[Tensor]:
        return list(x.split([len(p.values) for p in self.parts]))

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([p.apply(b) for p, b in zip(self.parts, self._split(x), strict=True)])

    def solve(self, x: Tensor) -> Tensor:
        return torch.cat([p.solve(b) for p, b in zip(self.parts, self._split(x), strict=True)])

    @property
    def zero(self) -> bool:
        return any(p.zero for p in self.parts)


@dataclass(frozen=True)
class OneHot(Root):
    """A root of diag(p) - p p^T: S = D - p q^T with D = diag(q), q = sqrt(p), of which `apply` takes the transpose, as W S wants it.

    S S^T = D² - p q^T D - D q p^T + p (q^T q) p^T = diag(p) - p p^T, since D q = p and q^T q = 1. It is singular, so it cannot be inverted.
    """

    share: Tensor | None = None

    @classmethod
    def of(cls, weight: Weight) -> OneHot:
        """From probabilities; they are scaled to sum to 1."""
        assert isinstance(weight.matrix, Tensor)
        p = weight.matrix.to(torch.float64)
        if not bool(torch.isfinite(p).all()) or bool((p < 0).any()) or float(p.sum()) <= 0:
            raise Refused(f"{weight.name}: frequencies must be finite, not negative and not all zero.")
        p = p / p.sum()
        return cls(p.sqrt(), None, 0, p)

    def apply(self, x: Tensor) -> Tensor:
        assert self.share is not None
        x = x.to(torch.float64)
        return self.values[:, None] * x - self.values[:, None] * (self.share @ x)

    def solve(self, x: Tensor) -> Tensor:
        raise Refused("the covariance of one-hot inputs is singular and cannot be inverted; let the other side have a clamp.")

    @property
    def condition(self) -> float:
        return float("inf")


@dataclass(frozen=True)
class Lower(Root):
    """S = L^T with the Cholesky factor L of the matrix: S^T S is the matrix, and W L has the left vectors and singular values of W matrix^1/2.

    `values` are the diagonal of L. It is not the symmetric root, and is not inverted.
    """

    lower: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        assert self.lower is not None
        return self.lower.T @ x.to(self.lower.dtype)

    def solve(self, x: Tensor) -> Tensor:
        raise Refused("the root of a side alone is not inverted; take `root`.")

    @property
    def condition(self) -> float:
        return float("inf")


def half(weight: Weight) -> Root:
    """Any S with S^T S = matrix^(2 power), for a metric with this side alone: nothing there depends on which.

    A Cholesky factor costs a twentieth of eigenvectors and, where it exists, has the same backward error whatever the condition. Where it does not
    (fewer rows than features), and for other powers or a clamp, this is `root`.

    Example:
        >>> import torch
        >>> half(Weight(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))).apply(torch.eye(2))
        tensor([[2., 1.],
                [0., 1.]], dtype=torch.float64)
    """
    if isinstance(weight.matrix, tuple):
        return Blocks.of([half(replace(weight, matrix=block)) for block in weight.matrix])
    if weight.matrix.ndim == 2 and weight.power == 0.5 and weight.clamp == 0:
        lower, info = torch.linalg.cholesky_ex(_symmetric(weight.matrix, weight.name))
        if int(info) == 0:
            return Lower(lower.diagonal(), None, 0, lower)
    return root(weight)


def root(weight: Weight) -> Root:
    """S = matrix^power with the relative clamp of `weight`, by eigh; the number of raised eigenvalues is kept for the report.

    Args:
        weight: the metric.

    Returns:
        A `Root`, float64, on the device of the matrix.

    Raises:
        Refused: not finite, or a diagonal with a negative entry.

    Example:
        >>> import torch
        >>> root(Weight(torch.tensor([4.0, 9.0]))).apply(torch.ones(2, 1)).T
        tensor([[2., 3.]], dtype=torch.float64)
    """
    if isinstance(weight.matrix, tuple):
        return Blocks.of([root(replace(weight, matrix=block)) for block in weight.matrix])
    if weight.one_hot:
        return OneHot.of(weight)
    if weight.matrix.ndim == 1:
        values, vectors = weight.matrix.to(torch.float64), None
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise Refused(f"{weight.name}: a diagonal metric must be finite and not negative.")
    else:
        values, vectors = eigh_psd(weight.matrix, weight.name)
    floor = weight.clamp * float(values.max()) if len(values) else 0.0
    raised = int((values < floor).sum())
    return Root(values.clamp_min(floor) ** weight.power, vectors, raised)
