"""Tensors that are put away and taken back: in memory up to a limit, beyond it in files of a temporary folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Generator, Hashable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import Refused
from ..store import dtypes

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = ".eckart-spool-"
LOCK = "lock"


class Spool:
    """A place for tensors by key. Not a store: nothing in it outlives the process.

    The folder is made when the first tensor does not fit into memory, and removed by `close`, after an exception too, and when the
    spool is collected. A killed run leaves it behind without its lock; the next spool under the same parent removes it.

    Args:
        limit: bytes kept in memory; what comes when they are full goes to files.
        parent: where the folder is made; None is the system's temporary folder.

    Example:
        >>> import torch
        >>> with Spool(limit=0) as spool:
        ...     spool.put("a", torch.arange(3))
        ...     spool.get("a").tolist(), spool.in_memory, spool.on_disk
        ([0, 1, 2], 0, 24)
    """

    def __init__(self, limit: int, parent: str | os.PathLike[str] | None = None) -> None:
        self.limit = limit
        self.in_memory = 0
        self.on_disk = 0
        self._parent = Path(tempfile.gettempdir() if parent is None else parent)
        self._held: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, tuple[Path, str, tuple[int, ...], int]] = {}
        self._folder: Path | None = None
        self._made = 0
        self._end: weakref.finalize[..., Spool] | None = None

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Put a tensor away, in place of an earlier one of that key. One that stays in memory is kept as it is, not copied.

        Raises:
            Refused: the disk is full, or the folder cannot be written.
        """
        size = tensor.numel() * tensor.element_size()
        place = self._files.get(key)
        self.drop(key, keep_file=True)
        if self.in_memory + size <= self.limit:
            self._held[key] = tensor
            self.in_memory += size
            if place is not None:
                self._unlink(place[0])
            return
        path = place[0] if place is not None else self._new_file()
        with self._writing(), open(path, "wb", buffering=0) as file:
            memory = dtypes.to_bytes(tensor)
            done = 0
            while done < len(memory):
                done += file.write(memory[done:])
        self._files[key] = (path, dtypes.name_of(tensor.dtype), tuple(tensor.shape), size)
        self.on_disk += size

    def get(self, key: Hashable) -> Tensor:
        """The tensor of a key, on the CPU where it comes from a file.

        Raises:
            KeyError: there is none.
            Refused: its file has been cut or removed.
        """
        if key in self._held:
            return self._held[key]
        path, dtype, shape, size = self._files[key]
        tensor, memory = dtypes.empty(dtype, shape)
        done = 0
        with self._writing(), open(path, "rb", buffering=0) as file:
            while done < size:
                count = file.readinto(memory[done:])
                if not count:
                    raise Refused(f"{path}: a spooled activation has {done} bytes, expected {size}. Run again.")
                done += count
        return tensor

    def drop(self, key: Hashable, *, keep_file: bool = False) -> None:
        """Forget a tensor, if there is one of that key."""
        held = self._held.pop(key, None)
        if held is not None:
            self.in_memory -= held.numel() * held.element_size()
        place = self._files.pop(key, None)
        if place is not None:
            self.on_disk -= place[3]
            if not keep_file:
                self._unlink(place[0])

    def close(self) -> None:
        """Forget everything and remove the folder."""
        self._held.clear()
        self._files.clear()
        self.in_memory = self.on_disk = 0
        if self._end is not None:
            self._end()
            self._folder = self._end = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _new_file(self) -> Path:
        if self._folder is None:
            with self._writing():
                sweep(self._parent)
                self._folder, lock = _new_folder(self._parent)
            self._end = weakref.finalize(self, _remove, self._folder, lock)
        self._made += 1
        return self._folder / f"{self._made:08d}"

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            where = self._folder or self._parent
            raise Refused(f"{where}: activations cannot be spooled there ({error}). Free space, or raise the memory limit.") from error

    @staticmethod
    def _unlink(path: Path) -> None:
        path.unlink(missing_ok=True)


def sweep(parent: Path) -> None:
    """Remove the folders that killed runs have left under a parent; those of living runs are locked, and stay."""
    for folder in sorted(parent.glob(PREFIX + "*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):  # of another user, or just removed by its owner
            lock = _locked(folder)
            if lock is not None:
                _remove(folder, lock)


def _new_folder(parent: Path) -> tuple[Path, int]:
    """A folder of our own and the open file whose lock says that we live."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # another run swept it up before it had its lock
            lock = _locked(folder)
            if lock is not None:
                return folder, lock


def _locked(folder: Path) -> int | None:
    """The open lock file of a folder; None when somebody else holds it, or has removed it meanwhile."""
    from ..store._os import lock

    path = folder / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        if lock(fd) and os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _remove(folder: Path, lock: int) -> None:
    """Remove a folder whose lock we hold; the lock goes last, so that what a kill leaves can still be told to be dead."""
    try:
        for entry in sorted(folder.iterdir(), key=lambda p: p.name == LOCK):
            entry.unlink(missing_ok=True)
        folder.rmdir()
    finally:
        os.close(lock)
