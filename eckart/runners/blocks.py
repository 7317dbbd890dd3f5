"""Statistics block by block: one block of a checkpoint in memory at a time, the activations between blocks in a spool.

    before    the model's own forward over stubs: takes down the hidden state of the first block and the other arguments of every block
    block i   its weights are read, it runs over all batches under the hooks of the statistics, its outputs replace the hidden states
    after     once more the forward over stubs, the last one returning the true hidden state, if anything outside of the blocks is measured

The sums are those of `stats.collect`: the same hooks, the same chunks, the same tree, the same fingerprint.
"""

from __future__ import annotations

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
from .spool import Spool
from .walk import Unwalkable, Walk, walk

STREAMS = ORIGINAL, PROPAGATED = "original", "propagated"


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
    """Statistics of one block; valid until the next step is asked for.

    Args:
        block: its number, -1 for what lies outside of the blocks (the last step, if there is one).
        sites: the sites of it that are measured.
        stats: their statistics; empty for a block that was skipped. Values that blocks share are in the step of each.
        model: with propagated inputs a module that holds this block alone, with its weights, under its full name. What is changed in it
            before the next step is what the following blocks see. None with original inputs.
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
) -> Iterator[Step]:
    """Measure block after block. Forward statistics only.

    "original" statistics are those of `stats.collect`. For "propagated" ones each block is given what the blocks before it return as the
    caller has left them: change `step.model` before asking for the next step. Within a block all sites see the inputs of the block as
    it was. Where a run has both kinds, two streams of hidden states are kept.

    Args:
        chain: the model.
        batches: as for `collect`.
        needs, sites: as for `collect`; `Stat.inputs` may be "propagated".
        model_id: fingerprint of the model, for instance `reader.fingerprint`.
        seed, probe, probes, loss: as for `collect`; they enter the fingerprint and nothing else.
        memory: bytes of activations kept in memory; the rest goes to files.
        folder: where the folder with these files is made; None is the system's temporary folder.
        skip: blocks whose statistics are not wanted. With propagated inputs they are still steps, so that they can be changed.

    Yields:
        A step per block that has something to measure, in order, then one for the sites outside of the blocks.

    Raises:
        UsageError: a backward statistic.
        Unwalkable: with real data the blocks are called in another way than the model showed; or sites behind the blocks cannot be
            reached. Raised before the first step.
        Refused: no batch, a weight that cannot be read, an activation that is not finite, a full disk.
    """
    given = list(batches)
    if not given:
        raise Refused("statistics: expected at least one calibration batch, found none.")
    slots, run = run_of(chain.model, needs, sites, seed, probe, probes, loss, propagated=True)
    back = next((s for s in slots if s.stat.via != "forward"), None)
    if back is not None:
        raise UsageError(
            f"statistic {back.stat.kind!r} via {back.stat.via}: gradients run through the whole model. Use the whole-model runner."
        )
    mark = fingerprint_of(model_id, data_digest(batch_digest(b) for b in given), run)
    with Spool(memory, folder) as spool:
        yield from _Sweep(chain, given, needs, sites, slots, run, mark, spool, frozenset(skip)).steps()


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
        for key in step.stats.values:
            if f"{key}|count" not in shapes:
                for name, tensor in parts_of(key, step.stats.values[key]).items():
                    shelf.put(name, tensor)
                    shapes[name] = tuple(tensor.shape)
    if found is None:
        raise UsageError("statistics: there is nothing to measure.")
    return replace(found, values=Shelf(shapes, shelf.get))


class _Sweep:
    """One sweep: what it needs to know, and how far it is."""

    def __init__(
        self, chain: Chain, batches: list[Any], needs: Iterable[Stat], sites: Collection[Site], slots: Sequence[Slot],
        run: Mapping[str, Any], mark: str, spool: Spool, skip: frozenset[int],
    ) -> None:  # fmt: skip
        self.chain, self.batches, self.sites, self.spool, self.run, self.skip = chain, batches, sites, spool, run, skip
        self.mark = mark + (" inputs=propagated" if any(s.stat.inputs == PROPAGATED for s in slots) else "")
        self.calls = Calls(chain.model, chain.walk, spool, chain.device)
        self.keys = {s.name: _keys(needs, s, run["auto"]) for s in sites}
        self.blocks = len(chain.walk.blocks)
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
        for number in range(min(last + 1, self.blocks)):
            yield from self._block(number, ticks)
            self.calls.forget(number)
        for stream in self.ends:
            self._after(stream, ticks)
        yield from self._step(-1, None)
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

    def _block(self, number: int, ticks: Iterator[int]) -> Iterator[Step]:
        chain, name = self.chain, self.chain.walk.blocks[number]
        end = self.ends.get(PROPAGATED, -1)
        with chain.weights.loaded([*chain.weights.under(name), *chain.walk.inside[number]]):
            if number <= self.ends.get(ORIGINAL, -1):
                self._pass(number, ORIGINAL, measure=True, keep=number < self.ends[ORIGINAL], ticks=ticks)
            if number <= end:
                self._pass(number, PROPAGATED, measure=True, keep=False, ticks=ticks if ORIGINAL not in self.ends else None)
                with _restored(chain.model.get_submodule(name)):
                    yield from self._step(number, _shell(chain.model, name))
                    if number < end:
                        self._pass(number, PROPAGATED, measure=False, keep=True, ticks=None)
        if number > end:
            yield from self._step(number, None)

    def _pass(self, number: int, stream: str, *, measure: bool, keep: bool, ticks: Iterator[int] | None) -> None:
        """One block over all batches of a stream."""
        mine = [s for s in self.slots.get(number, ()) if s.stat.inputs == stream and measure]
        if not mine and not keep:
            return
        recorder = Recorder(mine)
        trees = _trees(recorder)
        with prepared(self.chain.model, recorder):
            for leaf in range(len(self.batches)):
                self._begin(recorder, leaf)
                hidden = self.calls.run(number, leaf, self.spool.get((stream, leaf)).to(self.chain.device))
                if keep:
                    self.spool.put((stream, leaf), hidden.detach().cpu().contiguous())
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

    def _step(self, number: int, model: nn.Module | None) -> Iterator[Step]:
        sites = tuple(s for s in self.sites if s.block == number)
        keys = sorted({k for s in sites for k in self.keys[s.name]} & self.values.keys())
        if not sites or (number in self.skip and model is None):
            return
        values = {} if number in self.skip else {k: self.values[k] for k in keys}
        step = Step(number, sites, Stats(values, self.run["sites"], self.mark, self.run["auto"]), model)
        later = {k for s in self.sites if number >= 0 and (s.block > number or s.block < 0) for k in self.keys[s.name]}
        self.values = {k: v for k, v in self.values.items() if k in later}
        del values
        yield step
        step.stats = step.model = None  # whoever still holds the step must not hold the sums of the block


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


class _restored:
    """Afterwards every module below is again what it was, whatever was put in its place."""

    def __init__(self, block: nn.Module) -> None:
        self.children = [(parent, name, child) for parent in block.modules() for name, child in parent.named_children()]
        self.biases = [(m, n) for m in block.modules() for n, p in vars(m)["_parameters"].items() if p is None]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for parent, name, child in self.children:
            setattr(parent, name, child)
        for module, name in self.biases:
            setattr(module, name, None)


def _shell(model: nn.Module, name: str) -> nn.Module:
    """A module that holds one block of a model and nothing else, under its full name."""
    out = parent = nn.Module()
    *path, last = name.split(".")
    for part in path:
        child = nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(last, model.get_submodule(name))
    return out
