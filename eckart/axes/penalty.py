"""Terms that are added to the loss, as gradients, once per step of the optimiser: each says how it is summed, and is smooth at zero.

Under Adam a penalty's gradient is part of what is normalised, as with any loss; weights of papers that clip or add elsewhere do not transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .training import Piece, Training, add_gradient

if TYPE_CHECKING:
    from torch import Tensor, nn

Reduce = Literal["sum", "mean"]


class Penalty(Piece):
    """Base of penalties: a sum over matrices of a smooth function of one tensor."""

    axis: ClassVar[str] = "penalty"

    weight: float
    reduce: Reduce
    parts: tuple[str, ...]

    def of(self, part: str, tensor: Tensor) -> Tensor:
        """The penalty of one tensor."""
        raise NotImplementedError

    def strength(self, training: Training) -> float:
        """What the sum is multiplied by."""
        return self.weight

    def value(self, training: Training) -> Tensor:
        """The term as the loss would have it, for reports."""
        found = [self.of(part, p) for _, part, p in training.trained(*self.parts)]
        return self._reduced(found) * self.strength(training)

    def before_step(self, training: Training) -> None:
        import torch

        wanted: Sequence[tuple[str, nn.Parameter]] = [(part, p) for _, part, p in training.trained(*self.parts)]
        if not wanted or self.weight == 0:
            return
        share = self.strength(training) / (len(wanted) if self.reduce == "mean" else 1)
        for part, parameter in wanted:  # one by one: their terms do not share anything
            with torch.enable_grad():
                alone = parameter.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.of(part, alone), alone)
            add_gradient(parameter, gradient * share)

    def _reduced(self, found: Sequence[Tensor]) -> Tensor:
        import torch

        if not found:
            return torch.zeros(())
        total = torch.stack([f.reshape(()) for f in found]).sum()
        return total / len(found) if self.reduce == "mean" else total


@dataclass(frozen=True)
class L2(Penalty):
    """Squared norm of a part.

    Args:
        weight: beta.
        parts: which.
        reduce: over the matrices.
    """

    kind: ClassVar[str] = "l2"

    weight: float = 1e-4
    parts: tuple[str, ...] = ("core",)
    reduce: Reduce = "sum"

    def of(self, part: str, tensor: Tensor) -> Tensor:
        return tensor.square().sum()


@dataclass(frozen=True)
class Orth(Penalty):
    """Distance of the factors from orthonormal ones: ‖L^T L - I‖ and ‖R R^T - I‖, on the r x r side.

    Args:
        weight: gamma.
        parts: which factors.
        norm: "fro", whose gradient has norm 2 however near the factors are, or "fro2", its square.
        reduce: over all factors of all layers.
        smooth: sqrt(x² + smooth²) - smooth instead of x: below it the gradient fades, where a bare norm would push along rounding noise.
        over_peak: divide the weight by the run's highest learning rate, so that plain SGD moves by the weight itself.
    """

    kind: ClassVar[str] = "orth"

    weight: float = 1e-3
    parts: tuple[str, ...] = ("left", "right")
    norm: Literal["fro", "fro2"] = "fro"
    reduce: Reduce = "sum"
    smooth: float = 1e-3
    over_peak: bool = False

    def strength(self, training: Training) -> float:
        return self.weight / training.peak if self.over_peak else self.weight

    def of(self, part: str, tensor: Tensor) -> Tensor:
        import torch

        gram = tensor.T @ tensor if part == "left" else tensor @ tensor.T
        square = (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()
        return square if self.norm == "fro2" else (square + self.smooth**2).sqrt() - self.smooth


@dataclass(frozen=True)
class Anchor(Penalty):
    """Mean distance of the rows of a part from where they began; for branches that hold their beginning (`initial_` and the part's name).

    Args:
        weight: lambda.
        parts: which.
        reduce: over the matrices.
        smooth: sqrt(x² + smooth²) - smooth instead of each distance x.
    """

    kind: ClassVar[str] = "anchor"

    weight: float = 1e-5
    parts: tuple[str, ...] = ("rows",)
    reduce: Reduce = "sum"
    smooth: float = 1e-6

    def value(self, training: Training) -> Tensor:
        found = [self._far(p, self._start(training, name, part)) for name, part, p in training.trained(*self.parts)]
        return self._reduced(found) * self.strength(training)

    def before_step(self, training: Training) -> None:
        import torch

        wanted = list(training.trained(*self.parts))
        share = self.strength(training) / (len(wanted) if self.reduce == "mean" and wanted else 1)
        for name, part, parameter in wanted if self.weight else ():
            with torch.enable_grad():
                alone = parameter.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self._far(alone, self._start(training, name, part)), alone)
            add_gradient(parameter, gradient * share)

    def _far(self, rows: Tensor, start: Tensor) -> Tensor:
        return (((rows - start).square().sum(-1) + self.smooth**2).sqrt() - self.smooth).mean()

    def _start(self, training: Training, name: str, part: str) -> Tensor:
        from ..errors import UsageError

        found = training.layers[name].parts().get(f"initial_{part}")
        if found is None:
            raise UsageError(f"penalty.anchor: {name} does not hold where its {part} began; form=rows and branches with minus=initial do.")
        return found


@dataclass(frozen=True)
class UnitUpdate(Penalty):
    """Distance of the update D = W - W0 of a layer from one with orthonormal rows or columns: ‖D^T D - I‖ or ‖D D^T - I‖, the smaller side.

    It wants all min(m, n) singular values of the update at 1, far above those of usual updates; an update of rank r stays at sqrt(min(m, n) - r).
    From zero it does not move anything. Thin updates are measured through the Grams of their factors.

    Args:
        weight: lambda.
        norm: "fro", or "fro2", its square.
        reduce: over the layers.
        smooth: sqrt(x² + smooth²) - smooth instead of the norm x.
    """

    kind: ClassVar[str] = "unit_update"

    weight: float = 1.0
    norm: Literal["fro", "fro2"] = "fro"
    reduce: Reduce = "sum"
    smooth: float = 1e-3

    def value(self, training: Training) -> Tensor:
        return self._reduced([self._far(b) for b in self._layers(training)]) * self.strength(training)

    def before_step(self, training: Training) -> None:
        import torch

        layers = self._layers(training)
        share = self.strength(training) / (len(layers) if self.reduce == "mean" and layers else 1)
        for branch in layers if share else ():
            trained = [p for p in branch.trained().values() if p.requires_grad]
            with torch.enable_grad():
                found = torch.autograd.grad(self._far(branch), trained, allow_unused=True)
            for parameter, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    add_gradient(parameter, gradient * share)

    def _layers(self, training: Training) -> list[Any]:
        return [b for b in training.layers.values() if any(p.requires_grad for p in b.trained().values())]

    def _far(self, branch: Any) -> Tensor:
        square = self._square(branch).clamp_min(0)
        return square if self.norm == "fro2" else (square + self.smooth**2).sqrt() - self.smooth

    def _square(self, branch: Any) -> Tensor:
        """‖D^T D - I‖², in float64: tr (D^T D)² - 2 tr D^T D + min(m, n) through r x r Grams, where they are the smaller ones."""
        import torch

        thin = branch.lora()
        side = min(branch.action.out, branch.action.into)
        if thin is not None and len(thin[0]) < side:
            a, b = (t.double() for t in thin)
            product = (a @ a.T) @ (b.T @ b)
            return (product * product.T).sum() - 2 * product.trace() + side
        update = branch.delta_matrix().double()
        gram = update @ update.T if update.shape[0] == side else update.T @ update
        return (gram - torch.eye(side, dtype=gram.dtype, device=gram.device)).square().sum()
