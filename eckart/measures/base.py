"""What a measure is, what it reads, and what it returns.

A measure's file binds `MEASURE`, a value of one of the classes below; the class says what it reads:

- `OfSpectrum`: the singular values of one weight,
- `OfWeight`: one weight,
- `OfPair`: the same weight in two checkpoints,
- `OfCheckpoint`: several weights at once, one of them in memory at a time,
- `OfText`: activations, which arrive while calibration text runs through the model once for all measures,
- `OfModel`: the live model itself, run as the measure likes (gradients, curvature).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ..axes.protocols import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..catalogue import Catalogue
    from ..linalg import Factors

Reads = Literal["spectrum", "weight", "pair", "checkpoint", "text", "model"]


@dataclass(frozen=True)
class Record:
    """One number about one module. Not a bare float: it says how it was estimated and whether it means anything.

    Args:
        module: dotted path; "" for a number about the whole model.
        measure: key of the measure.
        value: a number, a list of numbers, or a mapping of names to these; None when there is none.
        estimator: how it was computed.
        valid: False when the value says nothing (a zero matrix, too few values); the note says why.
        note: the caveat.
        settings: what the value depends on.
        uncertainty: standard error in the value's unit, where the estimator has one; a list or mapping like the value's.
    """

    module: str
    measure: str
    value: Any
    estimator: str
    valid: bool = True
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    uncertainty: Any = None


@dataclass(frozen=True)
class Found:
    """What a measure found in one module; `Measure.record` makes the record of it.

    Args:
        value: as in `Record`.
        uncertainty: as in `Record`.
        note: a caveat of this value, put before the measure's own.
        valid: False when the value must not be read as a result; a value that is not finite never counts as valid.
        settings: what was chosen for this matrix, beside the measure's own settings.
    """

    value: Any
    uncertainty: Any = None
    note: str = ""
    valid: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What every measure says of itself. Not runnable: the classes below are.

    Args:
        name: key, the name of its file.
        title: what it is, in words.
        paper: source: "arXiv:...", "doi:..." or an address.
        estimator: how it is computed, in a line.
        note: caveat that belongs beside every value.
        settings: what the value depends on.
        unit: unit or scale of the value, for headings; "" for a pure number.
        default: whether a run that names no measure takes it; dear ones are asked for by name.
        fidelity, differs: as for a recipe.
    """

    reads: ClassVar[Reads]

    name: str
    title: str
    paper: str
    estimator: str
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""
    default: bool = True
    kind: str = "measure"
    verb: str = "inspect"
    fidelity: str = "exact"
    differs: str = ""

    def record(self, module: str, found: Any) -> Record:
        """The record of one module, from a `Found` or a bare value."""
        f = found if isinstance(found, Found) else Found(found)
        valid = f.valid and f.value is not None and finite(f.value)
        note = f.note if f.note or valid else "the value is not finite"
        both = "; ".join(n for n in (note, self.note if valid else "") if n)
        return Record(module, self.name, f.value, self.estimator, valid, both, {**self.settings, **f.settings}, f.uncertainty)

    def missing(self, module: str, why: str) -> Record:
        """The record of a module that could not be measured."""
        return Record(module, self.name, None, self.estimator, False, why, self.settings)


