"""A fresh update in Tucker form, which leaves a convolution's kernel the tensor that it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UsageError
from .base import AdapterChoice, Choice
from .branch import Material
from .draw import Draw
from .protocols import Bundle, Cost

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.action import Action
    from ..nn.branch import Branch as Module


@dataclass(frozen=True)
class Tucker(AdapterChoice):
    """dW = s G x_1 L x_2 R x_3 K ..., with a core of zeros: a layer begins as it was, and at the first step only the core has a gradient.

    The rank is that of the out and in axes; an axis that is shorter has its own size. A linear layer has two axes: it is L G R.

    Args:
        kernel: rank of each axis of a convolution's kernel.
    """

    kind: ClassVar[str] = "tucker"
    conflicts: ClassVar[frozenset[str]] = frozenset({"refresh.refactor", "refresh.allocate", "gradient.project", "roles.protect"})

    kernel: int = 2

    def __post_init__(self) -> None:
        if self.kernel < 1:
            raise UsageError(f"form.kernel: expected a rank of at least 1, found {self.kernel}.")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("core", "left", "right", "kernel", "base")

    def width(self, rank: int, full: int) -> int:
        return rank

    def cost(self, bundle: Bundle) -> Cost:
        m, n = bundle.shape
        return Cost(dense=(m + n) * min(m, n) + 1, per_rank=m + n, full=min(m, n))

    def ranks(self, sizes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Of the core's axes, for a weight of these sizes."""
        return tuple(min(rank if i < 2 else self.kernel, d) for i, d in enumerate(sizes))

    def trainable(self, shape: Sequence[int], rank: int, roles: Mapping[str, Choice], bias: bool) -> int:
        """Trained numbers, by formula; of a convolution `shape` is (out, in / groups, kernel...)."""
        from ..nn.tucker import AXES

        ranks = self.ranks(shape, rank)
        counts = {"core": math.prod(ranks), **{n: d * r for n, d, r in zip(AXES, shape, ranks, strict=False)}}
        return sum(counts[n] for n in self._trained(roles) if n in counts)

    def _trained(self, roles: Mapping[str, Choice]) -> tuple[str, ...]:
        from ..nn.tucker import AXES

        def role(name: str) -> str:
            part = name if name in ("core", "left", "right") else "kernel"
            return roles[part].kind if part in roles else "train"

        return tuple(n for n in ("core", *AXES) if role(n) == "train")

    def module(
        self, action: Action, rank: int, roles: Mapping[str, Choice], *, asked: int, alpha: float, dropout: float = 0.0, bias: bool = True
    ) -> Module:
        from ..nn.action import ConvAction
        from ..nn.tucker import Tucker as Module

        sizes = tuple(action.layer.weight.shape) if isinstance(action, ConvAction) else (action.out, action.into)
        return Module(action, sizes, self.ranks(sizes, rank), self._trained(roles), alpha, dropout)

    def begin(self, made: Material, empty: Module, draw: Draw) -> dict[str, Tensor]:
        module: Any = empty
        # kaiming normal with a = sqrt(3), as released: the fan is the factor's own rank
        words = {n: f"normal:{math.sqrt(0.5 / r)!r}" for n, r in zip(module.axes, module.ranks, strict=True)}
        return {name: draw(name, words.get(name, "zero"), tuple(part.shape)) for name, part in module.parts().items()}
