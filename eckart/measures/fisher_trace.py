"""Fisher trace: how strongly the output answers to each weight matrix, from labels that the model itself draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..errors import Refused, UsageError
from ._loss import half, nothing, target_weights, text_loss
from ._watch import linears_of, mean_and_error
from .base import Found, ModelView, OfModel, Record

if TYPE_CHECKING:
    from torch import Tensor

    from ..stats.gradients import Sample

SAMPLES = 32  # texts
NAMES = {"drawn": "fisher_trace", "text": "empirical_trace"}


@dataclass
class _Squares:
    """Squared lengths of gradients: one number per text, matrix and kind of label."""

    view: ModelView
    found: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # kind -> site -> text -> number
    tokens: dict[int, float] = field(default_factory=dict)

    def scalars(self, sample: Sample, output: Any) -> Sequence[tuple[str, Tensor]]:
        if not self.view.causal and self.view.loss is None:
            return [("drawn", self._projection(sample, output))]
        found = text_loss(self.view, sample, output)
        if found is None:
            return ()
        self.tokens[sample.number] = found[1]
        if self.view.loss is not None:
            return [("text", found[0])]
        return [("drawn", self._drawn(sample, output)), ("text", found[0])]

    def take(self, sample: Sample, name: str, site: Site, x: Tensor, delta: Tensor) -> None:
        from ..stats.gradients import outer_square

        square = outer_square(x, delta) / self.tokens[sample.number]
        self.found.setdefault(name, {}).setdefault(site.name, {})[sample.number] = square

    def _drawn(self, sample: Sample, output: Any) -> Tensor:
        """Loss of next tokens that are drawn from what the model predicts: then the mean square of its gradient is the Fisher trace, exactly,
        since the gradients of different tokens are uncorrelated."""
        import torch

        from ..seeds import generator
        from ..stats.gradients import token_losses

        assert sample.ids is not None
        chances = output.logits[0, :-1].detach().float().softmax(-1).cpu()
        if not bool(torch.isfinite(chances).all()):
            raise Refused(f"the output on text {sample.number} is not finite. Check the weights (eckart inspect), or run in float32.")
        source = generator(self.view.seed, "fisher_trace", str(sample.number))
        labels = torch.multinomial(chances, 1, generator=source).squeeze(1)
        losses = token_losses(output, torch.cat([sample.ids[0, :1].cpu(), labels])[None])
        return (losses * (target_weights(sample, losses) > 0)).sum()

    def _projection(self, sample: Sample, output: Any) -> Tensor:
        """<v, embedding> with v standard normal: the Fisher trace of a normal distribution of variance 1 around the embedding."""
        from ..stats.probes import embedding_of, random_projections

        self.tokens[sample.number] = 1.0
        (scalar,) = random_projections(embedding_of(output, None), self.view.seed, sample.number, 1)
        return scalar


def fisher_trace(view: ModelView) -> Iterable[Record]:
    """A record for each linear layer, and one for their sum.

    Args:
        view: model and batches; a loss, if one is given, replaces both kinds of label, and only the empirical trace is left.

    Returns:
        The records: means over texts with their standard errors.
    """
    from ..stats.gradients import drawn, each_gradient

    sites = linears_of(view)
    if not sites:
        yield MEASURE.missing("", "the run holds no linear layer")
        return
    squares = _Squares(view)
    try:
        chosen = drawn(view.batches, SAMPLES, view.seed, "fisher_trace")
        hidden = not view.causal and view.loss is None
        done = each_gradient(view.model, chosen, sites, squares.scalars, squares.take, hidden=hidden)
        why = nothing(view, done)
    except (Refused, UsageError) as error:
        why = str(error)
    if why:
        yield from (MEASURE.missing(name, why) for name in (*(s.name for s in sites), ""))
        return
    notes = [half(view)]
    if view.loss is not None:
        notes.append("of the given loss: no labels can be drawn, so only the empirical trace is there")
    elif not view.causal:
        notes.append("per text, of a normal distribution of variance 1 around the embedding, since the model predicts no tokens")
    note = "; ".join(n for n in notes if n)
    total: dict[str, dict[int, float]] = {}
    for site in sites:
        own = {NAMES[kind]: by_site[site.name] for kind, by_site in squares.found.items() if site.name in by_site}
        yield _record(site.name, own, note)
        for name, by_text in own.items():
            for number, square in by_text.items():
                total.setdefault(name, {})[number] = total.get(name, {}).get(number, 0.0) + square
    yield _record("", total, note)


def _record(name: str, own: dict[str, dict[int, float]], note: str) -> Record:
    if not own:
        return MEASURE.missing(name, "no gradient reaches it")
    value: dict[str, float] = {}
    error: dict[str, float | None] = {}
    for key, by_text in own.items():
        value[key], error[key] = mean_and_error(list(by_text.values()))
    return MEASURE.record(name, Found(value, error, note, settings={"texts": max(map(len, own.values()))}))


MEASURE = OfModel(
    name="fisher_trace",
    title="Trace of the Fisher information",
    paper="arXiv:1905.12558",
    estimator="fisher_trace: mean over texts of the squared gradient of log p of next tokens drawn from the model, per predicted token; "
    "empirical_trace: the same with the text's own tokens",
    compute=fisher_trace,
    note="the empirical trace is not an estimate of the Fisher trace: its labels are the data's, and the gradients of a text's tokens add up "
    "before they are squared",
    settings={"texts_at_most": SAMPLES, "draws": 1},
)
