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
    """The linear layers of a model. Not convolutions, not experts in one stack, and not a head that shares its storage with an embedding.

    Args:
        skip: regular expressions searched in the module's name; a match leaves the layer alone.
        only: if given, regular expressions of which one must match.
        blocks: take only layers inside the repeated blocks, where a model has blocks.
        embeddings: take embedding tables too, wherever they stand.
    """

    kind: ClassVar[str] = "linears"
    axis: ClassVar[str] = "target"
    gives: ClassVar[frozenset[str]] = frozenset({"sites"})

    skip: tuple[str, ...] = ("lm_head", "pooler", "classifier", "score$")
    only: tuple[str, ...] = ()
    blocks: bool = True
    embeddings: bool = False

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        kinds = ("linear", "embedding") if self.embeddings else ("linear",)
        inside = self.blocks and any(s.block >= 0 for s in catalogue.sites if s.kind == "linear")
        chosen: list[Site] = []
        left: dict[str, str] = {}
        for site in catalogue.sites:
            if site.kind == "experts":
                left[site.name] = f"{site.shape[0]} experts in one stack; --recipe sub_moe merges them"
            if site.kind not in kinds:
                continue
            hit = next((p for p in self.skip if re.search(p, site.name)), None)
            if hit is not None:
                left[site.name] = f"target.skip has {hit!r}"
            elif self.only and not any(re.search(p, site.name) for p in self.only):
                left[site.name] = "no pattern of target.only matches"
            elif site.tied:
                left[site.name] = f"shares its storage with {', '.join(site.tied)}"
            elif inside and site.block < 0 and site.kind == "linear":
                left[site.name] = "outside the repeated blocks"
            else:
                chosen.append(site)
        return chosen, left


@dataclass(frozen=True)
class Vocabulary(Choice):
    """The table of a model's input tokens: of its embeddings the one with the most rows, tied to a head or not. Nothing else."""

    kind: ClassVar[str] = "vocabulary"
    axis: ClassVar[str] = "target"
    gives: ClassVar[frozenset[str]] = frozenset({"sites"})

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        tables = [s for s in catalogue.sites if s.kind == "embedding"]
        chosen = sorted(tables, key=lambda s: -s.shape[1])[:1]
        left = {s.name: "is no embedding" for s in catalogue.sites if s.kind == "linear"}
        return chosen, left | {s.name: "has fewer rows than another table" for s in tables if s not in chosen}


@dataclass(frozen=True)
class Experts(Choice):
    """The stacked experts of mixture-of-experts layers, and their routers; nothing else.

    Args:
        skip: regular expressions searched in the name of the stack.
    """

    kind: ClassVar[str] = "experts"
    axis: ClassVar[str] = "target"
    gives: ClassVar[frozenset[str]] = frozenset({"experts"})

    skip: tuple[str, ...] = ()

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        stacks = [s for s in catalogue.sites if s.kind == "experts"]
        homes = {s.name.rpartition(".")[0].rpartition(".")[0] for s in stacks}
        chosen: list[Site] = []
        left: dict[str, str] = {}
        for site in catalogue.sites:
            router = site.kind in ("other", "linear") and site.name.removesuffix(".weight").rpartition(".")[0] in homes
            if site.kind == "linear" and not router:
                left[site.name] = "is no expert"
            elif site.kind != "experts" and not router:
                continue
            elif hit := next((p for p in self.skip if re.search(p, site.name)), None):
                left[site.name] = f"target.skip has {hit!r}"
            else:
                chosen.append(site)
        return chosen, left
