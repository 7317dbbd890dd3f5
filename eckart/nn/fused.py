"""Which rows of a fused linear layer belong to which of the matrices in it: q, k and v of an attention layer, gate and up of an MLP.

Decided by the layer's name, its size and the model's config; what is not known for sure is one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

THIRDS = ("c_attn", "qkv", "Wqkv")
"""GPT-2, vision transformers (timm, SAM, DINOv2, Qwen-VL), MPT and ModernBERT: [q; k; v] of one size."""
INTERLEAVED = ("gpt_neox", "bloom")
"""Model types whose `query_key_value` holds q, k and v head by head."""


@dataclass(frozen=True)
class Rows:
    """Rows of one matrix inside a fused one: `count` runs of `length` rows, `period` apart.

    Args:
        start: first row.
        length: rows of a run.
        period: from one run to the next.
        count: number of runs.
    """

    start: int
    length: int
    period: int = 0
    count: int = 1

    @property
    def size(self) -> int:
        """Rows in all."""
        return self.length * self.count

    def index(self) -> Tensor:
        """The row numbers, int64.

        Example:
            >>> Rows(1, 2, period=4, count=2).index().tolist()
            [1, 2, 5, 6]
        """
        import torch

        runs = self.start + self.period * torch.arange(self.count)
        return (runs[:, None] + torch.arange(self.length)).reshape(-1)


def stacked(**sizes: int) -> dict[str, Rows]:
    """Blocks one below the other.

    Example:
        >>> stacked(q=4, k=2)["k"]
        Rows(start=4, length=2, period=0, count=1)
    """
    out: dict[str, Rows] = {}
    at = 0
    for name, size in sizes.items():
        out[name] = Rows(at, size)
        at += size
    return out


def fused_rows(name: str, out: int, config: Any = None) -> dict[str, Rows] | None:
    """The matrices inside a linear layer, or None for a layer that is one matrix or that is not known.

    Args:
        name: dotted path of the module.
        out: its rows.
        config: the model's config: an object or a mapping.

    Example:
        >>> sorted(fused_rows("h.0.attn.c_attn", 12))
        ['k', 'q', 'v']
    """
    last = name.rpartition(".")[2]

    def get(*names: str) -> Any:
        found = (config.get(n) if isinstance(config, Mapping) else getattr(config, n, None) for n in names)
        return next((v for v in found if v is not None), None)

    hidden, heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
    if last in THIRDS and out % 3 == 0 and (hidden is None or last != "c_attn" or out == 3 * hidden):
        return stacked(q=out // 3, k=out // 3, v=out // 3)
    if last == "gate_up_proj" and out % 2 == 0:
        return stacked(gate=out // 2, up=out // 2)
    if last == "qkv_proj" and heads and hidden:
        each = get("head_dim") or hidden // heads
        groups = get("num_key_value_heads") or heads
        if (heads + 2 * groups) * each == out:
            return stacked(q=heads * each, k=groups * each, v=groups * each)
    if last == "query_key_value" and heads and get("model_type") in INTERLEAVED and out % (3 * heads) == 0:
        each = out // (3 * heads)
        return {n: Rows(i * each, each, 3 * each, heads) for i, n in enumerate(("q", "k", "v"))}
    return None
