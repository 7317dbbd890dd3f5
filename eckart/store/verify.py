"""Is a checkpoint still what was written, and was it made from that source?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused
from ..progress import track
from . import files
from .digest import shard_digests
from .header import TensorInfo
from .index import inside, read_weights
from .manifest import FileRow, Manifest, Row, check_accounts
from .manifest_file import MANIFEST, read_manifest
from .reader import Reader
from .side import NEVER
from .source import infos_of


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Args:
        ok: nothing is wrong.
        problems: what is, each naming the file or tensor.
        tensors: number of tensors whose bytes were checked.
        bytes: bytes that were read and hashed.
        extra: other files of the folder, which the manifest does not know (reports, notes).
    """

    ok: bool
    problems: tuple[str, ...]
    tensors: int
    bytes: int
    extra: tuple[str, ...] = ()


def verify(folder: str | os.PathLike[str], against: str | os.PathLike[str] | Reader | None = None) -> VerifyReport:
    """Check an output of eckart: every byte against the manifest, and with `against` every tensor against the source.

    It does not judge how good a result is. Checksums find damage, not malice: a manifest forged together with the files passes.

    Args:
        folder: the output.
        against: the source it was made from: a folder, a Hub id or a reader.

    Returns:
        A report; damage is in `problems`, not raised.

    Raises:
        Refused: there is no such folder, or it has no readable manifest, or the source cannot be read.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise Refused(f"{path}: no such folder.")
    if not os.path.lexists(path / MANIFEST):
        raise Refused(f"{path}: has no {MANIFEST}; only outputs of eckart can be verified.")
    source = against if against is None or isinstance(against, Reader) else Reader(against)
    try:
        manifest = read_manifest(path)
    except Refused as err:
        return VerifyReport(False, (str(err),), 0, 0)
    problems: list[str] = []
    tensors, count = _check_weights(path, manifest, problems)
    for name, row in manifest.files.items():
        if not name.endswith(".safetensors") or "/" in name:
            _check_file(path, name, row, problems)
            count += row.bytes
    extra = _check_extra(path, manifest, problems)
    if source is not None:
        count += _check_source(manifest, source, problems)
    return VerifyReport(not problems, tuple(problems), tensors, count, extra)


def _check_weights(path: Path, manifest: Manifest, problems: list[str]) -> tuple[int, int]:
    try:
        headers = read_weights(path).headers
    except Refused as err:
        problems.append(str(err))
        return 0, 0
    rows = {row.name: row for row in manifest.rows if row.action != "dropped"}
    found = {tensor.name: tensor for header in headers for tensor in header.tensors}
    problems += [f"tensor {name!r}: in the manifest, not in the weight files." for name in sorted(rows.keys() - found.keys())]
    problems += [f"tensor {name!r}: in {found[name].file}, not in the manifest." for name in sorted(found.keys() - rows.keys())]
    tensors = count = 0
    for header in track(headers, "verifying"):
        try:
            whole, each = shard_digests(inside(path, header.file), header.tensors)
        except Refused as err:
            problems.append(str(err))
            continue
        tensors, count = tensors + len(each), count + header.size
        before = len(problems)
        for tensor in header.tensors:
            if tensor.name in rows:
                _check_tensor(rows[tensor.name], tensor, each[tensor.name], problems)
        if manifest.files.get(header.file) != FileRow(header.size, whole) and len(problems) == before:
            problems.append(f"{header.file}: differs from what was written (its header, or its checksum in the manifest).")
    return tensors, count


def _check_tensor(row: Row, tensor: TensorInfo, digest: str, problems: list[str]) -> None:
    where = f"tensor {row.name!r} in {tensor.file}"
    if (row.dtype, row.shape) != (tensor.dtype, tensor.shape):
        problems.append(f"{where}: is {tensor.dtype} {list(tensor.shape)}, was written as {row.dtype} {list(row.shape)}.")
    elif row.sha256 != digest:
        problems.append(f"{where}: its bytes differ from what was written.")


def _check_file(path: Path, name: str, row: FileRow, problems: list[str]) -> None:
    try:
        found = files.file_digest(inside(path, name))
    except Refused as err:
        problems.append(str(err))
        return
    if found != (row.sha256, row.bytes):
        problems.append(f"{name}: differs from what was written.")


def _check_extra(path: Path, manifest: Manifest, problems: list[str]) -> tuple[str, ...]:
    known = {*manifest.files, MANIFEST}
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
    extra = tuple(name for name in names if name not in known)
    alien = [name for name in extra if Path(name).suffix.lower() in {*NEVER, ".safetensors"} or name.endswith(".index.json")]
    problems += [f"{name}: is not in the manifest; weights or code that appeared later." for name in alien]
    return extra


def _check_source(manifest: Manifest, source: Reader, problems: list[str]) -> int:
    if manifest.source["fingerprint"] != source.fingerprint:
        problems.append(f"source: {source.id} is not the checkpoint this was made from (its fingerprint differs).")
    try:
        check_accounts(manifest.rows, infos_of(source))
    except Refused as err:
        problems.append(str(err))
        return 0
    if (manifest.source["tensors"], manifest.source["bytes"]) != (len(source), source.nbytes):
        said = f"{manifest.source['tensors']} of {manifest.source['bytes']}"
        problems.append(f"source: {len(source)} tensors of {source.nbytes} bytes, the manifest says {said}.")
    count = 0
    for row in track([row for row in manifest.rows if row.action == "copied"], "comparing with the source"):
        count += row.bytes
        try:
            same = source.digest(row.sources[0]) == row.sha256
        except Refused as err:
            problems.append(str(err))
            continue
        if not same:
            problems.append(f"tensor {row.name!r}: is not the copy of {row.sources[0]!r} of the source that the manifest says.")
    return count
