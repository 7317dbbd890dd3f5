"""Which weight files a folder holds, with index and headers checked against each other as hostile input."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import Refused
from . import _json, files
from .header import Header, check_name, read_header

MAX_INDEX = 100_000_000  # bytes
MAX_NAMES = 1_000_000  # tensors over all files
MAX_FILES = 10_000
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_UNSAFE = re.compile(r"[\x00-\x1f\x7f:*?\"<>|]")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # Windows opens these as devices in every folder


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder.

    Args:
        headers: one per file, sorted by file name.
        index: basename of the index, None for a single file.
    """

    headers: tuple[Header, ...]
    index: str | None


def check_basename(name: _json.Json, where: str, suffix: str = "") -> str:
    """A file name that stays in its folder on every system: no separator, drive, root, `..`, device or control character."""
    text = _json.as_str(name, f"{where}: file name", 255)
    plain = PureWindowsPath(text).name == text and PurePosixPath(text).name == text and text not in (".", "..", "")
    if not plain or _UNSAFE.search(text) or _DEVICE.match(text) or not text.endswith(suffix) or text.endswith((" ", ".")):
        raise Refused(f"{where}: {_json.short(text)} is not the plain name of a file{' that ends in ' + suffix if suffix else ''}.")
    return text


def check_relative(name: _json.Json, where: str) -> str:
    """The name of a file below a folder: plain names joined by "/"."""
    text = _json.as_str(name, f"{where}: file name")
    for part in text.split("/"):
        check_basename(part, where)
    return text


def inside(folder: Path, relative: str) -> Path:
    """The real path of a file of a folder; refused when a link leads out of it.

    The one exception is the cache of the Hugging Face Hub, where `snapshots/<revision>/file` links to `blobs/` of the same repository.
    """
    root = folder.resolve()
    path = root / relative
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as err:  # a loop of links is a RuntimeError on Python 3.11 and 3.12
        raise Refused(f"{path}: cannot be read ({getattr(err, 'strerror', None) or err}).") from err
    if real.is_relative_to(root):
        return real
    if root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent.resolve() / "blobs"):
        return real
    raise Refused(f"{path}: links to {real}, outside the folder of the checkpoint.")


def parse_index(raw: bytes, where: str, suffix: str = ".safetensors") -> dict[str, str]:
    """{tensor: file} of an index; pure.

    Args:
        raw: its bytes.
        where: named in a refusal.
        suffix: how every file must end.

    Raises:
        Refused: not an index, or a name in it is not acceptable.
    """
    top = _json.as_dict(_json.parse(raw, where, nodes=1000, items=MAX_NAMES + 1000), where)
    if "weight_map" not in top:
        raise Refused(f"{where}: has no weight_map.")
    found = _json.as_dict(top["weight_map"], f"{where}: weight_map")
    if not 1 <= len(found) <= MAX_NAMES:
        raise Refused(f"{where}: weight_map has {len(found)} tensors, expected 1 to {MAX_NAMES}.")
    result: dict[str, str] = {}
    known: set[str] = set()
    for name, file in found.items():
        if not isinstance(file, str) or file not in known:
            known.add(check_basename(file, f"{where}: tensor {_json.short(name)}", suffix))
        result[check_name(name, where)] = str(file)
    if len(known) > MAX_FILES:
        raise Refused(f"{where}: {len(known)} files, expected at most {MAX_FILES}.")
    return result


def read_weights(folder: Path, only: str | None = None) -> Weights:
    """Read the headers of a folder's checkpoint.

    Args:
        folder: where to look: `model.safetensors`, else an index, else the only `.safetensors` file (the order of transformers).
        only: take this file and no other.

    Raises:
        Refused: no checkpoint, an incomplete one, one that only comes as pickles, or a hostile one.
    """
    with files.reading(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    single = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if only is None and SINGLE in single:
        only = SINGLE
    if only is None and indexes:
        index = INDEX if INDEX in indexes else indexes[0]
        if index != INDEX and len(indexes) > 1:
            raise Refused(f"{folder}: has {len(indexes)} indexes and none is named {INDEX}; name one weight file instead of the folder.")
        return Weights(_sharded(folder, index), index)
    if only is None and len(single) == 1:
        only = single[0]
    if only is not None:
        header = read_header(inside(folder, check_basename(only, str(folder), ".safetensors")))
        return Weights((_named(header, only),), None)
    if single:
        raise Refused(f"{folder}: has {len(single)} .safetensors files and no {INDEX} that says which tensor is where.")
    raise Refused(_no_weights(folder, names))


def _sharded(folder: Path, index: str) -> tuple[Header, ...]:
    where = inside(folder, check_basename(index, str(folder)))
    wanted = parse_index(files.read_small(where, MAX_INDEX), f"{folder / index}")
    headers = tuple(_named(read_header(inside(folder, file)), file) for file in sorted(set(wanted.values())))
    check_agreement(wanted, headers, str(folder / index))
    return headers


def check_agreement(index: Mapping[str, str], headers: tuple[Header, ...], where: str) -> None:
    """Every tensor of the index is in the file it names, and the files hold no other."""
    found: dict[str, str] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in found:
                raise Refused(f"{where}: tensor {tensor.name!r} is in {found[tensor.name]} and in {header.file}.")
            found[tensor.name] = header.file
    for name, file in index.items():
        if found.get(name) != file:
            raise Refused(f"{where}: tensor {name!r} should be in {file}, found in {found.get(name, 'no file')}.")
    for name in found.keys() - index.keys():
        raise Refused(f"{where}: tensor {name!r} of {found[name]} is not in the index.")


def _named(header: Header, file: str) -> Header:
    # in a Hub cache the real file is blobs/<sha>; results carry the name that the folder shows
    return header if header.file == file else replace(header, file=file, tensors=tuple(replace(t, file=file) for t in header.tensors))


def _no_weights(folder: Path, names: list[str]) -> str:
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return f"{folder}: the weights are in {pickled[0]}, a format that can run code when it is opened. {conversion(folder)}"
    if hub_id(folder) is None:
        return f"{folder}: no .safetensors file found."
    return (
        f"{hub_id(folder)}: no .safetensors file in the cache of the Hugging Face Hub ({folder}). If the repository has one, repeat this with "
        f"a network: it was only fetched in part. If its weights are pickles: {conversion(folder)}"
    )


def hub_id(folder: Path) -> str | None:
    """`org/name@revision` of a folder in a Hugging Face cache, None elsewhere."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return f"{folder.parent.parent.name.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return None


def conversion(folder: Path) -> str:
    """The command that rewrites a folder of pickles as safetensors."""
    model = hub_id(folder)
    new = f"{model.partition('@')[0].rpartition('/')[2]}-safetensors" if model else f"{folder}-safetensors"
    return f"It is converted once, through a loader that runs no code:\n  eckart convert {shlex.quote(model or str(folder))} -o {shlex.quote(new)}"
