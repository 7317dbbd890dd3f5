"""Changes to the gradients before the optimiser sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .training import Piece, Training, outside


@dataclass(frozen=True)
class Project(Piece):
    """Take the protected part out of the gradients of the factors.

    Alone it does not keep the factors out of that part: an optimiser that scales elements (Adam) turns the direction. The role `protect`
    does, by projecting the factors themselves after the step.
    """

    kind: ClassVar[str] = "project"
    axis: ClassVar[str] = "gradient"

    def before_step(self, training: Training) -> None:
        for name, part, parameter in training.trained("left", "right"):
            branch: Any = training.layers[name]
            if parameter.grad is None:
                continue
            if part == "left":
                parameter.grad.copy_(outside(parameter.grad, branch.kept_left))
            else:
                parameter.grad.copy_(outside(parameter.grad.T, branch.kept_right.T).T)
