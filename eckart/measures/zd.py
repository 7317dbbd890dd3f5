"""ZD: the share of a layer's weights that lie more than one standard deviation above their mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..axes.protocols import Site
from ..errors import Refused
from .base import CheckpointView, Found, OfCheckpoint, Record

if TYPE_CHECKING:
    from torch import Tensor

GAUSSIAN = 0.5 * math.erfc(1 / math.sqrt(2))  # 0.1587: of any normal distribution
ROWS = 2048  # of a weight, in float64 at once


def zd(view: CheckpointView) -> Iterable[Record]:
    """A record for each block over all its linear layers together, and one for each linear layer alone. One weight is in memory at a time.

    Args:
        view: the checkpoint.

    Returns:
        The records; the value is between 0 and 1.
    """
    from ..progress import track

    blocks: dict[int, list[Site]] = {}
    linears = [s for s in view.sites if s.kind == "linear"]
    if not linears:
        yield MEASURE.missing("", "the run holds no linear layer")
    for site in track(linears, "z-scores"):
        yield _record(view, site.name, [site])
        if site.block >= 0:
            blocks.setdefault(site.block, []).append(site)
    for block, members in blocks.items():
        yield _record(view, view.catalogue.blocks[block], members)


def _record(view: CheckpointView, name: str, sites: Sequence[Site]) -> Record:
    try:
        found = _share(view, sites)
    except Refused as error:  # of this weight; the others go on
        return MEASURE.missing(name, str(error))
    many = name != sites[0].name
    whole = sum(s.block == sites[0].block and s.kind == "linear" for s in view.catalogue.sites)
    note = f"{len(sites)} of the {whole} linear layers of the block" if many and len(sites) < whole else ""
    settings = {"scope": "block" if many else "matrix"}
    return (
        MEASURE.missing(name, "every weight is the same")
        if found is None
        else MEASURE.record(name, Found(found, note=note, settings=settings))
    )


def _share(view: CheckpointView, sites: Sequence[Site]) -> float | None:
    count, mean, scatter, size = 0, 0.0, 0.0, 0.0
    for site in sites:
        for part in _parts(view, site):  # Chan: means and scatters of the parts are joined, so a large mean costs no digits
            own = float(part.mean())
            step, n = own - mean, part.numel()
            scatter += float((part - own).square().sum()) + step * step * count * n / (count + n)
            mean += step * n / (count + n)
            count += n
            size = max(size, float(part.abs().max()))
    deviation = math.sqrt(scatter / count) if count else 0.0
    if deviation <= 1e-12 * size:
        return None
    return sum(int((part > mean + deviation).sum()) for site in sites for part in _parts(view, site)) / count


def _parts(view: CheckpointView, site: Site) -> Iterable[Tensor]:
    import torch

    weight = view.read(site)
    if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise Refused(f"{site.name}: the weight is not of finite real numbers")
    return (part.to(torch.float64) for part in weight.cpu().split(ROWS) if part.numel())


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
