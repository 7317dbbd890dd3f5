"""Initial values by a word: "zero", "one", "normal:STD", "uniform:BOUND", "kaiming" and "kaiming:A"; seeded by names, never by the order of work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[str, str, tuple[int, ...]], "Tensor"]
"""(name of the part, word, shape) -> values."""

WORDS = ("zero", "one", "normal", "uniform", "kaiming")


def number(word: str, name: str, default: float | None) -> tuple[str, float]:
    """(word, number) of "normal:0.02".

    Raises:
        UsageError: an unknown word, or a number that is none or missing.
    """
    kind, _, text = word.partition(":")
    if kind not in WORDS:
        raise UsageError(f"{name}: no initial value is called {word!r}.{did_you_mean(kind, WORDS)} There are: {', '.join(WORDS)}.")
    try:
        return kind, float(text) if text or default is None else default
    except ValueError:
        raise UsageError(f"{name}: expected a number behind the colon, as in {kind}:0.02, found {word!r}.") from None


def check(word: str, name: str) -> None:
    """Refuse a word that `drawing` would refuse later."""
    number(word, name, None if word.partition(":")[0] in ("normal", "uniform") else 0.0)


def drawing(seed: int, *names: str) -> Draw:
    """A function that draws initial values; equal names give equal values.

    Args:
        seed: of the run.
        *names: what the values are for, for instance the layer's name.

    Returns:
        (part, word, shape) -> float32 values. "kaiming:A" is uniform with bound sqrt(6 / ((1 + A²) fan_in)), fan_in the last axis;
        A is sqrt(5) when left out, which gives the bound 1 / sqrt(fan_in) of `torch.nn.Linear`.

    Example:
        >>> draw = drawing(0, "layer")
        >>> bool((draw("right", "kaiming", (2, 4)).abs() <= 0.5).all())
        True
    """
    from ..seeds import generator

    def draw(part: str, word: str, shape: tuple[int, ...]) -> Tensor:
        import torch

        kind, value = number(word, part, math.sqrt(5) if word.startswith("kaiming") else 0.0)
        if kind in ("zero", "one"):
            return torch.full(shape, float(kind == "one"))
        source = generator(seed, *names, part)
        if kind == "normal":
            return torch.randn(shape, generator=source) * value
        bound = value if kind == "uniform" else math.sqrt(6 / ((1 + value**2) * max(1, shape[-1])))
        return (torch.rand(shape, generator=source) * 2 - 1) * bound

    return draw
