"""`eckart export-lora`."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from .adapt import hush
from .base import Flag, Json, Out, app, print_json


@app.command(name="export-lora")
def export_lora(adapter: Path, /, *, out: Out = None, base: str | None = None, overwrite: Flag = False, as_json: Json = False) -> None:
    """Write an adapter as plain LoRA, which loads without eckart.

    Parameters
    ----------
    adapter:
        Adapter folder that eckart wrote.
    out:
        Folder to write.
    base:
        Base model, where the adapter does not say where it is.
    overwrite:
        Replace an earlier adapter folder.
    """
    if out is None:
        raise UsageError("export-lora writes a folder: give -o OUT.")
    hush()
    from ..hub.peft.export import export_lora as run

    found = run(adapter, out, base=base, overwrite=overwrite)
    if as_json:
        print_json({"path": str(found.path), "ranks": found.ranks, "logits": found.logits, "weights": found.weights})
        return
    ranks = sorted(set(found.ranks.values()))
    print(f"{len(found.ranks)} layers at rank {', '.join(map(str, ranks))}.")
    if found.logits is not None:
        print(f"Loaded as plain LoRA, outputs differ by at most {found.logits:.1e} of the largest.")
    print(f"lora: {found.path}")
