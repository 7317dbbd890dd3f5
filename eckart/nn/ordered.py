"""Factored layers whose triples can be switched off from the last one on: what ordered training and trained truncation run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHARPNESS = 10.0  # of the soft cut, per rank: within a third of a rank of the position a triple is half on


class OrderedLinear(nn.Module):
    """y = up[:, :width] (down[:width] x) + bias: a linear map of which only the first `width` triples act. For training; never stored as such.

    Args:
        up: (m, r).
        down: (r, n).
        bias: (m,), or None.

    Example:
        >>> layer = OrderedLinear(torch.eye(2), torch.eye(2), None)
        >>> layer.width = 1
        >>> layer(torch.tensor([3.0, 4.0])).tolist()
        [3.0, 0.0]
    """

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up.detach().clone()), nn.Parameter(down.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.width = self.up.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return nn.functional.linear(nn.functional.linear(x, self.down[: self.width]), self.up[:, : self.width], self.bias)

    def importance(self) -> Tensor:
        """(r,) norm of each triple, ‖up_i‖ ‖down_i‖."""
        return self.up.norm(dim=0) * self.down.norm(dim=1)

    def lasso(self) -> Tensor:
        """Hierarchical group lasso: for every i the norm of everything from triple i on, in both factors. Its gradient at zero is zero."""
        return sum((_tails(s) for s in (self.up.square().sum(0), self.down.square().sum(1))), torch.zeros((), dtype=self.up.dtype))


def _tails(squares: Tensor) -> Tensor:
    tails = squares.flip(0).cumsum(0)
    on = tails > 0
    return torch.where(on, tails.where(on, torch.ones_like(tails)).sqrt(), 0).sum()


class SoftCutLinear(nn.Module):
    """y = up (mask * (down x)) + bias with mask_i = tanh(10 (position - i)) / 2 + 1/2, i from 0: a truncation whose place is trained.

    At a position between i and i + 1 the triples up to i act. The factors do not train.

    Args:
        up: (m, r), triples in the order in which they are kept.
        down: (r, n).
        bias: (m,), or None.
        position: where the cut starts out, in ranks.

    Example:
        >>> layer = SoftCutLinear(torch.eye(2), torch.eye(2), None, position=0.5)
        >>> [round(v, 3) for v in layer(torch.tensor([3.0, 4.0])).tolist()]
        [3.0, 0.0]
    """

    up: Tensor
    down: Tensor
    places: Tensor

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None, position: float) -> None:
        super().__init__()
        self.register_buffer("up", up.detach().clone())
        self.register_buffer("down", down.detach().clone())
        self.register_buffer("places", torch.arange(up.shape[1], dtype=torch.float32, device=up.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.position = nn.Parameter(torch.tensor(float(position), device=up.device))

    def mask(self) -> Tensor:
        """(r,) how far each triple is on."""
        return torch.tanh(SHARPNESS * (self.position - self.places)) / 2 + 0.5

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return nn.functional.linear(nn.functional.linear(x, self.down) * self.mask().to(x.dtype), self.up, self.bias)
