"""A common basis for several matrices, with coefficients for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .base import FormChoice
from .pairs import Balance, Layout, apply_site, balance, base_of, dense_tensors, pair_outcome, pair_tables, pair_tensors, reread_site
from .protocols import Bundle, Cost, Edits, Made, Outcome, Parts, Ranked

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SharedBasis(FormChoice):
    """Matrices that are solved together keep one common factor and one of their own each; a group of one is an ordinary pair.

    Sharing "in": one `down` (r, n), an `up` (m_i, r) for each. Sharing "out": one `up` (m, r), a `down` (r, n_i) for each. The common factor is
    stored once, under the first of the sites, and the loader ties the others to it.

    Args:
        balance: which factor carries the singular values; "even" over the stacked factors.
        layout: "factored", or "dense" for the products: loads anywhere, saves nothing.
    """

    kind: ClassVar[str] = "shared_basis"
    takes: ClassVar[frozenset[str]] = frozenset({"kept"})
    gives: ClassVar[frozenset[str]] = frozenset({"bias", "pair", "common basis"})

    balance: Balance = "even"
    layout: Layout = "factored"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("basis", "coeff")

    def cost(self, bundle: Bundle) -> Cost:
        """r (common length + all others) against the sum of the matrices."""
        m, n = bundle.shape
        return Cost(dense=m * n, per_rank=m + n, full=min(m, n))

    def build(self, kept: Parts, rest: Parts | None, bundle: Bundle, read_bias: Callable[[str], Tensor], seed: int) -> Edits:
        tensors: dict[str, Tensor] = {}
        gone: dict[str, str] = {}
        up, down = balance(kept.left, kept.right, self.balance)
        ups = up.split([s.shape[0] for s in bundle.sites]) if bundle.shares == "in" else [up] * len(bundle.sites)
        downs = down.split([s.shape[1] for s in bundle.sites], dim=1) if bundle.shares == "out" else [down] * len(bundle.sites)
        for i, (site, u, d) in enumerate(zip(bundle.sites, ups, downs, strict=True)):
            own = None if kept.bias is None else kept.bias[i]
            bias = own if own is not None else read_bias(site.bias) if site.bias else None
            if self.layout == "dense":
                tensors |= dense_tensors(site, u @ d, bias)
                continue
            tensors |= pair_tensors(site, None if self._alias(bundle, i, "up") else u, None if self._alias(bundle, i, "down") else d, bias)
            if site.bias:
                gone[site.bias] = f"moved to {base_of(site)}.up.bias"
        return Edits(tensors, gone)

    @staticmethod
    def _alias(bundle: Bundle, index: int, factor: str) -> bool:
        """Whether this factor of the site is stored under another."""
        return index > 0 and bundle.shares == {"down": "in", "up": "out"}[factor]

    def outcome(self, bundle: Bundle, rank: int, adds_bias: bool) -> Outcome:
        """The tensors at this rank, before any work."""
        tensors: dict[str, Made] = {}
        gone: dict[str, str] = {}
        every = tuple(k for s in bundle.sites for k in s.tensors)
        for i, site in enumerate(bundle.sites):
            stored = {"up": not self._alias(bundle, i, "up"), "down": not self._alias(bundle, i, "down")}
            found = pair_outcome(site, rank, adds_bias, self.layout, **stored, also=every)
            tensors |= found.tensors
            gone |= found.gone
        return Outcome(tensors, gone)

    def apply(self, model: Any, bundle: Bundle, edits: Edits) -> None:
        """Put the pairs into a model in memory, their common factor being one parameter."""
        from ..nn.surgery import share

        base = base_of(bundle.sites[0])
        common = {"up": edits.tensors.get(f"{base}.up.weight"), "down": edits.tensors.get(f"{base}.down.weight")}
        for i, site in enumerate(bundle.sites):
            also = {f: common[f] for f in ("up", "down") if self._alias(bundle, i, f)}
            apply_site(model, site, edits.tensors, self.layout, **also, common=bundle.shares is not None)
        if self.layout == "factored" and bundle.shares is not None:
            share(model, [s.name for s in bundle.sites], bundle.shares)

    def reread(self, model: Any, bundle: Bundle, edits: Edits) -> Edits:
        """The edits with the values that a model has after training; `edits` says which tensors there are."""
        if self.layout == "dense":
            return edits
        tensors: dict[str, Tensor] = {}
        for site in bundle.sites:
            tensors |= reread_site(model, site, edits.tensors)
        return replace(edits, tensors=tensors)

    def config_of(
        self, done: Ranked, adds_bias: bool, config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """Ranks, biases, and which modules share a factor."""
        if self.layout == "dense" or not done:
            return {}, {}
        tables = pair_tables(done, adds_bias)
        shared = [{"side": b.shares, "modules": [s.name for s in b.sites]} for b, _ in done if b.shares is not None]
        return tables | ({"shared": shared} if shared else {}), {}
