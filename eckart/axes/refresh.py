"""What is done again every so many steps: ranks that are allocated anew, factors that are made orthogonal again. In place, always."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        warm: steps before the first cut; a number below 1 is a share of the run.
        final: steps at the end in which the cut is fixed, likewise.
        betas: smoothing of the sensitivity, and of its variation.
    """

    kind: ClassVar[str] = "allocate"
    axis: ClassVar[str] = "refresh"

    keep: float = 2 / 3
    every: int = 1
    warm: float = 0
    final: float = 0
    betas: tuple[float, float] = (0.85, 0.85)

    def state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if not {"left", "core", "right"} <= shapes.keys() or len(shapes["core"]) != 1:
            raise UsageError(
                f"refresh.allocate cuts entries of a diagonal between two factors (form.core.kind=diag); this form has {', '.join(sorted(shapes))}."
            )
        out: dict[str, tuple[int, ...]] = {"mask": shapes["core"]}
        for part in ("left", "core", "right"):
            out |= {f"{part}_mean": shapes[part], f"{part}_spread": shapes[part]}
        return out

    def begin(self, training: Training) -> None:
        if training.total is None:
            raise UsageError("refresh.allocate follows a schedule: it must know the run's steps. Give total_steps to glue.begin(...).")
        warm, final = self.ends(training.total)
        if warm + final >= training.total:
            raise UsageError(f"refresh.allocate: {warm} warm and {final} final steps leave none of {training.total} to cut ranks in.")

    def ends(self, total: int) -> tuple[int, int]:
        """(warm, final) in steps of a run of `total`."""
        warm, final = (round(x * total) if x < 1 else int(x) for x in (self.warm, self.final))
        return warm, final

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
        warm, final = self.ends(total)
        if step <= warm:
            return ranks
        if step >= total - final:
            return last
        left = 1 - (step - warm) / (total - final - warm)
        return int(last + (ranks - last) * left**3)

    def after_step(self, training: Training) -> None:
        import torch

        total = training.total
        assert total is not None
        warm, final = self.ends(total)
        with torch.no_grad():
            layers: dict[str, Any] = dict(training.layers)
            fixed = training.step > total - final
            if not fixed:
                for layer in layers.values():
                    self._remember(layer)
            if fixed:
                for layer in layers.values():
                    layer.core.mul_(layer.state_mask)
            elif training.step > warm and (training.step % self.every == 0 or training.step == total - final):
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


@dataclass(frozen=True)
class Sample(Piece):
    """Train the layers of a few blocks at a time: every so many steps others are drawn, and what the optimiser remembers of those that rest is dropped.

    Blocks are drawn uniformly without replacement, from the seed and the number of the draw alone, so every process and every run that goes on
    draws the same. Layers outside the repeated blocks always train.

    Args:
        blocks: how many train at a time; all of them where the model has no more.
        every: steps between two draws.
    """

    kind: ClassVar[str] = "sample"
    axis: ClassVar[str] = "refresh"
    freezes: ClassVar[bool] = True

    blocks: int = 2
    every: int = 20

    def __post_init__(self) -> None:
        for name in ("blocks", "every"):
            if getattr(self, name) < 1:
                raise UsageError(f"refresh.sample: {name} must be at least 1, found {getattr(self, name)}.")

    def drawn(self, names: Iterable[str], seed: int, draw: int) -> frozenset[str]:
        """The blocks that train during a draw, of those that hold the named layers.

        Example:
            >>> sorted(Sample(blocks=2).drawn(["h.0.q", "h.1.q", "head"], seed=0, draw=0))
            ['h.0', 'h.1']
        """
        import torch

        from ..seeds import generator

        blocks = list(dict.fromkeys(b for b in map(block_of, names) if b))
        order = torch.randperm(len(blocks), generator=generator(seed, "blocks that train", str(draw))).tolist()
        return frozenset(blocks[i] for i in order[: self.blocks])

    def begin(self, training: Training) -> None:
        training.notes["sample"] = [p for b in training.layers.values() for p in b.trained().values() if p.requires_grad]
        self._choose(training, drop=False)

    def after_step(self, training: Training) -> None:
        if training.step % self.every == 0:
            self._choose(training, drop=True)

    def end(self, training: Training) -> None:
        for parameter in training.notes.pop("sample", ()):
            parameter.requires_grad_(True)

    def _choose(self, training: Training, drop: bool) -> None:
        trains = self.drawn(training.layers, training.seed, training.step // self.every)
        ours = {id(p) for p in training.notes["sample"]}
        for name, branch in training.layers.items():
            block = block_of(name)
            for parameter in branch.trained().values():
                if id(parameter) not in ours:
                    continue
                on = not block or block in trains
                parameter.requires_grad_(on)
                if not on:
                    parameter.grad = None
                    if drop:
                        training.forget(parameter)


def block_of(name: str) -> str:
    """The repeated block that a layer lies in: its name up to the first number; empty outside.

    Example:
        >>> block_of("model.layers.3.mlp.up_proj"), block_of("lm_head")
        ('model.layers.3', '')
    """
    parts = name.partition("[")[0].split(".")
    at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])
