"""Which tensors are changed, seen as which matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UsageError
from .base import TargetChoice
from .protocols import Site, Stat, StatsView

if TYPE_CHECKING:
    from ..catalogue import Catalogue


@dataclass(frozen=True)
class Linears(TargetChoice):
    """The linear layers of a model. Not convolutions, not experts in one stack, and not a head that shares its storage with an embedding.

    Args:
        skip: regular expressions searched in the module's name; a match leaves the layer alone.
        only: if given, regular expressions of which one must match.
        blocks: take only layers inside the repeated blocks, where a model has blocks.
        embeddings: take embedding tables too, wherever they stand.
    """

    kind: ClassVar[str] = "linears"
    gives: ClassVar[frozenset[str]] = frozenset({"sites"})

    skip: tuple[str, ...] = ("lm_head", "pooler", "classifier", "score$")
    only: tuple[str, ...] = ()
    blocks: bool = True
    embeddings: bool = False

    @property
    def tables(self) -> bool:
        return self.embeddings

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        kinds = ("linear", "embedding") if self.embeddings else ("linear",)
        inside = self.blocks and any(s.block >= 0 for s in catalogue.sites if s.kind == "linear")
        chosen: list[Site] = []
        left: dict[str, str] = {}
        for site in catalogue.sites:
            if site.kind not in kinds:
                left[site.name] = _why_not(site)
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


def _why_not(site: Site) -> str:
    """Why a matrix is no linear layer."""
    if site.kind == "experts":
        return f"{site.shape[0]} experts in one stack; --recipe sub_moe merges them"
    return {"conv": "a convolution", "embedding": "a table of embeddings; --set target.embeddings=true takes it"}.get(
        site.kind, "the weight of no layer"
    )


@dataclass(frozen=True)
class Turns(TargetChoice):
    """The layers of the blocks at which the path of the hidden state through the model turns most, by Ramer-Douglas-Peucker on text.

    The last block, where every path ends, is never one of them. Ties with a straight path are left out, so there may be fewer than the share.

    Args:
        inner: the layers of all blocks.
        share: of the blocks, that are kept; at least one. 13 of 36 is the number of the abstract.
    """

    kind: ClassVar[str] = "turns"
    glues: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"sites"})

    inner: Linears = Linears()
    share: float = 13 / 36

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat("path", at="block")})

    @property
    def tables(self) -> bool:
        return self.inner.tables

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        return self.inner.sites(catalogue)

    def around(self, other: Any) -> Turns:
        """The same choice of blocks among the layers of another target.

        Raises:
            UsageError: a target that is no choice of linear layers.
        """
        if not isinstance(other, Linears):
            raise UsageError(f"target.turns chooses among linear layers; the recipe's target is {other.kind}, and both cannot hold.")
        return replace(self, inner=other)

    def narrow(self, sites: Sequence[Site], stats: StatsView) -> list[Site]:
        """The layers of the chosen blocks.

        Raises:
            UsageError: none of the layers lies in one of them.
        """
        if not sites:
            return []
        turns, blocks = stats.get(Stat("path", at="block"), sites[0])
        kept = turns[: max(1, round(self.share * blocks))]
        out = [s for s in sites if any(s.name == b or s.name.startswith(f"{b}.") for b in kept)]
        if not out:
            raise UsageError(f"target.turns: the path turns at {', '.join(kept) or 'no block'}, where none of the chosen layers lies.")
        return out


@dataclass(frozen=True)
class Vocabulary(TargetChoice):
    """The table of a model's input tokens: of its embeddings the one with the most rows, tied to a head or not. Nothing else."""

    kind: ClassVar[str] = "vocabulary"
    gives: ClassVar[frozenset[str]] = frozenset({"sites"})

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        tables = [s for s in catalogue.sites if s.kind == "embedding"]
        chosen = sorted(tables, key=lambda s: -s.shape[1])[:1]
        left = {s.name: "is no embedding" for s in catalogue.sites if s.kind == "linear"}
        return chosen, left | {s.name: "has fewer rows than another table" for s in tables if s not in chosen}


@dataclass(frozen=True)
class Experts(TargetChoice):
    """The stacked experts of mixture-of-experts layers, and their routers; nothing else.

    Args:
        skip: regular expressions searched in the name of the stack.
    """

    kind: ClassVar[str] = "experts"
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
