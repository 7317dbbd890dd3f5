"""Matrices around one set of channels: the hidden units of an MLP, or the dimensions of the heads of an attention.

Names, shapes and config.json say where they are (`catalogue.parts`). Whatever else has a tensor of the channels' length leaves them alone: a norm
over them, say, would change when some are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, ClassVar

from .base import Choice
from .protocols import Bundle, Bundles, Site, World

if TYPE_CHECKING:
    from ..catalogue.parts import Attention


@dataclass(frozen=True)
class Channels(Choice):
    """The matrices of each MLP, and of each attention, that meet in one set of channels; `form.smaller` keeps some of these.

    Not for gate and up in one matrix, for queries, keys and values woven head by head, and for heads that are normalised.

    Args:
        mlp: take MLPs.
        attention: take attentions. Heads of another width need our loader.
    """

    kind: ClassVar[str] = "channels"
    axis: ClassVar[str] = "group"
    takes: ClassVar[frozenset[str]] = frozenset({"channels"})
    gives: ClassVar[frozenset[str]] = frozenset({"grouped channels"})

    mlp: bool = True
    attention: bool = True

    def bundles(self, sites: Sequence[Site], world: World) -> Bundles:
        left = {s.name: "belongs to no MLP or attention whose channels are known" for s in sites}
        found: list[Bundle] = []
        for bundle in (*(_mlps(sites, left, world) if self.mlp else ()), *(_attentions(sites, left, world) if self.attention else ())):
            if all(s.name in left for s in bundle.sites):
                found.append(bundle)
                for site in bundle.sites:
                    del left[site.name]
        at = {s.name: i for i, s in enumerate(sites)}
        return sorted(found, key=lambda b: min(at[s.name] for s in b.sites)), left


def _mlps(sites: Sequence[Site], left: dict[str, str], world: World) -> Iterator[Bundle]:
    from ..catalogue import Catalogue
    from ..catalogue.parts import hidden
    from .group import name_of

    for _, ups, down in hidden(Catalogue(tuple(sites))):
        parts = (*ups, down)
        other = _other(parts, down.shape[1], world)
        if len(ups) > 1 and len({u.reads for u in ups}) > 1 and all(u.reads != u.name for u in ups):
            left |= {s.name: "its parts do not read one input" for s in parts}
        elif other is not None:
            left |= {s.name: f"{other} spans its hidden units too" for s in parts}
        else:
            yield Bundle(name_of(parts), parts)


def _attentions(sites: Sequence[Site], left: dict[str, str], world: World) -> Iterator[Bundle]:
    from ..catalogue import Catalogue
    from ..catalogue.parts import attentions, rotary
    from .group import name_of

    found, why = attentions(Catalogue(tuple(sites)), world.config)
    for site in sites:
        reason = next((r for n, r in why.items() if n and site.name.startswith(f"{n}.")), None)
        if reason is not None and site.name in left:
            left[site.name] = reason
    for one in found:
        parts = tuple(dict.fromkeys(s.site for s in (one.q, one.k, one.v, one.o)))
        width = one.v.at.shape[1]
        other = _other(parts, width, world)
        reason = _unfit(one) or (f"{other} spans the dimensions of a head too" if other else None)
        if reason is not None:
            left |= {s.name: reason for s in parts}
            continue
        facts = {"heads": one.heads, "kv": len(one.k.at), "width": width, "rope": int(rotary(world.config)), "fused": int(len(parts) == 2)}
        yield Bundle(name_of(parts), parts, facts=tuple(facts.items()))


def _unfit(one: Attention) -> str | None:
    if one.cross:
        return "attends to another sequence"
    if one.q.at.shape[1] != one.v.at.shape[1]:
        return "its queries and values have heads of different width"
    if one.q.site is one.k.site and len(one.q.at) > 1 and int(one.q.at[1, 0] - one.q.at[0, 0]) != one.q.at.shape[1]:
        return "its queries, keys and values are woven together head by head"
    return None


def _other(sites: Sequence[Site], size: int, world: World) -> str | None:
    """A tensor beside the sites, in the module that holds them all, with a dimension of that length; None where there is none."""
    own = {k for s in sites for k in (*s.tensors, *((s.bias,) if s.bias else ()))}
    split = [k.split(".") for s in sites for k in s.tensors]
    common = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*split, strict=False)))
    if not common:
        return None
    return next(
        (k for k, shape in world.shapes.items() if k.startswith(common + ".") and k not in own and len(shape) == 1 and shape[0] == size),
        None,
    )
