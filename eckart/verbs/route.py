"""How a run takes its statistics, and what that takes of memory: decided with the plan, before any tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..axes.protocols import Bundle, Site, Stat, StatsView
from ..axes.recipe import Recipe
from ..engine import Engine
from ..errors import UsageError
from ..plan import Plan, judges
from ..runners import blocks
from ..runners.budget import CACHE_BYTES, FILES, PROGRAM, beside_program, calibration_bytes, fitted, words
from ..runners.predict import Peak, predict_whole
from ..runners.walk import Unwalkable
from ..runners.whole import Sweep
from ..stats import predict_bytes
from .by_blocks import ByBlocks, one_by_one, spans_of, together
from .calibrate import Calibration, is_tensors, length_limit, options_of, rows_of
from .host import Host

SPOOL = 1 << 30  # bytes of activations between blocks that stay in memory, where nothing limits them


@dataclass(frozen=True, eq=False)
class Route:
    """How statistics are taken.

    Args:
        needs, sites: what is measured, and where; nothing where there is nothing to measure.
        by_blocks: one block at a time; None is the whole model in memory.
        streams: the statistics of a block go to its jobs and are dropped; otherwise all are there before the first job.
        note: what was chosen where there was a choice, for people; it enters no byte of the result.
        caution: why it is not what would take less memory; likewise.
    """

    needs: frozenset[Stat] = frozenset()
    sites: tuple[Site, ...] = ()
    by_blocks: ByBlocks | None = None
    streams: bool = False
    note: str = ""
    caution: str = ""

    @property
    def measures(self) -> bool:
        """Whether statistics are taken before the first job."""
        return bool(self.needs) and not self.streams

    def fingerprint(self, given: Any) -> str:
        """Of the statistics, those at hand or those that will come."""
        if self.streams and self.by_blocks is not None:
            return self.by_blocks.fingerprint
        return given.fingerprint if given is not None else ""

    def sweeps(self, rec: Recipe, bundles: Sequence[Bundle], given: StatsView | None, file: Path | None) -> tuple[Sweep, Sweep]:
        """How bundles come with their statistics: in wave one, where inputs are always the original's, and in the cut.

        Args:
            rec, bundles: of the run.
            given: all statistics, unless they are streamed.
            file: where other processes find them.
        """
        if not self.streams or self.by_blocks is None:
            every = together(bundles, given, file)
            return every, every
        return one_by_one(self.by_blocks, rec, bundles, original=True), one_by_one(self.by_blocks, rec, bundles)


def plan_route(plan: Plan, host: Host, rec: Recipe, bundles: Sequence[Bundle], how: Calibration, given: bool, engine: Engine, folder: Path | None) -> tuple[Plan, Route]:  # fmt: skip
    """The plan with its memory and disk, and how statistics will be taken.

    "auto" goes block by block where the recipe wants propagated inputs, or where the whole model does not fit into the limit; it falls back to
    the whole model where that cannot be.

    Args:
        plan, rec, bundles: of the run.
        host: the model; no tensor of it is read.
        how: how statistics are taken.
        given: whether they are at hand.
        engine: where jobs run.
        folder: where activations are spooled; None is the system's temporary folder.

    Raises:
        UsageError: what is asked for cannot be.
    """
    fit = partial(_fit, plan, host, rec, engine, how.limit)
    needs, sites = rec.needs(), tuple(s for b in bundles for s in b.sites)
    propagated = any(s.inputs == blocks.PROPAGATED for s in needs)
    if propagated and (given or how.runner == "whole"):
        only = "statistics of an earlier run hold none" if given else "--calibrate whole cannot"
        raise UsageError(f"{rec.name} measures inputs that passed through what is already compressed: {only}. Use --calibrate auto.")
    if given or not needs:
        return fit({}, 0), Route()
    whole = Route(needs, sites)
    if how.runner == "whole" or (how.runner == "auto" and how.limit is None and not propagated):
        return fit(_whole(host, how, whole), 0), whole
    found = _by_blocks(host, rec, whole, bundles, how, engine, folder)
    in_memory = fit(_whole(host, how, whole, None if isinstance(found, str) else found), 0)
    if how.runner == "auto" and not propagated and in_memory.peak <= (how.limit or 0):
        return in_memory, whole
    if not isinstance(found, str):
        streams = propagated or (plan.decides == "shape" and how.file is None and not engine.remote)
        return _with_blocks(plan, replace(whole, by_blocks=found, streams=streams), fit, bundles, how, engine, in_memory)
    if how.runner == "blocks" or propagated:
        remedy = "Leave out what asks for propagated inputs." if propagated else "Use --calibrate auto or whole."
        raise UsageError(f"{host.name} cannot be calibrated block by block: {found} {remedy}")
    return in_memory, replace(whole, caution=f"The whole model is in memory for calibration. Block by block it cannot be: {found}")


def cautions(route: Route, plan: Plan, limit: int | None) -> list[str]:
    """That of the route, and that a limit does not count the program where it is too small for that."""
    found = [route.caution] if route.caution else []
    if limit is not None and beside_program(plan) <= limit < plan.peak:
        found.append(f"--max-memory {words(limit)} is kept beside Python and its libraries, which take about {words(PROGRAM)} themselves.")
    return found


def _by_blocks(host: Host, rec: Recipe, route: Route, bundles: Sequence[Bundle], how: Calibration, engine: Engine, folder: Path | None) -> ByBlocks | str:  # fmt: skip
    """What the block runner is given, or why there can be none: a sentence."""
    propagated = any(s.inputs == blocks.PROPAGATED for s in route.needs)
    if any(s.via != "forward" for s in route.needs):
        return f"{rec.name} measures gradients, which run through the whole model."
    if judges(rec) and not propagated:
        return f"{rec.name} measures losses of the whole model, or trains it."
    if engine.remote and propagated:
        return "jobs in other processes do not wait for the block before. Leave --engine out."
    if how.file is not None and propagated:
        return "inputs that passed through this very result are of no use to another run. Leave --stats out."
    try:
        spans = spans_of(bundles, propagated)
        rows = rows_of(host, how)
        chain = host.chain(rows[0])
    except Unwalkable as error:
        return str(error)
    return ByBlocks(chain, rows, route.needs, route.sites, options_of(host, how), spans, 0, folder)


def _fit(plan: Plan, host: Host, rec: Recipe, engine: Engine, limit: int | None, parts: dict[str, int], more_disk: int) -> Plan:
    changed = [j for j in plan.jobs if j.state != "dense"] if rec.form.layout != "dense" else []
    disk = host.reader.nbytes - sum(host.reader.info(k).nbytes for j in changed for k in j.tensors) + sum(j.bytes for j in changed)
    cut_as_seen = all(s.inputs == blocks.ORIGINAL for axis, choice in rec.axes().items() if axis != "refine" for s in choice.needs)
    cache = CACHE_BYTES if cut_as_seen else 0  # bases of wave one are of no use where the cut is measured on other inputs
    return fitted(plan, workers=_at_once(engine), cache=cache, parts=parts, disk=disk + more_disk, limit=limit)


def _at_once(engine: Engine) -> int:
    """Jobs at once in this process."""
    return 0 if engine.remote else engine.workers


def _whole(host: Host, how: Calibration, route: Route, found: ByBlocks | None = None) -> dict[str, int]:
    """What calibration of the whole model takes: by a walk through it where there is one, else an estimate from the config."""
    if found is not None:
        peak = predict_whole(found.chain, found.rows, route.needs, route.sites)
        return {"model": peak.weights, "activations": peak.activations, "statistics": peak.statistics}
    tokens = how.batch_size * (length_limit(host, how.max_length) if not is_tensors(how.texts) else 1)
    backward = any(s.via == "backward" for s in route.needs)
    return {
        "statistics": predict_bytes(route.needs, route.sites, leaves=-(-len(how.texts) // how.batch_size)),
        "model": calibration_bytes(host.reader.config, host.reader.nbytes, tokens, backward),
    }


def _with_blocks(
    plan: Plan, route: Route, fit: Callable[[dict[str, int], int], Plan], bundles: Sequence[Bundle], how: Calibration, engine: Engine, in_memory: Plan
) -> tuple[Plan, Route]:  # fmt: skip
    """The plan of the block runner, with as many activations in memory as there is room for."""
    found = route.by_blocks
    assert found is not None
    jobs = _at_once(engine) * max((j.peak for s in plan.stages for j in s.jobs), default=0)
    largest = max((predict_bytes(route.needs, [s]) for s in route.sites), default=0)
    changed = _largest_step(plan, found, bundles) if found.propagated else 0

    def beside(peak: Peak) -> int:
        """Jobs run, and files are written, while a step is held, or when all statistics lie on disk."""
        return max(peak.step + changed if route.streams else _at_once(engine) * largest, peak.total - jobs - FILES)

    peak = found.predict(route.streams, 0)
    spool = SPOOL
    if how.limit is not None:
        least = FILES + jobs + beside(peak)
        spool = min(SPOOL, max(0, how.limit - least - (PROGRAM if least + PROGRAM <= how.limit else 0)))
    peak = found.predict(route.streams, spool) if spool else peak
    kept = 0 if route.streams else predict_bytes(route.needs, route.sites) * (1 if how.file is None else 2)
    planned = fit({"calibration": beside(peak)}, peak.spooled + kept)
    why = (
        ", since inputs pass through what is already compressed"
        if found.propagated
        else " for --max-memory"
        if how.runner == "auto"
        else ""
    )
    note = (
        f"Calibration goes block by block{why}: at most {words(peak.total)}, at {peak.where}. With the whole model in memory this run would take "
        f"{words(beside_program(in_memory))} beside the program."
    )
    return planned, replace(route, by_blocks=replace(found, spool=spool), note=note)


def _largest_step(plan: Plan, found: ByBlocks, bundles: Sequence[Bundle]) -> int:
    """Most bytes of new tensors of one step."""
    new = {j.name: j.bytes for j in plan.jobs}
    spans = blocks.all_spans(found.spans, len(found.chain.walk.blocks))
    return max((sum(new[b.name] for b in bundles if b.sites[0].block in span) for span in spans), default=0)
