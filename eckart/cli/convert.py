"""`eckart convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .base import Flag, Json, Quiet, app, print_json


@app.command
def convert(
    model: str, /, *, out: Annotated[Path, Parameter(name=("--out", "-o"))], overwrite: Flag = False, as_json: Json = False, quiet: Quiet = False
) -> None:  # fmt: skip
    """Rewrite a model of .bin files as safetensors, without running code that they may hold.

    transformers opens the files, with weights_only, in a process of its own.
    The whole model must fit into memory, and twice its size on the disk.

    Parameters
    ----------
    model:
        Folder with config.json and pytorch_model.bin, or Hub id.
    out:
        Folder to write.
    overwrite:
        Replace the folder once the new one is complete.
    """
    from dataclasses import asdict

    from ..verbs.convert import convert as run

    found = run(model, out, overwrite=overwrite)
    if as_json:
        print_json({**asdict(found), "path": str(found.path)})
        return
    print(f"{found.path}: {found.tensors} tensors, {found.bytes:,} bytes, equal to what {found.model_class} loads.")
    if quiet:
        return
    for title, rows in (("same as", found.kept_as), ("dropped", found.dropped), ("left behind", found.left_behind)):
        for name, text in rows.items():
            print(f"{title}: {name}: {text}")
