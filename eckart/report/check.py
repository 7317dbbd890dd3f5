"""Is a dict a report? The types in `schema` say what one looks like; here they are walked, and what they cannot say is checked."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NotRequired, TypeGuard, cast

from ..errors import Refused, did_you_mean
from .schema import FORMAT, SPECTRUM_POINTS, Layer, Report


def check(report: Mapping[str, Any]) -> Report:
    """Refuse a dict that is not a report; return it unchanged otherwise. It does not check that the numbers are true.

    Args:
        report: what a verb produced, or `json.load` of a `report.json`.

    Returns:
        The same object, typed.

    Raises:
        Refused: the first thing that is wrong, with its path inside the report ("layers[3].rank"), what was expected and what was found.

    Example:
        >>> check({"format": 1})
        Traceback (most recent call last):
        ...
        eckart.errors.Refused: report.kind: missing. A report needs format, kind, layers, model, title, verdict.
    """
    if not isinstance(report, Mapping):
        raise Refused(f"report: expected a dict, found {type(report).__name__}.")
    if "format" in report and report["format"] != FORMAT:
        raise Refused(
            f"report.format: this version of eckart reads format {FORMAT}, found {report['format']!r}. Write the report again with it."
        )
    _walk(report, Report, "report")
    checked = cast(Report, report)
    names: set[str] = set()
    for i, layer in enumerate(checked["layers"]):
        _layer(layer, f"report.layers[{i}] ({layer['name']!r})")
        if layer["name"] in names:
            raise Refused(f"report.layers[{i}].name: {layer['name']!r} is there twice; one entry per matrix is expected.")
        names.add(layer["name"])
    for i, table in enumerate(checked.get("tables", [])):
        for j, row in enumerate(table["rows"]):
            if len(row) != len(table["columns"]):
                raise Refused(f"report.tables[{i}].rows[{j}]: expected {len(table['columns'])} cells, one per column, found {len(row)}.")
    for i, curve in enumerate(checked.get("curves", [])):
        for j, series in enumerate(curve["series"]):
            if not series["points"] or any(len(p) != 2 for p in series["points"]):
                raise Refused(f"report.curves[{i}].series[{j}].points: expected a non-empty list of [x, y] pairs.")
    known = [c["key"] for c in checked.get("columns", [])]
    if len(set(known)) < len(known):
        raise Refused(f"report.columns: every key is there once, found {sorted(k for k in set(known) if known.count(k) > 1)} more often.")
    for i, depth in enumerate(checked.get("depth", [])):
        if not any(p["value"] is not None for trace in depth["traces"] for p in trace["points"]):
            raise Refused(f"report.depth[{i}] ({depth['key']!r}): expected at least one number.")
    for i, profile in enumerate(checked.get("profiles", [])):
        for j, line in enumerate(profile["lines"]):
            at = line["at"]
            if not at or len(at) != len(line["values"]) or at[0] < 1 or any(b <= a for a, b in pairwise(at)):
                raise Refused(f"report.profiles[{i}].lines[{j}]: expected as many increasing places, from 1 on, as values; found {at!r}.")
    for i, note in enumerate(checked.get("notes", [])):
        if note.get("href") and not is_web(str(note.get("href"))):
            raise Refused(f"report.notes[{i}].href: expected an address that starts with https:// or http://, found {note.get('href')!r}.")
    return checked


def is_web(address: str) -> TypeGuard[str]:
    """Is this a plain web address, with nothing in it that a browser would run?"""
    return address.startswith(("https://", "http://")) and not any(c.isspace() or ord(c) < 32 for c in address)


def _layer(layer: Layer, at: str) -> None:
    if len(layer["shape"]) != 2 or min(layer["shape"]) < (layer["state"] != "skipped"):
        raise Refused(f"{at}.shape: expected two positive sizes (out, in), found {layer['shape']!r}.")
    full, rank = min(layer["shape"]), layer["rank"]
    if rank is not None and not 0 <= rank <= full:
        raise Refused(f"{at}.rank: expected 0 to {full} for shape {layer['shape']}, found {rank}.")
    if layer["state"] == "factored" and rank is None:
        raise Refused(f"{at}.rank: a factored layer has a rank, found null.")
    if min(layer["params_before"], layer["params_after"]) < 0:
        raise Refused(f"{at}: a number of parameters is negative.")
    if layer["block"] < -1:
        raise Refused(f"{at}.block: expected a block index, or -1 outside the blocks, found {layer['block']}.")
    _spectrum(layer.get("spectrum", []), layer.get("spectrum_at", []), full, at)
    if other := layer.get("other"):
        _spectrum(other["spectrum"], other["spectrum_at"], full, f"{at}.other")
    if (tail := layer.get("tail")) is not None and ([len(end) for end in tail] != [2, 2] or min(map(min, tail)) <= 0):
        raise Refused(f"{at}.tail: expected two ends [index, value] with positive numbers, found {tail!r}.")
    certificate = layer.get("certificate")
    if certificate is not None and not isinstance(certificate.get("kind"), str):
        raise Refused(f"{at}.certificate.kind: expected a word such as 'free', 'spectral' or 'optimum', found {certificate.get('kind')!r}.")


def _spectrum(values: list[float], places: list[int], full: int, at: str) -> None:
    if len(values) != len(places) or len(values) > SPECTRUM_POINTS:
        raise Refused(
            f"{at}.spectrum: expected at most {SPECTRUM_POINTS} values and as many places in spectrum_at, "
            f"found {len(values)} and {len(places)}."
        )
    if places and (places[0] < 1 or places[-1] > full or any(b <= a for a, b in pairwise(places))):
        raise Refused(f"{at}.spectrum_at: expected increasing places from 1 to {full}, found {places!r}.")
    if any(v < 0 for v in values) or any(b > a * 1.0001 + 1e-30 for a, b in pairwise(values)):
        raise Refused(f"{at}.spectrum: expected singular values, descending and not negative.")


def _walk(value: Any, kind: Any, at: str) -> None:
    """Check `value` against a type made of TypedDict, list, dict, Literal, unions and scalars."""
    origin = typing.get_origin(kind)
    if kind is Any:
        _json(value, at)
    elif origin is NotRequired:
        _walk(value, typing.get_args(kind)[0], at)
    elif typing.is_typeddict(kind):
        _record(value, kind, at)
    elif origin is Literal:
        if value not in typing.get_args(kind):
            words = ", ".join(repr(w) for w in typing.get_args(kind))
            raise Refused(f"{at}: expected one of {words}, found {value!r}.")
    elif origin in (types.UnionType, typing.Union):
        _union(value, typing.get_args(kind), at)
    elif origin is list:
        if not isinstance(value, list):
            raise Refused(f"{at}: expected a list, found {_what(value)}.")
        (inner,) = typing.get_args(kind)
        if inner in _NAMES and all(_is(item, inner) for item in cast("list[Any]", value)):
            return  # spectra are most of a report
        for i, item in enumerate(cast("list[Any]", value)):
            _walk(item, inner, f"{at}[{i}]")
    elif origin is dict:
        if not isinstance(value, dict):
            raise Refused(f"{at}: expected a dict, found {_what(value)}.")
        for key, item in cast("dict[Any, Any]", value).items():
            _key(key, at)
            _walk(item, typing.get_args(kind)[1], f"{at}[{key!r}]")
    elif not _is(value, kind):
        raise Refused(f"{at}: expected {_NAMES[kind]}, found {_what(value)}.")


def _record(value: Any, kind: Any, at: str) -> None:
    if not isinstance(value, Mapping):
        raise Refused(f"{at}: expected a dict, found {_what(value)}.")
    known = _hints(kind)
    needed = sorted(kind.__required_keys__)
    for key in needed:
        if key not in value:
            raise Refused(f"{at}.{key}: missing. A {kind.__name__.lower()} needs {', '.join(needed)}.")
    for key, item in cast("Mapping[Any, Any]", value).items():
        if key not in known:
            raise Refused(f"{at}.{key}: not a key of a {kind.__name__.lower()}.{did_you_mean(str(key), sorted(known))}")
        _walk(item, known[key], f"{at}.{key}")


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _union(value: Any, kinds: tuple[Any, ...], at: str) -> None:
    if value is None and type(None) in kinds:
        return
    nested = [k for k in kinds if k not in _NAMES]
    if nested and value is not None:
        return _walk(value, nested[0], at)
    if not any(_is(value, k) for k in kinds):
        raise Refused(f"{at}: expected {' or '.join(_NAMES.get(k, 'a dict') for k in kinds)}, found {_what(value)}.")


def _json(value: Any, at: str) -> None:
    if isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            _key(key, at)
            _json(item, f"{at}[{key!r}]")
    elif isinstance(value, list):
        for i, item in enumerate(cast("list[Any]", value)):
            _json(item, f"{at}[{i}]")
    elif not any(_is(value, k) for k in _NAMES):
        raise Refused(f"{at}: expected something JSON can hold, found {_what(value)}.")


def _key(key: Any, at: str) -> None:
    if not isinstance(key, str):
        raise Refused(f"{at}: expected words as keys, found {key!r}.")


_NAMES: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    type(None): "null",
}


def _is(value: Any, kind: Any) -> bool:
    # True is an int in Python, and numpy's float64 is a float: exact types keep report.json what it says it is.
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _what(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
