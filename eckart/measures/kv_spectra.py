"""KV-cache spectra: how many directions the keys and values of a layer use, and those of neighbouring layers together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..spectra.numbers import effective_rank, energy_rank, thin
from ._kv import KINDS, Layer, groups_of, layers_of
from ._watch import Side, Watch, by_text, mean_and_error, sample_of
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor

    from ..stats.moments import Centred

GROUP = 4  # neighbouring layers that share a basis in xKV
SHARE = 0.9  # of the squared singular values, for ranks
PROMPTS = 8  # texts whose own caches are factorised, as xKV does at each prompt
WIDEST = 8192  # channels of a Gram: 512 MiB
POINTS = 32  # of a spectrum kept for plots


@dataclass
class Caches(Watch):
    """Keeps a Gram per group of layers and kind, 8 (layers x width)^2 bytes each, and the keys and values of one batch."""

    layers: list[Layer] = field(default_factory=list)
    groups: list[list[Layer]] = field(default_factory=list)
    held: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # (layer, kind) -> rows and texts
    sums: dict[tuple[str, str], Centred] = field(default_factory=dict)  # of a group under the name of its first layer, or of a layer
    prompts: dict[tuple[str, str], list[float]] = field(
        default_factory=dict
    )  # ranks of single texts: of a layer, "+" and "|" a group's first
    chosen: frozenset[int] | None = None

    def __post_init__(self) -> None:
        self.layers = layers_of(self.view)
        self.groups = groups_of(self.view, self.layers, GROUP)
        self.chosen = sample_of(self.view, PROMPTS, "kv_spectra")

    def wants(self) -> list[tuple[str, Side]]:
        return [(module, "out") for layer in self.layers for module in dict.fromkeys(m for m, _ in layer.parts.values())]

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        for layer in self.layers:
            for kind, (source, columns) in layer.parts.items():
                if source == module:
                    own = x.clone() if columns is None else x[:, columns]  # either way a copy
                    self.held.setdefault((layer.name, kind), []).append((own, text))

    def end_batch(self) -> None:
        import torch

        held = {key: (torch.cat([x for x, _ in calls]), torch.cat([t for _, t in calls])) for key, calls in self.held.items()}
        self.held.clear()
        for group in self.groups:
            for kind in KINDS:
                members = [held[layer.name, kind] for layer in group if (layer.name, kind) in held]
                if not members:
                    continue
                if len(members) == len(group) > 1 and _joinable(members):
                    rows, text = torch.cat([x for x, _ in members], 1), members[0][1]
                    self._add(("+" + group[0].name, kind), rows)
                    self._prompts(group, kind, [x for x, _ in members], text)
                else:
                    for layer in group:
                        if (layer.name, kind) in held:
                            self._add((layer.name, kind), held[layer.name, kind][0])
                for layer in group:
                    if (layer.name, kind) in held:
                        rows, text = held[layer.name, kind]
                        self._prompts([layer], kind, [rows], text)

    def records(self) -> Iterable[Record]:
        from ..progress import track

        if not self.layers:
            yield MEASURE.missing("", "the run holds no attention layer whose keys and values are known by name")
            return
        joint: dict[str, list[Any]] = {}
        for group in track(self.groups, "KV-cache spectra"):
            grams = self._grams(group)
            for layer in group:
                yield self._layer(layer, {kind: grams[layer.name, kind] for kind in layer.parts if (layer.name, kind) in grams})
            for name, value in self._joint(group, grams).items():
                joint.setdefault(name, []).append(value)
        names = [[layer.name for layer in group] for group in self.groups if len(group) > 1]
        if not joint:
            reason = (
                "no group of two or more neighbouring layers was seen together" if names else "there are no neighbouring layers to join"
            )
            yield MEASURE.missing("", reason)
        else:
            groups = joint.pop("layers")
            yield MEASURE.record("", Found(joint, note="a value for each group of neighbouring layers", settings={"groups": groups}))

    def _add(self, key: tuple[str, str], rows: Tensor) -> None:
        from ..stats.moments import centred, combine

        part = centred(rows)
        if part is not None:
            self.sums[key] = combine(self.sums[key], part) if key in self.sums else part

    def _prompts(self, group: Sequence[Layer], kind: str, members: Sequence[Tensor], text: Tensor) -> None:
        """Ranks of single texts: of one layer, or of a group together ("+") and apart ("|")."""
        import torch

        from ..linalg import svdvals

        name = group[0].name
        together = self.prompts.setdefault(("+" + name if len(group) > 1 else name, kind), [])
        for parts in zip(*(by_text(x, text) for x in members), strict=True):
            if len(together) == PROMPTS or (self.chosen is not None and parts[0][0] not in self.chosen):
                continue
            own = [x.cpu().double() for _, x in parts]
            if not any(bool(x.any()) for x in own):
                continue
            together.append(float(energy_rank(svdvals(torch.cat(own, 1), tol=1e-7), SHARE)))
            if len(group) > 1:
                apart = _union([svdvals(x, tol=1e-7) for x in own])
                self.prompts.setdefault(("|" + name, kind), []).append(float(energy_rank(apart, SHARE)))

    def _grams(self, group: Sequence[Layer]) -> dict[tuple[str, str], Tensor]:
        """Sums of x x^T: of each layer by its name, and of the group by "+" and the name of its first layer."""
        out: dict[tuple[str, str], Tensor] = {}
        for kind in KINDS:
            first = ("+" + group[0].name, kind)
            if first in self.sums:
                whole = self.sums[first].moments().gram
                out[first] = whole
                at = 0
                for layer in group:
                    out[layer.name, kind] = whole[at : at + layer.width(kind), at : at + layer.width(kind)]
                    at += layer.width(kind)
            for layer in group:
                key = (layer.name, kind)
                if key in self.sums:  # of batches in which a layer of the group was missing
                    own = self.sums[key].moments().gram
                    out[key] = out[key] + own if key in out else own
        return out

    def _layer(self, layer: Layer, grams: dict[str, Tensor]) -> Record:
        why = layer.reason or next((f"{m}: {self.lost[m]}" for m, _ in layer.parts.values() if m in self.lost), "")
        if why or not grams:
            return MEASURE.missing(layer.name, why or "no row of text passed it")
        value: dict[str, Any] = {}
        rows = 0
        for kind, gram in grams.items():
            s = _spectrum(gram)
            if s is None:
                return MEASURE.missing(layer.name, f"every {kind} is zero")
            rows = max(rows, self._rows(layer, kind))
            s = s[:rows]  # fewer tokens than channels: the others are zero but for rounding
            drawn = thin(s / s[0], POINTS)
            value |= {
                f"{kind}_rank90": energy_rank(s, SHARE),
                f"{kind}_effective_rank": effective_rank(s),
                **self._prompt_rank(f"{kind}_prompt_rank90", (layer.name, kind)),
                f"{kind}_width": len(gram),
                f"{kind}_spectrum": drawn["spectrum"],
                f"{kind}_spectrum_at": drawn["spectrum_at"],
            }
        cacheless = "" if self.view.causal else "this model keeps no cache: keys and values as its attention reads them"
        note = "; ".join(n for n in (layer.note, cacheless) if n)
        return MEASURE.record(layer.name, Found(value, note=note, settings={"rows": rows}))

    def _rows(self, layer: Layer, kind: str) -> int:
        group = next(g for g in self.groups if layer in g)
        return int(sum(self.sums[k].count for k in ((layer.name, kind), ("+" + group[0].name, kind)) if k in self.sums))

    def _prompt_rank(self, name: str, key: tuple[str, str]) -> dict[str, float]:
        """The mean rank of single texts, under a name; empty where none was measured."""
        found = self.prompts.get(key)
        return {name: mean_and_error(found)[0]} if found else {}

    def _joint(self, group: Sequence[Layer], grams: dict[tuple[str, str], Tensor]) -> dict[str, Any]:
        """Rank of the layers of a group with one basis for all, beside the sum of their ranks with a basis each, at the same squared error."""
        out: dict[str, Any] = {}
        name = group[0].name
        for kind in KINDS:
            first = ("+" + name, kind)
            s = _spectrum(grams[first]) if first in grams else None
            if s is None:
                continue
            apart = [a for a in (_spectrum(grams[layer.name, kind]) for layer in group) if a is not None]
            out[f"{kind}_joint_rank90"] = energy_rank(s, SHARE)
            out[f"{kind}_apart_rank90"] = energy_rank(_union(apart), SHARE)
            out |= self._prompt_rank(f"{kind}_joint_prompt_rank90", first)
            out |= self._prompt_rank(f"{kind}_apart_prompt_rank90", ("|" + name, kind))
        return out | ({"layers": [layer.name for layer in group]} if out else {})


def _union(spectra: Sequence[Tensor]) -> Tensor:
    """All values of several spectra, descending: the spectrum that the matrices would have together if they shared no direction."""
    import torch

    return torch.cat(list(spectra)).sort(descending=True).values


def _joinable(members: Sequence[tuple[Tensor, Tensor]]) -> bool:
    import torch

    first = members[0][1]
    return sum(x.shape[1] for x, _ in members) <= WIDEST and all(t.shape == first.shape and torch.equal(t, first) for _, t in members)


def _spectrum(gram: Tensor) -> Tensor | None:
    """Singular values of the rows whose Gram this is; None when all are zero."""
    from ..linalg.product import eigvals_psd

    values = eigvals_psd(gram)
    return values.sqrt() if float(values[0]) > 0 else None


MEASURE = OfText(
    name="kv_spectra",
    title="KV-cache spectra within and across layers",
    paper="arXiv:2503.18893",
    estimator="singular values of keys and values (tokens, KV heads x head width) of all text, by layer and for 4 neighbouring layers side by side; "
    "rank90 holds 90% of their squares, prompt_rank90 is the mean of that rank over single texts",
    observer=Caches,
    note="keys before the rotary embedding, as the projection gives them; joint_rank90 counts directions that layers share once, apart_rank90 "
    "(the sum of the layers' ranks at the same squared error) in each layer, so joint below apart says what a shared basis saves. "
    "Layers with large keys rule both",
    settings={"group": GROUP, "share": SHARE, "prompts_at_most": PROMPTS},
    fidelity="variant",
    differs="measures, does not compress; xKV factorises at every prompt, which the prompt ranks show, and here all text is pooled as well",
)
