"""Is an output the finished work of this very run? And what a run that stopped says."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path

from ..errors import Incomplete, Refused
from . import _json, files, work
from .guard import resolve_output
from .index import inside
from .manifest_file import MANIFEST, read_manifest

RUN = "run.json"  # the note of what differs between equal runs: clocks, and the stamps of the files that were read
MAX_RUN = 16 << 20  # bytes


def finished(out: str | Path, fingerprint: Mapping[str, str], stamps: Mapping[str, str] | None = None) -> bool:
    """True when `out` is the complete output of a run with this fingerprint: there is nothing to do or to go on with.

    Leftovers of a clean-up that was interrupted are removed. The bytes are not checked again; `verify` does that.

    Args:
        out: the output.
        fingerprint: as `Writer` takes it; what else decides bytes (the shard size) belongs in it.
        stamps: as `Writer` takes them. A source that was written since, in however few rows, makes the answer False, and so does an
            output that has lost its `run.json`.

    Raises:
        Incomplete: leftovers could not be removed.
    """
    path = resolve_output(out)
    try:
        found = read_manifest(path).fingerprint
    except Refused:
        return False
    if {name: text for name, text in found.items() if not name.startswith("store.")} != dict(fingerprint):
        return False
    if stamps and _noted(path) != dict(stamps):
        return False
    with on_disk(path, work.folder_of(path, found), "the same command"):
        work.tidy(path)
    return True


def recorded(out: str | Path, name: str) -> bytes:
    """The content of a small file of an output, which is what the manifest says it is.

    Raises:
        Refused: the output has no such file, or it is not as it was written.
    """
    path = resolve_output(out)
    row = read_manifest(path).files.get(name)
    if row is None:
        raise Refused(f"{path}: its {MANIFEST} knows no {name}.")
    data = files.read_small(inside(path, name), row.bytes)
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise Refused(f"{path / name}: differs from what was written. See: eckart verify {path}")
    return data


def stamped(notes: Mapping[str, bytes], stamps: Mapping[str, str]) -> dict[str, bytes]:
    """Notes whose `run.json` holds the stamps beside what it held; unchanged when there are none."""
    if not stamps:
        return dict(notes)
    run = _json.as_dict(_json.parse(notes.get(RUN, b"{}"), RUN, nodes=10**5, items=10**6), RUN)
    return {**notes, RUN: (json.dumps({**run, "stamps": dict(stamps)}, indent=1, sort_keys=True) + "\n").encode()}


@contextlib.contextmanager
def on_disk(out: Path, kept: Path | None, resume: str) -> Generator[None, None, None]:
    """Within the block an OSError becomes an Incomplete that says what is kept, and where."""
    try:
        yield
    except OSError as err:
        what = f"{err.filename}: " if err.filename else ""
        where = f" What is finished is kept in {kept}." if kept is not None and kept.exists() else ""
        raise Incomplete(f"{out}: {what}{err.strerror or err}.{where}", resume) from err


def _noted(out: Path) -> dict[str, _json.Json]:
    try:
        run = _json.parse(files.read_small(out / RUN, MAX_RUN), RUN, nodes=10**5, items=10**6)
        return _json.as_dict(_json.as_dict(run, RUN).get("stamps", {}), RUN)
    except Refused:  # an output without stamps is not known to be of these files
        return {}
