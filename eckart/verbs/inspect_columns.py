"""Records as columns: a value that is a list or a mapping becomes several numbers, each with a name of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measures.base import Measure, Record

MAIN = 7  # columns of a table before anybody asks for more
LIST = 64  # values of a list that are kept for plots
PROFILE = 32  # and of a list whose places are known


@dataclass(frozen=True)
class Cell:
    """One number of a record.

    Args:
        part: its name within the record; "" when the record is one number.
        value: None where it is not finite.
        spread: its standard error.
    """

    part: str
    value: float | int | None
    spread: float | None = None


def cells(record: Record) -> list[Cell]:
    """The numbers of a record, in its own order. A list counts only where a setting of equal length names its entries.

    Example:
        >>> from eckart.measures.base import Record
        >>> cells(Record("a", "energy_ranks", [3, 9], "", settings={"shares": (0.5, 0.9)}))
        [Cell(part='50%', value=3, spread=None), Cell(part='90%', value=9, spread=None)]
        >>> cells(Record("a", "m", {"low": 1.0, "deep": {"er": 2}}, "", uncertainty={"low": 0.5}))
        [Cell(part='low', value=1.0, spread=0.5), Cell(part='deep er', value=2, spread=None)]
    """
    return list(_cells(record.value, record.uncertainty, record.settings, ""))


def _cells(value: Any, spread: Any, settings: Mapping[str, Any], at: str) -> Iterator[Cell]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _cells(inner, spread.get(key) if isinstance(spread, Mapping) else None, settings, f"{at} {key}".strip())
    elif isinstance(value, list | tuple):
        names = names_of(value, settings)
        spreads = spread if isinstance(spread, list | tuple) and len(spread) == len(value) else [None] * len(value)
        for name, inner, s in zip(names, value, spreads, strict=True) if names else ():
            yield from _cells(inner, s, settings, f"{at} {name}".strip())
    elif isinstance(value, int | float):
        yield Cell(at, _finite(value), _finite(spread) if isinstance(spread, int | float) else None)


def names_of(values: Sequence[Any], settings: Mapping[str, Any]) -> list[str]:
    """What the entries of a list are called, by the first setting that has as many; an empty list when none has."""
    for given in settings.values():
        if isinstance(given, list | tuple) and len(given) == len(values) and len(given) <= 12:
            shares = all(isinstance(v, float) and 0 < v <= 1 for v in given)
            return [f"{100 * v:g}%" if shares else _name(v) for v in given]
    return []


def _name(value: Any) -> str:
    if isinstance(value, list | tuple) and value:
        blocks = [m[1] for v in (value[0], value[-1]) if (m := re.search(r"\.(\d+)(?:\.|$)", str(v)))]
        return " to ".join(blocks if len(blocks) == 2 else (str(value[0]), str(value[-1])))  # of modules the numbers of their blocks say it
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _finite(value: float | int) -> float | int | None:
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, int) or math.isfinite(value) else None


def lists(record: Record) -> dict[str, list[float | None]]:
    """The lists of a record that are neither columns nor profiles, thinned to 64 values, by their name within it."""
    found = {"": record.value} if isinstance(record.value, list | tuple) else record.value if isinstance(record.value, Mapping) else {}
    out: dict[str, list[float | None]] = {}
    drawn = {name for part in plotted(record) for name in (part, f"{part}_at")}
    for part, values in found.items():
        if part in drawn:
            continue
        if not isinstance(values, list | tuple) or len(values) < 3 or names_of(values, record.settings):
            continue
        if all(isinstance(v, int | float) or v is None for v in values):
            step = (len(values) - 1) / (min(LIST, len(values)) - 1)
            picked = [values[round(i * step)] for i in range(min(LIST, len(values)))]
            out[str(part)] = [None if v is None else _finite(v) for v in picked]
    return out


def plotted(record: Record) -> dict[str, tuple[list[float], list[float]]]:
    """{name: (places, values)} of the lists of a record that another list, named with "_at" behind it, gives the places of; finite numbers only."""
    value = record.value if isinstance(record.value, Mapping) else {}
    out: dict[str, tuple[list[float], list[float]]] = {}
    for part, values in value.items():
        at = value.get(f"{part}_at")
        if isinstance(values, list | tuple) and isinstance(at, list | tuple) and len(at) == len(values) > 1:
            pairs = list(zip(at, values, strict=True))
            good = [(i, float(v)) for i, v in pairs if all(isinstance(x, int | float) and math.isfinite(x) for x in (i, v))]
            out[str(part)] = [i for i, _ in good], [v for _, v in good]
    return out


def profiles(record: Record) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (places, values)} of its lists whose places are counted, 1, 2, ...: spectra. At most 32 values each.

    Example:
        >>> from eckart.measures.base import Record
        >>> profiles(Record("a", "kv", {"key": [2.0, 1.0], "key_at": [1, 7]}, ""))
        {'key': ([1, 7], [2.0, 1.0])}
    """
    out: dict[str, tuple[list[int], list[float]]] = {}
    for part, (at, values) in plotted(record).items():
        if len(at) > 1 and all(isinstance(i, int) and i >= 1 for i in at):
            picked = range(len(at)) if len(at) <= PROFILE else [round(i * (len(at) - 1) / (PROFILE - 1)) for i in range(PROFILE)]
            out[part] = [int(at[i]) for i in picked], [values[i] for i in picked]
    return out


