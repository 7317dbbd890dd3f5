"""What a run of `adapt` is asked for: which recipe, with which changes, on which layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from ..axes import Budget, Recipe
from ..axes.border import override
from ..axes.protocols import Site, Stat
from ..errors import UsageError, did_you_mean
from ..registry import get_recipe


def resolve(
    recipe: str | Recipe, rank: float | None = None, *, variant: str | None = None, glue: Sequence[str | Recipe] = (), base: str | None = None,
    settings: Sequence[str] = (),
) -> Recipe:  # fmt: skip
    """The recipe of a run.

    Args:
        recipe: name, or a recipe.
        rank: replaces the recipe's budget: triples of each matrix, or their mean where an allocation spreads them.
        variant: one of the recipe's named forms.
        glue: recipes whose penalties, gradients, losses and refreshes act beside its own.
        base: "subtract" or "mutate".
        settings: `axis.field=value`, applied last.

    Raises:
        UsageError: not a recipe for adapters, an unknown variant or setting, two budgets.
    """
    found = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if found.verb != "adapt":
        raise UsageError(f"{found.name} does {found.verb}, not adapt. `eckart ls --verb adapt` shows what fits here.")
    if variant is not None:
        found = found.variant(variant)
    for other in glue:
        more = get_recipe(other) if isinstance(other, str) else other
        if not more.pieces() and not more.target.glues:
            raise UsageError(f"glue: {more.name} does nothing during training, so there is nothing to take from it.")
        found = found.plus(more)
    if rank is not None and not found.form.ranked:
        raise UsageError(f"rank: {found.name} trains whole weights (form={found.form.kind}), which have no rank. Leave it out.")
    if rank is not None:
        if any(s.startswith("budget.") for s in settings):
            raise UsageError("two budgets: rank and --set budget... exclude each other. Give one of them.")
        found = found.with_(budget=_budget(rank, found))
    if base is not None:
        if base not in ("subtract", "mutate"):
            raise UsageError(f"base: expected 'subtract' or 'mutate', found {base!r}.")
        if not any(f.name == "base" for f in fields(found.form)):
            raise UsageError(
                f"base={base}: form={found.form.kind} takes nothing away from the weight, so there is no choice. Leave base out."
            )
        found = found.with_(form=replace(found.form, base=base))
    return override(found, settings) if settings else found


def _budget(rank: float, recipe: Recipe) -> Budget:
    if (
        isinstance(rank, bool)
        or not isinstance(rank, int | float)
        or rank <= 0
        or (isinstance(rank, float) and rank >= 1 and rank != int(rank))
    ):
        raise UsageError(f"rank: expected an integer of at least 1, or a share in (0, 1), found {rank!r}.")
    if recipe.budget.kind == "total_rank":
        return Budget(total_rank=float(rank))
    return Budget(rank=int(rank) if rank >= 1 else rank)


def refuse_without_data(recipe: Recipe, calib: Any, stats: Any) -> None:
    """Say that a recipe measures something, before anything is loaded.

    Raises:
        UsageError: it does, and there is neither calibration nor statistics.
    """
    if recipe.needs() and calib is None and stats is None:
        what = " and ".join(sorted({_words(s) for s in recipe.needs() if s.kind != "frequency"}))
        raise UsageError(
            f"{recipe.name} measures {what} on calibration text, and there is none. Give --calib FILE (calib=...), or use a recipe that needs "
            "no data: pissa, lora."
        )


def _words(stat: Stat) -> str:
    if stat.kind == "path":
        return "the path of the hidden state through the blocks"
    return f"{stat.kind} of the layers' {'inputs' if stat.at == 'in' else stat.at}"


def chosen(recipe: Recipe, sites: Sequence[Site], catalogue: Any, target: str | Iterable[str] | None) -> list[Site]:
    """The layers of a run: those of the recipe's target, or those that the user names.

    Args:
        recipe: with its target.
        sites: every layer that can hold an adapter.
        catalogue: what the recipe's target reads.
        target: names, of which a layer's name is or ends with one; a regular expression for the whole name as one string; or None.

    Raises:
        UsageError: a name that matches nothing, with near misses, or no layer at all.
    """
    if target is None:
        found, skipped = recipe.target.sites(catalogue)
        able = {s.name for s in sites}
        found = [s for s in found if s.name in able]
        if not found:
            reasons = "; ".join(sorted(set(skipped.values()))) or "the model has no linear layers"
            raise UsageError(f"{recipe.name}: no layer is targeted ({reasons}). Name layers: target=[...], --target q_proj.")
        return found
    if isinstance(target, str):
        found = [s for s in sites if re.fullmatch(target, s.name) or _named(s.name, target)]
        names = [target] if not found else []
    else:
        wanted = list(target)
        if not wanted:
            raise UsageError("target: expected names of layers, found none.")
        found = [s for s in sites if any(_named(s.name, t) for t in wanted)]
        names = [t for t in wanted if not any(_named(s.name, t) for s in sites)]
    if names:
        refuse_target(names, [s.name for s in sites])
    return found


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def refuse_target(names: Sequence[str], known: Sequence[str]) -> None:
    """Say which target names match no layer, and what comes near.

    Raises:
        UsageError: always.
    """
    ends = sorted({n.rpartition(".")[2] for n in known})
    hints = "; ".join(f"{n!r}.{did_you_mean(n.rpartition('.')[2], ends)}" for n in names)
    raise UsageError(f"target: no layer is called {hints} Layers that can hold an adapter end with: {', '.join(ends)}.")
