"""What is done again every so many steps: ranks that are allocated anew, factors that are made orthogonal again. In place, always."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UsageError
from .training import Piece, Training

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Refactor(Piece):
    """Replace the factors of a branch by those of the singular value decomposition of their product, which stays what it is.

    Args:
        every: steps between two of them.
        balance: which factor carries the singular values; with a diagonal core it does.
        memory: what happens to the optimiser's memory of the factors: "reset", since their coordinates change, or "keep".
    """

    kind: ClassVar[str] = "refactor"
    axis: ClassVar[str] = "refresh"

    every: int = 200
    balance: Literal["even", "left", "right"] = "even"
    memory: Literal["reset", "keep"] = "reset"

    def after_step(self, training: Training) -> None:
        if training.step % self.every:
            return
        import torch

        from ..linalg import Factors

        with torch.no_grad():
            for branch in training.layers.values():
                layer: Any = branch
                core = layer.core_kind.value(layer.parts())
                if core is not None and core.ndim != 1:
                    raise UsageError(f"refresh.refactor: a core of shape {tuple(core.shape)} cannot take singular values.")
                values = torch.ones(layer.rank, dtype=layer.left.dtype, device=layer.left.device) if core is None else core
                if not bool(values.any()) or not bool(layer.left.any()) or not bool(layer.right.any()):
                    continue  # of a zero product every basis is as good as another
                found = Factors(layer.left, values, layer.right).refactor()
                left, right = (found.U, found.Vh) if core is not None else found.balance(self.balance)
                layer.left.copy_(left)
                layer.right.copy_(right)
                if core is not None:
                    layer.core.copy_(found.S)
                if self.memory == "reset":
                    for parameter in layer.trained().values():
                        training.forget(parameter)


@dataclass(frozen=True)
class Allocate(Piece):
    """Zero the least sensitive diagonal entries of all branches together, on a cubic schedule, until the run's ranks are what is wanted.

    Sensitivity is |p g|, smoothed, times how much it still varies; an entry's score adds the mean scores of its row and column of the factors.
    Entries keep training between two cuts and may come back, until the last `final` steps, in which the cut stays as it is.

    Args:
        keep: share of all ranks that is left at the end.
        every: steps between two cuts.
        warm: steps before the first cut.
        final: steps at the end in which the cut is fixed.
        betas: smoothing of the sensitivity, and of its variation.
    """

    kind: ClassVar[str] = "allocate"
    axis: ClassVar[str] = "refresh"

    keep: float = 2 / 3
    every: int = 1
    warm: int = 0
    final: int = 0
    betas: tuple[float, float] = (0.85, 0.85)

    def state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {"mask": shapes["core"]}
        for part in ("left", "core", "right"):
            out |= {f"{part}_mean": shapes[part], f"{part}_spread": shapes[part]}
        return out

    def begin(self, training: Training) -> None:
        if training.total is None:
            raise UsageError("refresh.allocate follows a schedule: it must know the run's steps. Give total_steps to glue.begin(...).")
        if self.warm + self.final >= training.total:
            raise UsageError(
                f"refresh.allocate: {self.warm} warm and {self.final} final steps leave none of {training.total} to cut ranks in."
            )

    def budget(self, step: int, total: int, ranks: int) -> int:
        """Entries that are left after a step.

        Args:
            step: counted from 1.
            total: steps of the run.
            ranks: entries at the start.

        Example:
            >>> Allocate(keep=0.5, warm=10, final=10).budget(10, 100, 40), Allocate(keep=0.5, warm=10, final=10).budget(90, 100, 40)
            (40, 20)
        """
        last = round(self.keep * ranks)
        if step <= self.warm:
            return ranks
        if step >= total - self.final:
            return last
        left = 1 - (step - self.warm) / (total - self.final - self.warm)
        return last + round((ranks - last) * left**3)

    def after_step(self, training: Training) -> None:
        import torch

        total = training.total
        assert total is not None
        with torch.no_grad():
            layers: dict[str, Any] = dict(training.layers)
            fixed = training.step > total - self.final
            if not fixed:
                for layer in layers.values():
                    self._remember(layer)
            if fixed:
                for layer in layers.values():
                    layer.core.mul_(layer.state_mask)
            elif training.step > self.warm and (training.step % self.every == 0 or training.step == total - self.final):
                ranks = sum(layer.rank for layer in layers.values())
                self._cut(layers, self.budget(training.step, total, ranks))

    def _remember(self, layer: Any) -> None:
        first, second = self.betas
        for part in ("left", "core", "right"):
            parameter = getattr(layer, part)
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            mean, spread = getattr(layer, f"state_{part}_mean"), getattr(layer, f"state_{part}_spread")
            mean.mul_(first).add_(now, alpha=1 - first)
            spread.mul_(second).add_((now - mean).abs(), alpha=1 - second)

    def _cut(self, layers: Mapping[str, Any], left: int) -> None:
        import torch

        scores: Tensor = torch.cat([self._scores(layer) for layer in layers.values()])
        # exactly as many as the budget says: of equal scores the first stay
        kept = torch.zeros_like(scores)
        kept[torch.sort(scores, descending=True, stable=True).indices[:left]] = 1
        for layer, mask in zip(layers.values(), kept.split([layer.rank for layer in layers.values()]), strict=True):
            layer.state_mask.copy_(mask)
            layer.core.mul_(mask)

    def _scores(self, layer: Any) -> Tensor:
        def score(part: str) -> Tensor:
            return getattr(layer, f"state_{part}_mean") * getattr(layer, f"state_{part}_spread")

        return score("core") + score("left").mean(0) + score("right").mean(1)
