"""Statistics of one block at a time in a run: measured, handed to the jobs of the block, dropped; or all of them collected on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Bundle, Edits, Site, Stat, StatsView
from ..axes.recipe import Recipe
from ..errors import UsageError
from ..runners import blocks
from ..runners.jobs import NoStats
from ..runners.predict import Peak, predict
from ..runners.whole import Group, Sweep

if TYPE_CHECKING:
    from ..stats import Stats


@dataclass(frozen=True, eq=False)
class ByBlocks:
    """What the block runner is given in a run.

    Args:
        chain, rows: model and batches.
        needs, sites: what is measured, and where.
        options: seed and the like.
        spans: blocks whose matrices are solved together.
        spool: bytes of activations in memory.
        folder: of what does not fit there; None is the system's temporary folder.
    """

    chain: blocks.Chain
    rows: Sequence[Any]
    needs: frozenset[Stat]
    sites: tuple[Site, ...]
    options: dict[str, Any]
    spans: tuple[range, ...] = ()
    spool: int = 0
    folder: Path | None = None

    @property
    def propagated(self) -> bool:
        """Whether inputs pass through what is already compressed."""
        return any(s.inputs == blocks.PROPAGATED for s in self.needs)

    @property
    def fingerprint(self) -> str:
        """Of the statistics that it takes."""
        return blocks.fingerprint(self.chain.model, self.rows, self.needs, self.sites, **self.options)

    def predict(self, streams: bool, spool: int) -> Peak:
        """The most memory of a sweep in steps, or of a collection."""
        return predict(self.chain, self.rows, self.needs, self.sites, memory=spool, spans=self.spans if streams else ())

    def collect(self) -> Stats:
        """All statistics, in files of the folder."""
        return blocks.collect(self.chain, self.rows, self.needs, self.sites, keep=0, memory=self.spool, folder=self.folder, **self.options)

    def steps(self, skip: set[int]) -> Iterator[blocks.Step]:
        """The sweep, without blocks whose statistics are not wanted."""
        return blocks.sweep(
            self.chain, self.rows, self.needs, self.sites, memory=self.spool, folder=self.folder, skip=skip, spans=self.spans, **self.options
        )  # fmt: skip


def spans_of(bundles: Sequence[Bundle], propagated: bool = False) -> tuple[range, ...]:
    """Blocks that must be measured before any of their matrices can be solved, where bundles reach over several.

    Args:
        bundles: what is solved.
        propagated: whether inputs pass through what is already compressed.

    Raises:
        UsageError: with propagated inputs, a bundle reaches out of the blocks.

    Example:
        >>> a, b, c = (Site(f"layers.{i}.up", (2, 2), (f"{i}",), block=i) for i in range(3))
        >>> spans_of([Bundle("a,b", (a, b), "in"), Bundle("c", (c,))])
        (range(0, 2),)
    """
    out: list[range] = []
    numbers = [sorted({s.block for s in b.sites}) for b in bundles]
    for bundle, found in zip(bundles, numbers, strict=True):
        if propagated and len(found) > 1 and found[0] < 0:
            raise UsageError(
                f"{bundle.name} joins matrices inside and outside of the blocks, through which no inputs can pass block by block."
            )
    inside = [[n for n in found if n >= 0] for found in numbers]
    for span in sorted((range(found[0], found[-1] + 1) for found in inside if len(found) > 1), key=lambda r: r.start):
        if out and span.start < out[-1].stop:
            out[-1] = range(out[-1].start, max(out[-1].stop, span.stop))
        else:
            out.append(span)
    return tuple(out)


def together(bundles: Sequence[Bundle], stats: StatsView | None, file: Path | None) -> Sweep:
    """All bundles in one group.

    Args:
        bundles: what is solved.
        stats: all statistics.
        file: where other processes find them.
    """
    group = Group(bundles, stats or NoStats(), str(file or ""))

    def sweep(done: frozenset[str] = frozenset()) -> list[Group]:
        return [group]

    return sweep


def one_by_one(how: ByBlocks, rec: Recipe, bundles: Sequence[Bundle], *, original: bool = False) -> Sweep:
    """A group per step: the bundles whose last block it is. What they become is what the following inputs pass through.

    Args:
        how: what is measured.
        rec, bundles: of the run.
        original: take inputs of the original model wherever propagated ones are wanted: what ranks are decided by, before anything is cut.
    """
    if original:
        how = replace(how, needs=frozenset(replace(s, inputs=blocks.ORIGINAL) for s in how.needs))
    return partial(_groups, how, rec, bundles, original)


@dataclass(frozen=True)
class _OnOriginal:
    """Statistics of the original model in the place of propagated ones."""

    stats: StatsView

    def get(self, stat: Stat, site: Site) -> Any:
        return self.stats.get(replace(stat, inputs=blocks.ORIGINAL), site)


def _groups(how: ByBlocks, rec: Recipe, bundles: Sequence[Bundle], original: bool, done: frozenset[str] = frozenset()) -> Iterator[Group]:
    busy = {s.block for b in bundles for s in b.sites if b.name not in done}
    skip = set[int]() if how.propagated else set(range(len(how.chain.walk.blocks))) - busy
    waiting = list(bundles)
    for step in how.steps(skip):
        ready = [b for b in waiting if step.block < 0 or all(0 <= s.block <= step.block for s in b.sites)]
        waiting = [b for b in waiting if b not in ready]
        assert step.stats is not None
        stats = _OnOriginal(step.stats) if original else step.stats
        take = partial(_put, rec, step.model, {b.name: b for b in ready}) if step.model is not None else None
        yield Group(ready, stats, take=take)
        del stats, take  # the sums of a block are gone before the next one is measured
    if waiting:  # nothing is measured at them, or they are done
        yield Group(waiting, NoStats())


def _put(rec: Recipe, model: Any, bundles: dict[str, Bundle], name: str, edits: Edits) -> None:
    rec.form.apply(model, bundles[name], edits)
