"""What a search tries when nobody says what, and how successive halving spends evaluations on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..axes import Recipe, allocate, group, refine, score
from ..axes.shared import SharedBasis
from ..errors import UsageError
from ..plan import trains_factors
from ..registry import get_recipe
from .compress import resolve

SINGLES = ("modegpt", "svd_llm", "swift_svd", "svd_llm_v2", "basis_sharing", "asvd", "fwsvd")
"""Recipes of the papers, as they are."""
FILL: dict[str, Any] = {"score": score.PredictedLoss(), "allocate": allocate.WaterFill()}
MEASURED: dict[str, Any] = {"score": score.MeasuredLoss(grid=(0.25, 0.5, 0.75), batches=1), "allocate": allocate.WaterFill()}
UNIFORM: dict[str, Any] = {"score": score.PredictedLoss(), "allocate": allocate.Uniform()}
SHARED: dict[str, Any] = {"group": group.SameInput(), "form": SharedBasis(), "roles": {}}
REFIT: dict[str, Any] = {"refine": refine.LeastSquares()}


def grid() -> list[Recipe]:
    """Metric x grouping x allocation x refit, then the recipes of the papers; the most promising first, since a budget takes the head of the list.

    Left out is what changes nothing: a pair that is cut in a metric of the layer's inputs, alone or beside one of its outputs, is fitted to them.
    """
    out: list[Recipe] = []
    for parts in (
        {"water_fill": FILL},
        {"same_input": SHARED, "water_fill": FILL},
        {"measured": MEASURED},
        {"same_input": SHARED, "measured": MEASURED},
    ):
        out += [mixed(name, parts) for name in ("two_sided:weight_grads", "two_sided")]
        out.append(mixed("two_sided:weight_grads", parts | {"refit": REFIT}))
    for parts in ({"water_fill": FILL}, {"same_input": SHARED, "water_fill": FILL}, {"measured": MEASURED}):
        out.append(mixed("svd_llm", parts))
    out += [mixed(name, {"uniform": UNIFORM}) for name in ("two_sided:weight_grads", "two_sided")]
    return out + [get_recipe(name) for name in SINGLES]


def mixed(name: str, parts: dict[str, dict[str, Any]]) -> Recipe:
    """A recipe with other choices on some axes, named for them."""
    base = get_recipe(name)
    changes = {axis: value for part in parts.values() for axis, value in part.items()}
    words = [w for w, part in parts.items() if any(getattr(base, axis) != value for axis, value in part.items())]
    return replace(base, name=" + ".join([name, *words]), variants={}, **changes)


def checked(recipes: Sequence[str | Recipe] | None) -> list[Recipe]:
    """The candidates, each once and by a name of its own.

    Raises:
        UsageError: one that a search cannot compare, or none.
    """
    found: list[Recipe] = []
    for given in grid() if recipes is None else recipes:
        recipe = resolve(given, None, (), "factored")
        if isinstance(given, str) and ":" in given:
            recipe = replace(recipe, name=given, variants={})
        why = None
        if trains_factors(recipe) or recipe.recover is not None or recipe.allocate.decides == "training":
            why = "trains. A search compares what is made without training; add the training to its winner"
        elif any(s.inputs == "propagated" for s in recipe.needs()):
            why = "measures inputs that passed through what is already compressed, which candidates cannot share. Add that to the winner"
        elif recipe.form.stored != "same":
            why = "stores integers. Search without them, and add --quantise to the winner"
        if why is not None:
            raise UsageError(f"{recipe.name} {why}.")
        if any(recipe.name == r.name for r in found):
            raise UsageError(f"two candidates are called {recipe.name!r}. Give each a name of its own.")
        found.append(recipe)
    if not found:
        raise UsageError("a search needs at least one candidate. Leave --recipe out for the whole grid.")
    return found


@dataclass(frozen=True)
class Rung:
    """A step of successive halving: so many candidates, each on so many batches of the held-out text."""

    candidates: int
    batches: int


def ladder(candidates: int, batches: int) -> list[Rung]:
    """The rungs: a quarter of the batches for all candidates, half of them for the better half, all of them for the better half of those.

    At least two candidates reach the last rung. Where a rung would see no more text than the one before, it is left out.

    Example:
        >>> [(r.candidates, r.batches) for r in ladder(10, 8)]
        [(10, 2), (5, 4), (3, 8)]
        >>> ladder(1, 8)
        [Rung(candidates=1, batches=8)]
    """
    if candidates <= 2:
        return [Rung(candidates, batches)]
    steps = [Rung(max(2, -(-candidates * share // 4)), -(-batches // share)) for share in (4, 2, 1)]
    return [step for step, before in zip(steps, [None, *steps], strict=False) if before is None or step.batches > before.batches]


def affordable(candidates: int, batches: int, evaluations: int | None) -> int:
    """How many of the candidates a number of evaluations at each size is enough for.

    Example:
        >>> affordable(24, 8, 20), affordable(24, 8, None)
        (11, 24)
    """
    if evaluations is None:
        return candidates
    if evaluations < 1:
        raise UsageError(f"evaluations: expected at least 1, found {evaluations}.")
    return max(n for n in range(1, candidates + 1) if n == 1 or spent(ladder(n, batches)) <= evaluations)


def spent(rungs: Sequence[Rung]) -> int:
    """Evaluations of a ladder."""
    return sum(r.candidates for r in rungs)
