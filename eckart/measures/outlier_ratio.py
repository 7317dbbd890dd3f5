"""Outlier ratio: the share of weights whose size times that of their input is far above the mean, OWL's score of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..axes.protocols import Site
from ..errors import Refused
from ._watch import Side, Watch, linears_of
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLE = 5.0  # M of the README's commands; the command line's own default is 3
ROWS = 2048  # of a weight, scored at once


@dataclass
class Norms(Watch):
    """Keeps the squared norm of each input channel; linears that read the same tensor share it."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0

    def wants(self) -> list[tuple[str, Side]]:
        return [(name, "in") for name in self._sources().values()]

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        import torch

        work = x.cpu() if x.device.type == "mps" else x
        square = work.to(torch.float64).square().sum(0).cpu()
        self.squares[module] = self.squares[module] + square if module in self.squares else square

    def records(self) -> Iterable[Record]:
        from ..progress import track

        sites = linears_of(self.view)
        if not sites:
            yield MEASURE.missing("", "the run holds no linear layer")
        blocks: dict[int, list[Site]] = {}
        for site in sites:
            if site.block >= 0:
                blocks.setdefault(site.block, []).append(site)
        for site in (s for s in track(sites, "outlier ratios") if s.block < 0):
            yield from self._group([site], "")
        for block, members in track(list(blocks.items()), "outlier ratios"):
            yield from self._group(members, self.view.catalogue.blocks[block])

    def _sources(self) -> dict[str, str]:
        """Id of an input -> the first module that reads it: the one that is looked at."""
        first: dict[str, str] = {}
        for site in linears_of(self.view):
            first.setdefault(site.reads or site.name, site.name)
        return first

    def _group(self, sites: Sequence[Site], block: str) -> Iterable[Record]:
        """Records of single matrices, and of the block that they make up, if there is one."""
        reasons: dict[str, str] = {}
        sums: dict[str, tuple[float, int]] = {}  # of |W_ij| |x_j|, and how many
        for site in sites:
            why = self._unfit(site)
            if not why:
                try:
                    sums[site.name] = sum(float(a.sum()) for a in self._scores(site)), site.shape[0] * site.shape[1]
                except Refused as error:  # of this weight; the others go on
                    why = str(error)
            if why:
                reasons[site.name] = why
        total, count = sum(t for t, _ in sums.values()), sum(n for _, n in sums.values())
        above = 0
        for site in sites:
            if site.name in reasons or sums[site.name][0] == 0:
                yield MEASURE.missing(site.name, reasons.get(site.name, "every weight or every input is zero"))
                continue
            own, size = sums[site.name]
            mine = 0
            for a in self._scores(site):
                mine += int((a > MULTIPLE * own / size).sum())
                above += int((a > MULTIPLE * total / count).sum())
            yield MEASURE.record(site.name, Found(100 * mine / size, settings={"scope": "matrix", "weights": size}))
        if not block:
            return
        if reasons or total == 0:
            yield MEASURE.missing(block, next((f"{k}: {v}" for k, v in reasons.items()), "every weight or every input is zero"))
            return
        whole = sum(s.block == sites[0].block and s.kind == "linear" for s in self.view.catalogue.sites)
        part = f"{len(sites)} of the {whole} linear layers of the block" if len(sites) < whole else ""
        yield MEASURE.record(block, Found(100 * above / count, note=part, settings={"scope": "block", "weights": count}))

    def _unfit(self, site: Site) -> str:
        module = self._sources()[site.reads or site.name]
        square = self.squares.get(module)
        if module in self.lost or square is None:
            why = self.lost.get(module, "no row of text passed it")
            return why if module == site.name else f"{module}, which reads the same input: {why}"
        return "" if len(square) == site.shape[1] else f"{site.shape[1]} input channels are expected, and {len(square)} arrive"

    def _scores(self, site: Site) -> Iterable[Tensor]:
        """|W_ij| |x_j|, float64, a few rows at a time."""
        import torch

        assert self.view.read is not None
        weight = self.view.read(site).cpu()
        if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
            raise Refused("the weight is not of finite real numbers")
        norms = self.squares[self._sources()[site.reads or site.name]].sqrt()
        return (part.to(torch.float64).abs() * norms for part in weight.split(ROWS))


MEASURE = OfText(
    name="outlier_ratio",
    title="Outlier ratio (OWL)",
    paper="arXiv:2310.05175",
    estimator=f"100 #(A > M mean(A)) / #A, A_ij = |W_ij| |x_j|, M = {MULTIPLE:g}; of a block: over all its linear layers together",
    observer=Norms,
    note="of a single matrix the bar is that matrix's own mean, of a block it is the block's, where large matrices dominate",
    settings={"M": MULTIPLE},
    unit="%",
)
