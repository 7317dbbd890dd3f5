"""The Interaction Basis of a layer's input: coordinates in which features are uncorrelated and act on the output one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Refused
from ..linalg import svd
from ..linalg.psd import Weight, eigh_psd, root

CUT = 1e-5  # share of the largest eigenvalue below which a direction counts as absent; the reference code cuts at the same absolute value


@dataclass(frozen=True, eq=False)
class Basis:
    """Features f' = forth f of activations f (n,), strongest interaction first.

    Args:
        values: (r,) how strongly each feature acts on the output: the eigenvalues called Lambda in the paper.
        forth: (r, n).
        back: (n, r), the pseudoinverse of `forth`: back @ forth projects onto the directions that occur and matter.
    """

    values: Tensor
    forth: Tensor
    back: Tensor


def interaction_basis(weight: Tensor, inputs: Tensor, gradients: Tensor, cut: float = CUT) -> Basis:
    """Whiten the inputs, then rotate them onto the singular directions of what follows: a weighted SVD with a metric on both sides.

    It is the basis of the map from f to the output through this layer, Jacobian variant. Edges between layers and modules are not computed.

    Args:
        weight: W (m, n) of y = W f; a bias is one more column, its feature the constant 1.
        inputs: (n, n) mean of f f^T, not centred.
        gradients: (m, m) mean of J^T J, with J the Jacobian of the output in y.
        cut: eigenvalues of either step below this share of the largest are dropped.

    Returns:
        `Basis`, float64. `values` do not depend on the coordinates of f or y.

    Raises:
        Refused: a metric that is not finite or of the wrong size.

    Example:
        >>> b = interaction_basis(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2), torch.eye(2))
        >>> b.values.tolist()
        [9.0, 1.0]
    """
    m, n = weight.shape
    for name, metric, size in (("inputs", inputs, n), ("gradients", gradients, m)):
        if metric.shape != (size, size):
            raise Refused(f"interaction basis: expected {name} of shape {(size, size)}, found {tuple(metric.shape)}.")
    energy, directions = eigh_psd(inputs, "inputs")
    kept = energy > cut * energy[0]
    scale, directions = energy[kept].sqrt(), directions[:, kept]
    bent = root(Weight(gradients, name="gradients")).apply(weight.to(torch.float64) @ (directions * scale))
    if not bool(kept.any()) or not bool(bent.any()):
        return Basis(torch.zeros(0).double(), torch.zeros(0, n).double(), torch.zeros(n, 0).double())
    found = svd(bent, tol=0.0)
    live = found.S.square() > cut * found.S[0].square()
    s, v = found.S[live], found.Vh[live]
    return Basis(s.square(), s[:, None] * (v / scale) @ directions.T, (directions * scale) @ (v / s[:, None]).T)
