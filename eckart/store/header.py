"""The header of a safetensors file, read as hostile input and written for our own files.

Layout of a file: 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused
from . import _json, dtypes, files

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package
MAX_TENSORS = 250_000  # per file; the largest published checkpoints have 10**5 over all files
MAX_NAME = 1024  # characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at byte `start` of `file` (a basename)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    start: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Args:
        file: its basename.
        size: bytes of the whole file.
        tensors: in the order of their bytes.
        metadata: the free strings of the file.
        digest: sha256 of everything before the first tensor.
    """

    file: str
    size: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    digest: str


def check_name(name: _json.Json, where: str) -> str:
    """A tensor's name that can be shown and stored: 1 to 1024 characters, no control characters, valid UTF-8."""
    text = _json.as_str(name, f"{where}: name of a tensor", MAX_NAME)
    if not text or text == "__metadata__" or _CONTROL.search(text):
        raise Refused(f"{where}: {_json.short(text)} cannot be the name of a tensor.")
    return text


def check_shape(shape: _json.Json, where: str) -> tuple[int, ...]:
    """A list of at most 64 sizes whose product (zeros taken as one) stays below 2**63."""
    sizes = _json.as_list(shape, f"{where}: shape")
    if len(sizes) > dtypes.MAX_DIMS:
        raise Refused(f"{where}: shape has {len(sizes)} dimensions, expected at most {dtypes.MAX_DIMS}.")
    checked = tuple(_json.as_int(size, f"{where}: shape") for size in sizes)
    if math.prod(max(size, 1) for size in checked) >= 1 << 63:
        raise Refused(f"{where}: shape has 2**63 or more elements.")
    return checked


def read_header(path: Path) -> Header:
    """Read and check the header of a file; tensors are not read.

    Raises:
        Refused: anything in the header or the length of the file is not as the format says; the file and the tensor are named.
    """
    with files.open_regular(path) as (fd, info):
        prefix = bytearray(min(8, info.st_size))
        files.read_at(fd, memoryview(prefix), 0, path.name)
        head = bytearray(8 + _length(prefix, info.st_size, path.name))
        files.read_at(fd, memoryview(head), 0, path.name)
        return parse_header(bytes(head), info.st_size, path.name)


def parse_header(head: bytes, size: int, file: str) -> Header:
    """Check the first bytes of a file (prefix and JSON) against the length of the file; pure.

    Args:
        head: at least the prefix and the JSON; what follows is ignored.
        size: bytes of the whole file.
        file: name for messages and results.
    """
    length = _length(head[:8], size, file)
    raw = head[8 : 8 + length]
    if len(raw) != length or not raw.startswith(b"{"):
        raise Refused(f"{file}: the header does not start with '{{'; this is not a safetensors file.")
    found = _json.as_dict(_json.parse(raw, f"{file}: header", nodes=3 * MAX_TENSORS + 2, items=16 * MAX_TENSORS), f"{file}: header")
    metadata: dict[str, str] = {}
    for key, value in _json.as_dict(found.pop("__metadata__", {}), f"{file}: __metadata__").items():
        metadata[_json.as_str(key, f"{file}: __metadata__")] = _json.as_str(value, f"{file}: __metadata__", MAX_HEADER)
    if len(found) > MAX_TENSORS:
        raise Refused(f"{file}: {len(found)} tensors, expected at most {MAX_TENSORS}.")
    start = 8 + length
    tensors = sorted((_entry(name, entry, file, start) for name, entry in found.items()), key=lambda t: (t.start, t.nbytes, t.name))
    end = start
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise Refused(f"{file}: tensor {tensor.name!r} {fault}: expected offset {end - start}, found {tensor.start - start}.")
        end += tensor.nbytes
    if end != size:
        raise Refused(f"{file}: the header describes {end} bytes, the file has {size}; it is damaged or incomplete.")
    return Header(file, size, tuple(tensors), metadata, hashlib.sha256(head[:start]).hexdigest())


def _length(prefix: bytes | bytearray, size: int, file: str) -> int:
    if size < 8 or len(prefix) < 8:
        raise Refused(f"{file}: {size} bytes are too few for a safetensors file.")
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= MAX_HEADER:
        raise Refused(f"{file}: header of {length} bytes, expected 2 to {MAX_HEADER}; this is not a safetensors file.")
    if 8 + length > size:
        raise Refused(f"{file}: header of {length} bytes in a file of {size}; it is damaged or incomplete.")
    return length


def _entry(key: str, value: _json.Json, file: str, start: int) -> TensorInfo:
    name = check_name(key, file)
    where = f"{file}: tensor {name!r}"
    entry = _json.as_dict(value, where)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{where}: expected the keys dtype, shape and data_offsets, found {_json.short(', '.join(sorted(entry)))}.")
    dtype = _json.as_str(entry["dtype"], f"{where}: dtype")
    if dtype not in dtypes.ITEMSIZE:
        raise Refused(f"{where}: dtype {_json.short(dtype)} is not known; expected one of {', '.join(dtypes.NAMES)}.")
    shape = check_shape(entry["shape"], where)
    offsets = _json.as_list(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2:
        raise Refused(f"{where}: data_offsets has {len(offsets)} numbers, expected 2.")
    begin, end = (_json.as_int(offset, f"{where}: data_offsets") for offset in offsets)
    expected = dtypes.nbytes(dtype, shape)
    if end - begin != expected:
        raise Refused(f"{where}: {dtype} {list(shape)} needs {expected} bytes, data_offsets give {end - begin}.")
    return TensorInfo(name, dtype, shape, expected, file, start + begin)


def build_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds (name, dtype, shape) in this order; padded so that the data start at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + dtypes.nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise Refused(f"the header would have {len(raw)} bytes, expected at most {MAX_HEADER}; use smaller shards.")
    return len(raw).to_bytes(8, "little") + raw
