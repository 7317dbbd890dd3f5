"""What travels with the weights: tokenizer, templates, licences. Whatever could run code or is another copy of the weights stays behind."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Refused
from . import files
from .index import check_basename, inside

MAX_FILE = 256 << 20  # bytes
MAX_FILES = 2_000
MAX_DEPTH = 3  # folders below the checkpoint; sentence encoders use one (1_Pooling/)
OURS = frozenset({"eckart.json", "run.json", "report.html", "report.json"})
_PICKLES = ("bin", "pt", "pth", "pkl", "pickle", "ckpt", "joblib", "dill", "npy", "npz", "mar", "nemo", "ot")
_CODE = ("py", "pyc", "pyd", "so", "dll", "dylib", "exe", "sh", "bat", "cmd", "ps1", "js", "jar")
_ARCHIVES = ("zip", "tar", "gz", "tgz", "bz2", "xz", "7z", "zst")
_WEIGHTS = ("h5", "hdf5", "keras", "pb", "tflite", "msgpack", "onnx", "onnx_data", "gguf", "ggml")
NEVER = {f".{suffix}": "holds code, or can" for suffix in (*_PICKLES, *_CODE, *_ARCHIVES)} | {
    f".{suffix}": "weights in another format" for suffix in _WEIGHTS
}


@dataclass
class Side:
    """Files beside the weights: `carried` {relative name: real path}, `left` {relative name: reason}."""

    carried: dict[str, Path] = field(default_factory=dict[str, Path])
    left: dict[str, str] = field(default_factory=dict[str, str])


def find_side_files(folder: Path, used: Collection[str]) -> Side:
    """Sort the other files of a checkpoint's folder into those that are carried over and those that are left behind.

    Args:
        folder: the checkpoint.
        used: names of the weight files and the index, which are neither.
    """
    side = Side()
    with files.reading(folder):
        _walk(folder, "", frozenset(used) | {"config.json"} | OURS, side)
    return side


def _walk(folder: Path, prefix: str, skip: frozenset[str], side: Side) -> None:
    for entry in sorted(os.scandir(folder / prefix), key=lambda entry: entry.name):
        name = prefix + entry.name
        if name in skip:
            continue
        reason = _reason(folder, name, entry)
        if reason is not None:
            side.left[name] = reason
        elif entry.is_dir(follow_symlinks=False):
            _walk(folder, name + "/", skip, side)
        else:
            side.carried[name] = inside(folder, name)
        if len(side.carried) > MAX_FILES:
            raise Refused(f"{folder}: more than {MAX_FILES} files beside the weights.")


def _reason(folder: Path, name: str, entry: os.DirEntry[str]) -> str | None:
    suffix = Path(name).suffix.lower()
    top = "/" not in name
    try:
        check_basename(entry.name, str(folder))
    except Refused:
        return "its name is not portable"
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return f"more than {MAX_DEPTH} folders deep" if name.count("/") >= MAX_DEPTH else None
    if suffix in NEVER:
        return NEVER[suffix]
    if (top and suffix == ".safetensors") or name.endswith(".index.json"):
        return "weights that are not part of this checkpoint"
    try:
        real = inside(folder, name)
    except Refused:
        return "links out of the folder, or to nothing"
    if not real.is_file():
        return "not a regular file"
    return f"larger than {MAX_FILE} bytes" if real.stat().st_size > MAX_FILE else None
