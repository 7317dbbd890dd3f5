"""Intrinsic dimension of texts: of the cloud of a text's token embeddings, by three estimators."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._watch import Side, Watch, by_text, correlation, means
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor

    from .base import TextView

TEXTS = 32  # measured, drawn from those that are long enough
TOKENS = 512  # of a text; what is beyond is cut
MINIMUM = 80  # tokens of a text that is measured, as in the code of Tulchinskii et al.
TIE = 1e-6  # of the mean distance: two tokens that float32 cannot tell apart count once


@dataclass
class Clouds(Watch):
    """Keeps the distances between tokens of at most `TEXTS` texts, 2 MB each, drawn by the seed whatever the number of texts."""

    held: list[tuple[float, int, Tensor]] = field(default_factory=list)  # a heap: the text with the largest key is first
    long: int = 0
    short: int = 0

    def wants(self) -> list[tuple[str, Side]]:
        return [("", "out")]

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        from ..spectra.dimension import distances, distinct

        front, behind = self.view.specials
        for number, rows in by_text(x, text):
            points = rows[front : max(front, len(rows) - behind)][:TOKENS]
            if len(points) < MINIMUM:
                self.short += 1
                continue
            self.long += 1
            key = _key(self.view, number)
            if len(self.held) == TEXTS and -key < self.held[0][0]:
                continue
            d = distinct(distances(points), TIE)
            if len(d) < MINIMUM:
                self.long, self.short = self.long - 1, self.short + 1
                continue
            push = heapq.heappush if len(self.held) < TEXTS else heapq.heappushpop
            push(self.held, (-key, number, d))

    def records(self) -> Iterable[Record]:
        from ..progress import track

        short = f"{self.short} texts have fewer than {MINIMUM} distinct tokens and are left out"
        if "" in self.lost:
            yield MEASURE.missing("", self.lost[""])
            return
        if not self.held:
            yield MEASURE.missing("", f"no text is long enough: {short}")
            return
        texts = sorted((number, d) for _, number, d in self.held)
        found = [_dimensions(d, number, self.view.seed) for number, d in track(texts, "intrinsic dimensions")]
        value, error = means(found)
        lengths = [len(d) for _, d in texts]
        notes = [short] if self.short else []
        if (r := correlation([math.log(n) for n in lengths], [f["phd"] for f in found])) is not None:
            notes.append(f"across these texts phd and the logarithm of the length correlate with r = {r:.2f}")
        endless = sum(not math.isfinite(f["phd"]) for f in found)
        if endless:
            notes.append(f"phd is infinite for {endless} texts, which its mean leaves out")
        settings = {"texts": len(texts), "texts_long_enough": self.long, "mean_tokens": sum(lengths) / len(lengths)}
        yield MEASURE.record("", Found(value, error, "; ".join(notes), settings=settings))


def _dimensions(d: Tensor, number: int, seed: int) -> dict[str, float]:
    from ..seeds import seed_of
    from ..spectra.dimension import likelihood_dimension, tree_growth, two_nn

    growth = tree_growth(d, seed=seed_of(seed, "intrinsic_dimension", str(number)))
    return {"phd": growth.dimension, "mle": likelihood_dimension(d), "twonn": two_nn(d)}


def _key(view: TextView, number: int) -> float:
    """A random number that belongs to a text: those with the smallest ones are measured."""
    from ..seeds import seed_of

    return seed_of(view.seed, "intrinsic_dimension", str(number)) / 2**63


MEASURE = OfText(
    name="intrinsic_dimension",
    title="Intrinsic dimension of texts",
    paper="arXiv:2511.15210",
    estimator="of the last hidden states of a text's tokens: phd from the growth of minimum spanning trees (40 to T tokens in 7 sizes, "
    "3 restarts, power 1), mle from 20 neighbours, twonn from two (a tenth of the ratios discarded); means over texts",
    observer=Clouds,
    note="grows with the length of the text: compare texts of one length",
    settings={"minimum_tokens": MINIMUM, "tokens_at_most": TOKENS, "texts_at_most": TEXTS},
    fidelity="variant",
    differs="the paper's own code is not public: PHD as in the code of arXiv:2306.04723; repeated tokens count once; line breaks stay",
)
