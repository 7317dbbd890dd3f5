"""From what a user names (a folder, a weight file, a Hub id) to a local folder. Only data files are ever fetched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused
from . import files
from .index import conversion

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?(@[\w./-]{1,200})?")
FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*")
NOT_FETCHED = ("consolidated*.safetensors", "original/*", "onnx/*", "openvino/*", "*.bin.index.json")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is.

    Args:
        folder: the local folder, resolved.
        only: the one weight file that was named, None when the folder was.
        id: what names it in a manifest: `org/name@revision`, or the folder's own name (never a path of this machine).
    """

    folder: Path
    only: str | None
    id: str


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Place:
    """Find a checkpoint on this machine, or fetch it from the Hugging Face Hub.

    Args:
        source: a folder, a `.safetensors` file, or a Hub id (`org/name`, `org/name@revision`).
        revision: branch, tag or commit of a Hub id.

    Raises:
        Refused: nothing is there, or it is a file that is never opened.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = path.resolve()
        return Place(folder, None, _id(folder))
    if path.is_file():
        if path.suffix != ".safetensors":
            command = conversion(path.parent, [entry.name for entry in path.parent.iterdir()])
            raise Refused(
                f"{path}: expected a folder or a .safetensors file. If it holds weights that you trust, convert them:\n  {command}"
            )
        return Place(path.parent.resolve(), path.name, _id(path.parent.resolve()))
    text = str(source)
    if not isinstance(source, str) or not _HUB_ID.fullmatch(text) or ".." in text:
        raise Refused(f"{text}: no such folder or file, and not the id of a model on the Hugging Face Hub.")
    name, _, tag = text.partition("@")
    folder = _fetch(name, revision or tag or None)
    return Place(folder, None, _id(folder))


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        # falls back to the cache by itself when the Hub cannot be reached
        got = snapshot_download(name, revision=revision, allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED))
    except Exception as err:  # what the client and its network library raise has no common base
        raise Refused(f"{name}: no such folder here, and the Hugging Face Hub did not give it ({_first_line(err)}).") from err
    with files.reading(name):
        return Path(str(got)).resolve(strict=True)


def _id(folder: Path) -> str:
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return f"{folder.parent.parent.name.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name


def _first_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else type(err).__name__
