"""Every system call with which the store touches a disk, one thin function each.

The rest of `eckart.store` opens, writes, syncs and renames only through here: tests make the Nth of these calls fail.
On Windows a folder cannot be synced, so there a power cut right after the commit may bring back the state before it.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # O_NONBLOCK: opening a named pipe must not hang
UPDATE = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
REPLACE = UPDATE | os.O_TRUNC
LARGEST = 1 << 30  # bytes per call; macOS fails beyond 2**31 - 1
_seek = threading.Lock()


def open(path: Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


def close(fd: int) -> None:
    os.close(fd)


def pread_into(fd: int, into: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [into[:LARGEST]], offset)
    with _seek:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, min(len(into), LARGEST))
    into[: len(data)] = data
    return len(data)


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data[:LARGEST], offset)
    with _seek:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data[:LARGEST])


def ftruncate(fd: int, length: int) -> None:
    os.ftruncate(fd, length)


def allocate(fd: int, length: int) -> None:
    """Reserve the blocks now, so that a full disk is met before the first job and not after the last."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, length)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def fsync(fd: int) -> None:
    os.fsync(fd)


def fsync_dir(path: Path) -> None:
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(old: Path, new: Path) -> None:
    os.rename(old, new)


def replace(old: Path, new: Path) -> None:
    os.replace(old, new)


def mkdir(path: Path) -> None:
    os.mkdir(path)


def unlink(path: Path) -> None:
    os.unlink(path)


def rmdir(path: Path) -> None:
    os.rmdir(path)


def lock(fd: int) -> bool:
    """Take the exclusive lock of an open file without waiting; False when another run holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue,reportUnknownMemberType]
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True
