"""Where an output may go: never onto, into or around a source, never over something that is not ours."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import Refused
from .manifest_file import MANIFEST
from .reader import Reader
from .work import siblings

MARGIN = 64 << 20  # bytes left free
MAX_BASENAME = 200  # characters; the work folder's name is longer
_CACHE_FOLDER = re.compile(r"(models|datasets|spaces)--")


def check_output(
    out: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str] | Reader] = (),
    overwrite: bool = False,
    *,
    nbytes: int = 0,
) -> Path:
    """Check an output folder before any work; nothing is created.

    Args:
        out: the folder to be made; its parent exists.
        sources: what the run reads: folders, files or readers.
        overwrite: an earlier eckart output may be there and is to be replaced at the end.
        nbytes: bytes the run will write, 0 when unknown.

    Returns:
        The absolute path of the output, links in its parent resolved.

    Raises:
        Refused: the output exists; is, contains or lies in a source; lies in a Hugging Face cache; is a link; cannot be written; does not
            fit on the disk.
    """
    path = resolve_output(out)
    for source in sources:
        _check_apart(path, source)
    _check_cache(path)
    _check_replaceable(path, overwrite)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise Refused(f"{path.parent}: is not writable.")
    _check_space(path, nbytes)
    return path


def resolve_output(out: str | os.PathLike[str]) -> Path:
    """The absolute path of an output whose parent exists, links in the parent resolved; the output itself is no link."""
    given = Path(os.path.abspath(Path(out).expanduser()))
    if not given.name:
        raise Refused(f"{out}: expected the name of a new folder.")
    if len(given.name) > MAX_BASENAME:
        raise Refused(f"{out}: the name has {len(given.name)} characters, expected at most {MAX_BASENAME}.")
    if not given.parent.is_dir():
        raise Refused(f"{given.parent}: no such folder. Make it first: mkdir -p {given.parent}")
    path = given.parent.resolve() / given.name
    if path.is_symlink():
        raise Refused(f"{path}: is a link to {os.readlink(path)}; give the path of the folder itself.")
    return path


def _check_apart(out: Path, source: str | os.PathLike[str] | Reader) -> None:
    if isinstance(source, Reader):
        root, used = source.path, [source.path / header.file for header in source.headers]
    else:
        root = Path(source).expanduser().resolve()
        used = sorted(entry for entry in root.iterdir() if entry.is_file()) if root.is_dir() else [root]
    if not root.exists():
        return
    if _same(out, root):
        raise Refused(f"{out}: is the source. Choose another output; sources are never written.")
    if _under(out, root):
        raise Refused(f"{out}: lies in the source {root}. Choose an output outside it.")
    for file in [root, *used]:
        if _under(file.resolve(), out):
            raise Refused(f"{out}: holds the source {file}. Choose another output.")
    theirs = {_identity(file) for file in used if file.exists()}
    for file in _files(out):
        if _identity(file) in theirs:
            raise Refused(f"{out}: {file.name} is the same file as one of the source {root} (a hard link). Choose another output.")


def _check_cache(out: Path) -> None:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    caches = [home / "hub", *(Path(os.environ[name]) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if os.environ.get(name))]
    in_repository = any(
        _CACHE_FOLDER.match(part.name) and {p.name for p in (part / "snapshots", part / "blobs") if p.is_dir()} for part in out.parents
    )
    if in_repository or any(_under(out, cache.expanduser().resolve()) for cache in caches):
        raise Refused(f"{out}: lies in a Hugging Face cache, whose files other programs rely on. Choose another output.")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise Refused(f"{out}: exists and is not a folder.")
    entries = sorted(entry.name for entry in out.iterdir())
    if not entries:
        return
    if not overwrite:
        raise Refused(f"{out}: exists and is not empty (it has {entries[0]}). Choose another output, or add --overwrite.")
    if MANIFEST not in entries:
        raise Refused(
            f"{out}: is not an output of eckart (it has no {MANIFEST}), so it is not overwritten. Remove it yourself if it may go."
        )


def _check_space(out: Path, nbytes: int) -> None:
    if not nbytes:
        return
    there = sum(_blocks(file) for work in siblings(out) for file in _files(work))
    free = shutil.disk_usage(out.parent).free + there
    if nbytes + MARGIN > free:
        raise Refused(f"{out.parent}: {free / 1e9:.2f} GB free, {(nbytes + MARGIN) / 1e9:.2f} GB needed.")


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them does not exist
        return a == b


def _under(path: Path, folder: Path) -> bool:
    return any(_same(parent, folder) for parent in path.parents)


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else ()


def _identity(file: Path) -> tuple[int, int]:
    info = file.stat()
    return info.st_dev, info.st_ino


def _blocks(file: Path) -> int:
    info = file.stat()
    return getattr(info, "st_blocks", info.st_size // 512) * 512
