"""ZD: the share of a layer's weights that lie more than one standard deviation above their mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..axes.protocols import Site
from ..errors import Refused
from .base import CheckpointView, Found, OfCheckpoint, Record

if TYPE_CHECKING:
    from torch import Tensor

GAUSSIAN = 0.5 * math.erfc(1 / math.sqrt(2))  # 0.1587: of any normal distribution
BYTES = 4 << 20  # of a weight, in float64 at once


def zd(view: CheckpointView) -> Iterable[Record]:
    """A record for each block over all its linear layers together, and one for each linear layer alone. One weight is in memory at a time.

    Args:
        view: the checkpoint.

    Returns:
        The records; the value is between 0 and 1.
    """
    from ..progress import track

    blocks: dict[int, list[Site]] = {}
    known: dict[str, Moments | str] = {}
    linears = [s for s in view.sites if s.kind == "linear"]
    if not linears:
        yield MEASURE.missing("", "the run holds no linear layer")
    for site in track(linears, "z-scores"):
        found = _alone(view, site)
        known[site.name] = found if isinstance(found, str) else found[0]
        yield MEASURE.missing(site.name, found) if isinstance(found, str) else _record(site.name, found[0], found[1], "matrix")
        if site.block >= 0:
            blocks.setdefault(site.block, []).append(site)
    for block, members in track(blocks.items(), "z-scores of blocks"):
        yield _of_block(view, view.catalogue.blocks[block], members, known)


@dataclass(frozen=True)
class Moments:
    """Of some numbers: how many, their mean, the sum of squared distances from it, and the largest magnitude."""

    count: int = 0
    mean: float = 0.0
    scatter: float = 0.0
    size: float = 0.0

    def joined(self, other: Moments) -> Moments:
        """Of both together (Chan et al. 1979): a large mean costs no digits."""
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + step * step * self.count * other.count / max(1, count)
        return Moments(count, self.mean + step * other.count / max(1, count), scatter, max(self.size, other.size))

    @property
    def edge(self) -> float | None:
        """One standard deviation above the mean; None where the numbers are all the same."""
        deviation = math.sqrt(self.scatter / self.count) if self.count else 0.0
        return None if deviation <= 1e-12 * self.size else self.mean + deviation


def _alone(view: CheckpointView, site: Site) -> tuple[Moments, int] | str:
    """Moments of a weight and how many of its values lie above its edge, or why there are none."""
    try:
        weight = _read(view, site)
    except Refused as error:  # of this weight; the others go on
        return str(error)
    found = Moments()
    for part in _parts(weight):
        low, high = (float(v) for v in part.aminmax())
        mean = float(part.mean())
        found = found.joined(Moments(part.numel(), mean, float(part.sub_(mean).square_().sum()), max(-low, high)))
    return found, _above(weight, found.edge)


def _of_block(view: CheckpointView, name: str, sites: list[Site], known: dict[str, Moments | str]) -> Record:
    together = Moments()
    for site in sites:
        found = known[site.name]
        if isinstance(found, str):
            return MEASURE.missing(name, found)
        together = together.joined(found)
    whole = sum(s.block == sites[0].block and s.kind == "linear" for s in view.catalogue.sites)
    note = f"{len(sites)} of the {whole} linear layers of the block" if len(sites) < whole else ""
    count = sum(_above(_read(view, site), together.edge) for site in sites) if together.edge is not None else 0
    return _record(name, together, count, "block", note)


def _record(name: str, moments: Moments, above: int, scope: str, note: str = "") -> Record:
    if moments.edge is None:
        return MEASURE.missing(name, "every weight is the same")
    return MEASURE.record(name, Found(above / moments.count, note=note, settings={"scope": scope}))


def _above(weight: Tensor, edge: float | None) -> int:
    return 0 if edge is None else sum(int((part > edge).sum()) for part in _parts(weight))


def _read(view: CheckpointView, site: Site) -> Tensor:
    import torch

    weight = view.read(site)
    weight = weight.float() if weight.is_floating_point() and weight.dtype.itemsize == 1 else weight
    if not weight.is_floating_point() or not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise Refused(f"{site.name}: the weight is not of finite real numbers")
    return weight


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """Copies of some rows at a time in float64: they may be changed, a weight that is float64 already must not be."""
    import torch

    rows = max(1, BYTES // (8 * max(1, weight.shape[1])))
    return (torch.empty(part.shape, dtype=torch.float64).copy_(part) for part in weight.cpu().split(rows))


MEASURE = OfCheckpoint(
    name="zd",
    title="ZD: z-score distribution of weights",
    paper="arXiv:2406.17415",
    estimator="share of weights with (w - mean) / std > 1, over the linear layers of a block together, and over each alone",
    compute=zd,
    note=f"needs no data; the paper takes fewer as more important. Any normal distribution gives {GAUSSIAN:.4f}, "
    "so only the shape of the tails moves it",
    settings={"z": 1.0, "sides": "upper"},
    fidelity="variant",
    differs="counts z > 1 as the paper writes; an implementation of others counts |z| > 1, averages over the matrices and lets norm weights in",
)
