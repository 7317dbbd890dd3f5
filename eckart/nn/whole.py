"""An adapter that is the whole update of a weight: full fine-tuning beside a weight that keeps its bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .action import Action
from .branch import Branch


class Whole(Branch):
    """y = base(x) + D x with D as large as the weight, zero at first. Not thin: it costs a second weight, and its optimiser state.

    Under an optimiser that knows no weight decay D moves as the weight itself would; weight decay acts on D, not on the weight.

    Args:
        action: how matrices act on this layer's input.
        train: whether D trains.
        dropout: probability of dropping an input.

    Example:
        >>> from eckart.nn.action import action_of
        >>> Whole(action_of(nn.Linear(4, 3))).whole.shape
        torch.Size([3, 4])
    """

    whole: Tensor

    def __init__(self, action: Action, train: bool = True, dropout: float = 0.0) -> None:
        super().__init__(action)
        zeros = torch.zeros(action.out, action.into)
        if train:
            self.register_parameter("whole", nn.Parameter(zeros))
        else:
            self.register_buffer("whole", zeros)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def gain(self, x: Tensor) -> Tensor:
        x = self.action.prepare(x, self.whole.dtype)
        if self.dropout is not None and x.is_floating_point():
            x = self.dropout(x)
        return self.action.whole(x, self.whole)

    def loss(self, x: Tensor) -> Tensor | None:
        return None

    def gain_matrix(self) -> Tensor:
        return self.whole

    def loss_matrix(self) -> Tensor | None:
        return None

    def extra_repr(self) -> str:
        return f"out={self.action.out}, in={self.action.into}"
