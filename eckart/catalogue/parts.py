"""Attention heads and hidden units of a model, as rows and columns of its matrices: read from names, shapes and config.json.

Nothing runs here, so what is found is a claim; `symmetries` says how such a claim is tested on a live model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from .catalogue import Catalogue

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("query_proj", "key_proj", "value_proj"),
)
# Fused projections: all queries, then all keys, then all values; or for each head its query, key and value.
STACKED = ("c_attn", "qkv_proj", "qkv", "Wqkv", "in_proj_weight")
WOVEN = ("query_key_value",)
OUT = ("o_proj", "out_proj", "dense", "c_proj", "o", "wo", "out_lin", "to_out.0", "to_out", "proj", "output.dense")
# (matrices whose rows are the hidden units, the one whose columns they are)
HIDDEN = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("w1", "w3"), "w2"),
    (("lin1",), "lin2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("fc_in",), "fc_out"),
    (("linear1",), "linear2"),
)
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
SIDED = {"encoder": ("encoder_attention_heads",), "decoder": ("decoder_attention_heads",)}
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
ROTARY = ("rope_parameters", "rope_theta", "rotary_pct", "rotary_emb_base", "rotary_dim", "partial_rotary_factor", "rope_scaling")


@dataclass(frozen=True, eq=False)
class Slab:
    """Where the heads of one projection lie in a matrix.

    Args:
        site: the matrix.
        at: (heads, width) positions along its rows (queries, keys, values) or columns (the output projection).
    """

    site: Site
    at: Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention module: y = sum over heads of O_h V_h x, weighted by softmax of (Q_h x)^T (K_h x').

    Args:
        name: what its four matrices' names have in common.
        block: index of the repeated block, -1 outside.
        q, k, v, o: its projections. With grouped queries k and v have fewer heads: query head h reads h * kv_heads // heads.
        cross: whether keys and values come from another sequence.
    """

    name: str
    block: int
    q: Slab
    k: Slab
    v: Slab
    o: Slab
    cross: bool = False

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.q.at.shape[0]

    @property
    def shared(self) -> int:
        """Query heads that read the same key head."""
        return self.heads // self.k.at.shape[0]


def attentions(catalogue: Catalogue, config: Mapping[str, Any]) -> tuple[list[Attention], dict[str, str]]:
    """Every attention module, in the order of the catalogue, and why others could not be read: by name, or under "" when there is none at all.

    Args:
        catalogue: the matrices.
        config: config.json, for the number of heads.

    Example:
        >>> from types import SimpleNamespace
        >>> from eckart.catalogue import from_headers
        >>> shapes = {f"layers.0.attn.{p}_proj.weight": (8, 8) for p in "qkvo"}
        >>> table = SimpleNamespace(keys=lambda: sorted(shapes), info=lambda k: SimpleNamespace(dtype="F32", shape=shapes[k]))
        >>> [a.q.at.shape for a in attentions(from_headers(table), {"num_attention_heads": 2})[0]]
        [torch.Size([2, 4])]
    """
    known = {s.name: s for s in catalogue.sites}
    found: list[Attention] = []
    why: dict[str, str] = {}
    for prefix, sites in _projections(known):
        try:
            found.append(_attention(prefix, sites, config))
        except Refused as error:
            why[prefix.rstrip(".")] = str(error)
    if not found and not why:
        why[""] = "no attention: no matrices are named like query, key, value and output projections"
    return found, why


def hidden(catalogue: Catalogue) -> list[tuple[str, tuple[Site, ...], Site]]:
    """(name, matrices whose rows are hidden units, the matrix whose columns they are) of every feed-forward block."""
    known = {s.name: s for s in catalogue.sites}
    out: list[tuple[str, tuple[Site, ...], Site]] = []
    seen: set[str] = set()
    for ups, down in HIDDEN:
        for name in known:
            if name in seen or not _ends(name, down):
                continue
            prefix = name[: len(name) - len(down)]
            rows = tuple(known[prefix + u] for u in ups if prefix + u in known)
            if len(rows) == len(ups) and all(r.shape[0] == known[name].shape[1] for r in rows):
                out.append((prefix.rstrip(".") or name, rows, known[name]))
                seen.add(name)
    return out


def live_key(site: Site) -> str:
    """Name of the weight in the live model; a file may put a first part in front, or store a tied weight under another name."""
    return site.name if site.kind == "other" else f"{site.name}.weight".lstrip(".")


