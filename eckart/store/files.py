"""Small, whole operations on files: read exactly, write durably, hash, remove; each names the file when it refuses."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from ..errors import Refused
from . import _os

ASIDE = ".new"  # suffix of a file until it is whole
CHUNK = 8 << 20  # bytes held at a time while a tensor or a file streams through


@contextlib.contextmanager
def reading(what: Path | str) -> Generator[None, None, None]:
    """Within the block an OSError becomes a Refused that names what was read."""
    try:
        yield
    except OSError as err:
        raise Refused(f"{what}: cannot be read ({err.strerror or err}).") from err


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Generator[int, None, None]:
    """A file descriptor that is closed at the end of the block."""
    fd = _os.open(path, flags)
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            _os.close(fd)
        raise
    _os.close(fd)


@contextlib.contextmanager
def open_regular(path: Path) -> Generator[tuple[int, os.stat_result], None, None]:
    """Open a regular file for reading; folders, pipes and devices are refused. Errors of the block itself pass unchanged."""
    with reading(path):
        fd = _os.open(path, _os.READ)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Refused(f"{path}: expected a regular file.")
        yield fd, info
    finally:
        with reading(path):
            _os.close(fd)


def read_at(fd: int, into: memoryview, offset: int, what: str) -> None:
    """Fill `into` from `offset`; Refused when the file ends before."""
    got = 0
    while got < len(into):
        with reading(what):
            count = _os.pread_into(fd, into[got:], offset + got)
        if count == 0:
            raise Refused(f"{what}: the file ends {len(into) - got} bytes too early.")
        got += count


def read_small(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes."""
    with open_regular(path) as (fd, info):
        if info.st_size > limit:
            raise Refused(f"{path}: {info.st_size} bytes, expected at most {limit}.")
        data = bytearray(info.st_size)
        read_at(fd, memoryview(data), 0, str(path))
        return bytes(data)


def chunks(fd: int, start: int, length: int, what: str, size: int = CHUNK) -> Iterator[memoryview]:
    """The bytes [start, start + length) piece by piece, in one buffer that is used again."""
    buffer = memoryview(bytearray(min(size, length)))
    done = 0
    while done < length:
        piece = buffer[: min(size, length - done)]
        read_at(fd, piece, start + done, what)
        yield piece
        done += len(piece)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    done = 0
    while done < len(data):
        count = _os.pwrite(fd, data[done:], offset + done)
        if count <= 0:
            raise OSError(errno.EIO, "nothing was written")
        done += count


def write_file(path: Path, data: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """Write a new file and sync it; returns (sha256, bytes). The caller syncs the folder."""
    digest, offset = hashlib.sha256(), 0
    with opened(path, _os.REPLACE) as fd:
        for piece in data:
            view = memoryview(piece)
            write_at(fd, view, offset)
            digest.update(view)
            offset += len(view)
        _os.fsync(fd)
    return digest.hexdigest(), offset


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, also through a power cut."""
    aside = path.with_name(path.name + ASIDE)
    write_file(aside, [data])
    _os.replace(aside, path)
    _os.fsync_dir(path.parent)


def file_digest(path: Path) -> tuple[str, int]:
    """(sha256, bytes) of a file."""
    digest = hashlib.sha256()
    with open_regular(path) as (fd, info):
        for piece in chunks(fd, 0, info.st_size, str(path)):
            digest.update(piece)
    return digest.hexdigest(), info.st_size


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder with what is in it; links are removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove_tree(entry)
        _os.rmdir(path)
    else:
        _os.unlink(path)
