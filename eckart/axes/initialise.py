"""From a recipe and a matrix to the tensors of a branch: `solve` for adapters. Pure: equal arguments give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import Refused, UsageError
from .branch import Material
from .draw import Draw, drawing
from .protocols import Bundle, Cost, Parts, Read, Site, StatsView
from .recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.action import Action
    from ..nn.branch import Branch
    from .base import Choice


class AdapterForm(Protocol):
    """What a form must say to be an adapter. `form.Branch` is the one that nearly all are settings of.

    `FormChoice` has what it may declare beside: `uses_source`, `ranked`, `conflicts`.
    """

    uses_source: ClassVar[bool]
    ranked: ClassVar[bool]
    conflicts: ClassVar[frozenset[str]]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names that roles may give."""
        ...

    @property
    def identity(self) -> bool:
        """Whether a layer begins as it was."""
        ...

    @property
    def uses_triples(self) -> bool:
        """Whether the matrix is factorised at all."""
        ...

    @property
    def uses_rest(self) -> bool:
        """Whether all triples are wanted, whatever the filter says."""
        ...

    @property
    def split(self) -> bool:
        """Whether the matrices of a fused layer are adapted one by one."""
        ...

    def width(self, rank: int, full: int) -> int:
        """Triples that train at a budget."""
        ...

    def cost(self, bundle: Bundle) -> Cost:
        """What a rank trains, for allocations."""
        ...

    def trainable(self, shape: tuple[int, int], rank: int, roles: Mapping[str, Choice], bias: bool) -> int:
        """Trained numbers, by formula."""
        ...

    def module(
        self, action: Action, rank: int, roles: Mapping[str, Choice], *, asked: int, alpha: float, dropout: float, bias: bool
    ) -> Branch:
        """The empty branch, from shapes alone."""
        ...

    def begin(self, made: Material, empty: Branch, draw: Draw) -> dict[str, Tensor]:
        """Its initial tensors."""
        ...


@dataclass(frozen=True)
class Start:
    """Initial tensors of one branch, and what was seen on the way.

    Args:
        values: name of the tensor -> value.
        record: rank, certificate.
    """

    values: Mapping[str, Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)


def empty(recipe: Recipe, action: Action, rank: int, *, asked: int, alpha: float, dropout: float = 0.0, bias: bool = True) -> Branch:
    """The branch of a layer before it has values: which tensors there are follows from shapes alone.

    Args:
        recipe: with the form, its roles, and what must be remembered in training.
        action: how matrices act on the layer's input.
        rank: the budget of this layer.
        asked: rank that the run asked for.
        alpha: numerator of the scale.
        dropout: of the input.
        bias: whether the layer has a bias.
    """
    form: AdapterForm = recipe.form
    acts = [f"{p.axis}.{p.kind}" for p in recipe.pieces()] + [f"roles.{r.kind}" for r in recipe.roles.values()]
    bad = next((a for a in acts if a in form.conflicts), None)
    if bad is not None:
        raise UsageError(
            f"{recipe.name}: {bad} works on the factors L and R of a branch, which form={recipe.form.kind} does not hold as such. "
            "Leave it out, or use form=branch."
        )
    if recipe.metric.kind != "identity" and any(r.kind == "protect" for r in recipe.roles.values()):
        raise UsageError(
            f"{recipe.name}: roles.protect wants a part whose directions the rest does not share, and parts chosen in a metric "
            f"({recipe.metric.kind}) share theirs. Set metric.kind=identity, or leave the role out."
        )
    branch = form.module(action, rank, recipe.roles, asked=asked, alpha=alpha, dropout=dropout, bias=bias)
    branch.recipe_name = recipe.name
    shapes = {k: tuple(v.shape) for k, v in branch.parts().items()}
    for piece in recipe.pieces():
        for name, shape in piece.state(shapes).items():
            branch.keep(name, shape)
    return branch


