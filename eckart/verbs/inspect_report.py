"""Records as the page shows them: matrices, charts by depth, facts, the methods behind them, and a verdict."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..axes.protocols import Site
from ..measures.base import Measure, Record
from .host import Host
from .inspect_columns import cells, columns, key_of, lists, names_of, plotted, profiles, remark, title_of
from .inspect_run import Found
from .inspect_verdict import verdict
from .output import versions

TRACES = 8  # lines in a chart by depth
BY_DEPTH = ("pair", "text", "model")  # what is drawn by depth even where it belongs to matrices
EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe|emb)($|[._])")


def inspect_report(
    host: Host, sites: Sequence[Site], chosen: Sequence[Measure], found: Found, *, other: Host | None, command: str, advice: dict[str, Any] | None, timings: Mapping[str, float]
) -> dict[str, Any]:  # fmt: skip
    """The report of a run as plain data, see `eckart.report.schema.Report`."""
    chosen = sorted(chosen, key=lambda m: m.reads != "pair")  # what compares comes first
    known = {m.name: m for m in chosen}
    by_site: dict[str, list[Record]] = {s.name: [] for s in sites}
    rest: list[Record] = []
    for record in found.records:
        by_site.get(record.module, rest).append(record)
    shown = columns([r for rs in by_site.values() for r in rs], chosen)
    layers = [_layer(s, by_site[s.name], known, found.spectra.get(s.name)) for s in sites]
    blocks = list(host.catalogue.blocks)
    depth = [*_depth_of_blocks(rest, blocks, known), *_depth_of_sites(sites, layers, shown, known)]
    seen: set[tuple[str, int]] = set()
    for chart in depth:  # the first number of a measure, of blocks and by role
        kind = chart["measure"], len(chart["traces"])
        chart["main"] = kind not in seen
        seen.add(kind)
    outside = [r for r in rest if _place(r.module, blocks) is None]
    warnings = _warnings(host, other, sites, by_site, known)
    report: dict[str, Any] = {
        "format": 1, "kind": "inspect", "title": f"{host.name} · spectra" if other is None else f"{host.name} beside {other.name}",
        "verdict": verdict(host, other, layers, chosen, found.records, advice), "model": model_of(host), "layers": layers, "columns": shown,
        "methods": [_method(m, [r for r in found.records if r.measure == m.name]) for m in chosen], "depth": depth,
        "facts": [f for r in outside for f in _facts(r, known.get(r.measure))], "curves": [c for r in outside for c in _curves(r, known.get(r.measure))], "profiles": _profiles(found.records, {s.name: s for s in sites}, blocks, known),
        "warnings": warnings, "versions": versions(), "timings": {k: round(v, 2) for k, v in timings.items()}, "command": command or None,
    }  # fmt: skip
    return report | ({"other": model_of(other)} if other is not None else {}) | ({"advice": advice} if advice else {})


def model_of(host: Host) -> dict[str, Any]:
    """The model in the words of a report."""
    return {"name": host.name, "path": str(host.path or host.name), "parameters": host.parameters(), "bytes": host.reader.nbytes}


def _layer(site: Site, records: Sequence[Record], known: Mapping[str, Measure], other: dict[str, Any] | None) -> dict[str, Any]:
    size = site.shape[0] * site.shape[1]
    row: dict[str, Any] = {
        "name": site.name, "block": site.block, "role": site.role, "shape": list(site.shape), "rank": None, "state": "dense", "reason": "",
        "params_before": size, "params_after": size,
    }  # fmt: skip
    if records and not any(r.valid for r in records):
        row |= {"state": "skipped", "reason": Counter(r.note for r in records).most_common(1)[0][0]}
    numbers: dict[str, Any] = {}
    extra: dict[str, dict[str, Any]] = {"spread": {}, "doubt": {}, "remarks": {}, "lists": {}}
    for record in records:
        if record.measure == "spectrum":
            row |= record.value if record.valid else {}
            continue
        note = remark(record, known.get(record.measure))
        if not record.valid:
            extra["doubt"][record.measure] = note or "not valid"
        elif note:
            extra["remarks"][record.measure] = note
        for cell in cells(record):
            key = key_of(record.measure, cell.part)
            numbers[key] = cell.value
            if cell.spread is not None:
                extra["spread"][key] = cell.spread
        extra["lists"] |= {key_of(record.measure, part): values for part, values in lists(record).items()}
        row |= _marks(record)
    row |= {k: v for k, v in extra.items() if v} | {"measures": numbers or None}
    return row | ({"other": other} if other else {})


def _marks(record: Record) -> dict[str, Any]:
    """What is drawn into the spectrum of a matrix: the edge of the noise, and a fitted tail, where they are valid."""
    if not record.valid:
        return {}
    if record.measure == "bulk_edge" and isinstance(record.value, Mapping) and record.value.get("edge"):
        return {"edge": float(record.value["edge"]), "outliers": int(record.value.get("outliers", 0))}
    alpha, xmin, count = record.value, record.settings.get("xmin"), record.settings.get("tail")
    if record.measure == "alpha" and xmin and count and isinstance(alpha, float) and alpha > 1:
        # shares i/count above a value x of a density x^-alpha: x = xmin (i/count)^(-1/(alpha - 1)), on squared singular values
        return {"tail": [[1.0, math.sqrt(xmin) * count ** (0.5 / (alpha - 1))], [float(count), math.sqrt(xmin)]]}
    return {}


def _place(module: str, blocks: Sequence[str]) -> tuple[int, str] | None:
    """Where a module stands in the depth of the model: its block and its name within it; -1 for an embedding, None elsewhere."""
    for i, block in enumerate(blocks):
        if module == block or module.startswith(block + "."):
            return i, module[len(block) + 1 :]
    return (-1, "") if module and EMBEDDING.search(module) else None


def _depth_of_blocks(records: Iterable[Record], blocks: Sequence[str], known: Mapping[str, Measure]) -> list[dict[str, Any]]:
    """A chart per number that blocks, or the same part of each block, have."""
    charts: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        place = _place(record.module, blocks)
        if place is None:
            continue
        note = remark(record, known.get(record.measure))
        for cell in cells(record):
            doubt = {} if record.valid else {"doubt": note or "not valid"}
            spread = {} if cell.spread is None else {"spread": cell.spread}
            points = charts.setdefault((record.measure, cell.part), {}).setdefault(place[1] or "block", [])
            points.append({"block": place[0], "value": cell.value} | spread | doubt)
    return [
        _chart(measure, part, known, [{"name": name, "points": sorted(p, key=lambda p: p["block"])} for name, p in traces.items()][:TRACES])
        for (measure, part), traces in charts.items()
        if any(p["value"] is not None for points in traces.values() for p in points)
    ]


def _profiles(
    records: Iterable[Record], sites: Mapping[str, Site], blocks: Sequence[str], known: Mapping[str, Measure]
) -> list[dict[str, Any]]:
    """Descending lists by what they are of: a panel per list and role."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if not record.valid or record.measure == "spectrum":
            continue
        site = sites.get(record.module)
        place = (site.block, site.role) if site is not None else _place(record.module, blocks) or (-1, record.module)
        for part, (at, values) in profiles(record).items():
            name = f"{title_of(record.measure, part)}{f' of {place[1]}' if place[1] and site is not None else ''}"
            line = {"module": record.module, "block": place[0], "at": at, "values": values}
            panels.setdefault((record.measure, name), []).append(line)
    return [
        {"key": f"{measure}/{name}", "measure": measure, "title": name, "lines": sorted(lines, key=lambda x: x["block"])}
        for (measure, name), lines in panels.items()
        if any(v > 0 for line in lines for v in line["values"])
    ]


