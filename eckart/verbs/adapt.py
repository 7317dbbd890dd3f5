"""What `adapt` decides before a model is touched: the recipe, the layers, their ranks and their initial tensors.

The same functions serve a live model (`hub.peft`) and a checkpoint on disk (`verbs.adapt_offline`): both only say how a matrix is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..axes import Recipe
from ..axes.initialise import Start, curve, empty, start
from ..axes.protocols import Bundle, Parts, Site, Stat, StatsView
from ..errors import Refused, UsageError, did_you_mean
from ..nn.fused import Rows, fused_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.action import Action
    from ..nn.branch import Branch

KNOWN_BYTES = 2 << 30  # of triples kept between the decision on ranks and the start; beyond it a matrix is factorised again


@dataclass(frozen=True)
class Place:
    """One matrix that gets factors: a layer, or one of the matrices in a fused layer.

    Args:
        module: the layer's name.
        site: the matrix; its name tells the matrices of a fused layer apart ("h.0.attn.c_attn[q]").
        label: "q", or empty for a whole layer.
        rows: its rows in the layer, None for all.
    """

    module: str
    site: Site
    label: str = ""
    rows: Rows | None = None

    @property
    def full(self) -> int:
        """Largest rank."""
        return min(self.site.shape)


Matrix = Callable[[Place], "Tensor"]
"""place -> W (out, in) of it."""


@dataclass(frozen=True)
class Design:
    """An adapter whose tensors are known by name and shape.

    Args:
        recipe: the choices.
        places: every matrix that has a rank above zero.
        ranks: place -> budget of it; 0 for those that get no adapter.
        asked: rank that the run asked for.
        alpha: numerator of the scale.
        known: triples that the decision computed already.
    """

    recipe: Recipe
    places: tuple[Place, ...]
    ranks: Mapping[str, int]
    asked: int
    alpha: float
    known: Mapping[str, Parts] = field(default_factory=dict, repr=False)

    @property
    def modules(self) -> tuple[str, ...]:
        """Layers that get an adapter, in the model's order."""
        return tuple(dict.fromkeys(p.module for p in self.places))

    def of(self, module: str) -> tuple[Place, ...]:
        """The matrices of one layer."""
        return tuple(p for p in self.places if p.module == module)


def lay(recipe: Recipe, sites: Sequence[Site], config: Any = None) -> list[Place]:
    """The matrices of the layers: fused ones apart where the recipe wants them so."""
    out: list[Place] = []
    for site in sites:
        rows = fused_rows(site.name, site.shape[0], config) if recipe.form.split and site.kind == "linear" else None
        if rows is None:
            out.append(Place(site.name, site))
            continue
        for label, part in rows.items():
            out.append(Place(site.name, replace(site, name=f"{site.name}[{label}]", shape=(part.size, site.shape[1])), label, part))
    return out