def finite(value: Any) -> bool:
    """Whether every number in a value is finite; names and None pass."""
    if isinstance(value, Mapping):
        return all(finite(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(finite(v) for v in value)
    return math.isfinite(value) if isinstance(value, float) else True


@dataclass
class WeightView:
    """One weight as a measure sees it: factorised once, whoever asks. Nothing in it may be changed.

    Args:
        site: the matrix in the catalogue.
        read: site -> W (out, in) as stored.
    """

    site: Site
    read: Callable[[Site], Tensor]

    @cached_property
    def weight(self) -> Tensor:
        """W (out, in), in its storage type."""
        return self.read(self.site)

    @cached_property
    def spectrum(self) -> Tensor:
        """All singular values, float64, descending. The weight is let go before they are computed; who needs it then reads it again."""
        from ..linalg import svdvals
        from ..linalg.svd import smaller_gram, values_of_gram

        gram = smaller_gram(self.weight)
        if gram is None:
            return svdvals(self.weight, wide=True)
        del self.weight
        return values_of_gram(gram)

    @cached_property
    def factors(self) -> Factors:
        """All singular triples; float32 (float64 where the weight is)."""
        from ..linalg import svd

        return svd(self.weight, name=self.site.name)


@dataclass
class PairView:
    """The same matrix before and after.

    Args:
        base: of the first checkpoint.
        other: of the second one, of the same shape.
    """

    base: WeightView
    other: WeightView

    @property
    def site(self) -> Site:
        """The matrix in the first checkpoint's catalogue."""
        return self.base.site


@dataclass(frozen=True)
class CheckpointView:
    """A whole checkpoint of which one tensor is read at a time.

    Args:
        catalogue: its matrices.
        read: site -> W (out, in) as stored.
        config: its `config.json`, empty when there is none.
        sites: the matrices that the run is about.
    """

    catalogue: Catalogue
    read: Callable[[Site], Tensor]
    config: Mapping[str, Any]
    sites: Sequence[Site]


@dataclass(frozen=True)
class TextView:
    """What is known before calibration text runs.

    Args:
        catalogue: the matrices of the model.
        sites: those that the run is about.
        config: the model's `config.json`, empty when there is none.
        causal: whether the model predicts the next token.
        texts: number of texts, which is the number of rows of all batches; 0 when the input is tensors.
        seed: of everything that draws numbers.
        read: site -> W (out, in) as stored, for measures that weigh weights by their inputs; None reads from the model that runs.
        specials: how many tokens the tokenizer puts in front of each text and behind it, for measures that leave them out.
    """

    catalogue: Catalogue
    sites: Sequence[Site]
    config: Mapping[str, Any]
    causal: bool
    texts: int
    seed: int = 0
    read: Callable[[Site], Tensor] | None = None
    specials: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ModelView:
    """The live model and the text, for measures that run it themselves. It must be left as it was found.

    Args:
        model: in evaluation mode; not to be changed.
        catalogue: its matrices.
        sites: those that the run is about.
        batches: calibration batches (`data.Batch`, tensors, or tuples of tensors).
        config: the model's `config.json`, empty when there is none.
        causal: whether the model predicts the next token.
        loss: for a plain module: (output, batch) -> scalar; None means next-token cross-entropy, or none at all.
        other: a second live model, where two are compared.
        seed: of everything that draws numbers.
    """

    model: nn.Module
    catalogue: Catalogue
    sites: Sequence[Site]
    batches: Sequence[Any]
    config: Mapping[str, Any]
    causal: bool
    loss: Callable[[Any, Any], Tensor] | None = None
    other: nn.Module | None = None
    seed: int = 0


class Observer(Protocol):
    """What an `OfText` measure does while text runs: it is fed activations and keeps sums, never the activations of all texts.

    Two places are not linears or blocks: ("", "out") is the last hidden state (of a plain module: its output).
    """

    def wants(self) -> Iterable[tuple[str, Literal["in", "out"]]]:
        """(module path, side) of everything it must see: linears, blocks, the embedding."""
        ...

    def see(self, module: str, side: Literal["in", "out"], x: Tensor, text: Tensor) -> None:
        """Rows that passed: one call of the module, in which every text of the batch is whole and in order.

        Args:
            module: path.
            side: "in" or "out".
            x: (t, n) the rows of real tokens, padding removed, finite, in the type and on the device of the model. What is kept beyond
                this call must be a copy: the model may write over it.
            text: (t,) int64 on the same device: which text of the run each row belongs to.
        """
        ...

    def lose(self, module: str, side: Literal["in", "out"], why: str) -> None:
        """A place that cannot be measured, and will not be shown again: the records say why."""
        ...

    def end_batch(self) -> None:
        """All modules have seen the batch."""
        ...

    def records(self) -> Iterable[Record]:
        """After the last batch; a record for everything that was wanted, measured or not."""
        ...


@dataclass(frozen=True, kw_only=True)
class OfSpectrum(Measure):
    """A measure that reads the singular values of one weight.

    Args:
        compute: (singular values, float64, descending; shape) -> value or `Found`.
    """

    reads: ClassVar[Reads] = "spectrum"
    compute: Callable[[Tensor, tuple[int, int]], Any]

    def of(self, view: WeightView) -> Record:
        """The record of one module; a zero matrix gives an invalid one."""
        s = view.spectrum
        if len(s) == 0 or float(s[0]) == 0:
            return self.missing(view.site.name, "the matrix is zero")
        return self.record(view.site.name, self.compute(s, view.site.shape))


@dataclass(frozen=True, kw_only=True)
class OfWeight(Measure):
    """A measure that reads one weight.

    Args:
        compute: view -> value or `Found`.
    """

    reads: ClassVar[Reads] = "weight"
    compute: Callable[[WeightView], Any]

    def of(self, view: WeightView) -> Record:
        """The record of one module; a zero matrix gives an invalid one."""
        if not bool(view.weight.any()):
            return self.missing(view.site.name, "the matrix is zero")
        return self.record(view.site.name, self.compute(view))


@dataclass(frozen=True, kw_only=True)
class OfPair(Measure):
    """A measure that compares one weight in two checkpoints.

    Args:
        compute: view -> value or `Found`.
    """

    reads: ClassVar[Reads] = "pair"
    compute: Callable[[PairView], Any]

    def of(self, view: PairView) -> Record:
        """The record of one module; two shapes give an invalid one."""
        here, there = view.base.weight.shape, view.other.weight.shape
        if here != there:
            return self.missing(view.site.name, f"the shapes differ: {tuple(here)} and {tuple(there)}")
        return self.record(view.site.name, self.compute(view))


@dataclass(frozen=True, kw_only=True)
class OfCheckpoint(Measure):
    """A measure that needs several weights at once.

    Args:
        compute: view -> records.
    """

    reads: ClassVar[Reads] = "checkpoint"
    compute: Callable[[CheckpointView], Iterable[Record]]


@dataclass(frozen=True, kw_only=True)
class OfText(Measure):
    """A measure of activations.

    Args:
        observer: what is known before the run -> an observer.
    """

    reads: ClassVar[Reads] = "text"
    observer: Callable[[TextView], Observer]


@dataclass(frozen=True, kw_only=True)
class OfModel(Measure):
    """A measure that runs the model itself.

    Args:
        compute: view -> records.
    """

    reads: ClassVar[Reads] = "model"
    compute: Callable[[ModelView], Iterable[Record]]
    default: bool = False
