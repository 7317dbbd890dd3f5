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


@dataclass(frozen=True)
class Drop(Choice):
    """The part is taken away."""

    kind: ClassVar[str] = "drop"
    axis: ClassVar[str] = "roles"


@dataclass(frozen=True)
class Protect(Choice):
    """The part keeps its value, and what is trained beside it is projected onto its complement after every step of the optimiser."""

    kind: ClassVar[str] = "protect"
    axis: ClassVar[str] = "roles"
