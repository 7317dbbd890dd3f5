"""What calibration takes of memory, from headers and the shapes of batches: found by the same pass without data that proves the walk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.protocols import Site, Stat
from ..stats.collect import run_of, unpack
from ..stats.record import Layout, Recorder
from ..stats.slots import WATCHED, Slot
from .blocks import PROPAGATED, Chain, all_spans, measured_at, place_in
from .known import tensors_in
from .walk import Sizes, Walk, walk

WORK = 8 << 20  # bytes; what matrix products keep for packed panels, 5 to 10 MiB by type with MKL and oneDNN on one thread


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when most memory is taken, on top of the program itself. On a GPU, its share and the machine's together.

    Args:
        weights: tensors of the checkpoint.
        activations: hidden states and other arguments of blocks that wait in memory, and what a forward pass makes.
        statistics: sums, and what is made on the way to them.
        spooled: activations on disk; not part of the total.
        where: the block, or what is before or behind them.
        step: what of it is held at most while the caller has a step; with propagated inputs without what the caller changes.
    """

    weights: int
    activations: int
    statistics: int
    spooled: int = 0
    where: str = ""
    step: int = 0

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.weights + self.activations + self.statistics


def predict(
    chain: Chain, batches: Iterable[Any], needs: Iterable[Stat], sites: Collection[Site], *, memory: int = 1 << 30, keep: int = 0,
    spans: Iterable[range] = (),
) -> Peak:  # fmt: skip
    """The most memory that `blocks.sweep` takes. No tensor is read.

    Counted are weights, activations, sums with all nodes of their tree, and finished values. Not counted are Python with its libraries and
    whatever the caller does with a step.

    Args:
        chain, batches, needs, sites, memory, spans: as for `sweep`.
        keep: bytes of finished values that are held while it runs: those of `blocks.collect`.

    Returns:
        The peak.

    Raises:
        Unwalkable: the largest batch is walked in another way than the chain's example.
    """
    given = list(batches)
    slots, _ = run_of(chain.model, needs, sites, propagated=True)
    walked = _walked(chain.model, chain.walk.blocks, given, slots)
    at: dict[int, list[Slot]] = {}
    for slot in slots:
        mine = measured_at(slot, [s for s in sites if (s.reads or s.name) == slot.where or s.name == slot.where or s is slot.site])
        at.setdefault(place_in(chain.walk, mine), []).append(mine)
    last, end = max(at, default=-1), max((b for b, found in at.items() if any(s.stat.inputs == PROPAGATED for s in found)), default=-2)
    parts = [s for s in all_spans(spans, len(chain.walk.blocks)) if s.start <= last]
    streams = max(1, len({s.stat.inputs for s in slots})) + any(len(s) > 1 and s.start <= end for s in parts)
    wait, largest = _waiting(given, walked.sizes, streams)
    held = min(wait, memory)
    one = largest if wait > memory else 0
    peaks = [_before(chain, walked.sizes, at.get(-1, []), len(given), min(wait - largest, memory), keep)]
    step = 0
    for span in parts:
        names = {n: [*chain.weights.under(chain.walk.blocks[n]), *chain.walk.inside[n]] for n in span}
        together = {k for found in names.values() for k in found} if span.start <= end else None
        done = 0  # bytes of values that wait for the end of the step
        for number in span:
            weights = together or names[number]
            mine = at.get(number, [])
            own = sum(s.nbytes for s in mine)
            sums, adding, ending = sums_of([s.nbytes for s in mine], len(given))
            loaded, kept = chain.weights.nbytes(weights), keep + done
            name, output = chain.walk.blocks[number], walked.sizes.hidden[number + 1]
            peaks += [
                Peak(loaded + chain.weights.widest(weights), held, kept, where=name),
                Peak(loaded, held + one + max(0, walked.sizes.inside[number] - own), sums + own + kept, where=name),
                Peak(loaded, held + output, adding + kept, where=name),
                Peak(loaded, held, ending + kept, where=name),
            ]
            done += own
        step = max(step, held + done + (chain.weights.nbytes(together) if together else 0))
    if last == len(chain.walk.blocks):
        behind = at[last]
        peaks += _behind(chain, walked.sizes, behind, len(given), held + one, keep)
        step = max(step, held + sum(s.nbytes for s in behind))
    peak = max(peaks, key=lambda p: p.total)
    return Peak(peak.weights, peak.activations + WORK, peak.statistics, wait - held, peak.where, step)


