"""What a run has finished, one line per job, each synced before the job counts as done.

A line is `<first 16 hex digits of the sha256 of the rest> <JSON>`; the first line that does not hold ends the journal.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Refused, UsageError
from . import _json, _os, files

MAX_JOURNAL = 1 << 30  # bytes
MAX_LINE = 16 << 20  # bytes
MAX_VALUES = 1_000_000  # objects and lists of a record
MAX_JOB = 4096  # characters of a job's name


@dataclass(frozen=True)
class Entry:
    """A finished job: sha256 of every tensor it wrote, and a small record of its own."""

    job: str
    tensors: Mapping[str, str]
    record: Mapping[str, _json.Json] = field(default_factory=dict[str, _json.Json])


def encode(entry: Entry) -> bytes:
    """One line, with its newline."""
    if not 0 < len(entry.job) <= MAX_JOB:
        raise UsageError(f"job: expected a name of 1 to {MAX_JOB} characters, found {len(entry.job)}.")
    body = _json.line({"job": entry.job, "tensors": dict(entry.tensors), "record": dict(entry.record)})
    if len(body) > MAX_LINE:
        raise UsageError(f"job {entry.job!r}: its record has {len(body)} bytes, expected at most {MAX_LINE}.")
    return _sum(body) + b" " + body + b"\n"


def plain(job: str, record: Mapping[str, Any]) -> dict[str, _json.Json]:
    """A record as it will be read back: plain JSON values."""
    try:
        raw = _json.line(dict(record))
        return _json.as_dict(_json.parse(raw, f"job {job!r}: record", nodes=MAX_VALUES, items=4 * MAX_VALUES), f"job {job!r}: record")
    except (TypeError, ValueError, RecursionError) as err:
        raise UsageError(f"job {job!r}: its record cannot be written as JSON ({err}).") from err


def decode(line: bytes) -> Entry | None:
    """The entry of a line without its newline, None when it is torn, damaged or not as `encode` writes it; pure."""
    mark, _, body = line.partition(b" ")
    if mark != _sum(body):
        return None
    try:
        found = _json.as_dict(_json.parse(body, "journal", nodes=MAX_VALUES, items=4 * MAX_VALUES), "journal")
        if found.keys() != {"job", "tensors", "record"}:
            return None
        tensors = _json.as_dict(found["tensors"], "journal")
        digests = {_json.as_str(name, "journal"): _json.as_str(digest, "journal", 64) for name, digest in tensors.items()}
        job = _json.as_str(found["job"], "journal", MAX_JOB)
        if not job or _json.line(found) != body:
            return None
        return Entry(job, digests, _json.as_dict(found["record"], "journal"))
    except (Refused, ValueError, RecursionError):  # ValueError: half a character, or an infinite number, which cannot be written again
        return None


def replay(path: Path) -> tuple[list[Entry], int]:
    """The entries of a journal up to the first line that does not hold, and the length of that part in bytes."""
    return entries_of(files.read_small(path, MAX_JOURNAL))


def entries_of(raw: bytes) -> tuple[list[Entry], int]:
    """`replay` of the bytes of a journal; pure."""
    entries: list[Entry] = []
    end = 0
    while (stop := raw.find(b"\n", end, end + MAX_LINE + 32)) >= 0:
        entry = decode(raw[end:stop])
        if entry is None:
            break
        entries.append(entry)
        end = stop + 1
    return entries, end


class Journal:
    """Appends lines; a failed append leaves nothing that the next one could be glued to. Safe for threads."""

    def __init__(self, path: Path, end: int) -> None:
        self._path, self._end = path, end
        self._lock = threading.Lock()

    def append(self, entry: Entry) -> None:
        """Write one line and sync it."""
        line = encode(entry)
        with self._lock, files.opened(self._path, _os.UPDATE) as fd:
            _os.ftruncate(fd, self._end)  # what an earlier, failed append may have left
            files.write_at(fd, memoryview(line), self._end)
            _os.fsync(fd)
            self._end += len(line)


def _sum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()
