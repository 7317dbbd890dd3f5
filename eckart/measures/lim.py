"""LIM: how much each block changes the hidden state, as minus the cosine between what enters and what leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._watch import NO_BLOCKS, Side, Watch, blocks_of
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Sums:
    """Products of input and output over all rows, and the cosines of single rows; of these also per text, for the error."""

    product: float = 0.0
    square_in: float = 0.0
    square_out: float = 0.0
    rows: int = 0
    zeros: int = 0
    cosines: float = 0.0
    texts: int = 0
    text_mean: float = 0.0
    text_square: float = 0.0


@dataclass
class Similarity(Watch):
    """Keeps nine numbers per block, and the rows that entered a block until they leave it."""

    sums: dict[str, _Sums] = field(default_factory=dict)
    entered: dict[str, Tensor] = field(default_factory=dict)

    def wants(self) -> list[tuple[str, Side]]:
        return [(name, side) for name in blocks_of(self.view) for side in ("in", "out")]

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        import torch

        wide = (x.cpu() if x.device.type == "mps" else x).to(torch.float64, copy=True)  # the block may write over its input
        if side == "in":
            self.entered[module] = wide
            return
        before = self.entered.pop(module, None)
        if before is None or before.shape != wide.shape:
            found = "nothing" if before is None else f"{tuple(before.shape)}"
            self.lose(module, side, f"rows {found} enter it and {tuple(wide.shape)} leave it; they cannot be compared")
            return
        sums = self.sums.setdefault(module, _Sums())
        product, one, two = (before * wide).sum(1), before.square().sum(1), wide.square().sum(1)
        sums.product += float(product.sum())
        sums.square_in += float(one.sum())
        sums.square_out += float(two.sum())
        good = (one > 0) & (two > 0)
        sums.zeros += len(wide) - int(good.sum())
        cosine = product[good] / (one[good].sqrt() * two[good].sqrt())
        sums.rows += len(cosine)
        sums.cosines += float(cosine.sum())
        _, at, counts = torch.unique_consecutive(text.to(wide.device)[good], return_inverse=True, return_counts=True)
        means = torch.zeros(len(counts), dtype=torch.float64, device=wide.device).index_add_(0, at, cosine) / counts
        for mean in means.tolist():  # Welford: no difference of large sums
            sums.texts += 1
            step = mean - sums.text_mean
            sums.text_mean += step / sums.texts
            sums.text_square += step * (mean - sums.text_mean)

    def records(self) -> Iterable[Record]:
        names = blocks_of(self.view)
        if not names:
            yield MEASURE.missing("", NO_BLOCKS)
        for name in names:
            sums = self.sums.get(name, _Sums())
            if name in self.lost:
                yield MEASURE.missing(name, self.lost[name])
            elif not sums.rows:
                yield MEASURE.missing(name, "every row that enters it or leaves it is zero")
            else:
                yield MEASURE.record(name, _found(sums))


def _found(s: _Sums) -> Found:
    lim = -s.product / (math.sqrt(s.square_in) * math.sqrt(s.square_out))
    error = math.sqrt(s.text_square / (s.texts - 1) / s.texts) if s.texts > 1 else None
    value = {"lim": min(1.0, max(-1.0, lim)), "per_token": -s.cosines / s.rows}
    note = f"{s.zeros} rows are zero and left out of per_token" if s.zeros else ""
    return Found(value, {"lim": None, "per_token": error}, note, settings={"rows": s.rows, "texts": s.texts})


MEASURE = OfText(
    name="lim",
    title="LIM: layer input modification",
    paper="arXiv:2406.17415",
    estimator="-<x, y> / (|x| |y|) with all rows of the text flattened (lim), and the mean over tokens of the same for single rows (per_token)",
    observer=Similarity,
    note="higher means that the block changes more; -1 is a block that only scales; "
    "lim is ruled by the few tokens whose activations are huge, per_token is not",
    fidelity="variant",
    differs="the paper's code is not public: whether it flattens or averages is unknown, so both are given. "
    "The error of per_token is that of its mean over texts",
)
