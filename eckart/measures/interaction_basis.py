"""Interaction Basis: how many directions of a layer's input occur, and how many of them the output depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Stat
from ..errors import Refused
from ._live import reasons
from .base import Found, ModelView, OfModel, Record

if TYPE_CHECKING:
    from torch import Tensor

    from ..axes.protocols import Site

TOKENS = 4096
SOURCES = 2  # random combinations of outputs that are differentiated per batch
EXACT = 32  # outputs per sample up to which each of them is
LARGEST = 16384  # outputs of a layer; beyond, its Gram of gradients is left alone
SHARES = (0.9, 0.99)
INPUTS = Stat("moments", at="in")
GRADIENTS = Stat("moments", at="out", via="backward", probe="task_loss")


def compute(view: ModelView) -> Iterable[Record]:
    """A record per linear matrix of the run."""
    return reasons(_records(view), MEASURE.missing)


def _records(view: ModelView) -> Iterator[Record]:
    from ..catalogue.parts import live_bias, live_key
    from ..progress import track
    from ..stats.collect import collect
    from ..stats.objective import arguments, few

    used, head = few(view.batches, TOKENS), _head(view.model)
    sites: list[Site] = []
    for site in view.sites:
        if site.kind != "linear" or site.name == head or site.shape[0] > LARGEST:
            yield MEASURE.missing(site.name, _left_out(site, head))
        else:
            sites.append(site)
    if not used or not sites:
        raise Refused("there is no linear matrix to measure" if used else "there is no calibration text")
    sources = Sources(view.seed, SOURCES)
    repeats = sources.plan(view.model, used[0])
    rows = [arguments(view.model, batch) for batch in used for _ in range(repeats)]
    found = collect(
        view.model, rows, {INPUTS, GRADIENTS}, sites, seed=view.seed, probe="task_loss", loss=sources, model_id="interaction basis"
    )
    tokens = int(found.get(INPUTS, sites[0]).count) // repeats
    settings = {"sources": "every output" if sources.exact else repeats, "batches": len(used), "rows": tokens, "seed": view.seed}
    for site in track(sites, "interaction bases"):
        moments, slopes = found.get(INPUTS, site), found.get(GRADIENTS, site)
        weight = view.model.get_parameter(live_key(site)).detach().double()
        weight = weight.T if site.view == "transposed" else weight
        own = live_bias(site)
        bias = None if own is None else view.model.get_parameter(own).detach().double()
        value = numbers(weight.cpu(), None if bias is None else bias.cpu(), moments.second(), moments.mean, slopes.second() * sources.scale)
        yield (
            MEASURE.record(site.name, Found(value, settings=settings))
            if value
            else MEASURE.missing(site.name, "the output does not depend on it")
        )


def numbers(weight: Tensor, bias: Tensor | None, second: Tensor, mean: Tensor, slopes: Tensor) -> dict[str, Any] | None:
    """What a record holds: counts of directions on the way through a layer; None where nothing depends on it.

    Args:
        weight: W (m, n).
        bias: (m,), folded in as the weight of a constant feature.
        second: (n, n) mean of x x^T.
        mean: (n,) mean of x.
        slopes: (m, m) mean of J^T J.
    """
    import torch

    from ..linalg.psd import Weight, eigh_psd
    from ..linalg.weighted import spectrum
    from ..spectra.interaction import CUT
    from ..spectra.numbers import energy_rank, participation_rank, thin

    if bias is not None:
        weight = torch.cat([weight, bias[:, None]], 1)
        second = torch.cat([torch.cat([second, mean[:, None]], 1), torch.cat([mean, torch.ones(1).double()])[None]])
    s = spectrum(weight, out=Weight(slopes, name="gradients"), into=Weight(second, name="inputs"))
    if float(s[0]) == 0:
        return None
    occur, matter = (eigh_psd(g)[0].sqrt() for g in (second, slopes))
    lam = s.square()
    value: dict[str, Any] = {
        "directions": energy_rank(s, SHARES[1]),
        "directions_90": energy_rank(s, SHARES[0]),
        "input_directions": energy_rank(occur, SHARES[1]),
        "output_directions": energy_rank(matter, SHARES[1]),
        "above_cut": int((lam > CUT * lam[0]).sum()),
        "participation": participation_rank(s),
        "total": float(lam.sum()),
    }
    plot = thin(lam)
    return value | {"values": plot["spectrum"], "values_at": plot["spectrum_at"]}


@dataclass
class Sources:
    """A loss whose gradient is J^T v for a source v: each output in turn, or random signs over all outputs and positions.

    Called once per batch in their order, so the number of the call says which source is due.

    Args:
        seed: of the signs.
        count: sources per batch, when they are random.
    """

    seed: int
    count: int
    exact: bool = False
    scale: float = 1.0
    calls: int = 0

    def plan(self, model: Any, batch: Any) -> int:
        """How often each batch must be run, from the shape of the model's output on the first one."""
        from ..stats.objective import Objective

        tried = Objective(model, [batch], loss=lambda output, _: _outputs(output).sum())
        z = _outputs(tried.term(tried.state(), 0)[1])
        self.exact = z.ndim == 2 and z.shape[1] <= EXACT
        self.scale = float(z.shape[1]) if self.exact else 1.0  # moments are means over sources; the sum over outputs is wanted
        return z.shape[1] if self.exact else self.count

    def __call__(self, output: Any, batch: Any) -> Tensor:
        import torch

        from ..seeds import generator

        z, call = _outputs(output), self.calls
        self.calls += 1
        if self.exact:
            return z[:, call % z.shape[1]]
        signs = torch.randint(0, 2, z.shape, generator=generator(self.seed, "source", str(call))).to(z) * 2 - 1
        mask = batch.get("attention_mask") if isinstance(batch, dict) else getattr(batch, "attention_mask", None)
        if mask is not None and mask.shape == z.shape[:2] and z.ndim == 3:
            signs = signs * mask.to(z)[:, :, None]
        return (z * signs).sum()


def _outputs(output: Any) -> Tensor:
    import torch

    for found in (output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)):
        if isinstance(found, torch.Tensor):
            return found if found.dtype == torch.float64 else found.float()
    raise Refused(f"expected an output tensor, .logits or .last_hidden_state, found {type(output).__name__}")


def _head(model: Any) -> str | None:
    """Name of the module whose outputs are the model's own."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def _left_out(site: Site, head: str | None) -> str:
    if site.name == head:
        return "its outputs are the model's own: nothing follows"
    return f"{site.shape[0]} outputs are too many for a Gram of gradients" if site.kind == "linear" else "not a linear layer"


MEASURE = OfModel(
    name="interaction_basis",
    title="Interaction Basis of a layer's input",
    paper="arXiv:2405.10927",
    estimator="singular values of G^(1/2) [W b] S^(1/2), S the second moment of the inputs with a constant feature, G that of the output's Jacobian "
    "in this layer's output",
    compute=compute,
    settings={"tokens": TOKENS, "shares": SHARES},
    note="directions: how many hold 99% of the interaction; input_directions: how many hold 99% of the inputs' energy. Random sources make G an "
    "estimate of rank at most sources times rows",
    fidelity="variant",
    differs="features of a layer's input acting on the model's output through that layer, where the paper takes residual streams and the next layer's "
    "features; no edges or modules; cut relative to the largest value. Exact for linear networks",
)
