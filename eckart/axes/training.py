"""What a recipe does while it trains, besides the optimiser: once per step of it, never inside a forward pass.

    before_step   gradients are complete, averaged over processes, unscaled and clipped
    (the optimiser steps)
    after_step    parameters are new, gradients still there

A penalty that sits in the forward pass is multiplied by the accumulation count, vanishes under label smoothing and inflates the loss that is
reported; here it is neither. What must survive a resume is a tensor of the branch (`Piece.state`), saved with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UsageError
from .base import Choice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..nn.branch import Branch
    from .recipe import Recipe


@dataclass
class Training:
    """One adapter while it trains.

    Args:
        recipe: its recipe.
        layers: name -> branch; the blocks of a fused layer are layers of their own.
        optimizer: the one whose steps are followed.
        total: steps that the run will make, where that is known.
        step: steps made so far.
        peak: the highest learning rate of the run.
        seed: of what is drawn.
    """

    recipe: Recipe
    layers: Mapping[str, Branch]
    optimizer: Any = None
    total: int | None = None
    step: int = 0
    peak: float = 1.0
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def trained(self, *parts: str) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(layer, part, parameter) of the parts that train now; all parts when none is named. "core" names every tensor of a core."""
        for name, branch in self.layers.items():
            for part, parameter in branch.trained().items():
                if parameter.requires_grad and (not parts or part in parts or ("core" in parts and part.startswith("core"))):
                    yield name, part, parameter

    def forget(self, parameter: nn.Parameter) -> None:
        """Drop what the optimiser remembers of a parameter whose coordinates changed."""
        state = getattr(self.optimizer, "state", None)
        if state is not None and parameter in state:
            state[parameter].clear()

    def group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The optimiser's settings for a parameter: lr, weight_decay.

        Raises:
            UsageError: the optimiser does not hold it.
        """
        for found in getattr(self.optimizer, "param_groups", ()):
            if any(p is parameter for p in found["params"]):
                return found
        raise UsageError("glue: the optimiser does not hold a parameter that trains. Build it from model.parameters() after ek.adapt.")


class Piece(Choice):
    """Base of what acts during training. A frozen value: what it remembers lives in `Training.notes`, or in the branch where it must be saved."""

    freezes: ClassVar[bool] = False
    """Whether parameters rest for a time."""

    def state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that it keeps in every branch, given those of the branch's own parts."""
        return {}

    def begin(self, training: Training) -> None:
        """Before the first step."""

    def before_step(self, training: Training) -> None:
        """Between the backward passes of a step and the optimiser."""

    def after_step(self, training: Training) -> None:
        """After the optimiser."""

    def end(self, training: Training) -> None:
        """When training stops."""


def needs_glue(recipe: Recipe) -> bool:
    """Whether plain gradient steps would train something other than the recipe."""
    return bool(recipe.pieces()) or any(role.kind == "protect" for role in recipe.roles.values())


def begin(training: Training) -> None:
    """Start every piece of the recipe."""
    for piece in training.recipe.pieces():
        piece.begin(training)


def before_step(training: Training) -> None:
    """Gradients are changed, then penalties are added to them."""
    for piece in training.recipe.pieces():
        piece.before_step(training)


def after_step(training: Training) -> None:
    """Protected parts are made safe again, then pieces act; the step is counted before."""
    training.step += 1
    if any(role.kind == "protect" for role in training.recipe.roles.values()):
        protect(training)
    for piece in training.recipe.pieces():
        piece.after_step(training)


def end(training: Training) -> None:
    """Let every piece clean up behind itself."""
    for piece in training.recipe.pieces():
        piece.end(training)


def outside(vectors: Tensor, basis: Tensor) -> Tensor:
    """Columns less what lies in the span of an orthonormal basis (m, k); twice, since once leaves rounding of the first order.

    Example:
        >>> import torch
        >>> outside(torch.ones(2, 1), torch.tensor([[1.0], [0.0]])).T
        tensor([[0., 1.]])
    """
    for _ in range(2):
        vectors = vectors - basis @ (basis.T @ vectors)
    return vectors


def protect(training: Training) -> None:
    """Project the trained factors onto the complement of the protected part: an optimiser that scales elements leaves it, whatever the gradient was."""
    import torch

    with torch.no_grad():
        for name, part, parameter in training.trained("left", "right"):
            branch: Any = training.layers[name]
            if part == "left":
                parameter.copy_(outside(parameter, branch.kept_left))
            else:
                parameter.copy_(outside(parameter.T, branch.kept_right.T).T)


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to what the backward passes left."""
    gradient = gradient.detach().to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient.clone()
    else:
        parameter.grad.add_(gradient)
