"""Which tensors are changed, seen as which matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Choice
from .protocols import Site

if TYPE_CHECKING:
    from ..catalogue import Catalogue


@dataclass(frozen=True)
class Linears(Choice):
    """The linear layers of a model. Not embeddings, not convolutions, and not a head that shares its storage with an embedding.

    Args:
        skip: regular expressions searched in the module's name; a match leaves the layer alone.
        only: if given, regular expressions of which one must match.
        blocks: take only layers inside the repeated blocks, where a model has blocks.
    """

    kind: ClassVar[str] = "linears"
    axis: ClassVar[str] = "target"
    gives: ClassVar[frozenset[str]] = frozenset({"sites"})

    skip: tuple[str, ...] = ("lm_head", "pooler", "classifier", "score$")
    only: tuple[str, ...] = ()
    blocks: bool = True

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        linears = [s for s in catalogue.sites if s.kind == "linear"]
        inside = self.blocks and any(s.block >= 0 for s in linears)
        chosen: list[Site] = []
        left: dict[str, str] = {}
        for site in linears:
            hit = next((p for p in self.skip if re.search(p, site.name)), None)
            if hit is not None:
                left[site.name] = f"target.skip has {hit!r}"
            elif self.only and not any(re.search(p, site.name) for p in self.only):
                left[site.name] = "no pattern of target.only matches"
            elif site.tied:
                left[site.name] = f"shares its storage with {', '.join(site.tied)}"
            elif inside and site.block < 0:
                left[site.name] = "outside the repeated blocks"
            else:
                chosen.append(site)
        return chosen, left
