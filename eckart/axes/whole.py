"""The whole update of a weight, for what fine-tunes weights and not factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import AdapterChoice, Choice
from .branch import Material
from .draw import Draw
from .protocols import Bundle, Cost

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.action import Action
    from ..nn.branch import Branch as Module


@dataclass(frozen=True)
class Whole(AdapterChoice):
    """An update as large as the weight, zero at first, beside a weight that keeps its bits. It has no rank; the budget is `keep=1`."""

    kind: ClassVar[str] = "whole"
    gives: ClassVar[frozenset[str]] = frozenset({"whole"})
    ranked: ClassVar[bool] = False
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"penalty.orth", "penalty.l2", "penalty.anchor", "refresh.refactor", "gradient.project", "roles.protect"}
    )

    @property
    def parts(self) -> tuple[str, ...]:
        return ("whole", "base")

    def width(self, rank: int, full: int) -> int:
        return full

    def cost(self, bundle: Bundle) -> Cost:
        m, n = bundle.shape
        full = min(m, n)
        return Cost(dense=m * n, per_rank=max(m, n), full=full)

    def trainable(self, shape: tuple[int, int], rank: int, roles: Mapping[str, Choice], bias: bool) -> int:
        return shape[0] * shape[1] if self._trains(roles) else 0

    def _trains(self, roles: Mapping[str, Choice]) -> bool:
        return "whole" not in roles or roles["whole"].kind == "train"

    def module(
        self, action: Action, rank: int, roles: Mapping[str, Choice], *, asked: int, alpha: float, dropout: float = 0.0, bias: bool = True
    ) -> Module:
        from ..nn.whole import Whole as Module

        return Module(action, self._trains(roles), dropout)

    def begin(self, made: Material, empty: Module, draw: Draw) -> dict[str, Tensor]:
        import torch

        module: Any = empty
        return {"whole": torch.zeros(module.action.out, module.action.into)}
