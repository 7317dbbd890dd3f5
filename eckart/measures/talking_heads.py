"""Composition of attention heads: which components of earlier heads later heads read, from the weights alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from .base import CheckpointView, Found, OfCheckpoint, Record

if TYPE_CHECKING:
    from torch import Tensor

    from ..catalogue.parts import Attention
    from ..linalg import Factors
    from ..spectra.composition import Heads, Sides

OUTLIER = 8.0  # robust z of a component's score among all that one module reads on one side
CHANNELS = 20  # those of largest z that are named
NORMS = (
    "input_layernorm",
    "ln_1",
    "ln1",
    "attention_norm",
    "norm1",
    "layer_norm1",
    "layernorm_before",
    "attn_norm",
    "self_attn_layer_norm",
)
WOVEN_PAIRS = ("gptj", "codegen", "cohere", "chatglm", "glm")  # model types whose rotary pairs are neighbours, not halves


@dataclass(frozen=True)
class Channel:
    """A component of an earlier head that a later head reads more than others.

    Args:
        name: "block.head.component -> block.head side".
        score: C of the component.
        z: distance of it from the median of its module and side, in robust deviations.
        energy: share of the component in the squared norm of the head that writes it.
    """

    name: str
    score: float
    z: float
    energy: float


def compute(view: CheckpointView) -> Iterable[Record]:
    """A record per attention module on what it reads of earlier ones, and one of the whole model with the strongest channels."""
    from ..catalogue.parts import attentions, rotary
    from ..progress import track

    found, why = attentions(view.catalogue, view.config)
    wanted = {s.name for s in view.sites}
    found = [a for a in found if {a.q.site.name, a.k.site.name, a.v.site.name, a.o.site.name} <= wanted]
    for name, reason in why.items():
        yield MEASURE.missing(name, reason)
    if not found and not why:
        yield MEASURE.missing("", "the run takes no attention module with all of its projections")
    turns = rotary(view.config)
    before: dict[str, list[tuple[Attention, Heads]]] = {}
    channels: list[Channel] = []
    whole: dict[str, Any] = {}
    for one in track(found, "composing heads"):
        if one.cross:
            yield MEASURE.missing(one.name, "cross attention reads another sequence: not followed")
            continue
        norm, folded = _norm(view, one)
        heads = factorise(view.read, one, norm, _pairs(one, view.config) if turns else None)
        if isinstance(heads, str):
            yield MEASURE.missing(one.name, heads)
            continue
        earlier = before.setdefault(_stack(one.name), [])
        found_here, value = _read(one, heads, [e for e in earlier if e[0].block < one.block])
        settings = {"norm": folded, "rotary": "mean over angles" if turns else "none", "key_heads": len(one.k.at), "heads": one.heads}
        if value:
            yield MEASURE.record(one.name, Found(value, settings=settings))
        else:
            yield MEASURE.missing(one.name, "no earlier attention writes to what it reads")
        channels = sorted([*channels, *found_here], key=lambda c: -c.z)[:CHANNELS]
        earlier.append((one, heads))
        if value:
            sides = {side: max(value[side], whole.get(side, 0.0)) for side in ("query", "key", "value")}
            whole = {"outliers": value["outliers"] + whole.get("outliers", 0), **sides, "random": heads.writes.shape[1] ** -0.5}
    if whole:
        named = {"channels": {c.name: c.score for c in channels}, "channel_energy": {c.name: c.energy for c in channels}}
        yield MEASURE.record("", Found({**whole, **named}))


def factorise(read: Any, one: Attention, norm: Tensor | None, pairs: Tensor | None) -> Heads | str:
    """The heads of a module in factored form, or why they have none.

    Args:
        read: site -> W (out, in).
        one: the module.
        norm: (d, d) or (d,) map that the norm in front applies to what is read, or None.
        pairs: rows of a head that rotate together, or None.
    """
    import torch

    from ..spectra.composition import SIDES, Heads, output_value, reader

    stored = {s.name: read(s) for s in (one.q.site, one.k.site, one.v.site, one.o.site)}
    kept = torch.float64 if any(w.dtype == torch.float64 for w in stored.values()) else torch.float32
    weights = {name: w.to(torch.float64) for name, w in stored.items()}
    for name, w in weights.items():
        if not bool(torch.isfinite(w).all()):
            return f"{name} holds NaN or Inf"
    q, k, v = (_folded(weights[s.site.name], norm) for s in (one.q, one.k, one.v))
    out = weights[one.o.site.name]
    written: list[Factors] = []
    sides: dict[Sides, list[Factors]] = {side: [] for side in SIDES}
    for h in range(one.heads):
        g = h // one.shared
        Q, K, V, O = q[one.q.at[h]], k[one.k.at[g]], v[one.v.at[g]], out[:, one.o.at[h]]
        ov = output_value(V, O)
        written.append(ov)
        sides["query"].append(reader(Q, K, pairs))
        sides["key"].append(reader(K, Q, pairs))
        sides["value"].append(ov)
    return Heads(
        torch.stack([f.U.to(kept) for f in written]),
        torch.stack([f.S.to(kept) for f in written]),
        {side: torch.stack([f.Vh.to(kept) for f in fs]) for side, fs in sides.items()},
        {side: torch.stack([f.S.to(kept) for f in fs]) for side, fs in sides.items()},
    )


def _folded(weight: Tensor, norm: Tensor | None) -> Tensor:
    return weight if norm is None else weight * norm if norm.ndim == 1 else weight @ norm


def _read(one: Attention, heads: Heads, earlier: list[tuple[Attention, Heads]]) -> tuple[list[Channel], dict[str, Any]]:
    """(strongest channels into a module, its numbers); nothing where nothing came before."""
    import torch

    from ..spectra.composition import SIDES, compose, outliers

    channels: list[Channel] = []
    value: dict[str, Any] = {"query": 0.0, "key": 0.0, "value": 0.0, "outliers": 0}
    for side in SIDES if earlier else ():
        scores = [compose(h, heads, side) for _, h in earlier]
        table = torch.cat([s.components.reshape(-1) for s in scores])
        z, out = outliers(table, OUTLIER)
        value[side] = float(table.max())
        value[f"{side}_heads"] = float(torch.cat([s.heads.reshape(-1) for s in scores]).max())
        value["outliers"] += int(out.sum())
        starts = [0]
        for s in scores:
            starts.append(starts[-1] + s.components.numel())
        for place in z.topk(min(CHANNELS, len(z))).indices.tolist():
            if table[place] == 0:
                continue
            which = bisect_right(starts, place) - 1
            (writer, factors), shape = earlier[which], scores[which].components.shape
            b, a, c = (int(i) for i in torch.unravel_index(torch.tensor(place - starts[which]), shape))
            energy = factors.sizes[a].square()
            name = f"{writer.block}.{a}.{c} -> {one.block}.{b} {side}"
            channels.append(Channel(name, float(table[place]), float(z[place]), float(energy[c] / energy.sum())))
    return channels, value if earlier else {}


def _norm(view: CheckpointView, one: Attention) -> tuple[Tensor | None, str]:
    """(what the norm in front of a module does to a vector but for its length, its name); None where none is known by name."""
    import torch

    others = set(view.catalogue.others)
    above = one.q.site.tensors[0].rpartition(".")[0]  # names of the file, whatever it puts in front of those of the modules
    while above:
        above = above.rpartition(".")[0]
        for norm in NORMS:
            key = f"{above}.{norm}.weight" if above else f"{norm}.weight"
            if key not in others:
                continue
            size = one.q.site.shape[1]
            scale = view.read(Site(key, (size, 1), (key,))).to(torch.float64)[:, 0]
            if "gemma" in str(view.config.get("model_type", "")):
                scale = scale + 1
            if key.removesuffix("weight") + "bias" not in others:
                return scale, key
            eye = torch.eye(size, dtype=torch.float64, device=scale.device)
            return scale[:, None] * (eye - 1 / size), key  # a layer norm takes the mean away first
        if above.rpartition(".")[2].isdigit():  # the block: norms outside of it belong to others
            break
    return None, "none known by name"


def _pairs(one: Attention, config: Mapping[str, Any]) -> Tensor:
    """(p, 2) rows of a head that are rotated together."""
    import torch

    width = one.q.at.shape[1]
    nested = config.get("rope_parameters")
    share = (nested.get("partial_rotary_factor") if isinstance(nested, Mapping) else None) or config.get("partial_rotary_factor")
    turned = config.get("rotary_dim") or int(width * (share or config.get("rotary_pct") or 1.0))
    rows = torch.arange(turned - turned % 2)
    woven = any(str(config.get("model_type", "")).startswith(t) for t in WOVEN_PAIRS)
    return rows.reshape(-1, 2) if woven else rows.reshape(2, -1).T


def _stack(name: str) -> str:
    """What precedes the number of the block: encoder and decoder are two stacks."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, p in enumerate(parts) if p.isdigit()), 0)])


MEASURE = OfCheckpoint(
    name="talking_heads",
    title="Communication channels between attention heads",
    paper="arXiv:2406.09519",
    estimator="C(A_i, B) = ||B u_i|| / ||B|| of the singular components of earlier O V maps with what later heads read by query, key and value",
    compute=compute,
    default=False,
    settings={"outlier": OUTLIER, "channels": CHANNELS},
    note="of weights: norms count by their scales only, biases not at all. Names: block.head.component -> block.head side. A random direction scores "
    "1/sqrt(width); outliers lie 8 robust deviations above the median of their module and side",
    fidelity="variant",
    differs="the rule for outliers is ours; with rotary positions query and key scores are root mean squares over independent rotation angles, "
    "where the paper's models have none; the paper's edits of weights are not measures",
)
