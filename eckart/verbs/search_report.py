"""The report of a search as plain data: what won, by how much, and every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..axes import Recipe
from .candidates import spent
from .output import versions
from .summary import recipe_card

if TYPE_CHECKING:
    from .search import Row, Searching

LINES = 8  # candidates in the drawing


def search_report(
    run: Searching, listed: Sequence[Recipe], texts: tuple[int, int], *, unit: str = "", dense: float | None = None, winners: Mapping[float, Recipe] | None = None,
    command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The report; without `winners` that of the plan.

    Args:
        run: the candidates, as far as they came.
        listed: every candidate, those beyond the budget too.
        texts: how many statistics are from, and how many were held out.
        unit: what the loss is.
        dense: loss of the original.
        winners: the recipe of each size.
        command: the line that was typed.
    """
    host, rows = run.host, run.rows()
    report: dict[str, Any] = {
        "format": 1,
        "kind": "search",
        "title": f"{host.name} · search",
        "verdict": _verdict(run, listed, texts, unit, dense, winners),
        "model": {"name": host.name, "path": str(host.path or host.name), "parameters": host.parameters(), "bytes": host.reader.nbytes},
        "layers": [],
        "command": command or None,
        "tables": [_table(run, [r for r in rows if r.keep == size], size, unit) for size in run.sizes],
        "warnings": _warnings(run, listed, winners),
        "versions": versions(),
    }
    if winners is not None and len(run.sizes) > 1:
        report["curves"] = _curves(run, rows, unit)
    if winners is not None and len(winners) == 1:
        (recipe,) = winners.values()
        report["recipe"] = recipe_card(recipe)
        report["budget"] = {"keep": run.sizes[0]}
    return report


def _verdict(
    run: Searching, listed: Sequence[Recipe], texts: tuple[int, int], unit: str, dense: float | None, winners: Mapping[float, Recipe] | None
) -> list[str]:  # fmt: skip
    count, sizes = len(run.candidates), len(run.sizes)
    if winners is None:
        at = "" if sizes == 1 else f" at each of {sizes} sizes"
        rungs = ", then ".join(f"{r.candidates} on {r.batches}" for r in run.steps)
        return [
            f"{count} of {len(listed)} candidates would be judged on {texts[1]} texts, by statistics of {texts[0]} others.",
            f"{spent(run.steps)} evaluations{at}: {rungs} of {run.steps[-1].batches if run.steps else 0} batches.",
        ]
    out: list[str] = []
    for size in run.sizes:
        last = [r for r in run.rows() if r.keep == size and not r.why and r.rung == run.climbed]
        best = last[0]
        beside = f", {last[1].recipe} {_figure(last[1].loss)}" if len(last) > 1 else ""
        original = f" (the original: {_figure(dense)}{beside})" if run.complete else f"{beside and ' (' + beside[2:] + ')'}"
        out.append(f"At {size:.0%} {best.recipe} loses least: {_figure(best.loss)}{original}.")
    out.append(
        f"The loss is the {unit}, on {texts[1]} texts that no statistics are from. {run.evaluated} evaluations, {count} candidates, {run.climbed} of {run.rungs} rungs."
    )
    return out


def _warnings(run: Searching, listed: Sequence[Recipe], winners: Mapping[float, Recipe] | None) -> list[str]:
    out: list[str] = []
    if winners is not None:
        out.append("The least of many losses is a little too good: judge the winner on other text, `eckart eval OUT --text FILE`.")
        if not run.complete:
            out.append(
                f"It ended after {run.climbed} of {run.rungs} rungs, so that the best were compared on a part of the held-out text. --rungs {run.climbed} gives the same again."
            )
    left = listed[len(run.candidates) :]
    if left:
        out.append(f"The budget leaves {len(left)} candidates out: {', '.join(r.name for r in left)}.")
    refused = {r.recipe: r.why for r in run.rows() if r.why}
    out += [f"{name} was refused: {why}" for name, why in refused.items()]
    return out


def _table(run: Searching, rows: Sequence[Row], size: float, unit: str) -> dict[str, Any]:
    front = {(r.keep, r.recipe) for r in run.frontier()}
    return {
        "title": f"Candidates at {size:.0%}",
        "columns": ["candidate", "stored", "loss", "batches", "rung", "frontier"],
        "rows": [
            [r.recipe, round(r.stored, 4) or None, r.loss, r.batches or None, r.rung or None, "yes" if (r.keep, r.recipe) in front else ""] for r in rows
        ],
        "note": f"Loss: {unit}; comparable on one rung only. Frontier: no other candidate of the last rung, at any size, stores as little and loses as little."
        if unit else "Nothing was evaluated yet.",
    }  # fmt: skip


def _curves(run: Searching, rows: Sequence[Row], unit: str) -> list[dict[str, Any]]:
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        if row.loss is not None and row.rung == run.climbed:
            found.setdefault(row.recipe, []).append([row.stored, row.loss])
    most = sorted(found, key=lambda n: -len(found[n]))[:LINES]
    series = [{"name": name, "points": sorted(found[name])} for name in found if name in most]
    return [{"title": "Candidates of the last rung", "x": "share of the targeted parameters stored", "y": unit, "series": series}]


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.5g}"
