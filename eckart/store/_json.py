"""JSON from a stranger: bounded before it is parsed, no duplicate keys, plain values only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias, cast

from ..errors import Refused

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def parse(raw: bytes, what: str, *, nodes: int, items: int, nan: bool = False) -> Json:
    """Parse JSON bytes with bounded memory.

    Args:
        raw: the bytes; the caller has bounded their number.
        what: named in the refusal, for instance the file.
        nodes: largest number of objects and lists.
        items: largest number of commas.
        nan: accept NaN and Infinity, as Python and transformers write them.

    Raises:
        Refused: not UTF-8, not JSON, nested too deeply, too many values, or a key given twice.
    """
    # Counted on the bytes, strings included: a few megabytes of "[[[[" or "{},{}," become gigabytes of Python objects.
    if raw.count(b"{") + raw.count(b"[") > nodes:
        raise Refused(f"{what}: more than {nodes} objects and lists.")
    if raw.count(b",") > items:
        raise Refused(f"{what}: more than {items} values.")

    def pairs(found: list[tuple[str, Json]]) -> dict[str, Json]:
        result = dict(found)
        if len(result) != len(found):
            seen: set[str] = set()
            twice = next(k for k, _ in found if k in seen or seen.add(k))
            raise Refused(f"{what}: the key {short(twice)} is given twice.")
        return result

    def constant(name: str) -> float:
        if nan:
            return float(name)
        raise Refused(f"{what}: {name} is not JSON.")

    try:
        return cast("Json", json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant))
    except Refused:
        raise
    except RecursionError as err:
        raise Refused(f"{what}: nested too deeply.") from err
    except ValueError as err:
        raise Refused(f"{what}: not valid JSON ({short(str(err), 120)}).") from err


def as_dict(value: Json, what: str) -> dict[str, Json]:
    """The value if it is an object, else Refused."""
    if not isinstance(value, dict):
        raise Refused(f"{what}: expected an object, found {short(value)}.")
    return value


def as_list(value: Json, what: str) -> list[Json]:
    """The value if it is a list, else Refused."""
    if not isinstance(value, list):
        raise Refused(f"{what}: expected a list, found {short(value)}.")
    return value


def as_str(value: Json, what: str, limit: int = 4096) -> str:
    """The value if it is a string of at most `limit` characters that UTF-8 can hold, else Refused."""
    if not isinstance(value, str) or len(value) > limit or not _encodable(value):
        raise Refused(f"{what}: expected a string of at most {limit} characters, found {short(value)}.")
    return value


def as_int(value: Json, what: str, *, below: int = 1 << 63) -> int:
    """The value if it is an integer in [0, below), else Refused."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise Refused(f"{what}: expected an integer in [0, {below}), found {short(value)}.")
    return value


def dump(value: Mapping[str, object]) -> bytes:
    """The one way objects are written: sorted keys, an entry of a top-level value per line, UTF-8, NaN refused, a newline at the end."""
    # not json's own indent, which leaves the C encoder: a manifest has up to 10**5 rows
    fields: list[str] = []
    for key in sorted(value):
        entry = value[key]
        if isinstance(entry, Mapping) and entry:
            inner = cast("Mapping[str, object]", entry)
            text = "{\n  " + ",\n  ".join(f"{_text(name)}: {_text(inner[name])}" for name in sorted(inner)) + "\n }"
        elif isinstance(entry, list) and entry:
            text = "[\n  " + ",\n  ".join(map(_text, cast("list[object]", entry))) + "\n ]"
        else:
            text = _text(cast("object", entry))
        fields.append(f" {_text(key)}: {text}")
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def line(value: object) -> bytes:
    """The same values on one line, without a newline."""
    return _text(value).encode()


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, written as \ud800
        return False
    return True


def short(value: object, limit: int = 60) -> str:
    """A value for a message: printable, and never longer than about `limit` characters."""
    # repr of a huge container is itself an allocation, and an integer of 10**5 digits has no repr
    if isinstance(value, str):
        text = ascii(value[:limit])
    elif isinstance(value, dict | list):
        text = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(cast('list[Json]', value))}"
    elif isinstance(value, int) and value.bit_length() > 128:
        text = f"an integer of {value.bit_length()} bits"
    else:
        text = repr(value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."
