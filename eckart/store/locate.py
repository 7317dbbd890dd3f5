"""From what a user names (a folder, a weight file, a Hub id) to a local folder. Only data files are ever fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused
from . import files
from .index import PICKLED, conversion, hub_id

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?(@[\w./-]{1,200})?")
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
            raise Refused(
                f"{path}: expected a folder or a .safetensors file.{f' {conversion(path.parent)}' if path.name.endswith(PICKLED) else ''}"
            )
        return Place(path.parent.resolve(), path.name, _id(path.parent.resolve()))
    text = str(source)
    if not isinstance(source, str) or not HUB_ID.fullmatch(text) or ".." in text:
        raise Refused(f"{text}: no such folder or file, and not the id of a model on the Hugging Face Hub.")
    name, _, tag = text.partition("@")
    folder = fetch(name, revision or tag or None)
    return Place(folder, None, _id(folder))


def _id(folder: Path) -> str:
    return hub_id(folder) or folder.name


def fetch(name: str, revision: str | None, patterns: Sequence[str] = FETCHED, but: Sequence[str] = NOT_FETCHED) -> Path:
    """The local folder of a repository of the Hub, fetched unless it is in the cache.

    Args:
        name: `org/name`.
        revision: branch, tag or commit; None is the main branch.
        patterns: names of the files that are wanted.
        but: names that are not, though they fit a pattern.

    Raises:
        Refused: it is not in the cache and the Hub did not give it.
    """
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # falls back to the cache by itself when the Hub cannot be reached
        got = snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(but))
    except LocalEntryNotFoundError as err:
        raise Refused(
            f"{name}: no such folder here, it is not in the cache of the Hugging Face Hub, and the Hub cannot be reached ({_first_line(err)}). "
            f"With a network: hf download {name}{f' --revision {revision}' if revision else ''}"
        ) from err
    except Exception as err:  # what the client and its network library raise has no common base
        raise Refused(f"{name}: no such folder here, and the Hugging Face Hub did not give it ({_first_line(err)}).") from err
    with files.reading(name):
        return Path(str(got)).resolve(strict=True)


def _first_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(err).__name__