def _depth_of_sites(
    sites: Sequence[Site], layers: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]], known: Mapping[str, Measure]
) -> list[dict[str, Any]]:
    """A chart per main column of what compares or runs: a line per role, the mean where a block has several."""
    charts: list[dict[str, Any]] = []
    for column in shown:
        measure = known.get(column["measure"])
        if measure is None or measure.reads not in BY_DEPTH or not column["main"]:
            continue
        traces: dict[str, dict[int, list[float]]] = {}
        for site, layer in zip(sites, layers, strict=True):
            value = (layer["measures"] or {}).get(column["key"])
            if site.block >= 0 and value is not None and column["measure"] not in layer.get("doubt", {}):
                traces.setdefault(site.role, {}).setdefault(site.block, []).append(value)
        lines = [
            {"name": role, "points": [{"block": b, "value": sum(v) / len(v)} for b, v in sorted(at.items())]} for role, at in traces.items()
        ]
        if lines:
            charts.append(_chart(column["measure"], column["key"].removeprefix(column["measure"]).lstrip("."), known, lines[:TRACES]))
    return charts


def _chart(measure: str, part: str, known: Mapping[str, Measure], traces: list[dict[str, Any]]) -> dict[str, Any]:
    unit = known[measure].unit if measure in known and not part else ""  # of the parts of a value each may have its own
    chart: dict[str, Any] = {"key": key_of(measure, part), "measure": measure, "title": title_of(measure, part), "traces": traces}
    return chart | ({"unit": unit} if unit else {})


def _facts(record: Record, measure: Measure | None) -> list[dict[str, Any]]:
    """The numbers of a record that belongs to no matrix and no block."""
    note = remark(record, measure)
    extra = ({"note": note} if note else {}) if record.valid else {"doubt": note or "not valid"}
    found = cells(record)
    base = {"module": record.module, "measure": record.measure}
    short = [
        base | {"part": part, "value": ", ".join("none" if v is None else f"{v:.3g}" for v in values)} | extra
        for part, values in _short_lists(record)
    ]
    if not found:
        return short or ([base | {"part": "", "value": None} | extra] if not record.valid else [])
    return [base | {"part": c.part, "value": c.value} | extra | ({} if c.spread is None else {"spread": c.spread}) for c in found] + short


