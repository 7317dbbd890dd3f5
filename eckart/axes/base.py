"""What every axis value shares: a `kind` for YAML, and empty declarations that a value overrides where it has something to declare."""

from __future__ import annotations

from typing import ClassVar

from .protocols import Stat

NOTHING: frozenset[str] = frozenset()


class Choice:
    """Base of axis values. Not an interface: the protocols are. It only gives the three declarations their empty defaults.

    `kind` is the name in YAML and on the command line, `axis` the axis it belongs to.
    """

    kind: ClassVar[str]
    axis: ClassVar[str]
    takes: ClassVar[frozenset[str]] = NOTHING
    gives: ClassVar[frozenset[str]] = NOTHING

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset()
