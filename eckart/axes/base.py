"""What every axis value shares: a `kind` for YAML, and empty declarations that a value overrides where it has something to declare.

Not interfaces: the protocols are. What a caller asks of every value of an axis has its usual answer here, so that nobody asks whether it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .protocols import Budget, Bundle, Edits, Outcome, Parts, Read, Site, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg.psd import Weight

NOTHING: frozenset[str] = frozenset()


class Choice:
    """Base of axis values. `kind` is the name in YAML and on the command line, `axis` the axis it belongs to."""

    kind: ClassVar[str]
    axis: ClassVar[str]
    takes: ClassVar[frozenset[str]] = NOTHING
    gives: ClassVar[frozenset[str]] = NOTHING

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset()


class TargetChoice(Choice):
    """Base of targets."""

    axis: ClassVar[str] = "target"
    glues: ClassVar[bool] = False
    """Whether it chooses among the layers of another target, so that it can be taken over into another recipe."""

    @property
    def tables(self) -> bool:
        """Whether embedding tables are taken beside linear layers; only they have frequencies of rows."""
        return False

    def around(self, other: Any) -> Any:
        """What a recipe with another target has when this one is added: the other's, unless this one `glues`."""
        return other

    def narrow(self, sites: Sequence[Site], stats: StatsView) -> list[Site]:
        """The sites that are left when statistics are known: all."""
        return list(sites)


class FactorChoice(Choice):
    """Base of factorisations."""

    axis: ClassVar[str] = "factor"
    nested: ClassVar[bool] = True
    """Whether the triples at a rank are the leading ones of those at a higher rank."""
    trains: ClassVar[bool] = False
    """Whether factors are trained on calibration text before ranks are known."""

    def triples(self, op: Tensor, sides: tuple[Weight | None, Weight | None], cap: int, algorithm: str, seed: int, name: str) -> Parts:
        """The leading triples of a matrix, left, values and right apart; those of the SVD in the metric."""
        from .triples import triples

        return triples(op, sides, cap, algorithm, seed, name)


class ScoreChoice(Choice):
    """Base of scores."""

    axis: ClassVar[str] = "score"
    measures: ClassVar[bool] = False
    """Whether curves are corrected by losses that are measured, through `measured`."""


class AllocateChoice(Choice):
    """Base of allocations."""

    axis: ClassVar[str] = "allocate"

    def most(self, budget: Budget, count: int, full: int) -> int | None:
        """Largest rank that one of `count` matrices can get; None where only its shape says."""
        return None

    @property
    def step(self) -> int:
        """What ranks are multiples of."""
        return 1


class RefineChoice(Choice):
    """Base of what follows the cut."""

    axis: ClassVar[str] = "refine"
    refits: ClassVar[bool] = False
    """Whether it works on the factors before a form is made of them, through `refit`, and not on the edits."""


class FormChoice(Choice):
    """Base of forms."""

    axis: ClassVar[str] = "form"
    solves: ClassVar[bool] = False
    """Whether it is no product of two factors and has `spectrum` and `solve` of its own."""
    uses_source: ClassVar[bool] = False
    """Whether it is made of the source as a whole, not of triples."""
    ranked: ClassVar[bool] = True
    """Whether a rank means anything to it."""
    conflicts: ClassVar[frozenset[str]] = NOTHING
    """What acts in training ("penalty.orth") and wants plain factors, which it does not hold."""

    @property
    def uses_rest(self) -> bool:
        """Whether all triples are wanted, whatever the filter says."""
        return False

    @property
    def mutates(self) -> bool:
        """Whether the weight itself changes when an adapter begins."""
        return False

    @property
    def stored(self) -> str:
        """Type that matrices are stored in: "same" as they came, "int8" or "int4"."""
        return "same"

    def outcome_dense(self, bundle: Bundle) -> Outcome | None:
        """What becomes of the tensors of a bundle that no rank suits: nothing (None), or their storage in another type."""
        return None

    def leave(self, bundle: Bundle, read: Read, read_bias: Callable[[str], Tensor]) -> Edits:
        """The edits of such a bundle, where there is an `outcome_dense`."""
        raise AssertionError("nothing becomes of it")

    def check(self, outline: Any, bundle: Bundle) -> None:
        """Refuse a model that it does not fit, before any work.

        Args:
            outline: gives the model without weights.
            bundle: what is to be changed.
        """


class AdapterChoice(FormChoice):
    """Base of forms of adapters that begin as the layer was; `form.Branch` answers for itself."""

    layout: ClassVar[str] = "adapter"

    @property
    def identity(self) -> bool:
        """Whether a layer begins as it was."""
        return True

    @property
    def uses_triples(self) -> bool:
        """Whether the matrix is factorised at all."""
        return False

    @property
    def split(self) -> bool:
        """Whether the matrices of a fused layer are adapted one by one."""
        return False
