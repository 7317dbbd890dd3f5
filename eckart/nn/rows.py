"""An adapter of a few rows of an embedding table: new tokens that train while all others keep their bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .action import EmbeddingAction
from .branch import Branch


class TokenRows(Branch):
    """The rows of some tokens are replaced: y = table[id], or rows[j] where id is the j-th of these tokens.

    Not a low-rank update, though it can be written as one of rank q with a selection as its right factor.

    Args:
        action: of the embedding.
        tokens: their ids, q of them.
        train: whether the rows train.

    Raises:
        UsageError: a layer that is no embedding, ids that are none of its rows, or one twice.

    Example:
        >>> from eckart.nn.action import action_of
        >>> sorted(TokenRows(action_of(nn.Embedding(10, 4)), [8, 9]).parts())
        ['base_rows', 'initial_rows', 'rows']
    """

    rows: Tensor
    base_rows: Tensor
    initial_rows: Tensor
    tokens: Tensor

    def __init__(self, action: EmbeddingAction, tokens: Sequence[int], train: bool = True) -> None:
        super().__init__(action)
        if not isinstance(action, EmbeddingAction):
            raise UsageError("TokenRows: expected an embedding; rows of tokens are found in no other layer (target).")
        if not tokens or len(set(tokens)) < len(tokens) or not all(0 <= t < action.into for t in tokens):
            raise UsageError(f"TokenRows: expected different ids from 0 to {action.into - 1}, found {list(tokens)[:8]}.")
        self.rank = len(tokens)
        shape = (self.rank, action.out)
        if train:
            self.register_parameter("rows", nn.Parameter(torch.zeros(shape)))
        else:
            self.register_buffer("rows", torch.zeros(shape))
        self.register_buffer("base_rows", torch.zeros(shape))
        self.register_buffer("initial_rows", torch.zeros(shape))
        # not persistent: they follow from the recipe and the rank
        self.register_buffer("tokens", torch.tensor(list(tokens)), persistent=False)

    def parts(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().parts().items() if k != "tokens"}

    def _pick(self, x: Tensor, rows: Tensor) -> Tensor:
        chosen = (x[..., None] == self.tokens.to(x.device)).to(rows.dtype)
        y = chosen @ rows
        factor = getattr(self.action, "scale_by", None)
        return y if factor is None else y * factor

    def gain(self, x: Tensor) -> Tensor:
        return self._pick(x, self.rows)

    def loss(self, x: Tensor) -> Tensor | None:
        return self._pick(x, self.base_rows)

    def _matrix(self, rows: Tensor) -> Tensor:
        out = torch.zeros(self.action.out, self.action.into, dtype=rows.dtype, device=rows.device)
        return out.index_add(1, self.tokens.to(rows.device), rows.T)

    def gain_matrix(self) -> Tensor:
        return self._matrix(self.rows)

    def loss_matrix(self) -> Tensor | None:
        return self._matrix(self.base_rows)

    def lora(self) -> tuple[Tensor, Tensor] | None:
        select = torch.nn.functional.one_hot(self.tokens, self.action.into).to(self.rows)
        return select, (self.rows - self.base_rows).T

    def extra_repr(self) -> str:
        return f"tokens={self.tokens.tolist()[:8]}, width={self.action.out}"
