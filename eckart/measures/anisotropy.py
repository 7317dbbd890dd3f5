"""Anisotropy: mean cosine between the activations of different tokens, exact from sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._watch import Side, Watch, layers_of, text_sums
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Sums:
    """Of the rows scaled to length 1: their number and sum, and over texts the squared number and the squared length of the text's sum."""

    rows: float = 0.0
    zeros: int = 0
    texts: int = 0
    total: Tensor | None = None
    square_rows: float = 0.0
    square_sums: float = 0.0
    pending: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


@dataclass
class Cosines(Watch):
    """Keeps one vector per layer."""

    sums: dict[str, _Sums] = field(default_factory=dict)

    def wants(self) -> list[tuple[str, Side]]:
        return [(name, "out") for name in (*layers_of(self.view), "")]

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        import torch

        sums = self.sums.setdefault(module, _Sums())
        wide = x.to(torch.float64) if x.device.type != "mps" else x.cpu().double()
        norm = wide.square().sum(1).sqrt()
        good = norm > 0
        sums.zeros += len(x) - int(good.sum())
        if bool(good.any()):
            sums.pending.append(text_sums(wide[good] / norm[good, None], text.to(wide.device)[good]))

    def end_batch(self) -> None:
        import torch

        for sums in self.sums.values():
            if not sums.pending:
                continue
            numbers, counts, totals = (torch.cat(parts) for parts in zip(*sums.pending, strict=True))
            sums.pending = []
            texts, at = torch.unique(numbers, return_inverse=True)  # a module may be called more than once
            count = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, at, counts)
            total = torch.zeros(len(texts), totals.shape[1], dtype=torch.float64).index_add_(0, at, totals)
            sums.rows += float(count.sum())
            sums.texts += len(texts)
            sums.square_rows += float(count.square().sum())
            sums.square_sums += float(total.square().sum())
            whole = total.sum(0)
            sums.total = whole if sums.total is None else sums.total + whole

    def records(self) -> Iterable[Record]:
        for module, _ in self.wants():
            sums = self.sums.get(module, _Sums())
            if module in self.lost:
                yield MEASURE.missing(module, self.lost[module])
            elif sums.rows < 2 or sums.total is None:
                yield MEASURE.missing(module, f"expected at least two rows that are not zero, found {sums.rows:.0f}")
            else:
                yield MEASURE.record(module, _found(sums))


def _found(s: _Sums) -> Found:
    assert s.total is not None
    square = float(s.total.square().sum())
    value = {"mean_cosine": (square - s.rows) / (s.rows * (s.rows - 1))}
    notes: list[str] = []
    if s.square_rows > s.rows:
        value["within_texts"] = (s.square_sums - s.rows) / (s.square_rows - s.rows)
    else:
        notes.append("every text has a single row, so there are no pairs within texts")
    if s.texts > 1:
        value["across_texts"] = (square - s.square_sums) / (s.rows**2 - s.square_rows)
    else:
        notes.append("a single text, so there are no pairs across texts")
    if s.zeros:
        notes.append(f"{s.zeros} rows are zero and left out")
    return Found(value, note="; ".join(notes), settings={"rows": int(s.rows), "texts": s.texts})


MEASURE = OfText(
    name="anisotropy",
    title="Anisotropy: mean cosine of token activations",
    paper="arXiv:1909.00512",
    estimator="over all pairs of rows u_i of length 1: (|sum u|^2 - N) / (N (N - 1)); pairs of different texts, and of one text, likewise",
    observer=Cosines,
    note="a few channels of huge size can make it large by themselves",
    fidelity="variant",
    differs="all pairs exactly, where the paper samples 1,000 of them; its baseline is the value across texts",
)
