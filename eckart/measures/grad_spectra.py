"""Gradient spectra: nuclear norm and effective rank of the weight gradients of single texts, layer by layer.

To compare two sets of texts (instructions and reasoning, good and bad), measure both with the same model and compare groups of equal
length: `examples/gradient_spectra.py` is that protocol. Token weights of a batch weigh the loss, so 0 leaves the prompt out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..errors import Refused, UsageError
from ._loss import NO_LOSS, half, nothing, text_loss
from ._watch import attention_role, correlation, linears_of, mean_and_error, means
from .base import Found, ModelView, OfModel, Record

if TYPE_CHECKING:
    from torch import Tensor

    from ..stats.gradients import Sample

SAMPLES = 32  # texts whose gradients are factorised
DUST = 1e-6  # of the text's largest nuclear norm: below it a gradient is rounding, such as a query's that has one position to look at


@dataclass
class _Spectra:
    """What was found in each text: numbers only."""

    view: ModelView
    by_site: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    loss: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, float] = field(default_factory=dict)
    zero: set[str] = field(default_factory=set)

    def scalars(self, sample: Sample, output: Any) -> Sequence[tuple[str, Tensor]]:
        found = text_loss(self.view, sample, output)
        if found is None:
            return ()
        mean = found[0] / found[1]
        self.loss[sample.number] = float(mean.detach())
        self.tokens[sample.number] = found[1] if self.view.loss is None else 1.0
        return (("loss", mean),)

    def take(self, sample: Sample, name: str, site: Site, x: Tensor, delta: Tensor) -> None:
        from ..linalg.product import product_svdvals
        from ..spectra.numbers import effective_rank

        s = product_svdvals(delta.cpu(), x.cpu(), f"{site.name}: the gradient of text {sample.number}")
        if float(s[0]) == 0:
            self.zero.add(site.name)
        else:
            found = {"nuclear_norm": float(s.sum()), "effective_rank": effective_rank(s)}
            self.by_site.setdefault(site.name, {})[sample.number] = found

    def sweep(self) -> None:
        """Take out gradients that are zero but for rounding."""
        largest: dict[int, float] = {}
        for found in self.by_site.values():
            for number, row in found.items():
                largest[number] = max(largest.get(number, 0.0), row["nuclear_norm"])
        for name, found in self.by_site.items():
            kept = {number: row for number, row in found.items() if row["nuclear_norm"] > DUST * largest[number]}
            if len(kept) < len(found):
                self.zero.add(name)
            self.by_site[name] = kept


def grad_spectra(view: ModelView) -> Iterable[Record]:
    """A record for each query, key, value and output projection (where there are none, for each linear layer), and one for the model.

    Args:
        view: model, batches and, for a model that does not predict the next token, a loss.

    Returns:
        The records: means over texts with their standard errors.
    """
    from ..stats.gradients import drawn, each_gradient

    linears = linears_of(view)
    named = [s for s in linears if attention_role(s) in ("q", "k", "v", "o", "qkv")]
    sites = named or linears
    if not sites:
        yield MEASURE.missing("", "the run holds no linear layer")
        return
    spectra = _Spectra(view)
    why = "" if view.causal or view.loss is not None else NO_LOSS
    if not why:
        try:
            done = each_gradient(view.model, drawn(view.batches, SAMPLES, view.seed, "grad_spectra"), sites, spectra.scalars, spectra.take)
            why = nothing(view, done)
            spectra.sweep()
        except (Refused, UsageError) as error:
            why = str(error)
    if why:
        yield from (MEASURE.missing(name, why) for name in (*(s.name for s in sites), ""))
        return
    note = "; ".join(n for n in (half(view), "" if named else "no attention layer is known by name: all linear layers") if n)
    for site in sites:
        rows = list(spectra.by_site.get(site.name, {}).values())
        if rows:
            value, error = means(rows)
            yield MEASURE.record(site.name, Found(value, error, note, settings={"texts": len(rows)}))
        else:
            yield MEASURE.missing(
                site.name, "its gradient is zero in every text" if site.name in spectra.zero else "no gradient reaches it"
            )
    yield _whole(spectra, note)


def _whole(spectra: _Spectra, note: str) -> Record:
    rows: list[dict[str, float]] = []
    for number in spectra.loss:
        own = [found[number] for found in spectra.by_site.values() if number in found]
        if own:
            mean = {name: mean_and_error([o[name] for o in own])[0] for name in own[0]}
            rows.append(mean | {"loss": spectra.loss[number], "tokens": spectra.tokens[number]})
    if not rows:
        return MEASURE.missing("", "no gradient reaches any of the layers")
    value, error = means(rows)
    r = correlation([math.log(row["tokens"]) for row in rows], [math.log(row["nuclear_norm"]) for row in rows])
    if r is not None:
        note = "; ".join([*([note] if note else []), f"nuclear norm and the logarithm of the length correlate with r = {r:.2f}"])
    return MEASURE.record("", Found(value, error, note, settings={"texts": len(rows)}))


MEASURE = OfModel(
    name="grad_spectra",
    title="Layer-wise gradient spectra",
    paper="arXiv:2504.10766",
    estimator="of the gradient of a text's mean next-token loss by each of the q, k, v, o weights: sum of the singular values, "
    "and exp(-sum p log p) with p = s / sum(s); means over texts",
    compute=grad_spectra,
    note="the nuclear norm follows loss and length: compare texts of equal length; the effective rank is at most the number of tokens",
    settings={"texts_at_most": SAMPLES},
    fidelity="variant",
    differs="all tokens enter the loss unless the batch weighs them; singular values through thin factors, the gradient is never formed; "
    "the cosines between layers, which the paper finds uninformative, are left out",
)
