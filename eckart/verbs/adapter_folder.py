"""Adapter folders as PEFT reads them: `adapter_config.json` and `adapter_model.safetensors`, there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Refused
from ..store import check_output

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def check_folder(out: str | Path, sources: Sequence[str | Path], overwrite: bool) -> Path:
    """The absolute path of an adapter folder to be written, checked before any work.

    Raises:
        Refused: it is, holds or lies in a source; it exists and is not ours to replace.
    """
    given = Path(out).expanduser()
    if overwrite and given.is_dir() and not given.is_symlink() and (given / CONFIG).is_file():
        for source in sources:
            if Path(source).expanduser().exists() and given.resolve() == Path(source).expanduser().resolve():
                raise Refused(f"{out}: is the source. Choose another output; sources are never written.")
        return given.resolve()
    return check_output(given, list(sources), overwrite=False)


def write_folder(
    out: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], files: Mapping[str, str | bytes] | None = None
) -> None:
    """Write an adapter folder beside its place, then move it there; an older one goes only when the new one is complete.

    Args:
        out: from `check_folder`.
        tensors: name in the checkpoint -> tensor.
        config: of PEFT's config file.
        files: further files, by name.
    """
    from safetensors.torch import save_file

    with whole_folder(out) as work:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, text in (files or {}).items():
            (work / name).write_bytes(text.encode() if isinstance(text, str) else text)
        for file in work.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside its place, moved there when the block ends well and gone otherwise; what is at the place goes only then."""
    work = out.with_name(f".{out.name}.{os.getpid()}.part")
    work.mkdir()
    try:
        yield work
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        if out.exists():
            os.rename(out, old)
        os.rename(work, out)
        if old.exists():
            shutil.rmtree(old)
    finally:
        if work.exists():
            shutil.rmtree(work)
