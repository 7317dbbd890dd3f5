"""Advice: which matrices to compress, keep, protect or adapt, by measures that were seen to predict it. What predicts nothing is not asked.

`evidence.json` says which measure predicted what on real models, one matrix at a time; `bench/advise.py` writes it. No constant about
a measure is in the code: another bench run, another advice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ..axes.protocols import Site
from ..measures.base import Record
from .inspect_columns import cells, key_of, title_of

MOST = 5  # suggestions of an action
LEAST = 5  # matrices below which a ranking says nothing
PER_RANK = "/rank"  # suffix of a column that is divided by min(m, n)
COUNTS = re.compile("rank|count|directions|outliers|detached")  # columns that count directions, of which a matrix has min(m, n)


@cache
def evidence() -> dict[str, Any]:
    """What each measure predicted: {"targets": {target: {"what", "low", "high", "models", "columns", "together", "tried"}}}."""
    return json.loads(resources.files("eckart.verbs").joinpath("evidence.json").read_text(encoding="utf-8"))


def rests_on(known: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the measures that predicted something that advice is given on."""
    found: dict[str, None] = {}
    for target in (known or evidence())["targets"].values():
        if target["low"] or target["high"]:
            found |= {measure_of(k): None for k, row in target["columns"].items() if row["verdict"] == "predicts"}
    return list(found)


def measure_of(key: str) -> str:
    """The measure that a column belongs to."""
    return key.removesuffix(PER_RANK).partition(".")[0]


def features(records: Sequence[Record], sites: Sequence[Site]) -> dict[str, dict[str, float]]:
    """{column: {matrix: number}} of all valid numbers about matrices; numbers of ranks also as a share of min(m, n).

    Args:
        records: of a run.
        sites: its matrices.
    """
    shapes = {s.name: s.shape for s in sites}
    out: dict[str, dict[str, float]] = {}
    for record in records:
        if not record.valid or record.module not in shapes or record.measure == "spectrum":
            continue
        for cell in cells(record):
            if cell.value is not None:
                out.setdefault(key_of(record.measure, cell.part), {})[record.module] = float(cell.value)
    for key, values in list(out.items()):
        if COUNTS.search(key) and all(0 <= v <= min(shapes[name]) for name, v in values.items()) and max(values.values()) > 1:
            out[key + PER_RANK] = {name: v / min(shapes[name]) for name, v in values.items()}
    return out


@dataclass(frozen=True)
class Judge:
    """A column that predicts, with what it saw.

    Args:
        key: the column.
        sign: +1 where large values went with large effects.
        rho: the smallest |Spearman| over the models.
        values: its numbers here, by matrix.
    """

    key: str
    sign: int
    rho: float
    values: Mapping[str, float]

    @property
    def measure(self) -> str:
        """The measure that it belongs to."""
        return measure_of(self.key)

    @property
    def title(self) -> str:
        """The column in words."""
        measure, _, part = self.key.removesuffix(PER_RANK).partition(".")
        return title_of(measure, part) + (" / full rank" if self.key.endswith(PER_RANK) else "")

    def places(self) -> dict[str, float]:
        """Mid-ranks of the values between 0 (least effect expected) and 1 (most)."""
        ordered = sorted(self.values.values())
        most = max(1, len(ordered) - 1)
        at = {v: (ordered.index(v) + len(ordered) - 1 - ordered[::-1].index(v)) / 2 / most for v in set(ordered)}
        return {name: at[v] if self.sign > 0 else 1 - at[v] for name, v in self.values.items()}

    def says(self, name: str) -> str:
        """`stable rank 3.1, 2nd lowest of 42`."""
        ordered = sorted(self.values.values())
        low, high = ordered.index(self.values[name]) + 1, ordered[::-1].index(self.values[name]) + 1
        place, word = (low, "lowest") if low <= high else (high, "highest")
        return f"{self.title} {self.values[name]:.3g}, {_nth(place)}{word} of {len(ordered)}"


def _nth(place: int) -> str:
    end = {1: "st", 2: "nd", 3: "rd"}.get(place % 10 if place % 100 not in (11, 12, 13) else 0, "th")
    return "" if place == 1 else f"{place}{end} "


