"""A live model as a measurement needs it, and afterwards as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


@contextlib.contextmanager
def evaluating(model: M) -> Iterator[M]:
    """Within the block the model is in evaluation mode; afterwards every submodule is in the mode it had.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Dropout())
        >>> with evaluating(net):
        ...     print(net[0].training)
        False
        >>> net[0].training
        True
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def frozen(model: M) -> Iterator[M]:
    """Within the block no parameter asks for a gradient; afterwards each asks as it did.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 2)
        >>> with frozen(net):
        ...     print(net.weight.requires_grad)
        False
        >>> net.weight.requires_grad
        True
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield model
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
