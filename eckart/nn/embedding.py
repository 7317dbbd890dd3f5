"""An embedding table held as a thin table and a linear map: y = up(down[i])."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .low_rank import own


class LowRankEmbedding(nn.Module):
    """An embedding whose rows are `up.weight @ down.weight[i] + up.bias`.

    Not a `torch.nn.Embedding` subclass. Its state has `down.weight` (rows, rank), `up.weight` (width, rank), `up.bias` (width,) if there is one,
    and the guard buffer `weight` of shape (1,), as in `LowRankLinear`.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: d, width of a row.
        rank: r, from 1 to min(V, d).
        bias: whether `up` has a bias.
        padding_idx: row that is not trained; unlike in a dense table it is not zero, since `up.bias` is added to it.
        device: where the parameters live; None is torch's default.
        dtype: their type; None is torch's default.

    Raises:
        UsageError: a size below 1, or a rank outside 1..min(V, d).

    Example:
        >>> LowRankEmbedding(10, 6, rank=2)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 6])
    """

    weight: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, bias: bool = True, padding_idx: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1 or isinstance(rank, bool) or not 1 <= rank <= min(num_embeddings, embedding_dim):
            sizes = f"num_embeddings={num_embeddings}, embedding_dim={embedding_dim}, rank={rank!r}"
            raise UsageError(f"LowRankEmbedding: expected sizes of at least 1 and a rank from 1 to the smaller one, found {sizes}.")
        self.num_embeddings, self.embedding_dim, self.rank, self.padding_idx = num_embeddings, embedding_dim, rank, padding_idx
        self.down = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx, device=device, dtype=dtype)
        self.up = nn.Linear(rank, embedding_dim, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None = None, padding_idx: int | None = None) -> LowRankEmbedding:
        """The table `down @ up.T + bias`. The tensors are copied.

        Args:
            up: (d, r).
            down: (V, r).
            bias: (d,), or None.
            padding_idx: as in the table that it replaces.

        Raises:
            UsageError: shapes that do not fit.

        Example:
            >>> up, down = torch.ones(2, 1), torch.tensor([[1.0], [3.0]])
            >>> LowRankEmbedding.from_factors(up, down)(torch.tensor(1)).tolist()
            [3.0, 3.0]
        """
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[1] or (bias is not None and bias.shape != up.shape[:1]):
            shapes = [None if t is None else tuple(t.shape) for t in (up, down, bias)]
            raise UsageError(f"from_factors: expected up (d, r), down (V, r) and bias (d,), found {shapes}.")

        # built on the meta device: torch's global generator is not touched
        table = cls(len(down), len(up), up.shape[1], bias=bias is not None, padding_idx=padding_idx, device="meta", dtype=up.dtype)
        table.down.weight = own(down)
        table.up.weight = own(up)
        if bias is not None:
            table.up.bias = own(bias)
        table.weight = torch.zeros(1, dtype=up.dtype, device=up.device)
        return table

    @property
    def bias(self) -> nn.Parameter | None:
        """What is added to every row, shape (d,), or None."""
        return self.up.bias

    def forward(self, ids: Tensor) -> Tensor:
        """(...) row numbers -> (..., d)."""
        return self.up(self.down(ids))

    def dense_weight(self) -> Tensor:
        """The table (V, d), bias included: computed in at least float32, returned in the factors' type."""
        up, down = self.up.weight, self.down.weight
        wide = torch.float32 if up.dtype in (torch.float16, torch.bfloat16) else up.dtype
        table = down.to(wide) @ up.to(wide).T
        return (table if self.bias is None else table + self.bias.to(wide)).to(up.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, bias={self.bias is not None}"
