"""What the observers of activations have in common: the places they look at, what was lost, and which attention weight is which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..axes.protocols import Site
from .base import TextView

if TYPE_CHECKING:
    from torch import Tensor

    from .base import ModelView

Side = Literal["in", "out"]
NO_BLOCKS = "the model has no repeated blocks"

# Last part of a module's name -> what it computes. The ambiguous ones count inside a module that is called attention only.
ROLES = {
    "q": ("q_proj", "query", "q_lin", "query_proj", "to_q", "wq", "q"),
    "k": ("k_proj", "key", "k_lin", "key_proj", "to_k", "wk", "k"),
    "v": ("v_proj", "value", "v_lin", "value_proj", "to_v", "wv", "v"),
    "o": ("o_proj", "out_proj", "out_lin", "wo", "dense", "c_proj", "o"),
    "qkv": ("qkv_proj", "c_attn", "query_key_value", "wqkv", "qkv"),
    "latent": ("kv_a_proj_with_mqa",),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
PLAIN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "kv_a_proj_with_mqa"})


@dataclass
class Watch:
    """The base of observers. It wants nothing and measures nothing; it remembers what cannot be measured and why.

    Args:
        view: what is known before the run.
        lost: module -> why; the first reason of several stays.
    """

    view: TextView
    lost: dict[str, str] = field(default_factory=dict)

    def lose(self, module: str, side: Side, why: str) -> None:
        """As `Observer.lose`."""
        self.lost.setdefault(module, why)

    def end_batch(self) -> None:
        """As `Observer.end_batch`."""


def blocks_of(view: TextView | ModelView) -> list[str]:
    """Names of the repeated blocks in which the run has a matrix, in order."""
    used = {s.block for s in view.sites}
    return [name for i, name in enumerate(view.catalogue.blocks) if i in used]


def linears_of(view: TextView | ModelView) -> list[Site]:
    """The linear layers of the run."""
    return [s for s in view.sites if s.kind == "linear"]


def layers_of(view: TextView) -> list[str]:
    """Where the hidden state of each layer is read: the blocks, or in a plain module without blocks the linear layers."""
    return blocks_of(view) or [s.name for s in linears_of(view)]


def towers_of(view: TextView | ModelView) -> list[list[str]]:
    """All blocks of the model by the list that holds them: an encoder and its decoder are two towers."""
    out: dict[str, list[str]] = {}
    for name in view.catalogue.blocks:
        out.setdefault(name.rpartition(".")[0], []).append(name)
    return list(out.values())


def attention_role(site: Site) -> str | None:
    """Which matrix of an attention layer this is: "q", "k", "v", "o", "qkv" (fused), "latent" (of multi-head latent attention), or None.

    Example:
        >>> attention_role(Site("layers.0.self_attn.k_proj", (4, 8), ()))
        'k'
        >>> attention_role(Site("layer.0.attention.output.dense", (8, 8), ())), attention_role(Site("layer.0.output.dense", (8, 32), ()))
        ('o', None)
    """
    *path, last = site.name.lower().split(".")
    inside = any("attn" in p or "attention" in p for p in path)
    return ROLE_OF.get(last) if inside or last in PLAIN else None


def by_text(x: Tensor, text: Tensor) -> Iterable[tuple[int, Tensor]]:
    """(text, its rows) of one call, in order; rows of a text are neighbours."""
    import torch

    numbers, counts = torch.unique_consecutive(text, return_counts=True)
    for number, rows in zip(numbers.tolist(), x.split(counts.tolist()), strict=True):
        yield int(number), rows


def text_sums(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers of the texts (k,), rows of each (k,), sums of their rows (k, n)), float64 on the CPU."""
    import torch

    numbers, at, counts = torch.unique_consecutive(text, return_inverse=True, return_counts=True)
    wide = x.cpu() if x.device.type == "mps" else x  # it has no float64
    total = torch.zeros(len(numbers), x.shape[1], dtype=torch.float64, device=wide.device)
    total.index_add_(0, at.to(wide.device), wide.to(torch.float64))
    return numbers.cpu(), counts.cpu().double(), total.cpu()


def sample_of(view: TextView, limit: int, name: str) -> frozenset[int] | None:
    """Numbers of at most `limit` texts drawn from the run by its seed; None where all of them, or the first ones, are taken."""
    import torch

    from ..seeds import generator

    if view.texts <= limit:
        return None
    return frozenset(torch.randperm(view.texts, generator=generator(view.seed, name))[:limit].tolist())


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error; None for a single value. The mean of nothing is NaN.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    n = len(values)
    if not n:
        return math.nan, None
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def means(rows: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Means and standard errors, name by name, of mappings with the same names; values that are not finite are left out."""
    value: dict[str, float] = {}
    error: dict[str, Any] = {}
    for name in rows[0]:
        value[name], error[name] = mean_and_error([r[name] for r in rows if math.isfinite(r[name])])
    return value, error


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r of pairs that are finite; None for fewer than 8, or where one side does not vary.

    Example:
        >>> round(correlation(range(8), [2 * v + 1 for v in range(8)]), 6), correlation([1, 2], [1, 2])
        (1.0, None)
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 8:
        return None
    mean = [math.fsum(v) / len(pairs) for v in zip(*pairs, strict=True)]
    xx, yy, xy = (math.fsum((p[i] - mean[i]) * (p[j] - mean[j]) for p in pairs) for i, j in ((0, 0), (1, 1), (0, 1)))
    return xy / math.sqrt(xx * yy) if xx > 1e-9 and yy > 0 else None
