"""Branches that are settings of `form.branch` but for what runs them: a gate over the triples, bases that stay orthonormal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UsageError
from .branch import Branch, Material
from .core import Diag
from .draw import Draw

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.branch import LowRank


@dataclass(frozen=True)
class Gated(Branch):
    """A branch with triples that every sample uses, and groups of triples that a gate opens; see `eckart.nn.gated.gate`.

    Args:
        shared: share of the triples that are always there.
        groups: number of groups among the others.
    """

    kind: ClassVar[str] = "gated"
    conflicts: ClassVar[frozenset[str]] = frozenset({"refresh.refactor"})  # it would mix triples of different groups

    shared: float = 0.5
    groups: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shared <= 1 or self.groups < 1:
            raise UsageError(f"form.gated: expected a share in (0, 1] and at least one group, found {self.shared:g} and {self.groups}.")
        if self.core is not None and not isinstance(self.core, Diag):
            raise UsageError(f"form.gated: a mask over triples takes a core of kind diag or none, found {self.core.kind}.")

    def built(self, *args: Any, **how: Any) -> LowRank:
        from ..nn.gated import Gated as Module

        return Module(*args, shared=self.shared, groups=self.groups, **how)


@dataclass(frozen=True)
class Householder(Branch):
    """Singular vectors that train on the sphere of orthonormal bases, as Householder reflections; singular values stay what they are.

    Args:
        spectrum: "values" keeps those of the weight, "ones" makes all of them one.
        rest: what becomes of the weight beside the branch: "keep" takes away the initial branch alone, so that a layer begins as it was when the
            spectrum is kept; "drop" takes away all of the weight, whose factors the adapter then holds.
    """

    kind: ClassVar[str] = "householder"
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"penalty.orth", "refresh.refactor", "refresh.allocate", "gradient.project", "roles.protect"}
    )

    core: Diag | None = field(default_factory=Diag)  # type: ignore[assignment]
    balance: Literal["none"] = "none"  # type: ignore[assignment]
    scale: Literal["one"] = "one"  # type: ignore[assignment]
    spectrum: Literal["values", "ones"] = "values"
    rest: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.core, Diag) or self.of != "kept" or self.left != "factor" or self.right != "factor" or self.scale != "one":
            raise UsageError("form.householder: expected of=kept with both factors from the triples, a core of kind diag and scale=one.")
        wanted = "kept" if self.rest == "drop" else "initial"
        if self.minus != wanted:
            raise UsageError(f"form.householder: rest={self.rest} takes away what minus={wanted} says, found minus={self.minus}.")

    @property
    def uses_rest(self) -> bool:
        return self.rest == "drop"

    @property
    def identity(self) -> bool:
        return self.rest == "keep" and self.minus == "initial"

    def built(self, *args: Any, **how: Any) -> LowRank:
        from ..nn.reflected import Reflected

        action = args[0]
        if self.rest == "drop":
            how["kept"] = min(action.out, action.into)
        return Reflected(*args, **how)

    def begin(self, made: Material, empty: Any, draw: Draw) -> dict[str, Tensor]:
        import torch

        from ..linalg.householder import reflectors

        kept, rest = made.kept, made.rest
        assert kept is not None
        assert kept.values is not None
        left, signs = reflectors(kept.left, "left singular vectors")
        right, more = reflectors(kept.right.T, "right singular vectors")
        values = kept.values if self.spectrum == "values" else torch.ones_like(kept.values)
        out = {"left": left, "right": right.T.contiguous(), "core": values * signs * more}
        out |= {f"initial_{n}": out[n] for n in empty.copied}
        if self.rest == "drop":
            assert rest is not None
            assert rest.values is not None
            out["kept_left"] = torch.cat([kept.left * kept.values, rest.left * rest.values], 1)
            out["kept_right"] = torch.cat([kept.right, rest.right])
        names: Mapping[str, Tensor] = empty.parts()
        if "bias" in names:
            out["bias"] = torch.zeros_like(names["bias"])
        return out
