"""A checkpoint that appears whole or not at all: preallocated shards in a work folder, a journal line per job, one rename at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from ..errors import Incomplete, Refused, UsageError, did_you_mean
from ..progress import track
from . import _os, files, parts, work
from .digest import shard_digests
from .guard import check_output, resolve_output
from .index import INDEX, check_relative
from .journal import Entry, Journal, replay
from .journal import plain as journal_plain
from .layout import MAX_SHARD, Layout, TensorSpec, lay_out
from .manifest import FileRow, Manifest, seal
from .manifest_file import MANIFEST, encode
from .resume import on_disk, stamped
from .source import Source

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "1"  # of the work folder; part of every fingerprint


class Writer:
    """Write a safetensors checkpoint that is known in advance, job by job, in any order, from several threads, over several runs.

    Nothing is visible at `out` before `commit`. Leaving the block early keeps what is finished, and the same call goes on with it; a call
    whose fingerprint differs is refused. It never judges values: a NaN is written like any number.

    Args:
        out: the folder to be made; its parent exists.
        layout: every tensor of the output; the order decides which shard it goes to.
        fingerprint: named strings that say what the run is (recipe, source, statistics, seed).
        stamps: {input: `Reader.stamp`}. A run only goes on with files that carry the same stamps, so that an edit which the fingerprint
            cannot see is noticed. They enter no byte of the result: a note of the output, `run.json`, keeps them for `finished`.
        overwrite: replace an earlier eckart output, at the end.
        max_shard_bytes: most tensor bytes per file.
        resume: the command that goes on after an interruption, for messages.

    Attributes:
        layout: where every byte goes; `layout.nbytes` is the size of the weight files.
        path: the absolute path of the output.

    Raises:
        Refused: on entering the block: the output exists, another run holds it, or an unfinished run with another fingerprint is there.
        Incomplete: when the disk fails or is full; what was finished is kept.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from eckart.store import Reader, Writer, account, TensorSpec, transformed
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_file({"w": torch.ones(2, 2)}, folder.name + "/model.safetensors")
        >>> reader = Reader(folder.name)
        >>> with Writer(folder.name + "-half", [TensorSpec("w", "F16", (2, 2))], fingerprint={"source": reader.fingerprint}) as writer:
        ...     writer.put("w", {"w": reader.read("w").half()})
        ...     path = writer.commit(reader.config, account(reader, [transformed("w", ["w"])]), reader.carry())
        >>> Reader(path).info("w").dtype
        'F16'
        >>> folder.cleanup()
    """

    def __init__(
        self,
        out: str | Path,
        layout: Iterable[TensorSpec],
        *,
        fingerprint: Mapping[str, str],
        stamps: Mapping[str, str] | None = None,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD,
        resume: str = "",
    ) -> None:
        self.layout: Layout = lay_out(layout, max_shard_bytes)
        self.fingerprint = {**work.check_fingerprint(fingerprint), "store.layout": self.layout.digest, "store.format": FORMAT}
        self.stamps = work.check_fingerprint(stamps or {})
        self._begun = {**self.fingerprint, **{work.STAMP + name: stamp for name, stamp in self.stamps.items()}}
        self.path = resolve_output(out)
        self._overwrite = overwrite
        self._resume = resume or "the same command"
        self._work = work.folder_of(self.path, self.fingerprint)
        self._lock: int | None = None
        self._state = threading.Lock()
        self._owner: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self._journal: Journal | None = None

    def __enter__(self) -> Self:
        with self._disk():
            lock = work.acquire(self.path)
            try:
                self._journal = self._start()
            except BaseException:
                with contextlib.suppress(OSError):  # the error that brought us here is the one to tell
                    work.release(self.path, lock)
                raise
            self._lock = lock
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lock, self._lock, self._journal = self._lock, None, None
        if lock is None:
            return
        if kind is not None:
            if not self._entries:
                self._discard()
            with contextlib.suppress(OSError):  # the error in flight is the one to tell; the lock ends with the descriptor
                work.release(self.path, lock)
            return
        with self._disk():
            work.release(self.path, lock)

    @property
    def done(self) -> frozenset[str]:
        """Names of the finished jobs, those of interrupted runs included."""
        return frozenset(entry.job for entry in self._finished())

    @property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        """{job: the record it was put with}."""
        return MappingProxyType({entry.job: entry.record for entry in sorted(self._finished(), key=lambda entry: entry.job)})

    @property
    def digests(self) -> Mapping[str, str]:
        """{tensor: sha256} of what is finished."""
        return MappingProxyType({name: sha for entry in self._finished() for name, sha in entry.tensors.items()})

    @property
    def missing(self) -> tuple[str, ...]:
        """Tensors of the layout that no finished job has written."""
        finished = self.digests
        return tuple(name for name in self.layout.specs if name not in finished)

    def put(self, job: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
        """Write the tensors of a job; when this returns they survive a power cut.

        A job that is done may be put again with the same values (engines run jobs at least once); other values are refused.

        Args:
            job: its name, the same in every run.
            tensors: {name: tensor}, as the layout has them; any device; may be empty.
            record: a few plain values (ranks, errors) that the next run finds in `records`.

        Raises:
            UsageError: not in the layout, wrong type or shape, or another job wrote it.
            Refused: a finished job gave other values.
            Incomplete: the disk failed.
        """
        for name in tensors:
            self._spec(name)
        parts.check(job, tensors, self.layout.places)
        self._finish(job, {name: partial(parts.one_piece, tensor) for name, tensor in tensors.items()}, record)

    @property
    def shards(self) -> Path:
        """The folder with the shards while the writer is open: where `parts.write_job` writes in another process."""
        return self._work / work.NEW

    def adopt(self, entry: Entry) -> None:
        """Count a job that `parts.write_job` has written, here or in another process; `commit` reads every byte back.

        Raises:
            UsageError: another job wrote one of its tensors.
            Refused: the job is finished with other values.
            Incomplete: the disk failed.
        """
        journal = self._open_journal()
        for name in entry.tensors:
            self._spec(name)
        before = self._claim(entry.job, entry.tensors)
        if before is not None:
            self._same(before, entry.tensors)
            return
        with self._disk():
            journal.append(entry)
        with self._state:
            self._entries[entry.job] = entry

    def copy(
        self, job: str, reader: Source, names: str | Sequence[str] | Mapping[str, str], record: Mapping[str, Any] | None = None
    ) -> None:
        """Copy tensors of a checkpoint byte for byte, in pieces.

        Args:
            job: its name, the same in every run.
            reader: the source.
            names: a tensor, several, or {name in the output: name in the source}.
            record: see `put`.
        """
        if not isinstance(names, Mapping):
            names = dict.fromkeys((names,) if isinstance(names, str) else names, "")
        pieces: dict[str, parts.Pieces] = {}
        for name, source in names.items():
            spec, info = self._spec(name), reader.info(source or name)
            if (info.dtype, info.shape) != (spec.dtype, tuple(spec.shape)):
                found = f"{info.dtype} {list(info.shape)}"
                raise UsageError(
                    f"job {job!r}: tensor {info.name!r} is {found}, the layout has {spec.dtype} {list(spec.shape)} for {name!r}."
                )
            pieces[name] = partial(reader.raw, info.name)
        self._finish(job, pieces, record)

    def commit(
        self,
        config: Mapping[str, Any],
        manifest: Manifest,
        side_files: Mapping[str, bytes | Path] | None = None,
        notes: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Check what was written by reading it back, add the small files, and make it the output with one rename.

        Args:
            config: for `config.json`; none is written when it is empty.
            manifest: from `account`; sealed here.
            side_files: {relative name: content or file}, for instance `reader.carry()`.
            notes: {relative name: content} that are not part of the result (timings, reports) and have no checksum. `run.json`,
                a JSON object, is given the stamps.

        Returns:
            The path of the output.

        Raises:
            Incomplete: a tensor is missing, or differs from what was written, or the disk failed.
            UsageError: the manifest and the layout disagree.
        """
        self._open_journal()
        notes = stamped(notes or {}, self.stamps)
        _check_names(side_files or {}, notes, {INDEX, MANIFEST, "config.json", *(shard.file for shard in self.layout.shards)})
        missing = self.missing
        if len(missing) > 0:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise Incomplete(f"{self.path}: not finished: tensor {missing[0]!r}{more} not written.", self._resume)
        with self._disk():
            new = self._work / work.NEW
            shards = {shard.file for shard in self.layout.shards}
            for entry in sorted(new.iterdir()):
                if entry.name not in shards:
                    files.remove_tree(entry)
            written = self._read_back(new)
            index = self.layout.index()
            small: dict[str, bytes | Path] = dict(side_files or {})
            if index is not None:
                small[INDEX] = _plain(index)
            if config:
                small["config.json"] = _plain(config)
            for name, content in sorted({**small, **notes}.items()):
                row = _write_small(new, name, content)
                if name in small:
                    written[name] = row
            sealed = seal(manifest, self.layout.specs, self.digests, written, self.fingerprint, _filled(self.records))
            files.write_file(new / MANIFEST, [encode(sealed)])
            for folder in sorted({new, *(path.parent for path in new.rglob("*"))}):
                _os.fsync_dir(folder)
            check_output(self.path, (), self._overwrite)
            work.install(self._work, self.path, self._overwrite)
            self._journal = None
        return self.path

    def _finished(self) -> tuple[Entry, ...]:
        with self._state:
            return tuple(self._entries.values())

    def _start(self) -> Journal:
        work.repair(self.path)
        for other in work.unfinished(self.path, self._work):
            found = work.difference(self._begun, work.read_fingerprint(other))
            raise Refused(
                f"{self.path}: an unfinished run with other settings is there ({found}). "
                f"Repeat its command to go on with it, or remove {other} to start again."
            )
        check_output(self.path, (), self._overwrite)
        if self._work.exists() and not self._ours():
            files.remove_tree(self._work)
        if not self._work.exists():
            try:
                work.create(self._work, self._begun, self.layout.shards)
            except OSError:
                self._discard()  # a disk that was too small is not left full
                raise
            return Journal(self._work / work.JOURNAL, 0)
        work.prepare(self._work, self.layout.shards)
        entries, end = replay(self._work / work.JOURNAL)
        self._trust(entries)
        return Journal(self._work / work.JOURNAL, end)

    def _ours(self) -> bool:
        """Whether the work folder was begun by this run, on these very files; False when it is another's and holds nothing finished."""
        theirs = work.read_fingerprint(self._work)
        if theirs == self._begun:
            return True
        found = work.difference(self._begun, theirs)
        if not found.startswith(work.STAMP):
            raise Refused(f"{self._work}: belongs to another run ({found}). Remove it to start again.")
        if not replay(self._work / work.JOURNAL)[0]:
            return False
        raise Refused(
            f"{self._work}: the run was begun on other files ({found}): they were changed, or copied, since. "
            "Bring the old ones back to go on, or remove the folder to start again."
        )

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # an error is in flight already; the next run clears what is left
            files.remove_tree(self._work)

    def _trust(self, entries: list[Entry]) -> None:
        # The last line of a job counts. A line is only believed when the bytes on the disk are those it describes.
        for entry in track(tuple({entry.job: entry for entry in entries}.values()), "checking what is finished"):
            if all(name in self.layout.places and self._digest(name) == sha for name, sha in entry.tensors.items()):
                self._entries[entry.job] = entry
                self._owner.update(dict.fromkeys(entry.tensors, entry.job))

    def _digest(self, name: str) -> str:
        place = self.layout.places[name]
        digest = hashlib.sha256()
        with files.open_regular(self._work / work.NEW / place.file) as (fd, _):
            for piece in files.chunks(fd, place.start, place.nbytes, place.file):
                digest.update(piece)
        return digest.hexdigest()

    def _finish(self, job: str, pieces: Mapping[str, parts.Pieces], record: Mapping[str, Any] | None) -> None:
        journal, plain = self._open_journal(), journal_plain(job, record or {})
        before = self._claim(job, pieces)
        if before is not None:
            self._same(before, {name: parts.stream(piece, _forget) for name, piece in pieces.items()})
            return
        with self._disk():
            entry = Entry(job, parts.write_pieces(self.shards, self.layout.places, pieces), plain)
            journal.append(entry)
        with self._state:
            self._entries[job] = entry

    def _claim(self, job: str, names: Iterable[str]) -> Entry | None:
        """Note whose the tensors are; the entry of the job if it is finished."""
        with self._state:
            for name in names:
                if self._owner.get(name, job) != job:
                    raise UsageError(f"job {job!r}: tensor {name!r} belongs to job {self._owner[name]!r}.")
            before = self._entries.get(job)
            if before is None:
                self._owner.update(dict.fromkeys(names, job))
        return before

    @staticmethod
    def _same(before: Entry, digests: Mapping[str, str]) -> None:
        if dict(digests) != dict(before.tensors):
            raise Refused(f"job {before.job!r}: is finished, and running it again gave other bytes; it is not deterministic.")

    def _read_back(self, new: Path) -> dict[str, FileRow]:
        expected = self.digests
        written: dict[str, FileRow] = {}
        for shard in track(self.layout.shards, "reading back"):
            spans = [self.layout.places[name] for name in shard.names]
            whole, found = shard_digests(new / shard.file, spans)
            wrong = [name for name in shard.names if found[name] != expected[name]]
            if wrong:
                raise Incomplete(f"{new / shard.file}: tensor {wrong[0]!r} does not read back as it was written.", self._resume)
            written[shard.file] = FileRow(shard.size, whole)
        return written

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.layout.specs:
            raise UsageError(f"tensor {name!r} is not in the layout of this output.{did_you_mean(name, self.layout.specs)}")
        return self.layout.specs[name]

    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise UsageError("the writer is not open: use it in a `with` block, and not after commit.")
        return self._journal

    def _disk(self) -> contextlib.AbstractContextManager[None]:
        return on_disk(self.path, self._work, self._resume)


def _plain(value: Mapping[str, Any]) -> bytes:
    # NaN and Infinity are allowed here: transformers writes them into config.json
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _write_small(new: Path, name: str, content: bytes | Path) -> FileRow:
    folder = new
    for part in name.split("/")[:-1]:
        folder = folder / part
        if not folder.exists():
            _os.mkdir(folder)
    if isinstance(content, Path):
        with files.open_regular(content) as (fd, info):
            sha, size = files.write_file(new / name, files.chunks(fd, 0, info.st_size, str(content)))
    else:
        sha, size = files.write_file(new / name, [content])
    return FileRow(size, sha)


def _check_names(side_files: Mapping[str, bytes | Path], notes: Mapping[str, bytes], taken: set[str]) -> None:
    for name in (*side_files, *notes):
        check_relative(name, "side file")
        if name in taken or (name in side_files and name in notes):
            raise UsageError(f"side file {name!r}: expected a name given once, other than those that the writer makes itself.")


def _filled(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {job: record for job, record in records.items() if record}


def _forget(_piece: memoryview, _offset: int) -> None:
    return None
