"""A checkpoint that is read one tensor at a time: headers first, nothing mapped, never opened for writing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import Refused, did_you_mean
from ..progress import track
from . import _json, dtypes, files
from .header import Header, TensorInfo
from .index import inside, read_weights
from .locate import locate
from .side import Side, find_side_files

if TYPE_CHECKING:
    from torch import Tensor

MAX_CONFIG = 16 << 20  # bytes
SAMPLE = 4096  # bytes read from the middle of each tensor for the fingerprint


class Reader:
    """A safetensors checkpoint: a local folder (one file or shards), a single file, or an id on the Hugging Face Hub.

    It is not a model: tensors have names, types and shapes, nothing more. Index and headers are checked as hostile input before the
    first tensor is read. One tensor is in memory at a time, and threads may read at once.

    Args:
        source: a folder, a `.safetensors` file, or `org/name` or `org/name@revision` on the Hub.
        revision: branch, tag or commit of a Hub id.

    Attributes:
        path: the local folder.
        id: `org/name@revision`, or the folder's own name.
        config: the parsed `config.json`; empty when there is none.
        metadata: the free strings of the weight files.
        aliases: {name that is not stored: name that holds the same values}, as `safetensors.torch.save_model` records ties.

    Raises:
        Refused: no checkpoint, a damaged or hostile one, or one in a format that can run code.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"weight": torch.ones(2, 3)}, folder + "/model.safetensors")
        ...     reader = Reader(folder)
        ...     reader.keys(), reader.info("weight").shape, float(reader.read("weight").sum())
        (('weight',), (2, 3), 6.0)
    """

    def __init__(self, source: str | os.PathLike[str], *, revision: str | None = None) -> None:
        place = locate(source, revision)
        self.path = place.folder
        self.id = place.id
        weights = read_weights(place.folder, place.only)
        self._headers = {header.file: header for header in weights.headers}
        self._index = weights.index
        self._real = {file: inside(place.folder, file) for file in self._headers}
        self._seen = {file: _state(path) for file, path in self._real.items()}
        self._tensors = {t.name: t for t in sorted((t for h in weights.headers for t in h.tensors), key=lambda t: t.name)}
        self.metadata: Mapping[str, str] = MappingProxyType({k: v for h in reversed(weights.headers) for k, v in h.metadata.items()})
        self.config: dict[str, Any] = read_config(place.folder)

    def keys(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Type, shape, size and place of a tensor, from the header alone."""
        if name not in self._tensors:
            raise Refused(f"{self.path}: there is no tensor {name!r}.{did_you_mean(name, self._tensors)}")
        return self._tensors[name]

    @property
    def headers(self) -> tuple[Header, ...]:
        """The headers of the weight files, sorted by file name."""
        return tuple(self._headers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        found = {k: v for k, v in self.metadata.items() if k not in self._tensors and v in self._tensors}
        return MappingProxyType(dict(sorted(found.items())))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, in fresh memory, in its storage type.

        Args:
            name: the tensor.
            rows: read only [start, stop) of the first dimension.

        Raises:
            Refused: no such tensor, a damaged file, a file that has changed since it was opened, or a BOOL that is neither 0 nor 1. Other
                values are not judged.
        """
        info = self.info(name)
        shape, start = info.shape, info.start
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise Refused(f"tensor {name!r}: rows {rows} are not in a tensor of shape {shape}.")
            row = info.nbytes // shape[0] if shape[0] else 0
            shape, start = (rows[1] - rows[0], *shape[1:]), start + rows[0] * row
        tensor, memory = dtypes.empty(info.dtype, shape)
        with self._open(info) as fd:
            files.read_at(fd, memory, start, f"{info.file}: tensor {name!r}")
        if info.dtype == "BOOL" and len(memory) and bytes(memory).translate(None, b"\0\1"):
            raise Refused(f"{info.file}: tensor {name!r} is BOOL and holds bytes other than 0 and 1.")
        return tensor

    def raw(self, name: str, chunk: int = files.CHUNK) -> Iterator[bytes]:
        """The stored bytes of a tensor, in pieces of at most `chunk` bytes."""
        info = self.info(name)
        with self._open(info) as fd:
            for piece in files.chunks(fd, info.start, info.nbytes, f"{info.file}: tensor {name!r}", chunk):
                yield bytes(piece)

    def digest(self, name: str) -> str:
        """sha256 of the stored bytes of a tensor."""
        digest = hashlib.sha256()
        info = self.info(name)
        with self._open(info) as fd:
            for piece in files.chunks(fd, info.start, info.nbytes, f"{info.file}: tensor {name!r}"):
                digest.update(piece)
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identity from names, sizes, headers, the config and 4 KiB out of the middle of each tensor.

        Cheap, and the same wherever the files lie. It tells another fine-tune of the same shape apart, but not an edit of single rows;
        `content_hash` does, and `stamp` notices any rewrite.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"eckart source 1\n")
        for header in self.headers:
            digest.update(_json.line([header.file, header.size, header.digest]))
            for info in header.tensors:
                take = min(SAMPLE, info.nbytes)
                sample = bytearray(take)
                with self._open(info) as fd:
                    files.read_at(fd, memoryview(sample), info.start + (info.nbytes - take) // 2, f"{info.file}: tensor {info.name!r}")
                digest.update(sample)
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def stamp(self) -> str:
        """Identity of the files on this disk (names, sizes, times): changes with any rewrite. For resuming, not for a manifest."""
        return hashlib.sha256(_json.line([[file, *state] for file, state in self._seen.items()])).hexdigest()

    def content_hash(self) -> str:
        """sha256 over all tensors (name, type, shape, bytes), independent of how they are spread over files. Reads everything."""
        digest = hashlib.sha256(b"eckart content 1\n")
        for info in track(tuple(self._tensors.values()), "hashing"):
            digest.update(_json.line([info.name, info.dtype, list(info.shape), self.digest(info.name)]))
        return digest.hexdigest()

    @cached_property
    def _side(self) -> Side:
        return find_side_files(self.path, {*self._headers, *([self._index] if self._index else [])})

    @property
    def side_files(self) -> tuple[str, ...]:
        """Relative names of the files that travel with the weights: tokenizer, templates, licence, module folders."""
        return tuple(self._side.carried)

    @property
    def left_behind(self) -> Mapping[str, str]:
        """{relative name: reason} of the files that do not: code, pickles, other copies of the weights."""
        return MappingProxyType(self._side.left)

    def side_path(self, name: str) -> Path:
        """The real path of a side file."""
        if name not in self._side.carried:
            raise Refused(f"{self.path}: {name!r} is not a side file of this checkpoint.{did_you_mean(name, self._side.carried)}")
        return self._side.carried[name]

    def carry(self) -> dict[str, Path]:
        """{relative name: path} of all side files, as `Writer.commit` takes them."""
        return dict(self._side.carried)

    @contextlib.contextmanager
    def _open(self, info: TensorInfo) -> Generator[int, None, None]:
        with files.open_regular(self._real[info.file]) as (fd, now):
            if (now.st_size, now.st_mtime_ns) != self._seen[info.file]:
                raise Refused(f"{self._real[info.file]}: has changed since it was opened.")
            yield fd


def _state(path: Path) -> tuple[int, int]:
    with files.reading(path):
        info = path.stat()
    return info.st_size, info.st_mtime_ns


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder, checked as hostile input; empty when there is none."""
    if not os.path.lexists(folder / "config.json"):
        return {}
    where = str(folder / "config.json")
    raw = files.read_small(inside(folder, "config.json"), MAX_CONFIG)
    return _json.as_dict(_json.parse(raw, where, nodes=10**6, items=4 * 10**6, nan=True), where)