def live_bias(site: Site) -> str | None:
    """Name of the bias in the live model."""
    return f"{site.name}.bias".lstrip(".") if site.bias else None


def rotary(config: Mapping[str, Any]) -> bool:
    """Whether queries and keys are rotated by position."""
    return any(_first(c, (name,)) is not None for c in _levels(config) for name in ROTARY)


def _projections(known: Mapping[str, Site]) -> Iterator[tuple[str, tuple[Site, ...]]]:
    """(prefix, (q, k, v, o) or (fused, o))."""
    for name in known:
        for q, k, v in SEPARATE:
            prefix = name[: len(name) - len(q)]
            if _ends(name, q) and prefix + k in known and prefix + v in known:
                out = _output(prefix, known, known[prefix + v])
                if out is not None:
                    yield prefix, (known[name], known[prefix + k], known[prefix + v], out)
                break
        for fused in (*STACKED, *WOVEN):
            if _ends(name, fused):
                prefix = name[: len(name) - len(fused)]
                out = _output(prefix, known, None)
                if out is not None:
                    yield prefix, (known[name], out)
                break


def _output(prefix: str, known: Mapping[str, Site], value: Site | None) -> Site | None:
    above = prefix.rstrip(".").rpartition(".")[0]
    for place in (prefix, f"{above}." if above else ""):
        for name in OUT:
            site = known.get(place + name)
            if site is not None and (value is None or site.shape[1] % value.shape[0] == 0):
                return site
    return None


def _attention(prefix: str, sites: Sequence[Site], config: Mapping[str, Any]) -> Attention:
    import torch

    name = prefix.rstrip(".")
    out = sites[-1]
    heads = _heads(name, config)
    given = _number(config, ("head_dim", "d_kv"))
    if len(sites) == 4:
        q, k, v, _ = sites
        width = given if given and q.shape[0] == heads * given else q.shape[0] // heads
        slabs = [Slab(s, _rows(s.shape[0], width, name)) for s in (q, k, v)]
    else:
        (fused, _), whole = sites, sites[0].shape[0]
        inner = out.shape[1]
        width = inner // heads
        kv = (whole - inner) // (2 * width) if width else 0
        if any(_ends(fused.name, w) for w in WOVEN):
            table = torch.arange(whole).reshape(-1, 3, width) if kv == heads and whole == 3 * inner else torch.zeros(0, 3, width).long()
            parts = [table[:, i] for i in range(3)]
        else:
            lengths = [inner, kv * width, kv * width]
            parts = [p.reshape(-1, width) for p in torch.arange(whole).split(lengths)] if sum(lengths) == whole and kv else []
        if len(parts) != 3 or len(parts[0]) != heads:
            raise Refused(
                f"{fused.name}: expected queries, keys and values of {heads} heads in {whole} rows; how they lie there is not known."
            )
        slabs = [Slab(fused, p) for p in parts]
    q, k, v = slabs
    if heads % max(len(k.at), 1) or len(k.at) != len(v.at) or len(q.at) != heads or out.shape[1] != heads * v.at.shape[1]:
        raise Refused(
            f"{name}: rows of q, k, v ({', '.join(str(s.at.numel()) for s in slabs)}) and columns of the output "
            f"({out.shape[1]}) do not fit {heads} heads; check num_attention_heads in config.json."
        )
    o = Slab(out, torch.arange(out.shape[1]).reshape(heads, -1))
    return Attention(name, q.site.block, q, k, v, o, cross="cross" in name or "encoder_attn" in name or "EncDec" in name)


def _rows(total: int, width: int, name: str) -> Tensor:
    import torch

    if width == 0 or total % width:
        raise Refused(f"{name}: {total} rows are no whole number of heads of width {width}; check num_attention_heads in config.json.")
    return torch.arange(total).reshape(-1, width)


def _heads(name: str, config: Mapping[str, Any]) -> int:
    side = next((keys for part, keys in SIDED.items() if part in name.split(".")), ())
    found = _number(config, (*side, *HEADS))
    if not found:
        raise Refused(f"{name}: config.json does not say how many attention heads there are ({', '.join(HEADS)}).")
    return found


def _number(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for level in _levels(config):
        value = _first(level, names)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((config[n] for n in names if config.get(n) is not None), None)


def _levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config itself, then what it nests: text models inside multimodal ones."""
    yield config
    for name in ("text_config", "vision_config", "llm_config"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            yield inner


def _ends(name: str, tail: str) -> bool:
    return name == tail or name.endswith("." + tail)