def judges(target: Mapping[str, Any], found: Mapping[str, Mapping[str, float]], count: int) -> list[Judge]:
    """The columns of a run that predicted a target, the strongest of each measure, the strongest measure first."""
    best: dict[str, Judge] = {}
    for key, row in target["columns"].items():
        values = found.get(key, {})
        if row["verdict"] != "predicts" or 2 * len(values) < count or len(set(values.values())) < 2:
            continue
        judge = Judge(key, row["sign"], min(abs(r[0]) for r in row["rho"].values()), values)
        if judge.measure not in best or best[judge.measure].rho < judge.rho:
            best[judge.measure] = judge
    return sorted(best.values(), key=lambda j: (-j.rho, j.key))


def scores(chosen: Sequence[Judge]) -> dict[str, float]:
    """Expected place of each matrix, 0 (least effect) to 1 (most): the mean over the columns, weighted by their correlations."""
    sums: dict[str, tuple[float, float]] = {}
    for judge in chosen:
        for name, place in judge.places().items():
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = total + judge.rho * place, weight + judge.rho
    return {name: total / weight for name, (total, weight) in sums.items()}


def advise(records: Sequence[Record], sites: Sequence[Site], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Suggestions for a run, and what they rest on. Not a promise: the correlations are those of small models, one matrix changed at a time.

    Args:
        records: of `inspect`.
        sites: its matrices.
        known: evidence; None takes what ships with the library.

    Returns:
        `suggestions` (action, module, reason, measures; best first within an action) and `basis`, a sentence per target.
    """
    inside = [s for s in sites if s.kind == "linear" and (s.block >= 0 or all(x.block < 0 for x in sites))]
    found = {k: {n: v for n, v in values.items() if n in {s.name for s in inside}} for k, values in features(records, inside).items()}
    suggestions: list[dict[str, Any]] = []
    basis: list[str] = []
    for target in (known or evidence())["targets"].values():
        actions = [a for a in (target["low"], target["high"]) if a]
        if not actions:  # the bench measured it for comparison
            continue
        head = " and ".join(actions).capitalize()
        if len(inside) < LEAST:
            basis.append(f"{head}: no suggestion, {len(inside)} matrices are too few to rank.")
            continue
        chosen = judges(target, found, len(inside))
        if not chosen:
            basis.append(f"{head}: no suggestion. {_silence(target)}")
            continue
        expected = scores(chosen)
        order = sorted(expected, key=lambda n: (expected[n], n))
        most = max(1, min(MOST, len(order) // 5))
        for action, names in ((target["low"], order[:most]), (target["high"], order[::-1][:most])):
            suggestions += [_suggestion(action, n, chosen) for n in names] if action else []
        basis.append(f"{head}: {_basis(target, chosen)}")
    return {"suggestions": suggestions, "basis": basis}


def _suggestion(action: str, name: str, chosen: Sequence[Judge]) -> dict[str, Any]:
    heard = [j for j in chosen if name in j.values][:2]
    return {"action": action, "module": name, "reason": "; ".join(j.says(name) for j in heard), "measures": [j.measure for j in heard]}


def _basis(target: Mapping[str, Any], chosen: Sequence[Judge]) -> str:
    parts = [f"{j.title} ({_rhos(target['columns'][j.key]['rho'])})" for j in chosen[:4]]
    more = f" and {len(chosen) - 4} more" if len(chosen) > 4 else ""
    luck = max(target["columns"][j.key]["luck"] for j in chosen)
    return (
        f"ranked by {', '.join(parts)}{more}. In brackets: Spearman correlation with the {target['what']}, and its 95% interval. "
        f"The best of the {target['tried']} columns that were tried would do as well by luck in {luck:.1%} of the cases. "
        "Both models are small: check it on yours."
    )


def _rhos(found: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{model} {rho:+.2f} [{low:+.2f}, {high:+.2f}]" for model, (rho, low, high) in found.items())


def _silence(target: Mapping[str, Any]) -> str:
    """Why a target has no suggestion."""
    good = sorted({measure_of(k) for k, row in target["columns"].items() if row["verdict"] == "predicts"})
    if not good:
        return f"Not one of the {target['tried']} columns that were tried predicts the {target['what']} on both models of the bench."
    return (
        f"What predicts the {target['what']} on both models of the bench was not measured here: {', '.join(good)}. "
        "It may need calibration text: --calib FILE (calib=...)."
    )
