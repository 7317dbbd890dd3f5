"""How a matrix acts on the input of a layer: the same low-rank map for a linear layer, GPT-2's Conv1D, a convolution and an embedding.

A matrix is always seen as y = W x, shape (out, in). `weight` has the layer's own storage; `to_matrix` and `to_weight` convert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .surgery import dense_shape, factorable

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Action:
    """A linear layer. `channels` is the axis of the output that `out` counts.

    Args:
        out: m, rows of the matrix.
        into: n, columns of the matrix.
        transposed: the weight is stored (in, out), as in GPT-2's Conv1D.
    """

    out: int
    into: int
    transposed: bool = False

    channels = -1

    def down(self, x: Tensor, right: Tensor) -> Tensor:
        """R x, right (r, n)."""
        return F.linear(x, right)

    def up(self, z: Tensor, left: Tensor) -> Tensor:
        """L z, left (m, r)."""
        return F.linear(z, left)

    def whole(self, x: Tensor, matrix: Tensor) -> Tensor:
        """W x for a matrix (m, n) without factors."""
        return F.linear(x, matrix)

    def scale(self, z: Tensor, core: Tensor) -> Tensor:
        """C z, core a diagonal (r,) or a matrix (r, r)."""
        return z * core if core.ndim == 1 else F.linear(z, core)

    def add(self, y: Tensor, bias: Tensor) -> Tensor:
        """y + bias along the channels."""
        return y + bias

    def prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input in the type of the factors.

        Contiguous: on strided inputs torch multiplies by a parameter and by a buffer in different orders, and what a branch adds and what
        it takes away would differ in the last bit.
        """
        return x.to(dtype).contiguous()

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(out, in) of a stored weight."""
        return weight.T if self.transposed else weight

    def to_weight(self, matrix: Tensor) -> Tensor:
        """The stored form of a matrix."""
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True, eq=False)
class ConvAction(Action):
    """A convolution: the matrix is the kernel flattened to (out, in / groups x kernel). With groups, all groups share R and each has its rows of L."""

    layer: Any = None

    channels = 1

    def _kernel(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], *self.layer.weight.shape[1:])

    def down(self, x: Tensor, right: Tensor) -> Tensor:
        kernel = self._kernel(right)
        groups = self.layer.groups
        if groups > 1:
            kernel = kernel.repeat(groups, *([1] * (kernel.ndim - 1)))
        return self.layer._conv_forward(x, kernel, None)

    def up(self, z: Tensor, left: Tensor) -> Tensor:
        point = left.reshape(*left.shape, *([1] * (z.ndim - 2)))
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[z.ndim]
        return conv(z, point, groups=self.layer.groups)

    def whole(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.layer._conv_forward(x, self._kernel(matrix), None)

    def scale(self, z: Tensor, core: Tensor) -> Tensor:
        shape = z.shape
        z = z.reshape(shape[0], self.layer.groups, -1, *shape[2:]).movedim(2, -1)
        z = z * core if core.ndim == 1 else F.linear(z, core)
        return z.movedim(-1, 2).reshape(shape)

    def add(self, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias.reshape(-1, *([1] * (y.ndim - 2)))

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.out, self.into)

    def to_weight(self, matrix: Tensor) -> Tensor:
        return self._kernel(matrix)


@dataclass(frozen=True, eq=False)
class EmbeddingAction(Action):
    """An embedding: the map of a one-hot vector, so the matrix is (width, vocabulary), the transpose of the table.

    Args:
        scale_by: factor that the layer applies to its rows (Gemma's scaled embeddings).
    """

    scale_by: Any = None

    def down(self, x: Tensor, right: Tensor) -> Tensor:
        z = F.embedding(x, right.T)
        return z if self.scale_by is None else z * self.scale_by

    def whole(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.down(x, matrix)

    def prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x


def action_of(layer: nn.Module) -> Action | None:
    """How matrices act in place of a layer's weight; None for layers that hold no adapter.

    Subclasses of `nn.Linear` are none, as in `surgery.factorable`: their parent may read the weight without calling them.

    Example:
        >>> action_of(nn.Linear(3, 2)).out, action_of(nn.LayerNorm(3))
        (2, None)
    """
    if factorable(layer):
        out, into = dense_shape(layer)
        return Action(out, into, transposed=type(layer) is not nn.Linear)
    weight: Any = getattr(layer, "weight", None)
    if type(layer) in CONVS:
        return ConvAction(int(weight.shape[0]), int(weight[0].numel()), layer=layer)
    if isinstance(layer, nn.Embedding) and layer.max_norm is None:
        factor = getattr(layer, "embed_scale", None)
        factor = getattr(layer, "scalar_embed_scale", factor)
        return EmbeddingAction(int(weight.shape[1]), int(weight.shape[0]), transposed=True, scale_by=factor)
    return None
