"""Every parser of bytes from elsewhere as one function: it returns for any input, or there is a fault in the parser.

The tests feed it the corpus and random damage, `bench/fuzz.py` what a coverage-guided fuzzer comes upon. The first byte of an input chooses
how it is wrapped, so that the checks behind a checksum are reached as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from eckart.errors import EckartError
from eckart.store import _json, journal, manifest_file
from eckart.store.header import parse_header
from eckart.store.index import parse_index
from eckart.store.manifest import check_rows

LONGEST = 4000  # characters of a refusal


def answer(parse: Callable[..., Any], *args: Any) -> Any:
    """What a parser makes of it; None when it refuses in words that can be shown. Any other error is a fault and passes."""
    try:
        return parse(*args)
    except EckartError as err:
        message = str(err)
    assert len(message) < LONGEST, f"a refusal of {len(message)} characters"
    assert message.replace("\n", "").isprintable(), "a refusal that cannot be shown"
    return None


def described(head: bytes) -> int:
    """The length of a file that ends where the last tensor of the header does, as far as the header can be read."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(head[8:]).items() if name != "__metadata__"]
        return len(head) + max(0, min(max(ends, default=0), 1 << 62))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return len(head)


def header(data: bytes) -> None:
    """First byte: a whole file, how much longer than the input it is said to be; or the JSON alone, with a length before it that holds."""
    mode, raw = data[0] if data else 0, data[1:]
    if mode & 4:
        raw = len(raw).to_bytes(8, "little") + raw
        size = described(raw)
    else:
        size = len(raw) + (0, 1, 16, 1 << 40)[mode % 4]
    found = answer(parse_header, raw, size, "f.safetensors")
    if found is None:
        return
    end = 8 + int.from_bytes(raw[:8], "little")
    for tensor in found.tensors:
        assert tensor.start == end
        end += tensor.nbytes
    assert end == size
    assert len({tensor.name for tensor in found.tensors}) == len(found.tensors)


def index(data: bytes) -> None:
    """First byte: of safetensors, or of pickles."""
    suffix = (".safetensors", ".bin")[data[0] % 2] if data else ".bin"
    for file in (answer(parse_index, data[1:], "i.json", suffix) or {}).values():
        assert file.endswith(suffix)
        assert not set(file) & set('/\\:\0\n*?"<>|')
        assert file not in (".", "..")


def manifest(data: bytes) -> None:
    """First byte: as it is, or with a checksum that holds."""
    raw = data[1:]
    if data and data[0] % 2:
        try:
            top = json.loads(raw)
            top.pop("sha256", None)
            raw = _json.dump(top | {"sha256": hashlib.sha256(_json.dump(top)).hexdigest()})
        except (ValueError, TypeError, AttributeError, RecursionError):  # no object, or one that JSON cannot hold
            return
    found = answer(manifest_file.decode, raw, "eckart.json")
    if found is not None:
        assert manifest_file.encode(found) == raw
        assert len(check_rows(found.rows)) == found.source["tensors"]


def canonical(line: bytes) -> bytes:
    """JSON as `_json` writes it; what is none stays."""
    try:
        return _json.line(json.loads(line))
    except (ValueError, RecursionError):
        return line


def journal_(data: bytes) -> None:
    """First byte: as it is, or every line in the one form that is written, with a checksum that holds."""
    raw = data[1:]
    if data and data[0] % 2:
        raw = b"".join(journal._sum(line) + b" " + line + b"\n" for line in map(canonical, raw.split(b"\n")))
    found, end = journal.entries_of(raw)
    assert 0 <= end <= len(raw)
    assert len(found) <= raw.count(b"\n")
    for entry in found:
        assert journal.decode(journal.encode(entry)[:-1]) == entry


def recipe(data: bytes) -> None:
    """What is accepted is written and read again as the same."""
    from eckart.axes.border import from_yaml, to_yaml

    found = answer(from_yaml, data)
    if found is not None:
        again = answer(from_yaml, to_yaml(found))
        assert again is not None
        assert to_yaml(again) == to_yaml(found)


PARSERS: dict[str, Callable[[bytes], None]] = {
    "header": header, "index": index, "manifest": manifest, "journal": journal_, "recipe": recipe,
}  # fmt: skip
