"""Writing the tensors of one job into the preallocated shards: from any thread or process that sees the work folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import _os, dtypes, files
from .header import TensorInfo
from .journal import Entry, plain

if TYPE_CHECKING:
    from torch import Tensor

Pieces = Callable[[], "Iterator[memoryview] | Iterator[bytes]"]


def check(job: str, tensors: Mapping[str, Tensor], places: Mapping[str, TensorInfo]) -> None:
    """Every tensor has the type and shape that its place is made for.

    Raises:
        UsageError: it has not, or has no place.
    """
    for name, tensor in tensors.items():
        place = places.get(name)
        if place is None:
            raise UsageError(f"job {job!r}: tensor {name!r} is not in the layout of this output.")
        if tuple(tensor.shape) != tuple(place.shape) or dtypes.name_of(tensor.dtype) != place.dtype:
            found = f"{dtypes.name_of(tensor.dtype)} {list(tensor.shape)}"
            raise UsageError(f"job {job!r}: tensor {name!r} is {found}, the layout has {place.dtype} {list(place.shape)}.")


def write_job(
    folder: str | Path, places: Mapping[str, TensorInfo], job: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None
) -> Entry:
    """Write the tensors of a job where they belong; when this returns they survive a power cut. The journal is not touched.

    Not for a process that does not hold the run's lock on behalf of somebody who does: `Writer.adopt` makes the result count.

    Args:
        folder: the folder with the shards, `Writer.shards`.
        places: {tensor: where it goes}, of `Writer.layout.places`.
        job: its name.
        tensors: {name: tensor}, as the layout has them.
        record: a few plain values.

    Returns:
        What the journal will say of the job.

    Raises:
        UsageError: a tensor without a place, or of another type or shape.
        OSError: the disk failed.
    """
    check(job, tensors, places)
    digests = write_pieces(Path(folder), places, {name: partial(one_piece, tensor) for name, tensor in tensors.items()})
    return Entry(job, digests, plain(job, record or {}))


def write_pieces(folder: Path, places: Mapping[str, TensorInfo], pieces: Mapping[str, Pieces]) -> dict[str, str]:
    """Write named byte streams into their places, sync every file once, and return the sha256 of each."""
    digests: dict[str, str] = {}
    by_file: dict[str, list[str]] = {}
    for name in sorted(pieces):
        by_file.setdefault(places[name].file, []).append(name)
    for file, names in by_file.items():
        with files.opened(folder / file, _os.UPDATE) as fd:
            for name in names:
                start = places[name].start
                digests[name] = stream(pieces[name], lambda piece, at, fd=fd, start=start: files.write_at(fd, piece, start + at))
            _os.fsync(fd)
    return digests


def one_piece(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor at once."""
    yield dtypes.to_bytes(tensor)


def stream(pieces: Pieces, use: Callable[[memoryview, int], None]) -> str:
    """Hand every piece with its offset to `use`; returns the sha256 of all."""
    # the generator is closed here and not by the garbage collector: it may hold a file open
    digest, offset, parts = hashlib.sha256(), 0, pieces()
    try:
        for part in parts:
            piece = memoryview(part)
            use(piece, offset)
            digest.update(piece)
            offset += len(piece)
    finally:
        if isinstance(parts, Generator):
            parts.close()
    return digest.hexdigest()
