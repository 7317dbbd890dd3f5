"""What becomes of each named part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Choice


@dataclass(frozen=True)
class Train(Choice):
    """The part is trained afterwards."""

    kind: ClassVar[str] = "train"
    axis: ClassVar[str] = "roles"


@dataclass(frozen=True)
class Freeze(Choice):
    """The part keeps its value."""

    kind: ClassVar[str] = "freeze"
    axis: ClassVar[str] = "roles"
