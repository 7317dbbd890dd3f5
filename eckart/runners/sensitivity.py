"""The measured loss of cutting one matrix alone, for allocations that do not trust predictions."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Bundle, Cost, Parts
from ..progress import track
from .jobs import Context, Task
from .judge import Judge

if TYPE_CHECKING:
    from ..plan import Job


def ranks_at(cost: Cost, grid: Sequence[float]) -> list[int]:
    """Ranks whose pairs store these shares of a matrix, each once, those that save something."""
    found = {math.floor((g * cost.dense - cost.fixed) / cost.per_rank) for g in grid}
    return sorted({min(max(r, 1), cost.break_even) for r in found if cost.break_even})


def measure(
    jobs: Mapping[str, Job], bundles: Sequence[Bundle], costs: Mapping[str, Cost], parts: Mapping[str, Parts | None], context: Context, judge: Judge
) -> dict[str, list[tuple[int, float]]]:  # fmt: skip
    """(rank, rise of the loss) for each bundle cut alone at the score's sizes.

    Args:
        jobs: of wave one.
        bundles, costs: of the plan.
        parts: what wave one kept of each bundle.
        context: recipe, weights and statistics.
        judge: of the original model.
    """
    recipe = context.recipe
    plain = {} if recipe.form.stored == "same" else {"store": "same"}
    dense = replace(context, recipe=recipe.with_(form=replace(recipe.form, layout="dense", **plain), recover=None))
    model = judge.copy()
    few = recipe.score.batches
    base = judge(model, batches=few)
    todo = [(b, r) for b in bundles for r in ranks_at(costs[b.name], recipe.score.grid)]
    out: dict[str, list[tuple[int, float]]] = {b.name: [] for b in bundles}
    for bundle, rank in track(todo, "measuring losses", len(todo)):
        job = jobs[bundle.name]
        edits = dense.cut(Task(bundle, rank, job.algorithm, job.seed, job.cap), parts.get(bundle.name))
        kept = _swap(model, bundle)
        dense.recipe.form.apply(model, bundle, edits)
        out[bundle.name].append((rank, judge(model, batches=few) - base))
        _put_back(model, kept)
    return out


def _swap(model: Any, bundle: Bundle) -> dict[str, Any]:
    """Copies in the place of the bundle's layers; returns the layers themselves."""
    from ..nn.surgery import put

    kept = {s.name: model.get_submodule(s.name) for s in bundle.sites}
    for name, layer in kept.items():
        put(model, name, copy.deepcopy(layer))
    return kept


def _put_back(model: Any, kept: Mapping[str, Any]) -> None:
    from ..nn.surgery import put

    for name, layer in kept.items():
        put(model, name, layer)
