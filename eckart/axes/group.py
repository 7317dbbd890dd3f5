"""Which matrices are solved together, and which side they share.

A group that shares "in" holds matrices over one input space, stacked: one `down` for all, an `up` for each. Sharing "out" is the mirror image.
A group of one is an ordinary pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import UsageError
from .base import Choice
from .channels import Channels as Channels
from .experts import Experts as Experts
from .protocols import Bundle, Bundles, Group, Side, Site, World

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg.joint import State

READS_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj", "qkv_proj", "query", "key", "value", "query_key_value",
    "intermediate.dense", "dense_h_to_4h", "c_attn", "c_fc", "fc1", "q_lin", "k_lin", "v_lin", "lin1")  # fmt: skip
"""Parts of a block that read the residual stream, as common architectures call them: their in sides are one space in every block."""


def name_of(sites: Sequence[Site]) -> str:
    """A name for sites together, built from what their names share: "layers.0.attn.{q_proj,k_proj}".

    Example:
        >>> a, b = Site("m.0.up", (2, 2), ("a",)), Site("m.1.up", (2, 2), ("b",))
        >>> name_of([a, b])
        'm.{0,1}.up'
    """
    if len(sites) == 1:
        return sites[0].name
    parts = [s.name.split(".") for s in sites]
    shortest = min(len(p) for p in parts)
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    room = shortest - head
    tail = next((i for i in range(room) if len({p[-1 - i] for p in parts}) > 1), room)
    middle = ",".join(".".join(p[head : len(p) - tail]) for p in parts)
    return ".".join([*parts[0][:head], f"{{{middle}}}", *(parts[0][len(parts[0]) - tail :])])


def bundle_of(sites: Sequence[Site], shares: Side) -> Bundle:
    """Sites as one bundle; a single one shares nothing."""
    return Bundle(name_of(sites), tuple(sites), shares if len(sites) > 1 else None)


def in_order(groups: Iterable[Sequence[Site]], sites: Sequence[Site], shares: Side) -> list[Bundle]:
    """Bundles in the order in which their first sites stand in the model."""
    at = {s.name: i for i, s in enumerate(sites)}
    return [bundle_of(g, shares) for g in sorted(groups, key=lambda g: min(at[s.name] for s in g))]


def shared_size(site: Site, shares: Side) -> int:
    """Length of the side that would be common."""
    return site.shape[1] if shares == "in" else site.shape[0]


class _Group(Choice):
    """A group needs a form that stores a common basis; single matrices fit every form."""

    axis: ClassVar[str] = "group"
    takes: ClassVar[frozenset[str]] = frozenset({"common basis"})


@dataclass(frozen=True)
class SameInput(_Group):
    """Matrices of one block that read the very same tensor, as traced: q/k/v, gate/up.

    Args:
        types: regular expressions searched in the site's role; empty takes all.
    """

    kind: ClassVar[str] = "same_input"

    types: tuple[str, ...] = ()

    def bundles(self, sites: Sequence[Site], world: World) -> Bundles:
        groups: dict[tuple[str, ...], list[Site]] = {}
        for s in sites:
            fits = s.reads and s.kind == "linear" and _typed(s, self.types)
            groups.setdefault((s.reads, s.dtype) if fits else ("", s.name), []).append(s)
        return in_order(groups.values(), sites, "in"), {}


@dataclass(frozen=True)
class Adjacent(_Group):
    """The same part of neighbouring blocks, a few blocks at a time: Basis Sharing.

    Args:
        count: blocks per group; the last group may be smaller.
        types: regular expressions matched against the whole role; other sites stay by themselves.
        shares: "in" for parts that read the residual stream, "out" for those that write it.
    """

    kind: ClassVar[str] = "adjacent"

    count: int = 2
    types: tuple[str, ...] = READS_STREAM
    shares: Side = "in"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"group.count: expected at least 1, found {self.count}.")

    def bundles(self, sites: Sequence[Site], world: World) -> Bundles:
        chains: dict[tuple[object, ...], list[Site]] = {}
        for s in sites:
            alone = s.kind != "linear" or s.block < 0 or not any(re.fullmatch(rf"(.*\.)?({t})", s.role) for t in self.types)
            key = (s.name,) if alone else (_family(s), shared_size(s, self.shares), s.dtype)
            chains.setdefault(key, []).append(s)
        groups: list[list[Site]] = []
        for chain in chains.values():
            ordered = sorted(chain, key=lambda s: s.block)
            for _, run in groupby(enumerate(ordered), key=lambda x: x[1].block - x[0]):  # blocks without a gap
                row = [s for _, s in run]
                groups += [row[i : i + self.count] for i in range(0, len(row), self.count)]
        return in_order(groups, sites, self.shares), {}


@dataclass(frozen=True)
class ErrorClusters(_Group):
    """Matrices whose common basis of rank r is predicted to lose at most `eps` of their norm: the three clusterings of Concat-SVD.

    Sorted by norm, largest first; a cluster opens with the largest matrix left and takes candidates in `order` until the prediction first
    exceeds `eps`. After `patience` clusters in a row without a second member, all others stay alone.

    Args:
        eps: relative Frobenius error.
        rank: r of the prediction; None is the rank that the run's budget gives the first matrix of a cluster by itself.
        predictor: "norm" and "residuals" are proven bounds, loose where matrices do share; "truncated" is the tight estimate.
        order: candidates by rising norm, or by rising residual to the first matrix ("residuals" and "truncated" only).
        patience: see above.
        oversample: directions carried beyond r ("truncated" only).
        shares: the common side; "stream" takes for each matrix the side whose length is most common in the model, "in" where both are.
        singletons: "private" gives a matrix without partners a pair of its own, "dense" leaves it alone, as published.
    """

    kind: ClassVar[str] = "error_clusters"

    eps: float = 0.1
    rank: int | None = None
    predictor: Literal["norm", "residuals", "truncated"] = "truncated"
    order: Literal["norm", "residual"] = "norm"
    patience: int = 10
    oversample: int = 5
    shares: Literal["in", "out", "stream"] = "stream"
    singletons: Literal["private", "dense"] = "private"

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise UsageError(f"group.eps: expected a relative error in [0, 1), found {self.eps:g}.")
        if self.order == "residual" and self.predictor == "norm":
            raise UsageError("group.order: the norm bound has no residuals; choose predictor residuals or truncated, or order norm.")

    def bundles(self, sites: Sequence[Site], world: World) -> Bundles:
        families: dict[tuple[Side, int, str], list[Site]] = {}
        for s in sites:
            side = self._side(s, sites)
            families.setdefault((side, shared_size(s, side), s.dtype), []).append(s)
        out: list[Bundle] = []
        left: dict[str, str] = {}
        for (side, _, _), members in families.items():
            for cluster in self._clusters(members, side, world):
                if len(cluster) == 1 and self.singletons == "dense":
                    left[cluster[0].name] = f"no other matrix shares its basis within {self.eps:g}"
                else:
                    out.append(bundle_of(cluster, side))
        at = {s.name: i for i, s in enumerate(sites)}
        return sorted(out, key=lambda b: at[b.sites[0].name]), left

    def _side(self, site: Site, sites: Sequence[Site]) -> Side:
        if self.shares != "stream":
            return self.shares
        lengths = [n for s in sites for n in s.shape]
        return "in" if lengths.count(site.shape[1]) >= lengths.count(site.shape[0]) else "out"

    def _clusters(self, sites: Sequence[Site], side: Side, world: World) -> list[list[Site]]:
        from ..linalg.joint import start
        from ..linalg.operator import sum_of_squares
        from ..progress import track

        def block(site: Site) -> Tensor:
            weight = world.read(site).float()
            return weight.T if side == "in" else weight

        norms = {s.name: sum_of_squares(block(s)) for s in sites}
        todo = sorted(sites, key=lambda s: (-norms[s.name], s.name))
        clusters: list[list[Site]] = []
        lonely = 0
        for _ in track(range(len(sites)), "grouping"):
            if not todo:
                break
            if lonely >= self.patience:
                clusters += [[s] for s in todo]
                break
            first, *others = todo
            state = start(self.predictor, self._rank(first, world), block(first), self.oversample)
            cluster = [first]
            for candidate in self._ordered(others, norms, state, block):
                more = state.add(block(candidate))
                if more.error > self.eps:
                    break
                state = more
                cluster.append(candidate)
            lonely = lonely + 1 if len(cluster) == 1 else 0
            clusters.append(cluster)
            taken = {s.name for s in cluster}
            todo = [s for s in todo if s.name not in taken]
        return clusters

    def _ordered(self, others: Sequence[Site], norms: Mapping[str, float], state: State, block: Callable[[Site], Tensor]) -> list[Site]:
        from ..linalg.joint import Residuals, Truncated
        from ..linalg.operator import sum_of_squares

        if self.order == "norm":
            return sorted(others, key=lambda s: (norms[s.name], s.name))
        assert isinstance(state, Residuals | Truncated)
        return sorted(others, key=lambda s: (sum_of_squares(state.residual(block(s))), s.name))

    def _rank(self, site: Site, world: World) -> int:
        (m, n), budget = site.shape, world.budget
        if self.rank is not None:
            wanted = self.rank
        elif budget.kind == "keep":
            wanted = int(budget.value * m * n / (m + n))
        elif budget.kind in ("rank", "total_rank") and budget.value >= 1:
            wanted = int(budget.value)
        elif budget.kind == "rank":
            wanted = int(budget.value * min(m, n))
        else:
            raise UsageError(f"group.rank: a budget of {budget.kind} says no rank to predict at. Set it: --set group.rank=32.")
        return max(1, min(wanted, m, n))


def _typed(site: Site, types: Sequence[str]) -> bool:
    return not types or any(re.search(t, site.role) for t in types)


def _family(site: Site) -> str:
    """A site's name without the number of its block: what is the same part in every block."""
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.)", "*", site.name, count=1)


def pack(group: Group | None, sites: Sequence[Site], world: World) -> Bundles:
    """The bundles of a recipe: by its group, or each site by itself; and why sites were left out."""
    return group.bundles(sites, world) if group is not None else ([Bundle(s.name, (s,)) for s in sites], {})