def design(
    recipe: Recipe, places: Sequence[Place], matrix: Matrix, stats: StatsView, *, alpha: float | str | None = None, seed: int = 0,
    ranks: Mapping[str, int] | None = None, pattern: Mapping[str, int] | None = None, asked: int | None = None,
) -> Design:  # fmt: skip
    """Ranks of all matrices.

    Args:
        recipe: with the budget of the run.
        places: the matrices.
        matrix: reads one of them.
        stats: the statistics that the recipe needs.
        alpha: numerator of the scale: a number, "r", "2r"; None is the recipe's.
        seed: of the run.
        ranks: decided by an earlier run: nothing is computed.
        pattern: regular expression of a layer's name -> its rank, before everything else.
        asked: with `ranks`, the rank that was asked for then.

    Raises:
        UsageError: a rank above a layer, or a budget that the allocation cannot read.
    """
    known: dict[str, Parts] = {}
    if ranks is None:
        ranks, known = _ranks(recipe, places, matrix, stats, seed, pattern or {})
    started = {p.module for p in places if ranks.get(p.site.name)}
    # the blocks of a fused layer stand or fall together
    ranks = {k: max(r, 1) if any(p.site.name == k and p.rows and p.module in started for p in places) else r for k, r in ranks.items()}
    for place in places:
        rank = ranks.get(place.site.name)
        if rank is None:
            raise UsageError(f"{place.site.name}: the adapter's config has no rank for this layer.")
        if rank and not 1 <= recipe.form.width(rank, place.full) <= place.full:
            raise UsageError(
                f"{place.site.name}: rank {rank} leaves {recipe.form.width(rank, place.full)} triples to train; "
                f"its shape is {place.site.shape[0]}x{place.site.shape[1]}, so the rank must be below {place.full}."
            )
    used = [p for p in places if ranks[p.site.name] > 0]
    if not used:
        raise UsageError(f"{recipe.name}: the allocation gave no layer a rank. Raise the budget.")
    value = recipe.budget.value if recipe.budget.kind in ("rank", "total_rank") else 0
    mean = round(sum(ranks.values()) / len(ranks)) or 1
    asked = asked or (int(value) if value >= 1 and (recipe.budget.kind == "rank" or isinstance(value, float)) else mean)
    return Design(
        recipe, tuple(used), dict(ranks), asked, _alpha(alpha if alpha is not None else recipe.train.get("alpha", "r"), asked), known
    )


def _alpha(value: float | str, rank: int) -> float:
    if isinstance(value, str):
        factor = value.removesuffix("r")
        try:
            return (float(factor) if factor else 1.0) * rank if value.endswith("r") else float(value)
        except ValueError:
            raise UsageError(f'alpha: expected a number, "r" or a multiple such as "2r", found {value!r}.') from None
    if isinstance(value, bool) or not value > 0:
        raise UsageError(f"alpha: expected a positive number, found {value!r}.")
    return float(value)


def _ranks(
    recipe: Recipe, places: Sequence[Place], matrix: Matrix, stats: StatsView, seed: int, pattern: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, Parts]]:
    """Ranks of the matrices, and the triples that were computed to find them."""
    fixed = {p.site.name: r for p in places for r in [_by_pattern(p, pattern)] if r is not None}
    unmatched = [k for k in pattern if not any(_matches(p, k) for p in places)]
    if unmatched:
        raise UsageError(f"rank_pattern: {unmatched[0]!r} matches no layer.{did_you_mean(unmatched[0], [p.site.name for p in places])}")
    open_places = [p for p in places if p.site.name not in fixed]
    budget = recipe.budget
    asked = budget.value if budget.kind == "rank" and isinstance(budget.value, int) else 0
    for place in places:
        rank = fixed.get(place.site.name, asked)
        if rank > place.full:
            raise UsageError(
                f"{place.site.name}: rank {rank} is above the layer, whose shape is {place.site.shape[0]}x{place.site.shape[1]}. Give a rank of at most "
                f"{min(p.full for p in places)}, or leave small layers out (target)."
            )
    if not open_places:
        return fixed, {}
    costs = {p.site.name: recipe.form.cost(Bundle(p.site.name, (p.site,))) for p in open_places}
    known: dict[str, Parts] = {}
    curves: dict[str, Sequence[float]] = {}
    if recipe.allocate.decides == "spectra" or budget.kind in ("energy", "error", "threshold"):
        curves, known = _curves(recipe, open_places, matrix, stats, seed)
    ranks = recipe.allocate(curves, costs, budget)
    return fixed | {k: int(r) if r is not None else costs[k].full for k, r in ranks.items()}, known


