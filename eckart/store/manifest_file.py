"""`eckart.json` on the disk: one canonical form that carries the sha256 of itself, so any changed byte shows; read as hostile input."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import Refused, UsageError
from . import _json, dtypes, files
from .header import check_name, check_shape
from .index import check_relative
from .manifest import ACTIONS, FileRow, Manifest, Row, check_rows

MANIFEST = "eckart.json"
FORMAT = 1
MAX_MANIFEST = 200_000_000  # bytes
MAX_ROWS = 500_000
_SHA = re.compile(r"[0-9a-f]{64}")


def encode(manifest: Manifest) -> bytes:
    """The bytes of `eckart.json`."""
    try:
        plain: dict[str, Any] = {"format_version": FORMAT, **vars(manifest)}
        plain["rows"] = [vars(row) for row in manifest.rows]
        plain["files"] = {name: vars(row) for name, row in manifest.files.items()}
        plain["sha256"] = hashlib.sha256(_json.dump(plain)).hexdigest()
        return _json.dump(plain)
    except (TypeError, ValueError, RecursionError) as err:
        raise UsageError(f"manifest: cannot be written as JSON ({err}).") from err


def read_manifest(folder: Path) -> Manifest:
    """Read and check the `eckart.json` of a folder.

    Raises:
        Refused: there is none, or it is damaged, or not what eckart writes.
    """
    return decode(files.read_small(folder / MANIFEST, MAX_MANIFEST), str(folder / MANIFEST))


def decode(raw: bytes, where: str) -> Manifest:
    """Check the bytes of an `eckart.json`; pure."""
    top = _json.as_dict(_json.parse(raw, where, nodes=4 * MAX_ROWS, items=20 * MAX_ROWS), where)
    _exactly(top, {"format_version", "sha256", *Manifest.__dataclass_fields__}, where)
    if _json.as_int(top["format_version"], f"{where}: format_version") != FORMAT:
        raise Refused(f"{where}: format_version {top['format_version']}, this version of eckart reads {FORMAT}. Update eckart.")
    rest = {key: value for key, value in top.items() if key != "sha256"}
    if _json.as_str(top["sha256"], f"{where}: sha256") != hashlib.sha256(_dump(rest, where)).hexdigest() or _dump(top, where) != raw:
        raise Refused(f"{where}: was changed after it was written (its checksum does not hold).")
    source = _json.as_dict(top["source"], f"{where}: source")
    _exactly(source, {"id", "fingerprint", "tensors", "bytes"}, f"{where}: source")
    for key in ("id", "fingerprint"):
        _json.as_str(source[key], f"{where}: source.{key}")
    for key in ("tensors", "bytes"):
        _json.as_int(source[key], f"{where}: source.{key}")
    rows = _json.as_list(top["rows"], f"{where}: rows")
    if len(rows) > MAX_ROWS:
        raise Refused(f"{where}: {len(rows)} rows, expected at most {MAX_ROWS}.")
    checked = tuple(_row(row, where) for row in rows)
    if len(check_rows(checked)) != source["tensors"]:
        raise Refused(f"{where}: the rows name {len(check_rows(checked))} tensors of the source, which has {source['tensors']}.")
    return Manifest(
        source=source,
        rows=checked,
        recipe=_json.as_dict(top["recipe"], f"{where}: recipe"),
        seed=_json.as_int(top["seed"], f"{where}: seed"),
        versions=_strings(top["versions"], f"{where}: versions"),
        inputs=_strings(top["inputs"], f"{where}: inputs"),
        records=_json.as_dict(top["records"], f"{where}: records"),
        fingerprint=_strings(top["fingerprint"], f"{where}: fingerprint"),
        files={
            check_relative(name, where): _file(value, f"{where}: file {_json.short(name)}")
            for name, value in _json.as_dict(top["files"], f"{where}: files").items()
        },
        left_behind=_strings(top["left_behind"], f"{where}: left_behind"),
    )


def _row(value: _json.Json, where: str) -> Row:
    row = _json.as_dict(value, f"{where}: rows")
    _exactly(row, set(Row.__dataclass_fields__), f"{where}: rows")
    name = check_name(row["name"], where)
    where = f"{where}: tensor {name!r}"
    action, dtype = _json.as_str(row["action"], f"{where}: action"), _json.as_str(row["dtype"], f"{where}: dtype")
    if action not in ACTIONS or dtype not in dtypes.ITEMSIZE:
        raise Refused(f"{where}: action {_json.short(action)} with dtype {_json.short(dtype)} is not possible.")
    sources = tuple(check_name(source, where) for source in _json.as_list(row["sources"], f"{where}: sources"))
    shape, count = check_shape(row["shape"], where), _json.as_int(row["bytes"], f"{where}: bytes")
    if count != dtypes.nbytes(dtype, shape):
        raise Refused(f"{where}: {dtype} {list(shape)} does not take {count} bytes.")
    sha = _json.as_str(row["sha256"], f"{where}: sha256")
    if sha if action == "dropped" else not _SHA.fullmatch(sha):
        raise Refused(f"{where}: sha256 is not one.")
    return Row(name, action, sources, _json.as_str(row["reason"], f"{where}: reason"), dtype, shape, count, sha)


def _file(value: _json.Json, where: str) -> FileRow:
    row = _json.as_dict(value, where)
    _exactly(row, {"bytes", "sha256"}, where)
    sha = _json.as_str(row["sha256"], f"{where}: sha256")
    if not _SHA.fullmatch(sha):
        raise Refused(f"{where}: sha256 is not one.")
    return FileRow(_json.as_int(row["bytes"], f"{where}: bytes"), sha)


def _strings(value: _json.Json, where: str) -> dict[str, str]:
    return {_json.as_str(key, where): _json.as_str(text, where, 1 << 20) for key, text in _json.as_dict(value, where).items()}


def _exactly(found: Mapping[str, Any], expected: set[str], where: str) -> None:
    if set(found) != expected:
        odd = min(set(found) ^ expected)
        fault = "unknown" if odd in found else "missing"
        raise Refused(f"{where}: expected the keys {', '.join(sorted(expected))}; {_json.short(odd)} is {fault}.")


def _dump(value: Mapping[str, object], where: str) -> bytes:
    try:
        return _json.dump(value)
    except ValueError as err:  # a lone surrogate, or a number that JSON does not have
        raise Refused(f"{where}: holds a value that eckart never writes ({_json.short(str(err))}).") from err
