"""How strongly one attention head reads what an earlier one writes, from thin factors: no matrix of the model's width squared is formed.

A head writes through O V (value and output projections) and reads through its queries, keys or values. With A the earlier head's O V and B what
the later one reads with, C(A, B) = ‖B A‖ / (‖B‖ ‖A‖) (Elhage et al. 2021). Of a single component s u v^T of A it is ‖B u‖ / ‖B‖.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..linalg import Factors, orth, svd

Sides = Literal["query", "key", "value"]
SIDES: tuple[Sides, ...] = ("query", "key", "value")
DEAD = 1e-6  # singular values below this share of the largest: their vectors are rounding


@dataclass(frozen=True, eq=False)
class Heads:
    """All heads of an attention module in factored form: about the size of its weights in float32 (float64 where these are).

    Args:
        writes: (heads, d, r) left singular vectors of O V.
        sizes: (heads, r) its singular values.
        reads: side -> (heads, r, d) right singular vectors of what is read with.
        gains: side -> (heads, r) the singular values of it.
    """

    writes: Tensor
    sizes: Tensor
    reads: dict[Sides, Tensor]
    gains: dict[Sides, Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """Composition of every pair of heads of two modules, on one side.

    Args:
        heads: (later, earlier) C of whole heads.
        components: (later, earlier, r) C of each component of the earlier head; 0 for components that are rounding.
    """

    heads: Tensor
    components: Tensor


def output_value(value: Tensor, output: Tensor) -> Factors:
    """SVD of O V for one head.

    Args:
        value: V (r, d).
        output: O (d, r).

    Example:
        >>> output_value(torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0], [4.0]])).S.tolist()
        [10.0]
    """
    ones = torch.ones(len(value), dtype=torch.float64)
    return Factors(output.to(torch.float64), ones.to(output.device), value.to(torch.float64)).refactor()


def reader(own: Tensor, partner: Tensor, pairs: Tensor | None = None) -> Factors:
    """SVD of a matrix B with ‖B x‖ = ‖K^T Q x‖: what a query reads of x, over all keys; or the same with the roles of Q and K exchanged.

    With rotary positions the product is Q^T R K with a rotation R by distance. B is then such that ‖B x‖² is the mean of ‖K^T R^T Q x‖² over
    independent uniform angles: each pair of rotated rows counts with the norm of its partner's pair.

    Args:
        own: Q (r, d), the rows that read.
        partner: K (r, d).
        pairs: (p, 2) rows that are rotated together; None or empty where positions do not rotate. Other rows multiply as they are.

    Returns:
        Factors of B, of rank at most r; Vh are the directions that are read.

    Example:
        >>> B = reader(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0, 1]]))
        >>> [round(float(s), 4) for s in B.S]
        [3.5355, 3.5355]
    """
    own, partner = own.to(torch.float64), partner.to(torch.float64)
    turned = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    rows: list[Tensor] = []
    if pairs is not None and len(pairs):
        index = pairs.to(own.device)
        turned[index.reshape(-1)] = True
        weight = partner[index].square().sum((1, 2)).div(2).sqrt()
        rows.append((own[index] * weight[:, None, None]).flatten(0, 1))
    if bool((~turned).any()):
        other = partner[~turned]
        if other.shape[0] <= other.shape[1]:  # K^T = basis (basis^T K^T): the orthonormal factor changes no norm
            other = other @ orth(other.T)
        rows.append(other.T @ own[~turned])
    return svd(torch.cat(rows), tol=0.0)


def compose(earlier: Heads, later: Heads, side: Sides) -> Scores:
    """Scores of all pairs of heads of two modules.

    Args:
        earlier: the module that writes.
        later: the module that reads.
        side: which of its projections.

    Returns:
        `Scores`; 1/sqrt(d) is what a random direction scores.
    """
    reads, gains = later.reads[side], later.gains[side]
    hb, rb, d = reads.shape
    ha, _, ra = earlier.writes.shape
    inner = reads.reshape(hb * rb, d) @ earlier.writes.transpose(0, 1).reshape(d, ha * ra)
    inner = inner.reshape(hb, rb, ha, ra).square()
    weight = gains.square()
    total = weight.sum(1)
    squares = torch.einsum("br,brac->bac", weight, inner) / torch.where(total > 0, total, 1.0)[:, None, None]
    energy = earlier.sizes.square()
    norm = energy.sum(1)
    whole = (squares * energy).sum(2) / torch.where(norm > 0, norm, 1.0)
    live = earlier.sizes > DEAD * earlier.sizes.amax(1, keepdim=True)
    return Scores(whole.sqrt(), torch.where(live, squares.sqrt(), 0.0))


def outliers(scores: Tensor, at: float) -> tuple[Tensor, Tensor]:
    """(robust z of every positive score, whether it is an outlier): distance from the median in units of the scaled median deviation.

    Args:
        scores: any shape; zeros take no part.
        at: z from which a score counts.

    Example:
        >>> z, out = outliers(torch.tensor([1.0, 1.1, 0.9, 1.05, 0.95, 9.0]), 6.0)
        >>> out.tolist()
        [False, False, False, False, False, True]
    """
    positive = scores[scores > 0]
    if len(positive) == 0:
        return torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    centre = positive.median()
    spread = 1.4826 * (positive - centre).abs().median()
    z = (scores - centre) / spread.clamp_min(torch.finfo(scores.dtype).tiny)
    return z, (z > at) & (scores > 0)
