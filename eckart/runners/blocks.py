"""Statistics block by block: one block of a checkpoint in memory at a time, the activations between blocks in a spool.

    before    the model's own forward over stubs: takes down the hidden state of the first block and the other arguments of every block
    block i   its weights are read, it runs over all batches under the hooks of the statistics, its outputs replace the hidden states
    after     once more the forward over stubs, the last one returning the true hidden state, if anything outside of the blocks is measured

The sums are those of `stats.collect`: the same hooks, the same chunks, the same tree, the same fingerprint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..axes.protocols import Site, Stat
from ..errors import Refused, UsageError
from ..progress import track
from ..stats import Stats, Tree
from ..stats.collect import prepared, run_of, unpack
from ..stats.record import Part, Recorder, join
from ..stats.result import batch_digest, data_digest, fingerprint_of, value_of
from ..stats.shelf import Shelf, Value, parts_of
from ..stats.slots import Slot, key_of, place_of, settle
from .calls import Calls
from .heap import return_freed_memory
from .materialise import Weights
from .shell import restored, shell
from .spool import Spool
from .walk import Unwalkable, Walk, walk

STREAMS = ORIGINAL, PROPAGATED = "original", "propagated"
INSIDE = "inside"  # the propagated hidden states between blocks that make one step


@dataclass(frozen=True, eq=False)
class Chain:
    """A model that can be run block by block; made by `chain`.

    Args:
        model: on the meta device, but for the buffers that no file holds.
        weights: where its tensors are.
        walk: how its blocks are called.
        device: where blocks run.
    """

    model: nn.Module
    weights: Weights
    walk: Walk
    device: torch.device


@dataclass
class Step:
    """Statistics of one block, or of several that make one step; valid until the next step is asked for.

    Args:
        block: its number, of several the last; -1 for what lies outside of the blocks (the last step, if there is one).
        sites: the sites of it that are measured.
        stats: their statistics; empty for a block that was skipped. Values that blocks share are in the step of each.
        model: with propagated inputs a module that holds these blocks alone, with their weights, under their full names. What is changed in
            it before the next step is what the following blocks see. None with original inputs.
    """

    block: int
    sites: tuple[Site, ...]
    stats: Stats | None
    model: nn.Module | None = field(default=None, repr=False)


def chain(weights: Weights, blocks: Sequence[str], example: Any) -> Chain:
    """Show that a model is a chain of blocks. No tensor is read.

    Args:
        weights: of a model on the meta device with its buffers in place, as `hub.skeleton.unloaded` gives it.
        blocks: `Catalogue.blocks`.
        example: a calibration batch.

    Raises:
        Unwalkable: it is none. The message is the reason, a sentence.
    """
    model = weights.model
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(module, name, buffer.to(weights.device))
    args, kwargs, *_ = unpack(model, 0, example, False, torch.device("cpu"))
    return Chain(model, weights, walk(model, blocks, args, kwargs), weights.device)


def sweep(
    chain: Chain,
    batches: Iterable[Any],
    needs: Iterable[Stat],
    sites: Collection[Site],
    *,
    model_id: str,
    seed: int = 0,
    probe: str = "auto",
    probes: int = 1,
    loss: Any = None,
    memory: int = 1 << 30,
    folder: str | Path | None = None,
    skip: Collection[int] = (),
    spans: Iterable[range] = (),
) -> Iterator[Step]:
    """Measure block after block. Forward statistics only.

    "original" statistics are those of `stats.collect`. For "propagated" ones each block is given what the blocks before it return as the
    caller has left them: change `step.model` before asking for the next step. Within a step all sites see the inputs of its blocks as
    they were. Where a run has both kinds, two streams of hidden states are kept.

    Args:
        chain: the model.
        batches: as for `collect`.
        needs, sites: as for `collect`; `Stat.inputs` may be "propagated".
        model_id: fingerprint of the model, for instance `reader.fingerprint`.
        seed, probe, probes, loss: as for `collect`; they enter the fingerprint and nothing else.
        memory: bytes of activations kept in memory; the rest goes to files.
        folder: where the folder with these files is made; None is the system's temporary folder.
        skip: blocks whose statistics are not wanted. With propagated inputs they are still steps, so that they can be changed.
        spans: neighbouring blocks that make one step, because their matrices are solved together; every other block is one by itself.

    Yields:
        A step per block or span that has something to measure, in order, then one for the sites outside of the blocks.

    Raises:
        UsageError: a backward statistic.
        Unwalkable: with real data the blocks are called in another way than the model showed; or sites behind the blocks cannot be
            reached. Raised before the first step.
        Refused: no batch, a weight that cannot be read, an activation that is not finite, a full disk.
    """
    given = list(batches)
    if not given:
        raise Refused("statistics: expected at least one calibration batch, found none.")
    slots, run, mark = _identity(chain.model, given, needs, sites, model_id, seed, probe, probes, loss)
    back = next((s for s in slots if s.stat.via != "forward"), None)
    if back is not None:
        raise UsageError(
            f"statistic {back.stat.kind!r} via {back.stat.via}: gradients run through the whole model. Use the whole-model runner."
        )
    with Spool(memory, folder) as spool:
        yield from _Sweep(chain, given, needs, sites, slots, run, mark, spool, frozenset(skip), spans).steps()


def fingerprint(
    model: nn.Module, batches: Iterable[Any], needs: Iterable[Stat], sites: Collection[Site], *, model_id: str, seed: int = 0, probe: str = "auto",
    probes: int = 1, loss: Any = None,
) -> str:  # fmt: skip
    """The fingerprint of the statistics of a `sweep` with the same arguments, without running anything; with original inputs that of
    `stats.collect`."""
    return _identity(model, list(batches), needs, sites, model_id, seed, probe, probes, loss)[2]


def _identity(
    model: nn.Module, given: Sequence[Any], needs: Iterable[Stat], sites: Collection[Site], model_id: str, seed: int, probe: str, probes: int, loss: Any
) -> tuple[tuple[Slot, ...], dict[str, Any], str]:  # fmt: skip
    slots, run = run_of(model, needs, sites, seed, probe, probes, loss, propagated=True)
    mark = fingerprint_of(model_id, data_digest(batch_digest(b) for b in given), run)
    return slots, run, mark + (" inputs=propagated" if any(s.stat.inputs == PROPAGATED for s in slots) else "")


def collect(
    chain: Chain, batches: Iterable[Any], needs: Iterable[Stat], sites: Collection[Site], *, keep: int = 1 << 62, **options: Any
) -> Stats:
    """What `stats.collect` would give, with one block in memory at a time.

    Args:
        chain, batches, needs, sites: as for `sweep`; original inputs only.
        keep: bytes of finished values kept in memory; the rest lies in files beside the activations and is read when it is asked for.
        **options: for `sweep`.

    Raises:
        UsageError, Unwalkable, Refused: as `sweep`; also a propagated statistic, which needs a run that cuts block by block.
    """
    needs = list(needs)
    for stat in needs:
        if stat.inputs != ORIGINAL:
            raise UsageError(f"statistic {stat.kind!r}: {stat.inputs} inputs exist only while blocks are cut one after the other.")
    shelf = Spool(keep, options.get("folder"))
    shapes: dict[str, tuple[int, ...]] = {}
    found: Stats | None = None
    for step in sweep(chain, batches, needs, sites, **options):
        assert step.stats is not None
        found = replace(step.stats, values={})
        shapes |= _put_away(step.stats.values, shelf, shapes)
    if found is None:
        raise UsageError("statistics: there is nothing to measure.")
    return replace(found, values=Shelf(shapes, shelf.get))


def _put_away(values: Mapping[str, Value], shelf: Spool, known: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Values onto a shelf, but for those that are there. A function, so that no name holds the last of them while the next block runs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in values.items():
        if f"{key}|count" not in known:
            for name, tensor in parts_of(key, value).items():
                shelf.put(name, tensor)
                shapes[name] = tuple(tensor.shape)
    return shapes


class _Sweep:
    """One sweep: what it needs to know, and how far it is."""

    def __init__(
        self, chain: Chain, batches: list[Any], needs: Iterable[Stat], sites: Collection[Site], slots: Sequence[Slot],
        run: Mapping[str, Any], mark: str, spool: Spool, skip: frozenset[int], spans: Iterable[range],
    ) -> None:  # fmt: skip
        self.chain, self.batches, self.sites, self.spool, self.run, self.skip, self.mark = chain, batches, sites, spool, run, skip, mark
        self.calls = Calls(chain.model, chain.walk, spool, chain.device)
        self.keys = {s.name: _keys(needs, s, run["auto"]) for s in sites}
        self.blocks = len(chain.walk.blocks)
        self.spans = all_spans(spans, self.blocks)
        self.slots: dict[int, list[Slot]] = {}
        for slot in slots:
            mine = measured_at(slot, [s for s in sites if slot.key in self.keys[s.name]], skip)
            if mine.site.block not in skip:
                self.slots.setdefault(place_in(chain.walk, mine), []).append(mine)
        late = self.slots.get(self.blocks, [])
        if late and chain.walk.tail:
            raise Unwalkable(f"{late[0].site.name} is outside of the blocks, and {chain.walk.tail}")
        ends = {stream: max((b for b, ss in self.slots.items() for s in ss if s.stat.inputs == stream), default=-2) for stream in STREAMS}
        self.ends = {stream: end for stream, end in ends.items() if end >= -1}
        self.values: dict[str, Value] = {}

    def steps(self) -> Iterator[Step]:
        if not self.ends:
            return
        return_freed_memory()
        last = max(self.ends.values())
        ticks = iter(track(range((last + 2) * len(self.batches)), "calibrating block by block"))
        self._before(ticks)
        for span in self.spans:
            if span.start <= last:
                yield from self._span(span, ticks)
                for number in span:
                    self.calls.forget(number)
        for stream in self.ends:
            self._after(stream, ticks)
        yield from self._step(range(-1, 0), None)
        for _ in ticks:  # let the bar end
            pass

    def _before(self, ticks: Iterator[int]) -> None:
        recorder = Recorder(self.slots.get(-1, ()))
        trees = _trees(recorder)
        with self.chain.weights.loaded(self.chain.walk.before), prepared(self.chain.model, recorder):
            for leaf in range(len(self.batches)):
                args, kwargs = self._begin(recorder, leaf)
                hidden = self.calls.record(leaf, args, kwargs).detach().cpu().contiguous()
                for stream in self.ends:
                    self.spool.put((stream, leaf), hidden)
                del hidden
                _add(trees, leaf, recorder)
                next(ticks, None)
        self._finish(trees)

    def _span(self, span: range, ticks: Iterator[int]) -> Iterator[Step]:
        end = self.ends.get(PROPAGATED, -2)
        if span.start > end:
            for number in span:
                with self._loaded(number):
                    self._original(number, ticks)
            yield from self._step(span, None)
            return
        modules = [self.chain.model.get_submodule(self.chain.walk.blocks[n]) for n in span]
        with contextlib.ExitStack() as stack:
            for number in span:
                stack.enter_context(self._loaded(number))
            for number in span:
                self._original(number, ticks)
                begins, ends = number == span.start, number + 1 == span.stop
                self._pass(
                    number, PROPAGATED, PROPAGATED if begins else INSIDE, None if ends else INSIDE, ticks if ORIGINAL not in self.ends else None
                )  # fmt: skip
            for leaf in range(len(self.batches)):
                self.spool.drop((INSIDE, leaf))
            with restored(modules):
                yield from self._step(span, shell(self.chain.model, [self.chain.walk.blocks[n] for n in span]))
                if span.stop <= end:
                    for number in span:
                        self._pass(number, None, PROPAGATED, PROPAGATED, None)

    def _loaded(self, number: int) -> contextlib.AbstractContextManager[None]:
        chain = self.chain
        return chain.weights.loaded([*chain.weights.under(chain.walk.blocks[number]), *chain.walk.inside[number]])

    def _original(self, number: int, ticks: Iterator[int]) -> None:
        end = self.ends.get(ORIGINAL, -2)
        if number <= end:
            self._pass(number, ORIGINAL, ORIGINAL, ORIGINAL if number < end else None, ticks)

    def _pass(self, number: int, measured: str | None, source: str, target: str | None, ticks: Iterator[int] | None) -> None:
        """One block over all batches: hidden states from one stream, what the block makes of them into another."""
        mine = [s for s in self.slots.get(number, ()) if s.stat.inputs == measured]
        if not mine and target is None:
            return
        recorder = Recorder(mine)
        trees = _trees(recorder)
        with prepared(self.chain.model, recorder):
            for leaf in range(len(self.batches)):
                self._begin(recorder, leaf)
                hidden = self.calls.run(number, leaf, self.spool.get((source, leaf)).to(self.chain.device))
                if target is not None:
                    self.spool.put((target, leaf), hidden.detach().cpu().contiguous())
                del hidden
                _add(trees, leaf, recorder)
                if ticks is not None:
                    next(ticks, None)
        self._finish(trees)

    def _after(self, stream: str, ticks: Iterator[int]) -> None:
        model, walked = self.chain.model, self.chain.walk
        recorder = Recorder([s for s in self.slots.get(self.blocks, ()) if s.stat.inputs == stream])
        trees = _trees(recorder)
        if not trees:
            return
        with self.chain.weights.loaded(walked.before | walked.after), prepared(model, recorder):
            for leaf in range(len(self.batches)):
                args, kwargs = self._begin(recorder, leaf)
                self.calls.finish(leaf, args, kwargs, self.spool.get((stream, leaf)).to(self.chain.device))
                _add(trees, leaf, recorder)
                next(ticks, None)
        self._finish(trees)

    def _begin(self, recorder: Recorder, leaf: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs, layout, *_ = unpack(self.chain.model, leaf, self.batches[leaf], False, self.chain.device)
        recorder.begin(layout)
        return args, kwargs

    def _finish(self, trees: dict[str, Tree[Part]]) -> None:
        for key in sorted(trees):
            self.values[key] = value_of(trees.pop(key).finish(len(self.batches)))

    def _step(self, span: range, model: nn.Module | None) -> Iterator[Step]:
        """The statistics of some blocks; those outside of all are block -1."""
        sites = tuple(s for s in self.sites if s.block in span)
        wanted = [s for s in sites if s.block not in self.skip]
        if not (wanted or (sites and model is not None)):
            return
        keys = sorted({k for s in wanted for k in self.keys[s.name]} & self.values.keys())
        step = Step(span[-1], sites, Stats({k: self.values[k] for k in keys}, self.run["sites"], self.mark, self.run["auto"]), model)
        later = {k for s in self.sites if span[-1] >= 0 and (s.block > span[-1] or s.block < 0) for k in self.keys[s.name]}
        self.values = {k: v for k, v in self.values.items() if k in later}
        yield step
        step.stats = step.model = None  # whoever still holds the step must not hold the sums of the block


def all_spans(spans: Iterable[range], blocks: int) -> list[range]:
    """Every block in one range: the given ones, the others by themselves.

    Example:
        >>> all_spans([range(1, 3)], 4)
        [range(0, 1), range(1, 3), range(3, 4)]
    """
    given = {s.start: s for s in spans if len(s)}
    out: list[range] = []
    while (start := out[-1].stop if out else 0) < blocks:
        out.append(given.get(start, range(start, start + 1)))
    return out


def measured_at(slot: Slot, sites: Sequence[Site], skip: Collection[int] = ()) -> Slot:
    """The slot at the first block that reads the input, wherever sites share one; outside of the blocks only if nothing else does."""
    return replace(slot, site=min(sites, key=lambda s: (s.block in skip, s.block < 0, s.block)))


def place_in(walk: Walk, slot: Slot) -> int:
    """The block in which a slot is measured; -1 before the first one, their number behind the last."""
    return slot.site.block if slot.site.block >= 0 else -1 if slot.site.name in walk.early else len(walk.blocks)


def _keys(needs: Iterable[Stat], site: Site, auto: str) -> frozenset[str]:
    settled = [settle(s, auto) for s in needs]
    return frozenset(key_of(s, place_of(s, site)) for s in settled)


def _trees(recorder: Recorder) -> dict[str, Tree[Part]]:
    return {s.key: Tree(join) for s in recorder.slots}


def _add(trees: dict[str, Tree[Part]], leaf: int, recorder: Recorder) -> None:
    for key in trees:
        trees[key] = trees[key].add(leaf, recorder.parts.pop(key, None))
    recorder.release()
