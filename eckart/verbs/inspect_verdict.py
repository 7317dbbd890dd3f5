"""The first words of a report: what was found, in sentences that anybody can read, and what it does not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..measures.base import Measure, Record
from .host import Host

Layers = Sequence[Mapping[str, Any]]


def verdict(host: Host, other: Host | None, layers: Layers, chosen: Sequence[Measure], records: Sequence[Record]) -> list[str]:
    """Sentences, the most important one first.

    Args:
        host: the model.
        other: what it was compared with.
        layers: the matrices of the report.
        chosen: the measures of the run.
        records: what they found.
    """
    names = {m.name for m in chosen}
    out = [_counts(host, other, layers)]
    out += _changes(layers) if other is not None else []
    out += _ranks(layers)
    out += _tails(layers, names)
    doubtful = sum(not r.valid and r.value is not None for r in records)
    if doubtful:
        out.append(f"{doubtful:,} of {len(records):,} numbers are marked as not valid: they are shown, and are no results.")
    if not names & {m.name for m in chosen if m.reads in ("text", "model")}:
        out.append("Weights alone do not say what a cut costs: inputs decide. Calibration text (--calib) measures them too.")
    return out


def _counts(host: Host, other: Host | None, layers: Layers) -> str:
    held, total = sum(x["params_before"] for x in layers), max(1, host.parameters())
    skipped = sum(x["state"] == "skipped" for x in layers)
    share = f"{len(layers):,} {'matrix holds' if len(layers) == 1 else 'matrices hold'} {held / total:.1%} of {total:,} parameters"
    if other is not None:
        share += f"; each was compared with the one of the same name in {other.name}"
    if skipped == len(layers):
        return f"{share}, and none of them could be measured."
    return f"{share}." if not skipped else f"{share}; {skipped:,} of them could not be measured."


def _ranks(layers: Layers) -> Iterator[str]:
    found = _values(layers, "effective_rank")
    shares = sorted((v / min(x["shape"]), x["name"]) for x, v in found)
    if shares:
        (low, least), (high, most) = shares[0], shares[-1]
        middle = shares[len(shares) // 2][0]
        yield f"Singular values are spread over {middle:.0%} of the possible rank in the middle matrix (effective rank): {low:.0%} in {least}, {high:.0%} in {most}."


def _tails(layers: Layers, names: set[str]) -> Iterator[str]:
    found = _values(layers, "alpha")
    if "alpha" in names:
        inside = sum(2 <= v <= 6 for _, v in found)
        unsure = sum("alpha" in (x.get("doubt") or {}) for x in layers)
        if found:
            text = f"{inside:,} of {len(found):,} fitted tail exponents lie between 2 and 6, the range that is read as well trained"
            yield f"{text}; {unsure:,} further fits are no power law." if unsure else f"{text}."
        elif unsure:
            yield f"No matrix has a tail that a power law fits ({unsure:,} fits are marked as not valid)."


def _changes(layers: Layers) -> Iterator[str]:
    """How far the weights moved, by the first column of relative change that there is."""
    keys = [k for x in layers for k in (x["measures"] or {}) if "relative" in k]
    found = _values(layers, keys[0]) if keys else []
    if found:
        ordered = sorted(found, key=lambda p: p[1])
        (least, low), (most, high) = ordered[0], ordered[-1]
        if high == 0:
            yield "Not one of the compared weights differs."
        else:
            yield f"The largest relative change of a weight is {high:.2g} ({most['name']}), the smallest {low:.2g} ({least['name']})."


def _values(layers: Layers, key: str) -> list[tuple[Mapping[str, Any], float]]:
    """Matrices with a valid number in a column."""
    measure = key.partition(".")[0]
    pairs = [(x, (x["measures"] or {}).get(key)) for x in layers if measure not in (x.get("doubt") or {})]
    return [(x, v) for x, v in pairs if v is not None]
