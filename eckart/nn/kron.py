"""An adapter that is a sum of Kronecker products, applied without forming one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .action import Action
from .branch import FROZEN, Branch, Policy

Shapes = tuple[tuple[int, int], tuple[int, int]]


class Kron(Branch):
    """y = s sum_k (A_k (x) B_k) x, less what it begins with. The sum has no thin factors: an update of few numbers may have full rank.

    Args:
        action: how matrices act on this layer's input.
        count: number of products.
        shapes: ((m1, n1), (m2, n2)) of A and B; m1 m2 = m, n1 n2 = n.
        trained: of "outer" (all A) and "inner" (all B); the others are frozen.
        scale: s.
        policy: "subtract" or "mutate".
        dropout: probability of dropping an input, the same inputs in what is added and what is taken away.

    Raises:
        UsageError: shapes that do not make up the layer's, or a part that does not exist.

    Example:
        >>> from eckart.nn.action import action_of
        >>> branch = Kron(action_of(nn.Linear(6, 4)), 2, ((2, 3), (2, 2)))
        >>> branch.outer.shape, branch.inner.shape
        (torch.Size([2, 2, 3]), torch.Size([2, 2, 2]))
    """

    outer: Tensor
    inner: Tensor
    initial_outer: Tensor
    initial_inner: Tensor

    def __init__(
        self,
        action: Action,
        count: int,
        shapes: Shapes,
        trained: Iterable[str] = ("outer", "inner"),
        scale: float = 1.0,
        policy: Policy = "subtract",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action, policy)
        (m1, n1), (m2, n2) = shapes
        if (m1 * m2, n1 * n2) != (action.out, action.into) or count < 1:
            raise UsageError(f"Kron: {count} products of {m1}x{n1} and {m2}x{n2} do not make up a {action.out}x{action.into} layer.")
        wanted = set(trained)
        if wanted - {"outer", "inner"}:
            raise UsageError(f"Kron: no part is called {sorted(wanted - {'outer', 'inner'})}; there are outer, inner.")
        self.rank, self.scale = count, float(scale)
        for name, shape in (("outer", (count, m1, n1)), ("inner", (count, m2, n2))):
            if name in wanted:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
                self.register_buffer(FROZEN + name, torch.zeros(shape))
            else:
                self.register_buffer(name, torch.zeros(shape))
        self.copied = tuple(n for n in ("outer", "inner") if n in wanted)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def _factors(self, initial: bool) -> tuple[Tensor, Tensor]:
        a, b = (getattr(self, FROZEN + n if initial and n in self.copied else n) for n in ("outer", "inner"))
        return a, b

    def _matrix(self, initial: bool) -> Tensor:
        a, b = self._factors(initial)
        whole = torch.einsum("kac,kbd->abcd", a, b)
        return whole.reshape(self.action.out, self.action.into) * self.scale

    def _map(self, x: Tensor, initial: bool) -> Tensor:
        if type(self.action) is not Action:  # convolutions and embeddings: a kernel, or columns, of the matrix itself
            return self.action.whole(x, self._matrix(initial))
        a, b = self._factors(initial)
        z = torch.einsum("...cd,kbd->...kcb", x.reshape(*x.shape[:-1], a.shape[2], b.shape[2]), b)
        y = torch.einsum("...kcb,kac->...ab", z, a).reshape(*x.shape[:-1], self.action.out)
        return y * self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.action.prepare(x, self.outer.dtype)
        if self.dropout is not None and x.is_floating_point():
            x = self.dropout(x)
        return super().forward(x)

    def gain(self, x: Tensor) -> Tensor:
        return self._map(x, False)

    def loss(self, x: Tensor) -> Tensor | None:
        return self._map(x, True)

    def gain_matrix(self) -> Tensor:
        return self._matrix(False)

    def loss_matrix(self) -> Tensor | None:
        return self._matrix(True)

    def extra_repr(self) -> str:
        return f"out={self.action.out}, in={self.action.into}, products={self.rank}, scale={self.scale:g}"