def key_of(measure: str, part: str) -> str:
    """The key of a column.

    Example:
        >>> key_of("energy_ranks", "90%"), key_of("alpha", "")
        ('energy_ranks.90%', 'alpha')
    """
    return f"{measure}.{part}" if part else measure


def title_of(measure: str, part: str) -> str:
    """The heading of a column.

    Example:
        >>> title_of("energy_ranks", "90%")
        'energy ranks 90%'
    """
    return f"{measure} {part if part != measure else ''}".strip().replace("_", " ")


def columns(records: Sequence[Record], chosen: Sequence[Measure]) -> list[dict[str, Any]]:
    """The columns of a table of matrices: all numbers of all measures in the order of the run, with the ones to show first.

    Args:
        records: those of matrices alone.
        chosen: the measures of the run.
    """
    parts: dict[str, dict[str, None]] = {m.name: {} for m in chosen}
    listed: set[str] = set()
    for record in records:
        if record.measure == "spectrum":
            continue
        parts.setdefault(record.measure, {}).update(dict.fromkeys(c.part for c in cells(record)))
        if isinstance(record.value, list | tuple):
            listed.add(record.measure)
    units = {m.name: m.unit for m in chosen}
    first = {name: list(found)[len(found) // 2 if name in listed else 0] for name, found in parts.items() if found}
    total = sum(len(found) for found in parts.values())
    main = {(name, first[name]) for name in _spread([m for m in chosen if m.name in first])[:MAIN]}
    out: list[dict[str, Any]] = []
    for name, found in parts.items():
        for part in found:
            shown = total <= MAIN or (name, part) in main
            out.append({"key": key_of(name, part), "measure": name, "title": title_of(name, part), "main": shown})
            if units.get(name) and not part:  # of the parts of a value each may have its own
                out[-1]["unit"] = units[name]
    return out


def _spread(chosen: Sequence[Measure]) -> list[str]:
    """Names in an order that shows much of a run early: comparisons, activations, weights; of a family (alpha, alpha_hill) one first."""
    order = {"pair": 0, "text": 1, "model": 1}
    seen: dict[str, int] = {}
    keyed: list[tuple[int, int, int, str]] = []
    for i, measure in enumerate(chosen):
        family = measure.name.partition("_")[0]
        seen[family] = seen.get(family, -1) + 1
        keyed.append((seen[family], order.get(measure.reads, 2), i, measure.name))
    return [name for _, _, _, name in sorted(keyed)]


def remark(record: Record, measure: Measure | None) -> str:
    """What a record says beyond its measure's own caveat."""
    own = measure.note if measure is not None else ""
    text = record.note.removesuffix(own) if own else record.note
    return text.removesuffix("; ").strip()
