"""What a measure is, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One number about one module. Not a bare float: it says how it was estimated and whether it means anything.

    Args:
        module: dotted path.
        measure: key of the measure.
        value: a number, or a list of numbers.
        estimator: how it was computed.
        valid: False when the value says nothing (a zero matrix, too few values); the note says why.
        note: the caveat.
        settings: what the value depends on.
    """

    module: str
    measure: str
    value: Any
    estimator: str
    valid: bool = True
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spectral:
    """A measure that reads the singular values of one weight.

    Args:
        name: key.
        title: what it is, in words.
        paper: source.
        estimator: how it is computed.
        compute: (singular values descending, shape) -> value.
        note: caveat that belongs beside every value.
        settings: what the value depends on.
    """

    name: str
    title: str
    paper: str
    estimator: str
    compute: Callable[[Tensor, tuple[int, int]], Any]
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "measure"
    verb: str = "inspect"
    fidelity: str = "exact"
    differs: str = ""

    def record(self, module: str, s: Tensor, shape: tuple[int, int]) -> Record:
        """The record of one module; a zero matrix gives an invalid one."""
        if len(s) == 0 or float(s.max()) == 0:
            return Record(module, self.name, None, self.estimator, False, "the matrix is zero", self.settings)
        return Record(module, self.name, self.compute(s, shape), self.estimator, True, self.note, self.settings)
