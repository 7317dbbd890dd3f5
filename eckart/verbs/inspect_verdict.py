"""The first words of a report: what was found, in sentences that anybody can read, and what it does not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..measures.base import Measure, Record
from .advise import evidence
from .host import Host

Layers = Sequence[Mapping[str, Any]]
SHARE = "60%"  # of the parameters, for the first sentence
NEAR, FAR = 0.1, 0.35  # relative error of that cut below which weights are called close to low rank, and above which far from it


def verdict(
    host: Host, other: Host | None, layers: Layers, chosen: Sequence[Measure], records: Sequence[Record], advice: Mapping[str, Any] | None
) -> list[str]:
    """Sentences, the most important one first.

    Args:
        host: the model.
        other: what it was compared with.
        layers: the matrices of the report.
        chosen: the measures of the run.
        records: what they found.
        advice: suggestions, where some were asked for.
    """
    names = {m.name for m in chosen}
    out = [*(_changes(layers, host, other) if other is not None else ()), *_room(layers), _counts(host, other, layers)]
    out += _advised(advice) if advice is not None else []
    out += _ranks(layers)
    out += _tails(layers, names)
    doubtful = sum(not r.valid and r.value is not None for r in records)
    if doubtful:
        out.append(f"{doubtful:,} of {len(records):,} results are marked as not valid: their numbers are shown, and mean nothing.")
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


def _room(layers: Layers) -> Iterator[str]:
    """What plain truncation would do, in the measure of the weights themselves."""
    found = sorted((v, x["name"]) for x, v in _values(layers, f"compressibility.{SHARE}"))
    if not found:
        return
    middle = found[len(found) // 2][0]
    word = "close to" if middle < NEAR else "far from" if middle > FAR else "neither close to nor far from"
    text = f"The weights are {word} low rank: cut to {SHARE} of its parameters by plain SVD, "
    if len(found) == 1:
        yield f"{text}the matrix would change by {middle:.0%} of its size."
    else:
        (low, least), (high, most) = found[0], found[-1]
        yield f"{text}a typical matrix would change by {middle:.0%} of its size ({low:.0%} in {least}, {high:.0%} in {most})."


def _ranks(layers: Layers) -> Iterator[str]:
    shares = sorted((v / min(x["shape"]), x["name"]) for x, v in _values(layers, "effective_rank"))
    if shares:
        (low, least), (high, most) = shares[0], shares[-1]
        middle = shares[len(shares) // 2][0]
        span = "" if len(shares) == 1 else f": {low:.0%} in {least}, {high:.0%} in {most}"
        yield f"Effective rank: singular values are spread over {middle:.0%} of the possible directions in a typical matrix{span}."


def _tails(layers: Layers, names: set[str]) -> Iterator[str]:
    found = _values(layers, "alpha")
    if "alpha" not in names:
        return
    inside = sum(2 <= v <= 6 for _, v in found)
    unsure = sum("alpha" in (x.get("doubt") or {}) for x in layers)
    if found:
        text = f"{inside:,} of {len(found):,} power-law tails have an exponent between 2 and 6, which WeightWatcher reads as well trained"
        yield (f"{text}; {unsure:,} further matrices have no such tail." if unsure else f"{text}.") + _hollow("alpha")
    elif unsure:
        yield f"No matrix has a tail that a power law fits ({unsure:,} fits are marked as not valid)."


def _hollow(column: str) -> str:
    """That a famous number said nothing about the loss of a cut, where the bench found so."""
    row = evidence()["targets"].get("svd_llm", {}).get("columns", {}).get(column, {})
    return " On the models of the bench that number did not tell what a cut costs." if row.get("verdict") in ("nothing", "opposite") else ""


def _changes(layers: Layers, host: Host, other: Host) -> Iterator[str]:
    """How far the weights moved, and whether their leading directions are new."""
    found = sorted((v, x["name"]) for x, v in _values(layers, "relative_change.frobenius"))
    if found:
        (low, least), (high, most) = found[0], found[-1]
        if high == 0:
            yield "Not one of the compared weights differs."
            return
        text = f"{other.name} differs from {host.name} most in {most}, by {_percent(high)} of its size"
        yield f"{text}." if len(found) == 1 else f"{text}, and least in {least} ({_percent(low)})."
    counts = _values(layers, "intruder.count")
    new = [x["name"] for x, v in counts if v > 0]
    if new:
        few = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        yield f"{len(new):,} of {len(counts):,} matrices gained leading directions that the base does not have (intruders): {few}."
    elif counts:
        yield f"None of {len(counts):,} matrices gained a leading direction that the base does not have (intruders)."
    shares = sorted(v / min(x["shape"]) for x, v in _values(layers, "weight_change.effective_rank"))
    if shares:
        yield f"The change itself is spread over {shares[len(shares) // 2]:.0%} of the possible directions in a typical matrix."


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 1 else f"{share:.0%}"


def _advised(advice: Mapping[str, Any]) -> Iterator[str]:
    """The first suggestion of each action, or that there is none."""
    first: dict[str, str] = {}
    for s in advice["suggestions"]:
        first.setdefault(s["action"], s["module"])
    if first:
        words = "; ".join(f"{action} {name}" for action, name in first.items())
        yield f"First suggestions: {words}. What they rest on is said with them."
    else:
        yield "No suggestion is made: nothing that was measured here is known to predict its outcome."


def _values(layers: Layers, key: str) -> list[tuple[Mapping[str, Any], float]]:
    """Matrices with a valid number in a column."""
    measure = key.partition(".")[0]
    pairs = [(x, (x["measures"] or {}).get(key)) for x in layers if measure not in (x.get("doubt") or {})]
    return [(x, v) for x, v in pairs if v is not None]
