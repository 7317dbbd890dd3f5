"""Matrix nuclear-norm (MNN) of a text's last hidden states, with the nuclear norm and the entropy that it stands for beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._watch import Side, Watch, by_text, means, sample_of
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = 256  # of a run that are measured


@dataclass
class Norms(Watch):
    """Keeps four numbers per measured text."""

    found: list[dict[str, float]] = field(default_factory=list)
    short: int = 0
    chosen: frozenset[int] | None = None

    def __post_init__(self) -> None:
        self.chosen = sample_of(self.view, TEXTS, "mnn")

    def wants(self) -> list[tuple[str, Side]]:
        return [("", "out")]

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        for number, rows in by_text(x, text):
            if len(self.found) == TEXTS or (self.chosen is not None and number not in self.chosen):
                continue
            value = of_text(rows)
            if value is None:
                self.short += 1
            else:
                self.found.append(value)

    def records(self) -> Iterable[Record]:
        short = f"{self.short} texts have a single token, or the same state at every token"
        if "" in self.lost:
            yield MEASURE.missing("", self.lost[""])
        elif not self.found:
            yield MEASURE.missing("", f"no text can be measured: {short}")
        else:
            value, error = means(self.found)
            yield MEASURE.record("", Found(value, error, short if self.short else "", settings={"texts": len(self.found)}))


def of_text(states: Tensor) -> dict[str, float] | None:
    """MNN, nuclear norm, entropy and effective rank of the states of one text.

    The states are centred over the tokens and scaled to length 1, Z (T, d); a token whose state is the mean has no direction and is left out.

    Args:
        states: (T, d), floating point.

    Returns:
        "mnn": sum of the min(T, d) largest column norms of Z, over T, "nuclear_norm": sum of its singular values, over T, "entropy":
        -sum p log p / log d with p = s^2 / T, and "effective_rank" of the singular values; None when no token is left.

    Example:
        >>> import torch
        >>> found = of_text(torch.cat([torch.eye(4), -torch.eye(4)]))
        >>> round(found["effective_rank"], 6), round(found["entropy"], 6)
        (4.0, 1.0)
    """
    import torch

    from ..linalg import svdvals
    from ..spectra.numbers import effective_rank

    work = states.detach().cpu().to(torch.float64)
    centred = work - work.mean(0)
    norm = centred.square().sum(1).sqrt()
    good = norm > 1e-12 * float(work.square().sum(1).max().sqrt())
    rows, d = int(good.sum()), work.shape[1]
    if rows < 2:
        return None
    z = centred[good] / norm[good, None]
    columns = z.square().sum(0).sqrt().sort(descending=True).values
    s = svdvals(z, tol=1e-7)
    p = s.square() / rows
    p = p[p > 0]
    return {
        "mnn": float(columns[: min(rows, d)].sum()) / rows,
        "nuclear_norm": float(s.sum()) / rows,
        "entropy": float(-(p * p.log()).sum()) / math.log(d) if d > 1 else 0.0,
        "effective_rank": effective_rank(s),
    }


MEASURE = OfText(
    name="mnn",
    title="Matrix nuclear-norm of hidden states",
    paper="arXiv:2410.10672",
    estimator="of the last hidden states of a text, centred and scaled to length 1: the min(T, d) largest column norms, summed, over T tokens; "
    "beside it the nuclear norm over T, -sum p log p / log d with p = s^2 / T, and the effective rank; means over texts",
    observer=Norms,
    note="mnn does not order by rank: on matrices of growing rank the nuclear norm and the entropy rise while mnn may fall, since it measures "
    "how unevenly the coordinates are used and changes under rotation. Read nuclear_norm and entropy; all of them depend on the length",
    settings={"texts_at_most": TEXTS},
    fidelity="variant",
    differs="tokens whose centred state is zero are left out, where the released code gives NaN; begin-of-sequence tokens count, as there",
)