def start(
    recipe: Recipe, site: Site, branch: Branch, read: Read, stats: StatsView, *, rank: int, seed: int, algorithm: str = "auto",
    known: Parts | None = None,
) -> Start:  # fmt: skip
    """The tensors with which a branch begins.

    Args:
        recipe: the choices.
        site: the matrix.
        branch: from `empty`, for the shapes; it is not changed.
        read: site -> W (out, in).
        stats: the statistics that the recipe needs.
        rank: the budget of this layer, as `empty` was given it.
        seed: of the run; what is drawn also depends on the layer's name and on nothing else.
        algorithm: as `linalg.svd` takes it.
        known: triples from `curve`, or from a cache: at least as many as are needed.

    Raises:
        Refused: a weight or a statistic that is not finite, or a statistic that is missing.
    """
    import torch

    made = Material()
    record: dict[str, Any] = {"rank": rank}
    form: AdapterForm = recipe.form
    if form.uses_triples:
        full = min(site.shape)
        cap = full if form.uses_rest else recipe.filter.cap(rank, full)
        reuse = known is not None and recipe.factor.nested
        parts = known if reuse and known is not None else factorise(recipe, site, read, stats, cap, seed=seed, algorithm=algorithm)
        assert parts.values is not None
        count = min(cap, len(parts.values))
        if len(parts.values) > count:
            parts = _leading(parts, count)
        made = Material(*recipe.filter.split(parts, rank), weighed=recipe.metric.kind != "identity")
        record["certificate"] = dict(parts.certificate)
    elif form.uses_source:
        weight = read(site)
        _refuse_unless_finite(weight, site.name, recipe)
        made = Material(source=recipe.source.operator(Bundle(site.name, (site,)), read, stats), weight=weight)
    draw = drawing(seed, site.name)
    values = form.begin(made, branch, draw)
    for name, tensor in branch.parts().items():
        if name.startswith("state_"):
            values[name] = torch.zeros_like(tensor)
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise Refused(f"{site.name}: the initial {name} of {recipe.name} is not finite. Check the weights and the calibration data.")
    return Start(values, record)


def factorise(recipe: Recipe, site: Site, read: Read, stats: StatsView, cap: int, *, seed: int, algorithm: str = "auto") -> Parts:
    """The leading `cap` triples of what the recipe factorises, of all of them where fewer exist."""
    from ..seeds import seed_of

    bundle = Bundle(site.name, (site,))
    op = recipe.source.operator(bundle, read, stats)
    if op is None:
        raise UsageError(f"{recipe.name}: form.of={recipe.form.of} is made of triples, and source={recipe.source.kind} is no matrix.")
    _refuse_unless_finite(op, site.name, recipe)
    sides = recipe.metric.sides(bundle, stats)
    return recipe.factor.triples(op, sides, min(cap, *op.shape), algorithm, seed_of(seed, site.name), site.name)


def curve(recipe: Recipe, site: Site, read: Read, stats: StatsView, cap: int, *, seed: int) -> tuple[Sequence[float], Parts]:
    """The value of each of the leading `cap` ranks of one matrix, and its triples."""
    parts = factorise(recipe, site, read, stats, cap, seed=seed)
    return recipe.score.curve(Bundle(site.name, (site,)), parts.spectrum, stats), parts


def _leading(parts: Parts, count: int) -> Parts:
    from dataclasses import replace

    assert parts.values is not None
    core = None if parts.core is None else parts.core[:count, :count]
    return replace(parts, left=parts.left[:, :count], right=parts.right[:count], values=parts.values[:count], core=core)


def _refuse_unless_finite(op: Tensor, name: str, recipe: Recipe) -> None:
    import torch

    # one sum in float64 tells whether anything is wrong; what it is is counted only then
    if not bool(torch.isfinite(op.sum(dtype=torch.float64))):
        bad = int((~torch.isfinite(op)).sum())
        what = "weight" if recipe.source.kind == "weights" else f"{recipe.source.kind} (source)"
        raise Refused(f"{name}: {bad} of {op.numel()} values of its {what} are NaN or Inf; {recipe.name} cannot be initialised from them.")
