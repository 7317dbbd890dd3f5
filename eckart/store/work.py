"""The work folder of an output, and the steps by which it becomes the output.

    OUT.partial-1a2b3c4d/fingerprint.json   what the run is; written last, so a folder without it holds nothing of value
    OUT.partial-1a2b3c4d/journal.jsonl      what is finished
    OUT.partial-1a2b3c4d/out/               the future OUT; one rename makes it so
    OUT.partial-1a2b3c4d/old/               the former OUT, whole, between the two renames of an overwrite and after them
    OUT.partial-1a2b3c4d/gone/              the former OUT while it is being removed
    OUT.partial-lock                        held while a run works on OUT

Every step leaves a state that `repair` recognises, so a kill between any two of them loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import Refused, UsageError
from . import _json, _os, files, journal
from .layout import Shard
from .verify import verify

FINGERPRINT, JOURNAL, NEW, OLD, GONE = "fingerprint.json", "journal.jsonl", "out", "old", "gone"
STAMP = "stamp."  # fields of the work folder's fingerprint that the output does not know
_PARTS = frozenset({FINGERPRINT, FINGERPRINT + files.ASIDE, JOURNAL, NEW, OLD, GONE})
MAX_FINGERPRINT = 4 << 20  # bytes


def folder_of(out: Path, fingerprint: Mapping[str, str]) -> Path:
    """The work folder of a run: beside OUT, named after the run's fingerprint."""
    return out.with_name(f"{out.name}.partial-{hashlib.sha256(_json.line(dict(fingerprint))).hexdigest()[:8]}")


def check_fingerprint(fields: Mapping[str, str]) -> dict[str, str]:
    """A fingerprint is a dict of named strings."""
    for name, value in fields.items():
        if not isinstance(name, str) or not isinstance(value, str) or name.startswith(("store.", STAMP)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"fingerprint: expected named strings, found {name!r}: {_json.short(value)}.")
    return dict(sorted(fields.items()))


def read_fingerprint(work: Path) -> dict[str, str]:
    """The fingerprint of a work folder."""
    where = work / FINGERPRINT
    found = _json.as_dict(
        _json.parse(files.read_small(where, MAX_FINGERPRINT), str(where), nodes=MAX_FINGERPRINT, items=MAX_FINGERPRINT), str(where)
    )
    return {name: _json.as_str(value, f"{where}: {name}", MAX_FINGERPRINT) for name, value in found.items()}


def difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Which fields differ, for a message."""
    names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    return "; ".join(
        f"{name}: was {_json.short(theirs.get(name, 'absent'))}, is now {_json.short(mine.get(name, 'absent'))}" for name in names
    )


def acquire(out: Path) -> int:
    """Take the lock of an output, or refuse at once when another run has it."""
    path = _lock_path(out)
    while True:
        fd = _os.open(path, _os.UPDATE)
        try:
            if not _os.lock(fd):
                raise Refused(f"{out}: another run is writing it (it holds {path}). Wait for it, or choose another output.")
            # the run before may have removed the file between our open and our lock
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BaseException:
            _close_quietly(fd)
            raise
        _os.close(fd)


def release(out: Path, fd: int) -> None:
    """Give the lock back."""
    try:
        if os.name != "nt":  # Windows cannot remove an open file; the empty file stays
            _os.unlink(_lock_path(out))
    finally:
        _os.close(fd)


def tidy(out: Path) -> None:
    """Clear what the clean-up of a finished run left, if anything."""
    if siblings(out) or _lock_path(out).exists():
        fd = acquire(out)
        try:
            repair(out)
        finally:
            release(out, fd)


def siblings(out: Path) -> list[Path]:
    """All work folders of an output. A folder that is only named like one is refused, since work folders may be removed."""
    found: list[Path] = []
    for path in sorted(out.parent.iterdir()):
        if re.fullmatch(re.escape(out.name) + r"\.partial-[0-9a-f]{8}", path.name) is None:
            continue
        strange = (
            [entry.name for entry in path.iterdir() if entry.name not in _PARTS] if path.is_dir() and not path.is_symlink() else [path.name]
        )
        if strange:
            raise Refused(f"{path}: is named like a work folder of eckart and is not one (it has {strange[0]}). Move it away.")
        found.append(path)
    return found


def create(work: Path, fingerprint: Mapping[str, str], shards: tuple[Shard, ...]) -> None:
    """Make a work folder with all files at full length and an empty journal."""
    _os.mkdir(work)
    _os.fsync_dir(work.parent)
    _os.mkdir(work / NEW)
    prepare(work, shards)
    files.write_file(work / JOURNAL, [])
    _os.fsync_dir(work)
    files.replace_file(work / FINGERPRINT, _json.dump(dict(fingerprint)))


def prepare(work: Path, shards: tuple[Shard, ...]) -> None:
    """Bring every shard to its length and header; what tensors are already there stays."""
    for shard in shards:
        with files.opened(work / NEW / shard.file, _os.UPDATE) as fd:
            if os.fstat(fd).st_nlink != 1:
                raise Refused(f"{work / NEW / shard.file}: is linked to another file, which would be overwritten. Remove {work}.")
            _os.allocate(fd, shard.size)
            _os.ftruncate(fd, shard.size)
            files.write_at(fd, memoryview(shard.head), 0)
            _os.fsync(fd)
    _os.fsync_dir(work / NEW)


def repair(out: Path) -> None:
    """Bring interrupted commits to their end and clear what holds nothing; called under the lock, whatever run comes next."""
    for work in siblings(out):
        new, old = work / NEW, work / OLD
        if not (work / FINGERPRINT).exists():
            if old.exists():
                raise Refused(f"{work}: holds a former output and no {FINGERPRINT}. Move {old} to where you want it, then remove {work}.")
            files.remove_tree(work)
            continue
        if old.exists() and not out.exists():
            # forward when the new output is whole, else back to the former one
            _os.rename(new if new.exists() and verify(new).ok else old, out)
            _sync_rename(work, out)
        elif old.exists() and new.exists():
            raise Refused(
                f"{out}: appeared while it was being overwritten. The new output is {new}, the former one {old}: move one by hand."
            )
        if not new.exists():
            clear(work)


def unfinished(out: Path, mine: Path) -> list[Path]:
    """Work folders of other runs that have finished jobs; those without any are removed."""
    result: list[Path] = []
    for work in siblings(out):
        if work == mine:
            continue
        if (work / JOURNAL).exists() and journal.replay(work / JOURNAL)[0]:
            result.append(work)
        else:
            files.remove_tree(work)
    return result


def install(work: Path, out: Path, overwrite: bool) -> None:
    """The commit: `work/out` becomes OUT. The former OUT is removed only after that is on the disk."""
    new, old = work / NEW, work / OLD
    if out.exists():
        if overwrite:
            _os.rename(out, old)
        else:
            _os.rmdir(out)  # fails unless it is empty
    try:
        _os.rename(new, out)
    except OSError:
        if old.exists():
            _os.rename(old, out)
        raise
    _sync_rename(work, out)
    clear(work)


def clear(work: Path) -> None:
    """Remove a work folder whose output is in place, in the order that `repair` understands."""
    if (work / OLD).exists():  # half of it must never be taken for the whole
        _os.rename(work / OLD, work / GONE)
        _os.fsync_dir(work)
    for entry in sorted(work.iterdir(), key=lambda path: (path.name == FINGERPRINT, path.name)):
        files.remove_tree(entry)
    _os.rmdir(work)


def _sync_rename(work: Path, out: Path) -> None:
    _os.fsync_dir(work)
    _os.fsync_dir(out.parent)


def _lock_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial-lock")


def _close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):  # the error that brought us here is the one to tell
        _os.close(fd)
