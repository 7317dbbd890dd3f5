"""RDP breakpoints: the blocks at which the path of the hidden state through the layers turns, by Ramer-Douglas-Peucker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._watch import NO_BLOCKS, Side, Watch, text_sums, towers_of
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 13 / 36  # of the blocks: the only number of the abstract, 13 of the 36 blocks of Qwen3-8B


@dataclass
class _Path:
    """Of one list of blocks: the mean point of each layer over texts, and how often a text's own path turns at a block."""

    texts: int = 0
    points: Tensor | None = None
    votes: dict[int, int] = field(default_factory=dict)


@dataclass
class Paths(Watch):
    """Keeps one vector per layer, and those of the texts of one batch."""

    paths: dict[str, _Path] = field(default_factory=dict)
    batch: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def wants(self) -> list[tuple[str, Side]]:
        out: list[tuple[str, Side]] = []
        for tower in towers_of(self.view):
            out.append((tower[0], "in"))
            out.extend((name, "out") for name in tower)
        return out

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        numbers, counts, sums = text_sums(x, text)
        key = (module, side)
        if key in self.batch:
            self.lose(module, side, "the block runs several times per text, so it is not one point of a path")
        self.batch[key] = numbers, sums / counts[:, None]

    def end_batch(self) -> None:
        import torch

        for tower in towers_of(self.view):
            keys = [(tower[0], "in"), *((name, "out") for name in tower)]
            found = [self.batch[k] for k in keys if k in self.batch]
            if len(found) < len(keys) or any(name in self.lost for name in tower):
                continue
            numbers = found[0][0]
            if any(not torch.equal(n, numbers) or p.shape != found[0][1].shape for n, p in found):
                self.lose(tower[0], "out", "the layers see different texts or states of different widths")
                continue
            points = torch.stack([p for _, p in found], 1)  # (texts, layers + 1, n)
            path = self.paths.setdefault(tower[0], _Path())
            path.texts += len(points)
            path.points = points.sum(0) if path.points is None else path.points + points.sum(0)
            for own in points:
                for k in _kept(own)[0]:
                    path.votes[k] = path.votes.get(k, 0) + 1
        self.batch.clear()

    def records(self) -> Iterable[Record]:
        towers = towers_of(self.view)
        if not towers:
            yield MEASURE.missing("", NO_BLOCKS)
        for tower in towers:
            yield from self._tower(tower)

    def _tower(self, tower: list[str]) -> Iterable[Record]:
        home = tower[0].rpartition(".")[0] or tower[0]
        lost = next((f"{name}: {self.lost[name]}" for name in tower if name in self.lost), None)
        path = self.paths.get(tower[0])
        if lost or path is None or path.points is None or len(tower) < 2:
            why = lost or ("a path of one block has no inner point" if len(tower) < 2 else "no text passed all of its blocks")
            for name in dict.fromkeys((home, *tower)):
                yield MEASURE.missing(name, why)
            return
        kept, order, reach = _kept(path.points)
        votes = [path.votes.get(k, 0) / path.texts for k in range(1, len(tower))]
        settings = {"texts": path.texts, "kept": len(kept)}
        value = {"breakpoints": [k - 1 for k in kept], "order": [k - 1 for k in order], "reach": reach, "agreement": votes}
        yield MEASURE.record(home, Found(value, settings=settings))
        for name, distance in zip(tower, reach, strict=False):
            yield MEASURE.record(name, Found(distance, settings=settings))
        yield MEASURE.missing(tower[-1], "the end of the path, which is always kept")


def _kept(points: Tensor) -> tuple[list[int], list[int], list[float]]:
    """(points kept within the share, sorted; all inner points in the order of their turn; reach of each as a share of the widest distance)."""
    from ..spectra.dimension import distances
    from ..spectra.trajectory import split_order

    norm = points.square().sum(1, keepdim=True).sqrt()
    points = points / norm.masked_fill(norm == 0, 1)
    order, tolerance = split_order(points)
    widest = float(distances(points).max())
    inner = tolerance[1:-1]
    count = max(1, round(SHARE * (len(points) - 1)))
    kept = sorted(k for k in order[:count] if float(tolerance[k]) > 0)
    return kept, order, (inner / widest if widest > 0 else inner).tolist()


MEASURE = OfText(
    name="rdp",
    title="RDP LoRA: breakpoints of the path through the layers",
    paper="arXiv:2604.19321",
    estimator="points: hidden states before the first block and after each, mean over the tokens of a text, then over texts, scaled to length 1; "
    "reach: the tolerance up to which Ramer-Douglas-Peucker keeps a point, over the widest distance of two points; breakpoints: the 13/36 kept longest",
    observer=Paths,
    note="point k stands for the block that made it; breakpoints and order count blocks from 0; "
    "agreement is the share of texts whose own path has the block among its breakpoints",
    settings={"share": SHARE, "pooling": "mean", "normalise": True},
    fidelity="idea",
    differs="neither code nor details could be read: pooling, scaling, tolerance, how a point maps to a block and whether the end counts are ours",
)
