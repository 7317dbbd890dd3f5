"""Where every byte of an output goes, known before the first byte is written: a pure function of the tensors and the shard size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import UsageError
from . import _json, dtypes
from .header import MAX_TENSORS, TensorInfo, build_header, check_name, check_shape
from .index import SINGLE

MAX_SHARD = 5_000_000_000  # bytes, the shard size of most published checkpoints
METADATA = {"format": "pt"}  # transformers asks for it


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the output: its name, storage type (a safetensors name, "BF16") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return dtypes.nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One file of the output: its name, its first bytes and its full length."""

    file: str
    head: bytes
    size: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The whole output.

    Args:
        specs: {name: TensorSpec}, in the order given.
        shards: the files.
        places: {name: TensorInfo}, where each tensor goes.
        digest: identity of all this.
    """

    specs: Mapping[str, TensorSpec]
    shards: tuple[Shard, ...]
    places: Mapping[str, TensorInfo]
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)

    def index(self) -> dict[str, object] | None:
        """The content of the index, None when there is a single file."""
        if len(self.shards) == 1:
            return None
        total = sum(spec.nbytes for spec in self.specs.values())
        return {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in self.places.items()}}


def lay_out(specs: Iterable[TensorSpec], max_shard_bytes: int = MAX_SHARD) -> Layout:
    """Spread tensors over files: in the order given, a new file when the next tensor would not fit.

    Inside a file the order is that of the safetensors package (wide types first, then by name), so that a single file is byte for
    byte what that package writes for the same tensors.

    Args:
        specs: the tensors; names are unique.
        max_shard_bytes: most tensor bytes per file; a larger tensor gets a file of its own.

    Raises:
        UsageError: no tensor, a name twice, an unknown type or an impossible shape.
    """
    known: dict[str, TensorSpec] = {}
    for spec in specs:
        check_name(spec.name, "layout")
        if spec.name in known:
            raise UsageError(f"layout: tensor {spec.name!r} is given twice.")
        if spec.dtype not in dtypes.ITEMSIZE:
            raise UsageError(f"layout: tensor {spec.name!r}: dtype {spec.dtype!r} is not known; expected one of {', '.join(dtypes.NAMES)}.")
        check_shape(list(spec.shape), f"layout: tensor {spec.name!r}")
        known[spec.name] = spec
    if not known:
        raise UsageError("layout: there is no tensor to write.")
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes: expected at least 1, found {max_shard_bytes}.")
    groups: list[list[TensorSpec]] = []
    room = -1
    for spec in known.values():
        if spec.nbytes > room or len(groups[-1]) >= MAX_TENSORS:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    shards: list[Shard] = []
    places: dict[str, TensorInfo] = {}
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        group.sort(key=lambda spec: (-dtypes.RANK[spec.dtype], spec.name))
        head = build_header([(spec.name, spec.dtype, spec.shape) for spec in group], METADATA)
        start = len(head)
        for spec in group:
            places[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, spec.nbytes, file, start)
            start += spec.nbytes
        shards.append(Shard(file, head, start, tuple(spec.name for spec in group)))
    digest = hashlib.sha256(_json.line([[shard.file, hashlib.sha256(shard.head).hexdigest()] for shard in shards])).hexdigest()
    return Layout(MappingProxyType(known), tuple(shards), MappingProxyType(places), digest)
