"""A trained branch beside a layer that stays as it is: y = base(x) + s L C R x, less what the branch begins with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UsageError
from .base import NOTHING, Choice, FormChoice
from .core import Affine, Block, Dense, Diag, Masked
from .draw import Draw, check
from .protocols import Bundle, Cost, Parts

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.action import Action
    from ..nn.branch import Branch as Module
    from ..nn.branch import LowRank

Balance = Literal["even", "values", "left", "right", "none"]
Scale = Literal["one", "alpha", "alpha/r", "alpha/r0", "alpha/sqrt(r)"]


@dataclass(frozen=True)
class Material:
    """What a branch is made from: triples of the matrix as `axes.triples` gives them.

    Args:
        kept: those that the filter kept.
        rest: the others that were computed.
        source: what the recipe's source gives, for forms that take it whole.
        weight: W (out, in), for these forms.
        weighed: whether the triples are those in a metric: then one factor is not orthonormal, and the values have the metric's unit.
    """

    kept: Parts | None = None
    rest: Parts | None = None
    source: Tensor | None = None
    weight: Tensor | None = None
    weighed: bool = False


@dataclass(frozen=True)
class Branch(FormChoice):
    """Two thin factors, with or without a core, whose product is added to the layer: y = base(x) + s L C R x - s L0 C0 R0 x.

    The base keeps its bits: what the branch holds at the start is taken away in the forward pass (`base="subtract"`), so the layer begins
    exactly as it was, also in half precision or over a quantised base, and several adapters do not disturb each other.
    `base="mutate"` takes it out of the weight instead, as the papers' own code does.

    Args:
        of: triples that the factors are made of: those that the filter "kept", the "rest" (rank then counts what is kept), or none ("fresh").
        core: what stands between the factors.
        left, right: "factor" (from the triples), or a word of `axes.draw`: "zero", "normal:0.02", "kaiming".
        balance: where the singular values go: half to each factor by norms ("even"), by the values themselves ("values"; they differ from
            norms under a metric), all to the "left" or "right" factor, or to the core ("none"; under a metric, the part's own singular
            values and vectors, without it).
        scale: s; r0 is the rank that was asked for, where an allocation then changes it.
        absorb: divide the initial product by s, so that it equals the part of the matrix it is made of.
        minus: what is taken away: the "initial" branch, the "kept" part of the matrix whatever the branch is, or "nothing".
        base: "subtract" or "mutate".
        floor: singular values below this share of the largest count as that, so that no triple begins without a gradient.
        bias: train a change of the bias too, where the layer has one.
        split: give each of the matrices inside a fused layer (q, k, v) factors of its own.
    """

    kind: ClassVar[str] = "branch"
    gives: ClassVar[frozenset[str]] = frozenset({"branch"})
    layout: ClassVar[str] = "adapter"

    of: Literal["kept", "rest", "fresh"] = "kept"
    core: Diag | Dense | Affine | Masked | Block | None = None
    left: str = "factor"
    right: str = "factor"
    balance: Balance = "even"
    scale: Scale = "alpha/r"
    absorb: bool = True
    minus: Literal["initial", "kept", "nothing"] = "initial"
    base: Literal["subtract", "mutate"] = "subtract"
    floor: float = 0.0
    bias: bool = False
    split: bool = False

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            word = getattr(self, name)
            if word == "factor" and self.of == "fresh":
                raise UsageError(f'form.{name}: a fresh branch is made of no triples; expected a word such as "zero" or "kaiming".')
            if word != "factor":
                check(word, f"form.{name}")
        if self.balance == "none" and self.core is None:
            raise UsageError("form.balance=none gives the singular values to the core, and form.core is none. Set form.core.kind=diag.")
        if self.base == "mutate" and self.minus == "nothing":
            raise UsageError(
                "form.base=mutate: this branch takes nothing away from the base (form.minus=nothing), so there is nothing to mutate."
            )

    @property
    def takes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"kept"}) if self.uses_triples else NOTHING

    @property
    def mutates(self) -> bool:
        return self.base == "mutate"

    @property
    def uses_triples(self) -> bool:
        """Whether the matrix must be factorised at all."""
        return self.of != "fresh" or self.minus == "kept"

    @property
    def uses_rest(self) -> bool:
        """Whether every triple is needed, whatever the filter says."""
        return self.of == "rest"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names that roles may give."""
        return ("left", *(("core",) if self.core else ()), "right", *(("bias",) if self.bias else ()), "kept", "base")

    def width(self, rank: int, full: int) -> int:
        """Triples in the branch, for a budget of `rank` in a matrix of full rank `full`."""
        return full - rank if self.of == "rest" else rank

    def cost(self, bundle: Bundle) -> Cost:
        """Trained numbers per rank. An adapter has no break-even with the dense matrix: every rank up to the full one is allowed."""
        m, n = bundle.shape
        full = min(m, n)
        per_rank = m + n + (1 if self.core else 0)
        return Cost(dense=per_rank * full + 1, per_rank=per_rank, full=full)

    @property
    def identity(self) -> bool:
        """Whether a layer begins as it was, whatever is drawn."""
        zero = "zero" in (self.left, self.right) or (self.core is not None and getattr(self.core, "init", "values") == "zero")
        return self.minus == "initial" or (self.minus == "nothing" and zero)

    def trainable(self, shape: tuple[int, int], rank: int, roles: Mapping[str, Choice], bias: bool) -> int:
        """Trained numbers of one matrix, by formula.

        Args:
            shape: (out, in).
            rank: the budget of this matrix.
            roles: of the recipe.
            bias: whether the layer has one.
        """
        m, n = shape
        r = self.width(rank, min(m, n))
        sizes = {"left": m * r, "right": r * n, "bias": m if bias else 0}
        if self.core is not None:
            sizes |= {k: math.prod(v) for k, v in self.core.module().shapes(r).items()}
        return sum(sizes[name] for name in self.trained(roles))

    def scaling(self, rank: int, asked: int, alpha: float) -> float:
        """s."""
        return {
            "one": 1.0, "alpha": alpha, "alpha/r": alpha / rank, "alpha/r0": alpha / asked, "alpha/sqrt(r)": alpha / math.sqrt(rank)
        }[self.scale]  # fmt: skip

    def trained(self, roles: Mapping[str, Choice]) -> tuple[str, ...]:
        """Names of the module's tensors that train. A part without a role does."""
        names = ["left", *(self.core.module().names if self.core else ()), "right", *(["bias"] if self.bias else ())]
        fixed: frozenset[str] = self.core.module().fixed if self.core else NOTHING

        def role(name: str) -> str:
            part = "core" if name.startswith("core") else name
            return roles[part].kind if part in roles else "train"

        return tuple(n for n in names if n not in fixed and role(n) == "train")

    def stores_kept(self, roles: Mapping[str, Choice]) -> bool:
        """Whether the kept part is stored beside the branch: to be taken away, to be protected, or because a role names it."""
        return self.minus == "kept" or ("kept" in roles and roles["kept"].kind != "drop")

    def module(
        self, action: Action, rank: int, roles: Mapping[str, Choice], *, asked: int, alpha: float, dropout: float = 0.0, bias: bool = True
    ) -> Module:
        """The empty branch of a layer.

        Args:
            action: how matrices act on the layer's input.
            rank: the budget of this layer.
            roles: of the recipe.
            asked: rank that the run asked for.
            alpha: numerator of the scale.
            dropout: of the input.
            bias: whether the layer has one.
        """
        full = min(action.out, action.into)
        width = self.width(rank, full)
        train = self.trained(roles)
        with_bias = self.bias and bias
        return self.built(
            action, width, self.core.module() if self.core else None,
            trained=train if with_bias else [t for t in train if t != "bias"],
            scale=self.scaling(width, asked, alpha), minus=self.minus, policy=self.base,
            kept=rank if self.stores_kept(roles) else 0, bias=with_bias, dropout=dropout,
        )  # fmt: skip

    def built(self, *args: Any, **how: Any) -> LowRank:
        """What runs it; arguments as of `LowRank`."""
        from ..nn.branch import LowRank

        return LowRank(*args, **how)

    def begin(self, made: Material, empty: Module, draw: Draw) -> dict[str, Tensor]:
        """Initial values of the tensors of an empty branch."""
        import torch

        from .triples import own

        module: Any = empty
        chosen = {"kept": made.kept, "rest": made.rest, "fresh": None}[self.of]
        m, n, r = module.action.out, module.action.into, module.rank
        s = module.scale if self.absorb and chosen is not None else 1.0
        if chosen is None:
            left, right, values = None, None, torch.ones(r)
        else:
            left, right, values = self._balanced(own(chosen) if made.weighed and self.balance == "none" else chosen, s)
        out: dict[str, Tensor] = {
            "left": left if self.left == "factor" and left is not None else draw("left", self.left, (m, r)),
            "right": right if self.right == "factor" and right is not None else draw("right", self.right, (r, n)),
        }
        if self.core is not None:
            out |= self.core.begin(r, values, draw)
        names = set(module.parts())
        if "bias" in names:
            out["bias"] = torch.zeros(m)
        for name in module.copied:
            out[f"initial_{name}"] = out[name]
        if "kept_left" in names:
            kept = made.kept
            assert kept is not None
            assert kept.values is not None
            out["kept_left"] = kept.left
            out["kept_right"] = kept.right * kept.values[:, None] if self.minus == "kept" else kept.right
        return out

    def _balanced(self, parts: Parts, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(left, right, values over the scale): their product is the part over the scale, with the values at their place."""
        assert parts.values is not None
        if parts.core is not None:
            if self.balance != "none":
                raise UsageError(
                    "form.balance: this factorisation has a matrix between its factors, which goes to the core. Set form.balance=none."
                )
            return parts.left, parts.right, parts.core / scale
        values = parts.values
        if self.floor > 0 and len(values):
            top = float(parts.spectrum.max()) if len(parts.spectrum) else float(values.max())
            values = values.clamp_min(self.floor * top)
        left, right = parts.left, parts.right
        if self.balance in ("even", "values"):
            root = (values / scale).sqrt()
            if self.balance == "values":
                return left * root, right * root[:, None], values / scale
            a, b = left.norm(dim=0), right.norm(dim=1)
            a, b = a.masked_fill(a == 0, 1), b.masked_fill(b == 0, 1)
            return left * (root * (b / a).sqrt()), right * (root * (a / b).sqrt())[:, None], values / scale
        if self.balance == "left":
            return left * (values / scale), right, values / scale
        if self.balance == "right":
            return left, right * (values / scale)[:, None], values / scale
        return left, right, values / scale
