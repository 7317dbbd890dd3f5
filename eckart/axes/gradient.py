"""Changes to the gradients before the optimiser sees them, and to the step that it makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UsageError
from .training import Piece, Training, outside

if TYPE_CHECKING:
    from torch import Tensor, nn


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


@dataclass(frozen=True)
class RowNorm(Piece):
    """Step further with the rows of the update that are still small: each row by c = 1 / sqrt(norm of the row + 1 / eta²), eta at a zero row.

    Args:
        eta: factor of a row that is still zero.
        of: norms of the rows of the whole "product", which scale the rows of the left factor, or of each "factor", which scale its own.
        when: scale the "update" that the optimiser made, or the "gradient" that it is given: under Adam a factor that hardly changes
            cancels there.
    """

    kind: ClassVar[str] = "row_norm"
    axis: ClassVar[str] = "gradient"

    eta: float = 2.0
    of: Literal["product", "factor"] = "product"
    when: Literal["update", "gradient"] = "update"

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise UsageError(f"gradient.row_norm: eta must be positive, found {self.eta}.")

    def state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if not {"left", "whole"} & shapes.keys():
            raise UsageError(f"gradient.row_norm: this form has no rows of outputs to scale; its tensors are {', '.join(sorted(shapes))}.")
        return {}

    def _factors(self, training: Training) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, (rows, 1)) of what is scaled."""
        wanted = ("left", "whole") if self.of == "product" else ("left", "right", "whole")
        for name, _, parameter in training.trained(*wanted):
            norms = update_rows(training.layers[name]) if self.of == "product" else parameter.detach().norm(dim=1)
            yield parameter, (norms + self.eta**-2).rsqrt()[:, None]

    def before_step(self, training: Training) -> None:
        import torch

        with torch.no_grad():
            if self.when == "gradient":
                for parameter, factor in self._factors(training):
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            else:
                training.notes["row_norm"] = [(p, p.detach().clone(), factor) for p, factor in self._factors(training)]

    def after_step(self, training: Training) -> None:
        import torch

        with torch.no_grad():
            for parameter, before, factor in training.notes.pop("row_norm", ()):
                parameter.copy_(before + factor * (parameter - before))


