"""Which tensors exist afterwards, with which values; it alone says what a rank costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UsageError
from .base import FormChoice
from .bases import Gated as Gated
from .bases import Householder as Householder
from .branch import Branch as Branch
from .kron import Kron as Kron
from .merged import Merged as Merged
from .pairs import Balance as Balance
from .pairs import Layout, apply_site, base_of, dense_tensors, pair_outcome, pair_tables, pair_tensors, reread_site
from .pairs import balance as balance
from .protocols import Bundle, Cost, Edits, Outcome, Parts, Ranked, Read
from .rows import Rows as Rows
from .shared import SharedBasis as SharedBasis
from .smaller import Smaller as Smaller
from .stored import STORES, Store, floats, leave, outcome_as, settle, tensors_as, untouched
from .tucker import Tucker as Tucker
from .whole import Whole as Whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair(FormChoice):
    """Two matrices in place of one: y = up (down x) + bias. `layout="dense"` multiplies them back: loads anywhere, saves nothing.

    Args:
        balance: which factor carries the singular values.
        layout: "factored" stores `down` and `up` beside a guard tensor, "dense" their product.
        store: "same" keeps the type of the file; "int8" (a scale per output) and "int4" (a scale per 32 inputs; int8 where the inputs of a factor
            are no multiple of 32) are torchao's, for the factors and for the targeted matrices that stay dense. Tables are never integers.
    """

    kind: ClassVar[str] = "pair"
    takes: ClassVar[frozenset[str]] = frozenset({"kept"})
    gives: ClassVar[frozenset[str]] = frozenset({"bias", "pair"})

    balance: Balance = "even"
    layout: Layout = "factored"
    store: Store = "same"

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise UsageError(f"form.store: expected one of {', '.join(STORES)}, found {self.store!r}.")
        if self.store != "same" and self.layout == "dense":
            raise UsageError(
                f"form: a dense result is meant to load anywhere, and {self.store} needs eckart and torchao. Give one of them."
            )

    @property
    def stored(self) -> str:
        return self.store

    @property
    def parts(self) -> tuple[str, ...]:
        return ("up", "down")

    def cost(self, bundle: Bundle) -> Cost:
        """r (m + n) against m n. A bias is counted on neither side unless the metric adds one (see `solve.cost`)."""
        m, n = bundle.shape
        return Cost(dense=m * n, per_rank=m + n, full=min(m, n))

    def build(self, kept: Parts, rest: Parts | None, bundle: Bundle, read_bias: Callable[[str], Tensor], seed: int) -> Edits:
        site = bundle.site
        bias = kept.bias[0] if kept.bias is not None and kept.bias[0] is not None else (read_bias(site.bias) if site.bias else None)
        if self.layout == "dense":
            return Edits(dense_tensors(site, kept.left @ kept.right, bias))
        up, down = balance(kept.left, kept.right, self.balance)
        gone = {site.bias: f"moved to {base_of(site)}.up.bias"} if site.bias else {}
        tensors = pair_tensors(site, up, down, bias)
        return Edits(tensors if self.store == "same" else tensors_as(tensors, bundle.sites, self.store), gone)

    def outcome(self, bundle: Bundle, rank: int, adds_bias: bool) -> Outcome:
        """The tensors at this rank, before any work."""
        found = pair_outcome(bundle.site, rank, adds_bias, self.layout)
        return found if self.store == "same" else outcome_as(found, bundle.sites, self.store)

    def outcome_dense(self, bundle: Bundle) -> Outcome | None:
        found = None if self.store == "same" else untouched(bundle)
        return None if found is None else outcome_as(found, bundle.sites, self.store)

    def leave(self, bundle: Bundle, read: Read, read_bias: Callable[[str], Tensor]) -> Edits:
        return leave(bundle, read, read_bias, self.store)

    def apply(self, model: Any, bundle: Bundle, edits: Edits) -> None:
        """Put the pair, or its product, into a model in memory."""
        if self.store == "same":
            apply_site(model, bundle.site, edits.tensors, self.layout)
            return
        tensors = floats(edits.tensors)
        layout: Layout = "factored" if f"{base_of(bundle.site)}.up.weight" in tensors else "dense"
        apply_site(model, bundle.site, tensors, layout)
        settle(model, edits.tensors, bundle.sites)

    def reread(self, model: Any, bundle: Bundle, edits: Edits) -> Edits:
        """The edits with the values that a model has after training; `edits` says which tensors there are."""
        return replace(edits, tensors=reread_site(model, bundle.site, edits.tensors)) if self.layout == "factored" else edits

    def config_of(
        self, done: Ranked, adds_bias: bool, config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """Ranks, and the biases that the dense class does not have."""
        return ({}, {}) if self.layout == "dense" else (pair_tables(done, adds_bias), {})
