"""What stands between the two thin factors of an adapter: nothing, a diagonal, or a small matrix made of trained and frozen pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Core:
    """A core is a function of a few tensors: no state, no parameters of its own. This one is the absent core, L R."""

    names: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[frozenset[str]] = frozenset()  # tensors that no role trains

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor at a rank."""
        return {}

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The core: a diagonal (r,), a matrix (r, r), or None for the identity."""
        return None


@dataclass(frozen=True)
class Diag(Core):
    """diag(d)."""

    names: ClassVar[tuple[str, ...]] = ("core",)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"core": (rank,)}

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["core"]


@dataclass(frozen=True)
class Dense(Core):
    """An r x r matrix."""

    names: ClassVar[tuple[str, ...]] = ("core",)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"core": (rank, rank)}

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["core"]


@dataclass(frozen=True)
class Affine(Core):
    """diag(gain * values + shift) with frozen values."""

    names: ClassVar[tuple[str, ...]] = ("core_gain", "core_shift", "core_values")
    fixed: ClassVar[frozenset[str]] = frozenset({"core_values"})

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.names, (rank,))

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["core_gain"] * tensors["core_values"] + tensors["core_shift"]


@dataclass(frozen=True)
class Masked(Core):
    """diag(mask * d): a mask of zeros and ones that an allocation writes, beside a diagonal that keeps its values."""

    names: ClassVar[tuple[str, ...]] = ("core", "core_mask")
    fixed: ClassVar[frozenset[str]] = frozenset({"core_mask"})

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.names, (rank,))

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["core"] * tensors["core_mask"]


@dataclass(frozen=True)
class Block(Core):
    """Two diagonal blocks: diag(gain * values + shift) over the leading p triples, diag(values) + X Y over the others.

    Args:
        lead: share of the triples in the leading block; at least one triple.
        inner: q, width of X (r - p, q) and Y (q, r - p); at most r - p.
        positive: "none", "diagonal" (negative diagonal entries become 0), or "all" (every negative entry does).
    """

    names: ClassVar[tuple[str, ...]] = ("core_gain", "core_shift", "core_values", "core_x", "core_y")
    fixed: ClassVar[frozenset[str]] = frozenset({"core_values"})

    lead: float = 0.1
    inner: int = 8
    positive: str = "diagonal"

    def leading(self, rank: int) -> int:
        """p: triples of the leading block."""
        return min(rank, max(1, int(self.lead * rank)))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        p = self.leading(rank)
        q = min(self.inner, rank - p)
        return {"core_gain": (p,), "core_shift": (p,), "core_values": (rank,), "core_x": (rank - p, q), "core_y": (q, rank - p)}

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = tensors["core_values"]
        p = len(tensors["core_gain"])
        lead = torch.diag(tensors["core_gain"] * values[:p] + tensors["core_shift"])
        out = torch.block_diag(lead, torch.diag(values[p:]) + tensors["core_x"] @ tensors["core_y"])
        if self.positive == "all":
            return out.relu()
        if self.positive == "diagonal":
            diagonal = out.diagonal()
            return out + torch.diag(diagonal.relu() - diagonal)
        return out