def update_rows(branch: Any) -> Tensor:
    """Norm of every row of a branch's update (m,), through its thin factors where it has them."""
    import torch

    with torch.no_grad():
        thin = branch.lora()
        if thin is None:
            return branch.delta_matrix().norm(dim=1)
        a, b = thin
        return ((b @ (a @ a.T)) * b).sum(1).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Equivalent(Piece):
    """Turn the gradients of two factors into the step whose product comes nearest to a step of the full matrix.

    With `moments="adamw"` the moments of Adam are those of the full matrix (out, in), in the optimiser's state beside its own, and the step is
    plain descent at the group's rate and weight decay, whatever optimiser the run has. With "optimiser" the gradients are replaced and the
    optimiser does the rest, which is the paper's form under SGD and a mixture under Adam.

    Args:
        moments: see above.
        betas: of the moments.
        eps: added to the root of the second one.
        floor: directions of a factor whose squared singular values are below this share of the largest are left out of its inverse.
    """

    kind: ClassVar[str] = "equivalent"
    axis: ClassVar[str] = "gradient"

    moments: Literal["adamw", "optimiser"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    floor: float = 1e-10

    def state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if not {"left", "right"} <= shapes.keys() or any(k.startswith("core") for k in shapes):
            raise UsageError(
                f"gradient.equivalent works on a product of two factors without a core; this form has the tensors {', '.join(sorted(shapes))}."
            )
        return {}

    def begin(self, training: Training) -> None:
        for name, branch in training.layers.items():
            missing = {"left", "right"} - branch.trained().keys()
            if missing:
                raise UsageError(
                    f"gradient.equivalent: {name} does not train its {' and '.join(sorted(missing))}; both factors must train."
                )

    def before_step(self, training: Training) -> None:
        import torch

        pending = training.notes["equivalent"] = []
        with torch.no_grad():
            for branch in training.layers.values():
                layer: Any = branch
                left, right = layer.left, layer.right
                if left.grad is None or right.grad is None or not left.requires_grad:
                    continue
                if self.moments == "adamw":
                    whole = full_gradient(left, right, left.grad, right.grad, layer.scale, self.floor)
                    direction, moments = self._adam(training, left, whole)
                    left.grad.copy_(direction @ right.T * layer.scale)
                    right.grad.copy_(left.T @ direction * layer.scale)
                    group = training.group(left)
                    pending.append(
                        (left, right, left.detach().clone(), right.detach().clone(), group["lr"], group.get("weight_decay", 0.0), moments)
                    )
                found = adjusted(left, right, left.grad, right.grad, layer.scale, self.floor)
                left.grad.copy_(found[0])
                right.grad.copy_(found[1])

    def _adam(self, training: Training, key: nn.Parameter, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        held = training.optimizer.state.get(key, {})
        first, second = self.betas
        mean, square, step = (held.get(f"equivalent_{k}") for k in ("mean", "square", "step"))
        step = (torch.zeros(()) if step is None else step.cpu()) + 1
        mean = gradient * (1 - first) if mean is None else mean * first + gradient * (1 - first)
        square = gradient.square() * (1 - second) if square is None else square * second + gradient.square() * (1 - second)
        count = float(step)
        direction = mean / (1 - first**count) / ((square / (1 - second**count)).sqrt() + self.eps)
        return direction, {"equivalent_mean": mean, "equivalent_square": square, "equivalent_step": step}

    def after_step(self, training: Training) -> None:
        import torch

        with torch.no_grad():
            for left, right, left_before, right_before, rate, decay, moments in training.notes.pop("equivalent", ()):
                for parameter, before in ((left, left_before), (right, right_before)):
                    # the gradient may have got a penalty's since
                    parameter.copy_(before * (1 - rate * decay) - rate * parameter.grad)
                # only now: an optimiser takes a state with entries for one that it has set up itself
                training.optimizer.state[left].update(moments)


def adjusted(left: Tensor, right: Tensor, g_left: Tensor, g_right: Tensor, scale: float, floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """The directions (of left, of right) whose joint first-order step of the product is the projected full gradient, nearest to the gradients.

    Args:
        left, right: B (m, r) and A (r, n) of the update s B A.
        g_left, g_right: their gradients.
        scale: s.
        floor: as in `Equivalent`.

    Returns:
        Float64 tensors of the shapes of the factors.

    Paper: arXiv:2407.18242. The pair is free up to (f_B - B X, f_A + X A), which moves nothing; X is the least squares choice, the solution of
    B^T B X + X A A^T = -f_A A^T.
    """
    from ..linalg.sylvester import sylvester_psd

    b, a = left.double(), right.double()
    f_left, f_right = _least(left, right, g_left, g_right, scale, floor)
    turn = sylvester_psd(b.T @ b, a @ a.T, -f_right @ a.T, floor)
    return f_left - b @ turn, f_right + turn @ a


def full_gradient(left: Tensor, right: Tensor, g_left: Tensor, g_right: Tensor, scale: float, floor: float = 1e-10) -> Tensor:
    """The gradient of the full matrix as far as a step of both factors can make it, g - (I - P_B) g (I - P_A), from their gradients alone.

    Arguments as of `adjusted`.

    Returns:
        (m, n) in the type of the factors.
    """
    f_left, f_right = _least(left, right, g_left, g_right, scale, floor)
    return (scale * (left.double() @ f_right + f_left @ right.double())).to(left.dtype)


def _least(left: Tensor, right: Tensor, g_left: Tensor, g_right: Tensor, scale: float, floor: float) -> tuple[Tensor, Tensor]:
    """One pair with that step: (I - P_B) g_B (A A^T)^+ / s² and (B^T B)^+ g_A / s²."""
    from ..linalg.sylvester import pinv_psd

    b, a, gb, ga = (t.double() for t in (left, right, g_left, g_right))
    inverse = pinv_psd(b.T @ b, floor, "B^T B")
    away = gb - b @ (inverse @ (b.T @ gb))
    return away @ pinv_psd(a @ a.T, floor, "A A^T") / scale**2, inverse @ ga / scale**2
