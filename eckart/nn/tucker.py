"""An adapter in Tucker form: a small core tensor with a factor for every axis of the weight; of a matrix, two factors and a core between them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .action import Action
from .branch import Branch

AXES = ("left", "right", "height", "width", "depth")
"""Factors in the order of the weight's axes: out, in, then those of the kernel."""


class Tucker(Branch):
    """dW = s G x_1 L x_2 R x_3 K_1 x_4 K_2 ..., nothing taken away.

    A linear layer is applied thin; a convolution by one more convolution with the kernel dW, which costs what the layer itself costs, and is right
    for groups, strides and every padding.

    Args:
        action: how matrices act on this layer's input.
        sizes: of the weight's axes: (out, in / groups, kernel...).
        ranks: of the core's axes, one for each.
        trained: of "core" and the factors' names; the others are frozen.
        scale: s.
        dropout: probability of dropping an input.

    Raises:
        UsageError: ranks that do not fit the axes.

    Example:
        >>> from eckart.nn.action import action_of
        >>> conv = nn.Conv2d(4, 8, 3)
        >>> branch = Tucker(action_of(conv), (8, 4, 3, 3), (2, 2, 2, 2))
        >>> [tuple(branch.parts()[n].shape) for n in ("core", "left", "right", "height", "width")]
        [(2, 2, 2, 2), (8, 2), (2, 4), (3, 2), (3, 2)]
    """

    core: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        action: Action,
        sizes: tuple[int, ...],
        ranks: tuple[int, ...],
        trained: Iterable[str] | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action)
        if len(sizes) != len(ranks) or not all(1 <= r <= d for r, d in zip(ranks, sizes, strict=True)):
            raise UsageError(f"Tucker: expected a rank from 1 to its size for each axis of a {sizes} weight, found {ranks}.")
        self.sizes, self.ranks, self.scale = sizes, ranks, float(scale)
        self.axes = AXES[: len(sizes)]
        self.rank = ranks[0]
        shapes: dict[str, tuple[int, ...]] = {"core": ranks, **{n: (d, r) for n, d, r in zip(self.axes, sizes, ranks, strict=True)}}
        shapes["right"] = (ranks[1], sizes[1])  # as in every branch
        wanted = set(shapes) if trained is None else set(trained)
        for name, shape in shapes.items():
            zeros = torch.zeros(shape)
            if name in wanted:
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def _rows(self) -> Tensor:
        """(r_out, n): what `left` combines into the update."""
        found = self.core
        for axis, name in enumerate(self.axes[1:], 1):
            factor: Tensor = getattr(self, name)
            across = factor if name == "right" else factor.T
            last = found.movedim(axis, -1)
            # of two matrices: the order in which torch sums a larger product depends on whether a factor wants a gradient
            flat = last.reshape(-1, last.shape[-1]) @ across
            found = flat.reshape(*last.shape[:-1], -1).movedim(-1, axis)
        return found.reshape(self.ranks[0], -1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.action.prepare(x, self.left.dtype)
        if self.dropout is not None and x.is_floating_point():
            x = self.dropout(x)
        return super().forward(x)

    def gain(self, x: Tensor) -> Tensor:
        if len(self.sizes) > 2:
            return self.action.whole(x, self.gain_matrix())
        z = self.action.scale(self.action.down(x, self.right), self.core)
        y = self.action.up(z, self.left)
        return y if self.scale == 1.0 else y * self.scale

    def loss(self, x: Tensor) -> Tensor | None:
        return None

    def gain_matrix(self) -> Tensor:
        return (self.left @ self._rows()) * self.scale

    def loss_matrix(self) -> Tensor | None:
        return None

    def lora(self) -> tuple[Tensor, Tensor] | None:
        return self._rows(), self.left * self.scale

    def extra_repr(self) -> str:
        return f"weight={self.sizes}, ranks={self.ranks}, scale={self.scale:g}"
