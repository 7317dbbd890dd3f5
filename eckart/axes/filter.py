"""Which triples of one matrix are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .base import Choice
from .protocols import Parts


def _cut(parts: Parts, keep: slice) -> Parts:
    values = None if parts.values is None else parts.values[keep]
    core = None if parts.core is None else parts.core[keep, keep]
    return replace(parts, left=parts.left[:, keep], right=parts.right[keep], values=values, core=core)


@dataclass(frozen=True)
class Top(Choice):
    """The r largest singular values."""

    kind: ClassVar[str] = "top"
    axis: ClassVar[str] = "filter"
    takes: ClassVar[frozenset[str]] = frozenset({"triples"})
    gives: ClassVar[frozenset[str]] = frozenset({"kept"})

    def cap(self, rank: int, full: int) -> int:
        """How many triples must be computed."""
        return min(rank, full)

    def split(self, parts: Parts, rank: int) -> tuple[Parts, Parts]:
        """(kept, rest)."""
        return _cut(parts, slice(0, rank)), _cut(parts, slice(rank, None))


@dataclass(frozen=True)
class Bottom(Choice):
    """The r smallest singular values; every triple is needed to know them."""

    kind: ClassVar[str] = "bottom"
    axis: ClassVar[str] = "filter"
    takes: ClassVar[frozenset[str]] = frozenset({"triples"})
    gives: ClassVar[frozenset[str]] = frozenset({"kept"})

    def cap(self, rank: int, full: int) -> int:
        """How many triples must be computed."""
        return full

    def split(self, parts: Parts, rank: int) -> tuple[Parts, Parts]:
        """(kept, rest)."""
        at = parts.left.shape[1] - rank
        return _cut(parts, slice(at, None)), _cut(parts, slice(0, at))
