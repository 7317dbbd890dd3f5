"""The adapter of a fused layer: one branch for each of the matrices in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .action import Action
from .branch import Branch, Policy


class Split(Branch):
    """Adapters of a fused layer, one per block of rows (the q, k and v of one matrix), each with factors of its own.

    Args:
        action: of the whole layer.
        blocks: name -> the branch of these rows.
        rows: for each block, the indices of its rows in the whole; together every row once.

    Raises:
        UsageError: rows that are missing or taken twice.
    """

    back: Tensor

    def __init__(self, action: Action, blocks: Mapping[str, Branch], rows: Sequence[Tensor]) -> None:
        policy: Policy = next(iter(blocks.values())).policy
        super().__init__(action, policy)
        order = torch.cat([r.reshape(-1) for r in rows])
        if sorted(order.tolist()) != list(range(action.out)):
            raise UsageError(f"Split: the blocks must take each of the {action.out} rows once, found {len(order)} indices.")
        self.blocks = nn.ModuleDict(blocks)
        # where each row of the concatenated blocks belongs; not persistent, since the layout follows from the layer
        self.register_buffer("back", torch.argsort(order), persistent=False)
        self.ordered = bool((order == torch.arange(len(order))).all())

    def _branches(self) -> list[Branch]:
        return list(self.layers().values())

    def parts(self) -> dict[str, Tensor]:
        return {f"blocks.{n}.{k}": t for n, b in self.layers().items() for k, t in b.parts().items()}

    def layers(self) -> dict[str, Branch]:
        return {n: b for n, b in self.blocks.items() if isinstance(b, Branch)}

    def _join(self, pieces: Sequence[Tensor], dim: int) -> Tensor:
        whole = torch.cat(list(pieces), dim)
        return whole if self.ordered else whole.index_select(dim, self.back)

    def forward(self, x: Tensor) -> Tensor:
        return self._join([b(x) for b in self._branches()], self.action.channels)

    def gain(self, x: Tensor) -> Tensor:
        return self._join([b.gain(x) for b in self._branches()], self.action.channels)

    def loss(self, x: Tensor) -> Tensor | None:
        found = [b.loss(x) for b in self._branches()]
        return None if any(f is None for f in found) else self._join([f for f in found if f is not None], self.action.channels)

    def gain_matrix(self) -> Tensor:
        return self._join([b.gain_matrix() for b in self._branches()], 0)

    def loss_matrix(self) -> Tensor | None:
        found = [b.loss_matrix() for b in self._branches()]
        return None if any(f is None for f in found) else self._join([f for f in found if f is not None], 0)

    def bias_delta(self) -> Tensor | None:
        found = [b.bias_delta() for b in self._branches()]
        return None if any(f is None for f in found) else self._join([f for f in found if f is not None], 0)

    def lora(self) -> tuple[Tensor, Tensor] | None:
        found = [b.lora() for b in self._branches()]
        if any(f is None for f in found):
            return None
        pairs = [f for f in found if f is not None]
        return torch.cat([a for a, _ in pairs]), self._join([torch.block_diag(*[b for _, b in pairs])], 0)
