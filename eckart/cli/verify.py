"""`eckart verify`."""

from __future__ import annotations

from pathlib import Path

from .base import Json, app, print_json


@app.command
def verify(folder: Path, /, *, against: str | None = None, as_json: Json = False) -> None:
    """Check every byte of a folder that eckart wrote.

    Parameters
    ----------
    folder:
        What to check.
    against:
        The source: copied tensors must equal it, and none may be missing.
    """
    from ..errors import Refused
    from ..store import verify as run

    found = run(folder, against)
    if as_json:
        print_json({"ok": found.ok, "problems": list(found.problems), "tensors": found.tensors, "bytes": found.bytes})
    elif found.ok:
        print(f"{folder}: {found.tensors} tensors, {found.bytes:,} bytes, all as recorded.")
    if not found.ok:
        raise Refused("\n".join((f"{folder}: not as recorded.", *found.problems)))
