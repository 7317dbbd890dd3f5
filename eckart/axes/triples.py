"""Singular triples for branches: left, values and right apart, where `Factor.factorise` gives their product.

An adapter may train the values alone, or put them where its paper wants them, and the tail of a singular matrix still needs its right vectors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .protocols import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg.psd import Weight


def triples(op: Tensor, sides: tuple[Weight | None, Weight | None], cap: int, algorithm: str, seed: int, name: str = "matrix") -> Parts:
    """The leading triples of a matrix in a metric, W' = left diag(values) right.

    Without a metric left and right are orthonormal. In a metric on one side, left (or right) is, and the other holds the rows of
    U_r^T W over the values: the metric is never inverted.

    Args:
        op: W (m, n).
        sides: (out, in) metrics.
        cap: how many triples.
        algorithm: as `linalg.svd` takes it.
        seed: of the algorithms that draw numbers.
        name: used in messages.

    Returns:
        `Parts` with `values`; `spectrum` holds what was computed of the singular values in the metric.

    Example:
        >>> import torch
        >>> parts = triples(torch.diag(torch.tensor([3.0, 4.0])), (None, None), 1, "auto", 0)
        >>> parts.values
        tensor([4.])
    """
    out, into = sides
    from ..linalg import svd
    from ..linalg.weighted import TOL, solve

    method: Any = algorithm
    if out is None and into is None:
        found = svd(op, cap, method=method, tol=TOL, seed=seed, name=name)
        return Parts(found.U, found.Vh, found.S, _facts(found.certificate), values=found.S)
    if out is None and into is not None and _is_itself(into):
        # W G needs no eigenvectors of G: a product, where the root of a wide Gram costs more than all the rest
        import torch

        work = op.to(torch.float64)
        weighed = work @ into.matrix.to(device=work.device, dtype=torch.float64)  # type: ignore[union-attr]
        found = svd(weighed, cap, method=method, tol=TOL, seed=seed, name=name)
        return _divided(found.U, found.U.T @ work, found.S, found.certificate)
    best = solve(op, out, into, rank=cap, method=algorithm, certify="free", seed=seed, name=name)
    return _divided(best.left, best.right, best.spectrum[: best.left.shape[1]], best.factors.certificate)


def own(parts: Parts) -> Parts:
    """The same matrix by its own singular triples, both factors orthonormal: for triples of a metric, where one factor is not, and whose values are in
    units of the metric.

    Args:
        parts: with values, and nothing between the factors.

    Returns:
        As many triples; the spectrum stays that in the metric.

    Example:
        >>> import torch
        >>> found = own(Parts(torch.eye(2)[:, :1], torch.tensor([[0.0, 0.5]]), torch.ones(1), values=torch.tensor([6.0])))
        >>> found.values, found.right.abs()
        (tensor([3.]), tensor([[0., 1.]]))
    """
    import torch

    from ..linalg import orth, svd

    assert parts.values is not None
    left, right = parts.left.to(torch.float64), parts.right.to(torch.float64)
    basis = orth(left)
    found = svd(basis.T @ (left * parts.values) @ right, len(parts.values), name="kept part")
    dtype = parts.left.dtype
    return replace(parts, left=(basis @ found.U).to(dtype), right=found.Vh.to(dtype), values=found.S.to(dtype))


def _is_itself(weight: Weight) -> bool:
    """Whether the metric is its own root: power 1, no clamp, one full matrix."""
    import torch

    return weight.power == 1 and weight.clamp == 0 and isinstance(weight.matrix, torch.Tensor) and weight.matrix.ndim == 2


def _divided(left: Tensor, right: Tensor, values: Tensor, certificate: Any) -> Parts:
    """Parts whose product left @ right is the approximation; rows of a zero value stay as they are (zero)."""
    safe = values.masked_fill(values <= 0, 1)
    return Parts(left, right / safe[:, None], values, _facts(certificate), values=values)


def _facts(certificate: Any) -> dict[str, Any]:
    return certificate.as_dict() if certificate is not None else {}
