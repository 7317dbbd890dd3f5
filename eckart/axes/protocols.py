"""The words of a recipe: what is measured, which matrices, what comes out, and the protocol of each axis.

No torch import here: the registry, the command line and the documentation read recipes without it.
A matrix is always seen as y = W x, shape (out, in), whatever its storage; "in" and "out" name the sides of that map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from ..catalogue import Catalogue

Side = Literal["in", "out"]
Decides = Literal["shape", "spectra", "evaluation", "training"]


@dataclass(frozen=True)
class Stat:
    """A statistic that must be measured. The planner takes the union over axes and sites; equal values are measured once.

    Args:
        kind: "moments" (count, mean, Gram), "absmean" (mean |x| per channel), "fisher" (sum over outputs of squared weight gradients),
            "gradient" (of the weight, m n numbers), "gradient_gram" (products of each sample's weight gradient, of its columns or rows),
            "encoded" (last hidden states of phrases).
        at: where it is measured: the layer's input, its output, or its weight. Never the side that a metric acts on.
        via: what must run: "forward", or "backward" with a probe.
        inputs: activations of the original model, or propagated through what was already compressed.
        probe: backward only: "task_loss" (next-token cross-entropy), "random_projection" (of the embedding), or "auto" (the first
            for causal language models, the second for encoders); the choice made is recorded.
        opts: refinements of the kind, for instance ("per_sample",) or ("per_batch",); for "gradient_gram" the side, ("in",) or ("out",).
    """

    kind: str
    at: Literal["in", "out", "weight", "block"] = "in"
    via: Literal["forward", "backward", "train", "prompt"] = "forward"
    inputs: Literal["original", "propagated"] = "original"
    probe: str = "auto"
    opts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """One matrix, seen in the tensors of a file or of a live module: the same value for both.

    Args:
        name: dotted path of the module.
        shape: (out, in).
        tensors: keys of the weight in the source.
        bias: key of the bias, if there is one.
        kind: "linear", "embedding", "conv", "experts" (all of a layer in one stack), "other".
        view: how the tensors show the matrix: "linear" (stored (out, in)) or "transposed" (stored (in, out), GPT-2's Conv1D).
        reads: id of the input; sites with equal ids read the same tensor and share one Gram. Empty when unknown.
        block: index of the repeated block that holds it, -1 outside.
        tied: other keys that are the same storage.
        dtype: safetensors name of the storage type ("F32", "BF16", ...).
    """

    name: str
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    bias: str | None = None
    kind: str = "linear"
    view: str = "linear"
    reads: str = ""
    block: int = -1
    tied: tuple[str, ...] = ()
    dtype: str = "F32"

    @property
    def role(self) -> str:
        """Last part of the name: "q_proj", "down_proj"; "attention.output.dense" keeps what tells it apart."""
        parts = [p for p in self.name.split(".") if not p.isdigit()]
        return ".".join(parts[-3:]) if parts and parts[-1] == "dense" else (parts[-1] if parts else self.name)


@dataclass(frozen=True)
class Bundle:
    """Sites that are solved together; a bundle of one is the ordinary case.

    Args:
        name: unique in a run.
        sites: the matrices.
        shares: the side with the common basis; None for a bundle of one, and for bundles that share something else.
        peers: further tensors that are edited along.
        facts: what a group found out and a form wants to know ("heads", "experts"), plain numbers.
    """

    name: str
    sites: tuple[Site, ...]
    shares: Side | None = None
    peers: tuple[str, ...] = ()
    facts: tuple[tuple[str, int], ...] = ()

    def fact(self, name: str, default: int = 0) -> int:
        """A fact by name."""
        return dict(self.facts).get(name, default)

    @property
    def site(self) -> Site:
        """The only site of a bundle of one."""
        (site,) = self.sites
        return site

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that is factorised: the sites stacked along the side they do not share."""
        if self.shares == "out":
            return self.sites[0].shape[0], sum(s.shape[1] for s in self.sites)
        return sum(s.shape[0] for s in self.sites), self.sites[0].shape[1]

    @property
    def keys(self) -> tuple[str, ...]:
        """Every tensor of the source that the bundle owns, biases and peers included, each once."""
        own = (k for s in self.sites for k in (*s.tensors, *((s.bias,) if s.bias else ())))
        return tuple(dict.fromkeys((*own, *self.peers)))


@dataclass(frozen=True)
class Parts:
    """What any factorisation returns: W' = left @ right (float32 or float64), with the spectrum it was cut from.

    `bias` holds what replaces the bias of each site of the bundle, None where the bias stays as it was.
    """

    left: Tensor
    right: Tensor
    spectrum: Tensor
    certificate: Mapping[str, Any] = field(default_factory=dict)
    bias: tuple[Tensor | None, ...] | None = None
    # for branches, which want the factors apart: W' = left diag(values) right, or left core right where a factorisation has a matrix there
    values: Tensor | None = None
    core: Tensor | None = None


@dataclass(frozen=True)
class Edits:
    """Everything a job may do to the world; rows of the manifest are made of it."""

    tensors: Mapping[str, Tensor]
    dropped: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is kept; exactly one field is set. A run's budget replaces the recipe's.

    Args:
        keep: parameters stored / original, over the targeted sites, in (0, 1].
        rank: an integer per bundle, or a share of min(m, n) in (0, 1).
        total_rank: ranks over all bundles; a float is the mean per bundle.
        energy: share of the (weighted) squared spectrum kept in every bundle, in (0, 1].
        error: largest relative (weighted) Frobenius error of a bundle, in [0, 1).
        threshold: cut on the score that the recipe names.
    """

    keep: float | None = None
    rank: int | float | None = None
    total_rank: int | float | None = None
    energy: float | None = None
    error: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        from ..errors import UsageError

        given = {k: v for k, v in self.__dict__.items() if v is not None}
        if len(given) > 1:
            raise UsageError(
                f"budget: exactly one of keep, rank, total_rank, energy, error, threshold may be set, found {', '.join(given)}."
            )
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"budget.{name}: expected a number, found {value!r}.")
            if name in ("keep", "energy") and not 0 < value <= 1:
                raise UsageError(f"budget.{name}: expected a share in (0, 1], found {value!r}.")
            if name == "error" and not 0 <= value < 1:
                raise UsageError(f"budget.error: expected a relative error in [0, 1), found {value!r}.")
            if name in ("rank", "total_rank") and (value <= 0 or (isinstance(value, float) and name == "rank" and value >= 1)):
                raise UsageError(f"budget.{name}: expected an integer of at least 1, or a share in (0, 1), found {value!r}.")

    @property
    def kind(self) -> str | None:
        """Name of the field that is set."""
        return next((k for k, v in self.__dict__.items() if v is not None), None)

    @property
    def value(self) -> float:
        """Value of the field that is set."""
        return next(v for v in self.__dict__.values() if v is not None)


class StatsView(Protocol):
    """Statistics as axes see them. A missing one raises Refused with the site's name."""

    def get(self, stat: Stat, site: Site) -> Any: ...


@runtime_checkable
class Axis(Protocol):
    """Every choice on every axis: what it needs measured, which tags it takes from the other axes, which it gives."""

    @property
    def needs(self) -> frozenset[Stat]: ...
    @property
    def takes(self) -> frozenset[str]: ...
    @property
    def gives(self) -> frozenset[str]: ...


Read = Callable[[Site], "Tensor"]
Bundles = tuple[list[Bundle], Mapping[str, str]]
"""Bundles, and the reason for every site that is in none."""


@dataclass(frozen=True)
class World:
    """What a group may look at beside the sites.

    Args:
        read: site -> W (out, in).
        budget: of the run.
        shapes: of every tensor of the source, by key.
        config: the model's `config.json`, empty for a plain module.
    """

    read: Read
    budget: Budget
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


class Target(Axis, Protocol):
    """Which tensors, seen as which matrices."""

    def sites(self, catalogue: Catalogue) -> tuple[Sequence[Site], Mapping[str, str]]:
        """The sites to change, and the reason for every linear that is left alone."""
        ...


class Group(Axis, Protocol):
    """Which sites are solved together."""

    def bundles(self, sites: Sequence[Site], world: World) -> Bundles: ...


class Source(Axis, Protocol):
    """Which matrix is factorised."""

    def operator(self, bundle: Bundle, read: Read, stats: StatsView) -> Any: ...


class Metric(Axis, Protocol):
    """In what sense the approximation is best."""

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[Any | None, Any | None]:
        """(out, in): `linalg.weighted.Weight` or None."""
        ...

    def repair(self, bundle: Bundle, stats: StatsView) -> tuple[Tensor, ...] | None:
        """Mean of the input of each site when the mean of the output is to be repaired through the bias, else None."""
        ...


class Factor(Axis, Protocol):
    """How the matrix is factorised."""

    def factorise(self, op: Any, sides: tuple[Any | None, Any | None], cap: int, algorithm: str, seed: int) -> Parts: ...


class Filter(Axis, Protocol):
    """Which triples of a matrix are kept."""

    def cap(self, rank: int, full: int) -> int: ...
    def split(self, parts: Parts, rank: int) -> tuple[Parts, Parts]: ...


class Score(Axis, Protocol):
    """The value of each rank, comparable over bundles."""

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]: ...


@dataclass(frozen=True)
class Cost:
    """What a bundle costs, in parameters: `dense` as it is, `fixed + per_rank * r` as r triples; and where it stands in the model.

    Args:
        dense, per_rank, fixed: parameters.
        full: largest rank.
        role: part of a block that it is ("q_proj"): allocations that compare like with like go by it.
        block: index of its repeated block, -1 outside.
    """

    dense: int
    per_rank: int
    full: int
    fixed: int = 0
    role: str = ""
    block: int = -1

    def at(self, rank: int | None) -> int:
        """Stored parameters at a rank; None is dense."""
        return self.dense if rank is None else self.fixed + self.per_rank * rank

    @property
    def break_even(self) -> int:
        """Largest rank that stores fewer parameters than the dense matrix."""
        return max(0, min(self.full, (self.dense - self.fixed - 1) // self.per_rank))


class Allocate(Axis, Protocol):
    """Across matrices: a rank for each, None for those that stay dense."""

    @property
    def decides(self) -> Decides: ...

    def __call__(self, curves: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], budget: Budget) -> Mapping[str, int | None]: ...


@dataclass(frozen=True)
class Made:
    """A tensor that a form will write.

    Args:
        dtype: safetensors name.
        shape: its shape.
        sources: keys of the source that go into it.
    """

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What becomes of a bundle's tensors, known from shapes and the rank.

    Args:
        tensors: key -> what will be written under it.
        gone: key of the source -> why it is not there afterwards.
    """

    tensors: Mapping[str, Made]
    gone: Mapping[str, str] = field(default_factory=dict)


Ranked = Sequence[tuple[Bundle, int]]


class Form(Axis, Protocol):
    """Which tensors exist afterwards, with which values. The one answer to "stored size"."""

    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def uses_rest(self) -> bool: ...
    def cost(self, bundle: Bundle) -> Cost: ...
    def build(self, kept: Parts, rest: Parts | None, bundle: Bundle, read_bias: Callable[[str], Tensor], seed: int) -> Edits: ...


class Stored(Form, Protocol):
    """A form whose result is a checkpoint or a model by itself: all forms of `compress`."""

    @property
    def layout(self) -> str: ...

    def outcome(self, bundle: Bundle, rank: int, adds_bias: bool) -> Outcome:
        """The tensors of this bundle at this rank, before any work."""
        ...

    def apply(self, model: Any, bundle: Bundle, edits: Edits) -> None:
        """Put the edits of a bundle into a model in memory."""
        ...

    def config_of(
        self, done: Ranked, adds_bias: bool, config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """(tables of `quantization_config`, empty when the plain class loads the result; other keys of `config.json` that change).

        Args:
            done: bundles that are not left as they were, with their ranks.
            adds_bias: whether layers without a bias got one.
            config: `config.json` as it was.
            records: of the bundles, by name.
        """
        ...


class Refine(Axis, Protocol):
    """After the cut; may call `again` to factorise once more."""

    @property
    def rounds(self) -> int: ...

    def __call__(self, edits: Edits, bundle: Bundle, read: Read, stats: StatsView, again: Callable[[Any], Edits]) -> Edits: ...
