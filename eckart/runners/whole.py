"""Run a plan: spectra if the allocation wants them, the decision, then the cut, on any engine.

The bundles come in groups, with the statistics of each: one group when all statistics are at hand, one per block when a runner measures
block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..axes.protocols import Bundle, Cost, Edits, Parts, StatsView
from ..engine import Engine
from ..plan import Job, Plan
from ..progress import track
from ..store import TensorInfo
from ..store.journal import Entry
from .budget import CACHE_BYTES
from .jobs import Context, Desk, Look, Task, Write
from .judge import Judge
from .sensitivity import measure
from .train import learn_cut, learn_ordered


@dataclass(frozen=True)
class Group:
    """Bundles whose statistics are at hand together.

    Args:
        bundles: what is solved.
        stats: their statistics, in this process.
        file: the same for other processes; "" where nothing is measured.
        take: told the edits of each bundle by its name, where what follows is measured through them.
    """

    bundles: Sequence[Bundle]
    stats: StatsView
    file: str = ""
    take: Callable[[str, Edits], None] | None = None


class Sweep(Protocol):
    """Goes through all bundles; may be called again. Groups are asked for one by one and dropped before the next one is made."""

    def __call__(self, done: frozenset[str] = frozenset()) -> Iterable[Group]:
        """The groups; statistics of bundles that are done need not be measured."""
        ...


Places = Mapping[str, Mapping[str, TensorInfo]]
Cut = tuple[Job, Edits] | Entry
"""A finished job: its edits, or the journal entry of tensors that another process has written."""


@dataclass(frozen=True)
class Seen:
    """What wave one learnt of a bundle: the value of each rank, and the parts if they were kept."""

    curve: tuple[float, ...]
    parts: Parts | None = None


@dataclass(frozen=True)
class Run:
    """How a plan is run; never what comes out.

    Args:
        context: what jobs share in this process; its statistics are replaced by each group's.
        engine: where jobs run.
        desk: what they are given in another process, None for an engine that has none.
        cache: bytes of bases kept between the waves.
        judge: of the original model, for recipes that measure losses or train.
    """

    context: Context
    engine: Engine
    desk: Desk | None = None
    cache: int = CACHE_BYTES
    judge: Judge | None = None


def decide(plan: Plan, costs: Mapping[str, Cost], sweep: Sweep, run: Run) -> tuple[Plan, dict[str, Seen]]:
    """Wave one and the allocation. A plan whose ranks follow from shapes is returned as it is."""
    if plan.decides == "shape":
        return plan, {}
    jobs = {j.name: j for j in plan.stages[0].jobs}
    keep = _kept(plan, run.cache)
    seen: dict[str, Seen] = {}
    recipe = run.context.recipe
    if run.judge is not None and recipe.factor.trains:
        for group in sweep():
            context = replace(run.context, stats=group.stats)
            for name, parts in learn_ordered(recipe, group.bundles, context, run.judge, plan.seed).items():
                bundle = next(b for b in group.bundles if b.name == name)
                seen[name] = Seen(tuple(recipe.score.curve(bundle, parts.spectrum, group.stats)), parts)
        return plan.decided(recipe.allocate({n: s.curve for n, s in seen.items()}, costs, recipe.budget), costs), seen
    for group in sweep():
        seen |= _spectra(plan, group, costs, run, keep)
        del group
    curves = {n: s.curve for n, s in seen.items()}
    if run.judge is not None and recipe.allocate.decides == "training":
        parts = {
            t.bundle.name: seen[t.bundle.name].parts or replace(run.context, stats=g.stats).look(t)[1]
            for g in sweep()
            for t in _tasks(jobs, g)
        }
        curves = {
            n: (p,) for n, p in learn_cut(recipe, [b for g in sweep() for b in g.bundles], costs, parts, run.judge, plan.seed).items()
        }
    return plan.decided(recipe.allocate(curves, costs, recipe.budget), costs), seen


def _spectra(plan: Plan, group: Group, costs: Mapping[str, Cost], run: Run, keep: frozenset[str]) -> dict[str, Seen]:
    """Wave one of a group."""
    jobs = {j.name: j for j in plan.stages[0].jobs}
    tasks = _tasks(jobs, group)
    recipe, context = run.context.recipe, replace(run.context, stats=group.stats)

    def look(task: Task) -> dict[str, object]:
        curve, parts = context.look(task)
        return {"name": task.bundle.name, "curve": curve, "parts": parts if task.bundle.name in keep else None}

    fn = Look(_at(run.desk, group)) if run.engine.remote else look
    seen: dict[str, Seen] = {}
    for found in track(run.engine.run(fn, tasks, lambda t: t.seconds), "spectra", len(tasks)):
        seen[found["name"]] = Seen(tuple(found["curve"]), found.get("parts"))
    if run.judge is not None and recipe.score.measures:
        found = measure(jobs, group.bundles, costs, {n: s.parts for n, s in seen.items()}, context, run.judge)
        seen |= {n: replace(seen[n], curve=tuple(recipe.score.measured(seen[n].curve, points))) for n, points in found.items()}
    return seen


def cut(
    plan: Plan, sweep: Sweep, run: Run, seen: Mapping[str, Seen], *, done: frozenset[str] = frozenset(), places: Places | None = None, shards: str = ""
) -> Iterator[Cut]:  # fmt: skip
    """Every bundle that is factored, or stored in another type, as it is ready.

    Args:
        plan: with ranks.
        sweep: the bundles with their statistics.
        run: where.
        seen: what `decide` learnt.
        done: jobs that an earlier run has stored; they are left out unless what follows is measured through them.
        places: where the tensors of each job go, for an engine in other processes.
        shards: the folder of the shards, likewise.
    """
    jobs = {j.name: j for j in plan.jobs if j.state in ("factored", "dense")}
    form = run.context.recipe.form
    for group in sweep(done):
        names = {b.name for b in group.bundles if jobs[b.name].state == "factored" or form.outcome_dense(b) is not None}
        names -= done if group.take is None else frozenset()
        todo = [b for b in group.bundles if b.name in names]
        tasks = [_task(jobs[b.name], b, cap=jobs[b.name].cap if plan.decides != "shape" else 0, places=places) for b in todo]
        yield from _cut(jobs, group, tasks, run, seen, shards)
        del group


def _cut(jobs: Mapping[str, Job], group: Group, tasks: Sequence[Task], run: Run, seen: Mapping[str, Seen], shards: str) -> Iterator[Cut]:
    if run.engine.remote:
        fn = Write(replace(_at(run.desk, group), shards=shards))
        found = run.engine.run(fn, tasks, lambda t: t.seconds)
        for raw in track(found, "factorising", len(tasks)):
            yield Entry(raw["job"], raw["tensors"], raw["record"])
        return
    context = replace(run.context, stats=group.stats)

    def one(task: Task) -> tuple[Job, Edits]:
        earlier = seen.get(task.bundle.name)
        return jobs[task.bundle.name], context.cut(task, earlier.parts if earlier else None)

    for job, edits in track(run.engine.run(one, tasks), "factorising", len(tasks)):
        if group.take is not None:
            group.take(job.name, edits)
        yield job, edits


def _kept(plan: Plan, limit: int) -> frozenset[str]:
    """Bundles whose bases stay in memory: in plan order, so that it does not depend on the order of arrival."""
    spent, keep = 0, set[str]()
    for job in plan.stages[0].jobs:
        spent += 8 * job.cap * sum(job.shape)
        if spent <= limit:
            keep.add(job.name)
    return frozenset(keep)


def _tasks(jobs: Mapping[str, Job], group: Group) -> list[Task]:
    """Wave one of a group."""
    return [_task(jobs[b.name], b, cap=jobs[b.name].cap) for b in group.bundles]


def _task(job: Job, bundle: Bundle, *, cap: int, places: Places | None = None) -> Task:
    rank = 0 if job.state == "dense" else job.rank or 1
    return Task(bundle, rank, job.algorithm, job.seed, cap, job.seconds, places[job.name] if places else {})


def _at(desk: Desk | None, group: Group) -> Desk:
    assert desk is not None, "an engine in other processes has a desk"
    return replace(desk, stats=group.file)
