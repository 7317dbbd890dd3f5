"""What stands between the two factors of a branch, and with which values it begins.

`init` is one of the words of `draw.draw` ("zero", "one", "normal:0.01", "kaiming"), or "values": the singular values of the part that the
branch is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UsageError
from .base import Choice
from .draw import Draw

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn import cores


class Core(Choice):
    """Base of cores."""

    axis: ClassVar[str] = "core"

    def module(self) -> cores.Core:
        """What runs it."""
        raise NotImplementedError

    def begin(self, rank: int, values: Tensor, draw: Draw) -> Mapping[str, Tensor]:
        """Initial tensors.

        Args:
            rank: r.
            values: over the scale of the branch, (r,) of the triples, or (r, r) where the factorisation has a matrix there.
            draw: for what is not made of them.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Diag(Core):
    """A diagonal, one number per triple.

    Args:
        init: how it begins.
    """

    kind: ClassVar[str] = "diag"

    init: str = "values"

    def module(self) -> cores.Core:
        from ..nn import cores

        return cores.Diag()

    def begin(self, rank: int, values: Tensor, draw: Draw) -> Mapping[str, Tensor]:
        return {"core": values if self.init == "values" else draw("core", self.init, (rank,))}


@dataclass(frozen=True)
class Dense(Core):
    """A whole r x r matrix.

    Args:
        init: how it begins; "values" is their diagonal matrix, or the matrix of the factorisation itself.
    """

    kind: ClassVar[str] = "dense"

    init: str = "values"

    def module(self) -> cores.Core:
        from ..nn import cores

        return cores.Dense()

    def begin(self, rank: int, values: Tensor, draw: Draw) -> Mapping[str, Tensor]:
        import torch

        if self.init != "values":
            return {"core": draw("core", self.init, (rank, rank))}
        return {"core": values if values.ndim == 2 else torch.diag(values)}


@dataclass(frozen=True)
class Affine(Core):
    """A scale and a shift of each singular value: diag(a s + b), beginning with a = 1 and b = 0; s stays frozen."""

    kind: ClassVar[str] = "affine"

    def module(self) -> cores.Core:
        from ..nn import cores

        return cores.Affine()

    def begin(self, rank: int, values: Tensor, draw: Draw) -> Mapping[str, Tensor]:
        import torch

        return {"core_gain": torch.ones_like(values), "core_shift": torch.zeros_like(values), "core_values": values}


@dataclass(frozen=True)
class Masked(Core):
    """A diagonal beside a mask of zeros and ones, which an allocation writes during training. The mask is saved and never trained.

    Args:
        init: how the diagonal begins.
    """

    kind: ClassVar[str] = "masked"

    init: str = "zero"

    def module(self) -> cores.Core:
        from ..nn import cores

        return cores.Masked()

    def begin(self, rank: int, values: Tensor, draw: Draw) -> Mapping[str, Tensor]:
        return {
            "core": values if self.init == "values" else draw("core", self.init, (rank,)),
            "core_mask": draw("core_mask", "one", (rank,)),
        }


@dataclass(frozen=True)
class Block(Core):
    """Scale and shift of the leading singular values, a low-rank update of the others among themselves.

    Args:
        lead: share of the triples in the leading block.
        inner: width of the low-rank update.
        positive: which entries of the core may not be negative: "none", those of its "diagonal", or "all".
    """

    kind: ClassVar[str] = "block"

    lead: float = 0.1
    inner: int = 8
    positive: Literal["none", "diagonal", "all"] = "diagonal"

    def __post_init__(self) -> None:
        if not 0 < self.lead <= 1 or self.inner < 1:
            raise UsageError(
                f"core.block: expected a share in (0, 1] and an inner width of at least 1, found {self.lead:g} and {self.inner}."
            )

    def module(self) -> cores.Core:
        from ..nn import cores

        return cores.Block(self.lead, self.inner, self.positive)

    def begin(self, rank: int, values: Tensor, draw: Draw) -> Mapping[str, Tensor]:
        import torch

        shapes: dict[str, Any] = self.module().shapes(rank)
        return {
            "core_gain": torch.ones(shapes["core_gain"]),
            "core_shift": torch.zeros(shapes["core_shift"]),
            "core_values": values,
            "core_x": draw("core_x", "kaiming:4.47213595", shapes["core_x"]),  # a = sqrt(20), as released
            "core_y": torch.zeros(shapes["core_y"]),
        }
