"""Which matrix is factorised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Choice
from .protocols import Bundle, Read, StatsView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weights(Choice):
    """The weight itself, (out, in)."""

    kind: ClassVar[str] = "weights"
    axis: ClassVar[str] = "source"

    def operator(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor:
        return read(bundle.site)
