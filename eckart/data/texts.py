"""Calibration and test texts: from a list or a file, checked before any work starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, cast

from ..errors import Refused

Texts: TypeAlias = list[str] | list[list[int]]


def load_texts(source: Any) -> Texts:
    """Texts, or lists of token ids. A string is a path, never a text. Blank texts say nothing and are left out.

    Args:
        source: a sequence of texts; a sequence of token-id sequences; or a path to a `.txt` file (a text per line) or a `.jsonl` file
            (per line `{"text": ...}` or a JSON string), in UTF-8.

    Returns:
        The texts, in order: all strings, or all lists of token ids.

    Raises:
        Refused: no such file, another kind of file, not UTF-8, a line that is not as expected (named as file:line), texts and token ids
            mixed, or nothing left.

    Example:
        >>> load_texts(["one", " ", "two"]), load_texts([[1, 2], [3]])
        (['one', 'two'], [[1, 2], [3]])
    """
    if isinstance(source, str | Path):
        return _from_file(Path(source))
    if not isinstance(source, Sequence) or isinstance(source, bytes | bytearray):
        expected = "a list of texts, a list of token-id lists, or a path to a .txt or .jsonl file"
        raise Refused(f"calibration: expected {expected}, found {type(source).__name__}.")
    items: Sequence[Any] = source
    strings = sum(isinstance(item, str) for item in items)
    if 0 < strings < len(items):
        odd = next(i for i, item in enumerate(items) if isinstance(item, str) != isinstance(items[0], str))
        found = f"item 0 is {_called(items[0])}, item {odd} is {_called(items[odd])}"
        raise Refused(f"calibration: texts and token ids are mixed ({found}). Pass one kind.")
    out = [t for t in items if t.strip()] if strings else [ids for i, item in enumerate(items) if (ids := _token_ids(item, i))]
    if not out:
        raise Refused("calibration: the list is empty or holds only blank texts. Give at least one text; 128 or more are usual.")
    return cast(Texts, out)


def _called(item: Any) -> str:
    return "a text" if isinstance(item, str) else f"of type {type(item).__name__}"


def _token_ids(item: Any, index: int) -> list[int]:
    values = item.tolist() if hasattr(item, "tolist") else item
    if not isinstance(values, Sequence) or isinstance(values, bytes | bytearray):
        raise Refused(f"calibration: item {index}: expected a text or a list of token ids, found {type(item).__name__}.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
            raise Refused(f"calibration: item {index}: expected token ids (integers from 0), found {value!r}.")
    return [int(v) for v in values]


def _from_file(path: Path) -> list[str]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise Refused(f"{path}: this calibration file {what}. A string is a path; pass a list for texts: calib=['...'].")
    if path.suffix not in (".txt", ".jsonl"):
        found = path.suffix or "no suffix"
        raise Refused(f"{path}: expected a .txt file (a text per line) or a .jsonl file, found {found}. Rename or convert it.")
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        remedy = f"Convert it: iconv -f LATIN1 -t UTF-8 {path} > converted{path.suffix}"
        raise Refused(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}). {remedy}") from error
    # split at \n only: str.splitlines also cuts at characters that JSON strings may hold
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(content.split("\n"), 1)]
    texts = [line if path.suffix == ".txt" else _json_text(path, number, line) for number, line in lines if line.strip()]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise Refused(f"{path}: empty: no line holds a text. Give at least one text; 128 or more are usual.")
    return texts


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{path}:{number}: not JSON ({error}). A .jsonl file holds one JSON value per line; name plain text .txt.") from error
    if isinstance(value, dict):
        value = cast(dict[str, object], value).get("text")
    if not isinstance(value, str):
        raise Refused(f'{path}:{number}: expected {{"text": "..."}} or a JSON string, found {line[:60]!r}.')
    return value


def fingerprint(texts: Texts) -> str:
    """sha256 of texts or token-id lists; their order and their boundaries count.

    Example:
        >>> fingerprint(["ab", "c"]) == fingerprint(["a", "bc"])
        False
    """
    digest = hashlib.sha256()
    for text in texts:
        body = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b",".join(b"%d" % i for i in text)
        digest.update(b"%s%d:" % (b"t" if isinstance(text, str) else b"i", len(body)))
        digest.update(body)
    return digest.hexdigest()
