"""The passes of `inspect`: weights one matrix at a time, then what needs several of them, then text. All of them return records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..errors import Refused, UsageError, did_you_mean
from ..measures.base import (
    CheckpointView,
    Measure,
    ModelView,
    OfCheckpoint,
    OfModel,
    OfPair,
    OfSpectrum,
    OfText,
    OfWeight,
    PairView,
    Record,
    TextView,
    WeightView,
)
from ..progress import track
from ..registry import get_object, list_entries
from ..spectra.numbers import thin
from .host import Host, is_causal
from .inspect_source import WeightFolder, unreadable

if TYPE_CHECKING:
    from torch import Tensor

NEEDS = {
    "pair": ("compares two checkpoints", "--compare OTHER (other=...)"),
    "text": ("measures activations", "--calib FILE (calib=...)"),
    "model": ("runs the model on text", "--calib FILE (calib=...)"),
}


def choose(names: Sequence[str | Measure] | None, *, other: bool, text: bool, more: Sequence[str] = ()) -> list[Measure]:
    """The measures of a run, in the order they were asked for, or those of the registry that are meant for every run.

    Args:
        names: names, or measures of your own; None takes every measure with `default` whose input is there.
        other: whether a second checkpoint is there.
        text: whether calibration text is there.
        more: names to add where none are given, as far as their input is there.

    Raises:
        UsageError: an unknown name, or a measure whose input is missing, with the option that gives it.
    """
    known = [e.name for e in list_entries("measure")]
    have = {"spectrum": True, "weight": True, "checkpoint": True, "pair": other, "text": text, "model": text}
    if names is None:
        found: list[Measure] = [get_object(n) for n in known]
        return [m for m in found if (m.default or m.name in more) and have[m.reads]]
    if isinstance(names, str) or not names:
        raise UsageError(f"measures: expected a list of names, found {names!r}. There are: {', '.join(known)}.")
    chosen: list[Measure] = []
    for name in names:
        if isinstance(name, str) and name not in known:
            raise UsageError(f"there is no measure {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}.")
        measure: Measure = get_object(name) if isinstance(name, str) else name
        if not have[measure.reads]:
            what, option = NEEDS[measure.reads]
            raise UsageError(f"{measure.name} {what}, and there is none: give {option}.")
        if all(m.name != measure.name for m in chosen):
            chosen.append(measure)
    return chosen


@dataclass
class Found:
    """What the passes saw, beside their records.

    Args:
        records: of all measures.
        spectra: thinned spectra of the compared checkpoint, by the name in the first one.
    """

    records: list[Record] = field(default_factory=list)
    spectra: dict[str, dict[str, Any]] = field(default_factory=dict)


def of_weights(host: Host, sites: Sequence[Site], chosen: Sequence[Measure], other: Host | None, partner: Mapping[str, Site]) -> Found:
    """Measures of single weights and of pairs. In memory is one weight, or one of each checkpoint, with what was computed from it."""
    out = Found()
    alone = [m for m in chosen if isinstance(m, OfSpectrum | OfWeight)]
    pairs = [m for m in chosen if isinstance(m, OfPair)]
    overlay = other is not None and any(m.name == "spectrum" for m in alone)
    for site in track(sites if alone or pairs else (), "measuring weights"):
        records, spectrum = _one(host, site, alone, pairs, other, partner.get(site.name), overlay)  # a call: nothing outlives it
        out.records += records
        if spectrum:
            out.spectra[site.name] = spectrum
    return out


def _one(
    host: Host, site: Site, alone: Sequence[Measure], pairs: Sequence[Measure], other: Host | None, mate: Site | None, overlay: bool
) -> tuple[list[Record], dict[str, Any] | None]:
    """Records of one matrix, and its thinned spectrum in the other checkpoint."""
    view = _view(host, site)
    records = [_attempt(m, site.name, view) for m in alone]
    if other is None or not (pairs or overlay):
        return records, None
    twin = _twin(other, site, mate)
    both = view if isinstance(view, str) else twin if isinstance(twin, str) else PairView(view, twin)
    records += [_attempt(m, site.name, both) for m in pairs]
    return records, thin(twin.spectrum) if overlay and isinstance(twin, WeightView) else None


def _twin(other: Host, site: Site, mate: Site | None) -> WeightView | str:
    if mate is None:
        return f"{other.name} has no matrix of this name"
    if mate.shape != site.shape:
        return f"its shape is {_by(site.shape)}, in {other.name} {_by(mate.shape)}"
    found = _view(other, mate)
    return f"in {other.name}: {found}" if isinstance(found, str) else found


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _view(host: Host, site: Site) -> WeightView | str:
    """The weight, or why nothing can be measured of it."""
    import torch

    why = unreadable(host, site)
    if why:
        return why
    view = WeightView(site, lambda s: _real(host.read(s)))
    weight = view.weight
    if not weight.is_floating_point():
        return f"stored as {str(weight.dtype).removeprefix('torch.')}, not as real numbers"
    ends = torch.stack(torch.aminmax(weight))  # one pass, no mask: a NaN anywhere is at both ends
    if not bool(torch.isfinite(ends).all()):
        return f"{int((~torch.isfinite(weight)).sum())} of {weight.numel()} values are NaN or Inf"
    return view


def _real(weight: Tensor) -> Tensor:
    """Floats of one byte as float32, which has arithmetic; the rest as it is."""
    return weight.float() if weight.is_floating_point() and weight.dtype.itemsize == 1 else weight


def _attempt(measure: Any, name: str, view: Any) -> Record:
    if isinstance(view, str):
        return measure.missing(name, view)
    try:
        return measure.of(view)
    except Refused as error:  # of this matrix; the others go on
        return measure.missing(name, str(error))


def of_checkpoint(host: Host, sites: Sequence[Site], chosen: Sequence[Measure]) -> list[Record]:
    """Measures that need several weights; each reads them itself, one at a time, and sees only those that can be read."""
    wanted = [m for m in chosen if isinstance(m, OfCheckpoint)]
    if not wanted:
        return []
    reasons = {s.name: why for s in sites if (why := unreadable(host, s))}
    good = [s for s in sites if s.name not in reasons]
    view = CheckpointView(host.catalogue, host.read, host.reader.config, good)
    out: list[Record] = []
    for measure in track(wanted, "measuring across weights"):
        try:
            found = list(measure.compute(view))
        except Refused as error:
            found = [measure.missing("", str(error))]
        if {r.module for r in found} & {s.name for s in good}:  # it speaks of matrices: of those that it did not see too
            found += [measure.missing(name, why) for name, why in reasons.items()]
        out += found
    return out


@dataclass(frozen=True)
class Text:
    """Calibration text and how it runs.

    Args:
        texts: texts, lists of token ids, or input tensors of a plain module.
        max_length: tokens per text; None is the model's limit, at most 512.
        batch_size: texts per forward pass.
        loss: for a plain module under a measure with gradients: (output, batch) -> scalar.
        seed: of everything that draws numbers.
    """

    texts: Any
    max_length: int | None = None
    batch_size: int = 8
    loss: Any = None
    seed: int = 0


def of_text(host: Host, sites: Sequence[Site], chosen: Sequence[Measure], text: Text, other: Host | None) -> list[Record]:
    """Measures of activations, which share one pass over the text, and measures that run the live model themselves."""
    wanted: list[Any] = [m for m in chosen if isinstance(m, OfText)]
    living: list[Any] = [m for m in chosen if isinstance(m, OfModel)]
    if not wanted and not living:
        return []
    model = host.live()
    rows, count, specials = _rows(host, text)
    config, causal = host.reader.config, is_causal(model) if hasattr(model, "config") else False
    out: list[Record] = []
    if wanted:
        from ..runners.observe import observe

        seen = TextView(host.catalogue, sites, config, causal, count, text.seed, host.read, specials)
        out += observe(model, rows, seen, wanted)
    mate = other.live() if other is not None and living else None
    for measure in track(living, "running the model"):
        view = ModelView(model, host.catalogue, sites, rows, config, causal, text.loss, mate, text.seed)
        try:
            out += measure.compute(view)
        except Refused as error:
            out.append(measure.missing("", str(error)))
    for one in (host, other):
        if isinstance(one, WeightFolder):
            one.close()
    return out


def _rows(host: Host, text: Text) -> tuple[list[Any], int, tuple[int, int]]:
    """Batches in which a row is a text, the number of texts (0 for tensors), and how many special tokens stand in front and behind."""
    from ..data import batches
    from ..data.batches import encode
    from .calibrate import is_tensors, length_limit

    if is_tensors(text.texts):
        return list(text.texts), 0, (0, 0)
    tokenizer = host.tokenizer() if isinstance(text.texts[0], str) else None
    limit = length_limit(host, text.max_length)
    rows = batches(text.texts, tokenizer, max_length=limit, batch_size=text.batch_size)
    front, _, behind = encode(text.texts[0], tokenizer)
    return rows, sum(len(b.input_ids) for b in rows), (len(front), len(behind))