def predict_whole(chain: Chain, batches: Iterable[Any], needs: Iterable[Stat], sites: Collection[Site]) -> Peak:
    """An estimate of what `stats.collect` takes with the whole model in memory: forward statistics only, backward passes hold more.

    Args:
        chain: the model.
        batches, needs, sites: as for `collect`.

    Raises:
        Unwalkable: the largest batch is walked in another way than the chain's example.
    """
    given = list(batches)
    slots, _ = run_of(chain.model, needs, sites, propagated=True)
    walked = _walked(chain.model, chain.walk.blocks, given, slots)
    sums, adding, ending = sums_of([s.nbytes for s in slots], len(given))
    own = sum(s.nbytes for s in slots)
    loaded, sizes = chain.weights.nbytes(chain.weights.under("")), walked.sizes
    inside = [size - sum(s.nbytes for s in slots if s.site.block == i) for i, size in enumerate(sizes.inside)]
    most = max(sizes.before, sizes.after, max(inside) + max(sizes.hidden) + sizes.others)
    running = Peak(loaded, most, sums + own, where="the whole model")
    summing = Peak(loaded, 0, max(adding, ending), where="the whole model")
    return max(running, summing, key=lambda p: p.total)


def sums_of(sizes: Sequence[int], leaves: int) -> tuple[int, int, int]:
    """Bytes of sums over numbered leaves: before a leaf is added, while the leaves of all sums are added one after the other, and while
    the sums are finished one after the other; the most of each over the whole run.

    Args:
        sizes: bytes of each sum.
        leaves: batches.
    """
    total, largest = sum(sizes), max(sizes, default=0)
    before = max(leaf.bit_count() for leaf in range(leaves)) * total
    adding = max((leaf.bit_count() + 1) * total + min(2, _carries(leaf)) * largest for leaf in range(leaves))
    # a node per bit of the number of leaves; joined they give the sum, the sum gives the value with two copies of it on the way
    nodes = leaves.bit_count()
    ending = max((nodes * sum(sizes[i:]) + sum(sizes[:i]) + max(min(2, nodes - 1), 2) * sizes[i] for i in range(len(sizes))), default=0)
    return before, adding, ending


def _carries(leaf: int) -> int:
    """Trailing ones: how many nodes are joined when this leaf is added."""
    return (~leaf & (leaf + 1)).bit_length() - 1


def _walked(model: nn.Module, blocks: Sequence[str], batches: Sequence[Any], slots: Sequence[Slot]) -> Walk:
    """The walk of the largest batch, statistics along."""
    batch = max(batches, key=_numbers)
    args, kwargs, layout, *_ = unpack(model, 0, batch, False, torch.device("cpu"))
    recorder = Recorder([s for s in slots if s.stat.via == "forward" and s.stat.kind not in WATCHED])
    layout = layout if layout.weight is None else _Padded(layout.leaf, layout.samples, layout.tokens)
    return walk(model, blocks, args, kwargs, recorder=recorder, layout=layout)


class _Padded(Layout):
    """Stands for a batch with padding, whose rows without it are a copy. As if nothing fell away: how much does, no shape tells."""

    def rows(self, x: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
        return x.detach().reshape(-1, x.shape[-1]).clone(), None


def _numbers(batch: Any) -> tuple[int, int]:
    """What decides which of two batches takes more: numbers in it, then the longest side."""
    given = vars(batch) if hasattr(batch, "input_ids") else batch
    first = next(tensors_in(given))
    return first.numel(), max(first.shape, default=0)


def _waiting(batches: Sequence[Any], sizes: Sizes, streams: int) -> tuple[int, int]:
    """Bytes of all activations between blocks, and of those of the largest batch."""
    one = streams * max(sizes.hidden) + sizes.others
    most = max(_numbers(b)[0] for b in batches)
    return sum(one * _numbers(b)[0] // most for b in batches), one


def _before(chain: Chain, sizes: Sizes, slots: Sequence[Slot], leaves: int, held: int, keep: int) -> Peak:
    sums, adding, _ = sums_of([s.nbytes for s in slots], leaves)
    weights = chain.weights.nbytes(chain.walk.before) + chain.weights.widest(chain.walk.before)
    return Peak(weights, held + sizes.before, max(sums, adding) + keep, where="before the blocks")


def _behind(chain: Chain, sizes: Sizes, slots: Sequence[Slot], leaves: int, held: int, keep: int) -> list[Peak]:
    sums, adding, ending = sums_of([s.nbytes for s in slots], leaves)
    names = chain.walk.before | chain.walk.after
    own = sum(s.nbytes for s in slots)
    weights, where = chain.weights.nbytes(names), "behind the blocks"
    return [
        Peak(weights + chain.weights.widest(names), held, keep, where=where),
        Peak(weights, held + max(0, sizes.after - own), sums + own + keep, where=where),
        Peak(weights, held, max(adding, ending) + keep, where=where),
    ]
