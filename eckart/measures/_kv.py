"""Where a model's keys and values are: which module's output, and which of its columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..axes.protocols import Site
from ._watch import attention_role, linears_of
from .base import TextView

KINDS = ("key", "value")
INTERLEAVED = frozenset({"gpt_neox", "bloom", "gpt_neox_japanese"})  # [query, key, value] of head 0, of head 1, ...
SIDE_BY_SIDE = frozenset({"qkv_proj", "c_attn", "wqkv", "qkv"})  # [all queries, all keys, all values]


@dataclass(frozen=True)
class Layer:
    """An attention layer.

    Args:
        name: dotted path of the attention module.
        parts: "key" and "value" -> (module whose output holds it, its columns there; None for all).
        widths: "key" and "value" -> KV heads x head width.
        reason: why it cannot be measured; empty when it can.
        note: a caveat of this layer.
    """

    name: str
    parts: Mapping[str, tuple[str, list[int] | None]] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    note: str = ""

    def width(self, kind: str) -> int:
        """Channels of a kind."""
        return self.widths[kind]


def layers_of(view: TextView) -> list[Layer]:
    """The attention layers of the run, in order."""
    homes: dict[str, dict[str, Site]] = {}
    for site in linears_of(view):
        role = attention_role(site)
        if role in ("k", "v", "qkv", "latent"):
            homes.setdefault(site.name.rpartition(".")[0], {})[role] = site
    return [_layer(view, name, sites) for name, sites in homes.items()]


def groups_of(view: TextView, layers: Sequence[Layer], size: int) -> list[list[Layer]]:
    """Neighbouring layers of one kind and width, `size` at a time; what cannot be measured stands alone."""
    rows: dict[tuple[Any, ...], list[Layer]] = {}
    alone: list[list[Layer]] = []
    for layer in layers:
        if layer.reason:
            alone.append([layer])
        else:
            rows.setdefault((re.sub(r"\d+", "#", layer.name), *sorted(layer.widths.items())), []).append(layer)
    return [row[at : at + size] for row in rows.values() for at in range(0, len(row), size)] + alone


def _layer(view: TextView, name: str, sites: Mapping[str, Site]) -> Layer:
    normed = any(key.startswith(f"{name}.") and "k_norm" in key for key in view.catalogue.others)
    note = "keys before the norm that this model puts on them" if normed else ""
    if "qkv" in sites:
        return _fused(view, name, sites["qkv"], note)
    if "latent" in sites:
        width = _config(view).get("kv_lora_rank")
        site = sites["latent"]
        if not isinstance(width, int) or not 0 < width <= site.shape[0]:
            return Layer(name, reason=f"{site.name}: the config does not say how wide the latent is (kv_lora_rank)")
        return Layer(
            name, {"key": (site.name, list(range(width)))}, {"key": width}, note="the latent that is cached, before its norm, as key"
        )
    parts: dict[str, tuple[str, list[int] | None]] = {
        kind: (sites[role].name, None) for kind, role in (("key", "k"), ("value", "v")) if role in sites
    }
    widths = {kind: sites[role].shape[0] for kind, role in (("key", "k"), ("value", "v")) if role in sites}
    missing = [kind for kind in KINDS if kind not in parts]
    return Layer(
        name, parts, widths, note="; ".join([*([note] if note else []), *(f"no {kind} projection in the run" for kind in missing)])
    )


def _fused(view: TextView, name: str, site: Site, note: str) -> Layer:
    config = _config(view)
    kind = str(config.get("model_type", ""))
    out = site.shape[0]
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    role = site.name.rpartition(".")[2].lower()
    if role == "query_key_value" and kind in INTERLEAVED and heads and out % (3 * heads) == 0:
        d = out // (3 * heads)
        columns = {k: [h * 3 * d + i * d + c for h in range(heads) for c in range(d)] for i, k in ((1, "key"), (2, "value"))}
    elif role in SIDE_BY_SIDE and not (kind == "gpt_bigcode" and not config.get("multi_query", True)):
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        d = _first(config, "head_dim") or (hidden // heads if hidden and heads else None)
        queries = heads * d if heads and d else out // 3
        width, odd = divmod(out - queries, 2)
        if width < 1 or odd or (not (heads and d) and out % 3):
            return Layer(name, reason=f"{site.name}: {out} outputs cannot be split into {queries} of queries and equal keys and values")
        columns = {k: list(range(queries + i * width, queries + (i + 1) * width)) for i, k in enumerate(KINDS)}
    else:
        return Layer(name, reason=f"{site.name}: how {kind or 'this model'} lays out keys and values in it is not known")
    return Layer(name, {k: (site.name, c) for k, c in columns.items()}, {k: len(c) for k, c in columns.items()}, note=note)


def _config(view: TextView) -> Mapping[str, Any]:
    """The part of the config that describes the text model."""
    inner = view.config.get("text_config")
    return inner if isinstance(inner, Mapping) and inner else view.config


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((v for n in names if isinstance(v := config.get(n), int) and v > 0), None)
