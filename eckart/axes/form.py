"""Which tensors exist afterwards, with which values; it alone says what a rank costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from .base import Choice
from .protocols import Bundle, Cost, Edits, Parts

if TYPE_CHECKING:
    from torch import Tensor

Balance = Literal["even", "left", "right"]


def balance(left: Tensor, right: Tensor, how: Balance) -> tuple[Tensor, Tensor]:
    """Move the norm of each triple: half to each side ("even"), or all of it into the left or the right factor.

    For a plain SVD "even" is the square root of the singular value on each side.
    """
    a, b = left.norm(dim=0), right.norm(dim=1)
    zero = (a == 0) | (b == 0)
    a, b = a.masked_fill(zero, 1), b.masked_fill(zero, 1)
    to_left = {"even": (b / a).sqrt(), "left": b, "right": 1 / a}[how]
    return left * to_left, right / to_left[:, None]


@dataclass(frozen=True)
class Pair(Choice):
    """Two matrices in place of one: y = up (down x) + bias. `layout="dense"` multiplies them back: loads anywhere, saves nothing.

    Args:
        balance: which factor carries the singular values.
        layout: "factored" stores `down` and `up` beside a guard tensor, "dense" their product.
    """

    kind: ClassVar[str] = "pair"
    axis: ClassVar[str] = "form"
    takes: ClassVar[frozenset[str]] = frozenset({"kept"})
    gives: ClassVar[frozenset[str]] = frozenset({"bias", "pair"})

    balance: Balance = "even"
    layout: Literal["factored", "dense"] = "factored"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("up", "down")

    @property
    def uses_rest(self) -> bool:
        return False

    def cost(self, bundle: Bundle) -> Cost:
        """r (m + n) against m n. A bias is counted on neither side unless the metric adds one (see `solve.cost`)."""
        m, n = bundle.shape
        return Cost(dense=m * n, per_rank=m + n, full=min(m, n))

    def build(self, kept: Parts, rest: Parts | None, bundle: Bundle, read_bias: Callable[[str], Tensor], seed: int) -> Edits:
        import torch

        from ..store.dtypes import torch_dtype

        site = bundle.site
        dtype = torch_dtype(site.dtype)
        bias = kept.bias if kept.bias is not None else (read_bias(site.bias) if site.bias else None)
        if self.layout == "dense":
            weight = (kept.left @ kept.right).to(dtype)
            tensors = {site.tensors[0]: weight.T.contiguous() if site.view == "transposed" else weight}
            if bias is not None:
                tensors[site.bias or f"{site.tensors[0].removesuffix('weight')}bias"] = bias.to(dtype)
            return Edits(tensors)
        up, down = balance(kept.left, kept.right, self.balance)
        base = site.tensors[0].removesuffix(".weight")
        tensors = {f"{base}.down.weight": down.to(dtype).contiguous(), f"{base}.up.weight": up.to(dtype).contiguous()}
        dropped = {}
        if bias is not None:
            tensors[f"{base}.up.bias"] = bias.to(dtype).contiguous()
        if site.bias:
            dropped[site.bias] = f"moved to {base}.up.bias"
        tensors[f"{base}.weight"] = torch.zeros(1, dtype=dtype)  # guard: an unregistered load must fail, not fill in random weights
        return Edits(tensors, dropped, {"ranks": {site.name: int(down.shape[0])}, "bias": {site.name: bias is not None}})

    def layout_of(self, bundle: Bundle, rank: int, adds_bias: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of the tensors that `build` will return at this rank, known before any work."""
        site = bundle.site
        m, n = site.shape
        base = site.tensors[0].removesuffix(".weight")
        has_bias = adds_bias or site.bias is not None
        if self.layout == "dense":
            out = {site.tensors[0]: (site.dtype, (n, m) if site.view == "transposed" else (m, n))}
            return out | ({site.bias or f"{base}.bias": (site.dtype, (m,))} if has_bias else {})
        out: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{base}.down.weight": (site.dtype, (rank, n)),
            f"{base}.up.weight": (site.dtype, (m, rank)),
        }
        if has_bias:
            out[f"{base}.up.bias"] = (site.dtype, (m,))
        return out | {f"{base}.weight": (site.dtype, (1,))}
