"""A linear layer held as two thin ones: y = up(down(x))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UsageError


def own(tensor: Tensor) -> nn.Parameter:
    """A parameter that shares no memory with the tensor."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


class LowRankLinear(nn.Module):
    """A linear layer whose matrix is a product of two thin ones, `W = up.weight @ down.weight`.

    Not a `torch.nn.Linear` subclass, and not a branch beside a dense layer: nothing of shape (out, in) is stored.
    It saves parameters only below rank mn/(m+n), and speed never follows from the rank alone.

    Its state has `down.weight` (rank, in), `up.weight` (out, rank), `up.bias` (out,) if there is one, and the buffer
    `weight` of shape (1,), always zero and never used in the computation. That guard makes a loader which expects the dense
    matrix under the same key stop at the shape, where it would otherwise fill the layer with random numbers; it also
    answers code that peeks at `layer.weight.dtype` or `.device`.

    Args:
        in_features: n, size of the last axis of the input.
        out_features: m, size of the last axis of the output.
        rank: r, from 1 to min(m, n).
        bias: whether `up` has a bias.
        device: where the parameters live; None is torch's default.
        dtype: their type; None is torch's default.
        common: one of the factors serves other layers too, so that the rank may exceed the smaller size, up to the larger.

    Raises:
        UsageError: a size below 1, or a rank outside 1..min(m, n).

    Example:
        >>> import torch
        >>> layer = LowRankLinear(8, 6, rank=2)
        >>> layer(torch.zeros(3, 8)).shape, layer.dense_weight().shape
        (torch.Size([3, 6]), torch.Size([6, 8]))
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        common: bool = False,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise UsageError(f"LowRankLinear: sizes must be at least 1, found in_features={in_features}, out_features={out_features}.")
        largest = (max if common else min)(in_features, out_features)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            raise UsageError(f"LowRankLinear: a {out_features}x{in_features} layer takes a rank from 1 to {largest}, found {rank!r}.")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None = None, common: bool = False) -> LowRankLinear:
        """The layer that multiplies by `up @ down`. The tensors are copied; type and device are theirs.

        Args:
            up: (m, r).
            down: (r, n).
            bias: (m,), or None.
            common: as for the layer itself.

        Raises:
            UsageError: shapes that do not fit, or tensors of different type or device.

        Example:
            >>> import torch
            >>> up, down = torch.ones(3, 1), torch.ones(1, 2)
            >>> LowRankLinear.from_factors(up, down)(torch.ones(2)).tolist()
            [2.0, 2.0, 2.0]
        """
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise UsageError(f"from_factors: expected up (m, r) and down (r, n), found {tuple(up.shape)} and {tuple(down.shape)}.")
        if bias is not None and bias.shape != up.shape[:1]:
            raise UsageError(f"from_factors: expected a bias of shape ({up.shape[0]},), found {tuple(bias.shape)}.")
        tensors = [up, down] if bias is None else [up, down, bias]
        if len({(t.dtype, t.device) for t in tensors}) > 1:
            found = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
            raise UsageError(f"from_factors: up, down and bias must share one type and device, found {found}.")

        # built on the meta device: no memory twice, and torch's global generator is not touched
        layer = cls(down.shape[1], up.shape[0], up.shape[1], bias=bias is not None, device="meta", dtype=up.dtype, common=common)
        layer.down.weight = own(down)
        layer.up.weight = own(up)
        if bias is not None:
            layer.up.bias = own(bias)
        layer.weight = torch.zeros(1, dtype=up.dtype, device=up.device)
        return layer

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the output, shape (m,), or None."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self.up(self.down(x))

    def dense_weight(self) -> Tensor:
        """`up.weight @ down.weight`, shape (m, n): multiplied in at least float32, returned in the factors' type."""
        up, down = (x.weight if isinstance(x, nn.Linear) else x.dense_weight() for x in (self.up, self.down))
        if up.dtype in (torch.float16, torch.bfloat16):
            return (up.float() @ down.float()).to(up.dtype)
        return up @ down

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
