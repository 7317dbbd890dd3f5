"""Run a plan with the whole model at hand: spectra if the allocation wants them, the decision, then the cut, bundle by bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..axes.protocols import Bundle, Cost, Edits, Parts, Read, StatsView
from ..axes.recipe import Recipe
from ..axes.solve import ReadBias, solve, spectrum
from ..engine import Engine
from ..plan import Job, Plan
from ..progress import track

CACHE_BYTES = 2 << 30  # bases of wave one kept for the cut; beyond it a bundle is factorised again


@dataclass(frozen=True)
class Context:
    """What every job of a run shares."""

    recipe: Recipe
    read: Read
    read_bias: ReadBias
    stats: StatsView


@dataclass(frozen=True)
class Seen:
    """What wave one learnt of a bundle: the value of each rank, and the parts if they were kept."""

    curve: tuple[float, ...]
    parts: Parts | None


def decide(
    plan: Plan, costs: Mapping[str, Cost], bundles: Sequence[Bundle], context: Context, engine: Engine
) -> tuple[Plan, dict[str, Seen]]:
    """Wave one and the allocation. A plan whose ranks follow from shapes is returned as it is."""
    if plan.decides == "shape":
        return plan, {}
    jobs = {j.name: j for j in plan.stages[0].jobs}
    kept = 0
    keep: set[str] = set()
    for b in bundles:  # by size in plan order, so that what is cached does not depend on the order of arrival
        kept += 8 * jobs[b.name].cap * sum(b.shape)
        if kept <= CACHE_BYTES:
            keep.add(b.name)

    def look(bundle: Bundle) -> tuple[str, Seen]:
        job = jobs[bundle.name]
        found = spectrum(context.recipe, bundle, context.read, context.stats, cap=max(1, job.cap), algorithm=job.algorithm, seed=job.seed)
        return bundle.name, Seen(found.curve, found.parts if bundle.name in keep else None)

    seen = dict(track(engine.run(look, bundles), "spectra", len(bundles)))
    ranks = context.recipe.allocate({n: s.curve for n, s in seen.items()}, costs, context.recipe.budget)
    return plan.decided(ranks, costs), seen


def cut(
    plan: Plan, bundles: Sequence[Bundle], context: Context, seen: Mapping[str, Seen], engine: Engine, skip: frozenset[str] = frozenset()
) -> Iterator[tuple[Job, Edits]]:
    """The edits of every bundle that is factored, as they are ready; `skip` names those that an earlier run has stored."""
    by_name = {b.name: b for b in bundles}
    todo = [j for j in plan.jobs if j.state == "factored" and j.name not in skip]

    def one(job: Job) -> tuple[Job, Edits]:
        assert job.rank is not None
        earlier = seen.get(job.name)
        parts = earlier.parts if earlier else None
        return job, solve(
            context.recipe,
            by_name[job.name],
            context.read,
            context.read_bias,
            context.stats,
            rank=job.rank,
            algorithm=job.algorithm,
            seed=job.seed,
            parts=parts,
        )

    yield from track(engine.run(one, todo), "factorising", len(todo))