def _curves(
    recipe: Recipe, places: Sequence[Place], matrix: Matrix, stats: StatsView, seed: int
) -> tuple[dict[str, Sequence[float]], dict[str, Parts]]:
    """Value curves; matrices that are made of nothing but one shared input are factorised once."""
    from ..progress import track

    curves: dict[str, Sequence[float]] = {}
    known: dict[str, Parts] = {}
    shared: dict[str, tuple[Sequence[float], Parts]] = {}
    kept = 0
    for place in track(places, "spectra"):
        name = place.site.name
        full = place.site.shape[1] if recipe.source.kind == "moments" else place.full
        most = recipe.allocate.most(recipe.budget, len(places), place.full) or full
        key = input_of(stats, place.site) if recipe.source.kind == "moments" else name
        if key not in shared:
            found = curve(recipe, place.site, lambda _s, p=place: matrix(p), stats, most, seed=seed)
            kept += 8 * found[1].left.numel() + 8 * found[1].right.numel()
            shared = {**shared, key: found} if recipe.source.kind == "moments" else {key: found}
        curves[name], parts = shared[key]
        curves[name] = curves[name][:most]
        if kept <= KNOWN_BYTES:
            known[name] = parts
    return curves, known


def input_of(stats: StatsView, site: Site) -> str:
    """Id of the input that a site reads, where the statistics know it."""
    sites = getattr(stats, "sites", None)
    return sites.get(site.name, site.reads or site.name) if isinstance(sites, Mapping) else site.reads or site.name


def _matches(place: Place, pattern: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", place.module) is not None or place.site.name == pattern


def _by_pattern(place: Place, pattern: Mapping[str, int]) -> int | None:
    return next((int(r) for k, r in pattern.items() if _matches(place, k)), None)


def branch_of(found: Design, module: str, action: Action, *, dropout: float = 0.0, bias: bool = True) -> Branch:
    """The empty branch of a layer.

    Args:
        found: the design.
        module: the layer.
        action: how matrices act on its input.
        dropout: of the input.
        bias: whether it has a bias.
    """
    from ..nn.split import Split

    places = found.of(module)

    def one(place: Place, acts: Action) -> Branch:
        rank = found.ranks[place.site.name]
        return empty(found.recipe, acts, rank, asked=found.asked, alpha=found.alpha, dropout=dropout, bias=bias)

    if len(places) == 1 and places[0].rows is None:
        return one(places[0], action)
    blocks = {p.label: one(p, type(action)(p.site.shape[0], p.site.shape[1])) for p in places}
    whole = Split(action, blocks, [p.rows.index() for p in places if p.rows is not None])
    whole.recipe_name = found.recipe.name
    return whole


def start_of(found: Design, module: str, branch: Branch, matrix: Matrix, stats: StatsView, *, seed: int) -> dict[str, Start]:
    """Initial tensors of every matrix of a layer, by its label. The branch is not changed."""
    blocks = branch.layers()
    out: dict[str, Start] = {}
    for place in found.of(module):
        out[place.label] = start(
            found.recipe, place.site, blocks[place.label], lambda _s, p=place: matrix(p), stats,
            rank=found.ranks[place.site.name], seed=seed, known=found.known.get(place.site.name),
        )  # fmt: skip
    return out


class NoStats:
    """Stands where a recipe measures nothing."""

    def get(self, stat: Stat, site: Site) -> Any:
        raise Refused(f"{site.name}: {stat.kind} was never declared in `needs`, so it was not measured.")


@dataclass(frozen=True)
class Parents:
    """Statistics under the names of whole layers, asked for matrices inside them and for layers that already hold an adapter.

    Args:
        inner: where they are.
    """

    inner: Any

    @property
    def sites(self) -> Mapping[str, str]:
        """Input ids by layer, with every name that `get` understands."""
        known: Mapping[str, str] = getattr(self.inner, "sites", {})
        return _Names({k.removesuffix(".base_layer"): v for k, v in known.items()})

    def get(self, stat: Stat, site: Site) -> Any:
        name = site.name.partition("[")[0]
        known: Mapping[str, str] = getattr(self.inner, "sites", {})
        if name not in known and f"{name}.base_layer" in known:
            name = f"{name}.base_layer"
        return self.inner.get(stat, replace(site, name=name))


class _Names(dict[str, str]):
    """Looks a matrix of a fused layer up under the layer's name."""

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        return super().get(key.partition("[")[0], default)