def _short_lists(record: Record) -> list[tuple[str, list[Any]]]:
    """Lists of a few numbers that have no names: they are written out."""
    pairs = record.value.items() if isinstance(record.value, Mapping) else [("", record.value)]
    few = [(str(k), list(v)) for k, v in pairs if isinstance(v, list | tuple) and 0 < len(v) <= 8 and not names_of(v, record.settings)]
    return [(k, v) for k, v in few if all(isinstance(x, int | float) or x is None for x in v)]


def _curves(record: Record, measure: Measure | None) -> list[dict[str, Any]]:
    """A record of the whole model whose mapping holds lists of equal length: the first one across, the others up."""
    if record.module or not record.valid:
        return []
    title = measure.title if measure is not None else record.measure
    note = f"How: {record.estimator}." + (f" Mind: {record.note}." if record.note else "")
    out: list[dict[str, Any]] = []
    for part, (at, values) in plotted(record).items():
        if part not in profiles(record) and at:
            name = part.replace("_", " ")
            series = {"name": name, "points": [[float(a), v] for a, v in zip(at, values, strict=True)]}
            out.append({"title": f"{title}: {name}", "x": "value", "y": name, "series": [series], "note": note})
    found = lists(record)
    (x, across), *others = found.items() if len(found) > 1 else [("", [])]
    drawn = {
        n: [[float(a), float(b)] for a, b in zip(across, up, strict=True) if a is not None and b is not None]
        for n, up in others
        if len(up) == len(across) and all(a < b for a, b in pairwise(v for v in across if v is not None))
    }
    several: list[dict[str, Any]] = [{"name": name.replace("_", " "), "points": points} for name, points in drawn.items() if points]
    up = several[0]["name"] if len(several) == 1 else measure.unit if measure is not None and measure.unit else "value"
    return [*out, {"title": title, "x": x.replace("_", " "), "y": up, "series": several, "note": note}] if several else out


def _method(measure: Measure, records: Sequence[Record]) -> dict[str, Any]:
    wrong = [r for r in records if not r.valid]
    texts: dict[str, list[str]] = {}
    for record in wrong:  # "12 values are NaN" and "3 values are NaN" are one reason
        why = remark(record, measure) or "not valid"
        texts.setdefault(re.sub(r"\d[\d.]*", "#", why), []).append(why)
    reasons = sorted(texts.values(), key=len, reverse=True)[:3]
    return {
        "name": measure.name, "title": measure.title, "paper": measure.paper, "estimator": measure.estimator, "note": measure.note,
        "settings": ", ".join(f"{k} = {_plain(v)}" for k, v in measure.settings.items()), "fidelity": measure.fidelity, "differs": measure.differs, "unit": measure.unit,
        "valid": len(records) - len(wrong), "invalid": len(wrong), "reasons": [_often(of) for of in reasons],
    }  # fmt: skip


def _often(reasons: Sequence[str]) -> str:
    """The first of some reasons, and how many are like it."""
    if len(set(reasons)) == 1:
        return f"{reasons[0]} ({len(reasons)})" if len(reasons) > 1 else reasons[0]
    return f"{reasons[0]} (and {len(reasons) - 1} alike)"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _warnings(
    host: Host, other: Host | None, sites: Sequence[Site], by_site: Mapping[str, Sequence[Record]], known: Mapping[str, Measure]
) -> list[str]:
    out = list(dict.fromkeys(r for h in (host, other) if h is not None and (r := getattr(h, "remark", ""))))
    missing = [f"{name} ({why})" for name, why in host.catalogue.notes.items() if "checkpoint" in why]
    if missing:
        out.append(f"Not in the checkpoint: {few(missing)}.")
    reasons: dict[str, list[str]] = {}
    for site in sites:
        own = [r for r in by_site[site.name] if r.measure in known and known[r.measure].reads in ("spectrum", "weight")]
        why = {r.note for r in own}
        if len(why) == 1 and all(r.value is None for r in own):
            reasons.setdefault(why.pop(), []).append(site.name)
    out += [f"Not measured, {why}: {few(names)}." for why, names in reasons.items()]
    if other is not None:
        theirs = {s.name.split(".", 1)[-1] for s in sites} | {s.name for s in sites}
        alone = [
            s.name for s in other.catalogue.sites if s.kind == "linear" and s.name not in theirs and s.name.split(".", 1)[-1] not in theirs
        ]
        out += [f"Only in {other.name}, hence not compared: {few(alone)}."] if alone else []
    return out


def few(names: Sequence[str], most: int = 3) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
