"""The folder of a search: its work beside the place where it will be, and its files, there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..axes.border import to_dict
from ..axes.protocols import Stat
from ..axes.recipe import Recipe
from ..errors import Refused
from ..store import check_output
from ..store.files import replace_file
from .output import lasting_part, versions

JSON, HTML = "search.json", "search.html"
IDENTITY, NOTES, RESULT, OLD = "identity.json", "evaluations.jsonl", "result", "old"
OURS = re.compile(rf"{IDENTITY}|{NOTES}|{RESULT}(\..*)?|{OLD}|statistics-[0-9a-f]{{16}}\.safetensors(\.part)?|.*\.new")
Known = dict[tuple[str, int], tuple[float, float]]
"""(candidate with its size, batches) -> (loss, stored share)."""


class Folder:
    """Where a search is written. Statistics and evaluations lie in ".NAME.search" until it is done, so that the same command goes on after a kill.

    Args:
        out: the folder to be made.
        source: folder of the model, which is never written.
        overwrite: an earlier output of ours may be there, and is replaced at the end.

    Raises:
        Refused: it is not ours to write.
    """

    def __init__(self, out: Path, source: Path | None, overwrite: bool) -> None:
        sources = [source] if source is not None else []
        earlier = sorted(out.glob("keep-*")) if overwrite and _holds_sizes(out) else []
        for part in earlier:
            check_output(part, sources, overwrite=True)
        self.out = out.absolute() if earlier else check_output(out, sources, overwrite)
        self.work = self.out.with_name(f".{self.out.name}.search")
        self.result = self.work / RESULT

    def open(self, marks: Sequence[str]) -> None:
        """Begin, or go on with what an interrupted search of the same model, text and settings has left; anything else there is dropped."""
        identity = json.dumps([*marks, versions()], sort_keys=True)
        mark = self.work / IDENTITY
        if self.work.is_symlink() or (self.work.exists() and not self.work.is_dir()):
            raise Refused(f"{self.work}: is where a search works, and is no folder. Move it away.")
        if self.work.exists():
            strange = [p.name for p in self.work.iterdir() if not OURS.fullmatch(p.name)]
            if strange:
                raise Refused(f"{self.work}: is named like the work of a search and is not that (it has {strange[0]}). Move it away.")
            if (self.work / OLD).exists() and not self.out.exists():  # stopped between two renames
                os.rename(self.work / OLD, self.out)
            if not (mark.is_file() and mark.read_text(encoding="utf-8") == identity):
                shutil.rmtree(self.work)
        self.work.mkdir(exist_ok=True)
        replace_file(mark, identity.encode())

    def statistics(self, needs: frozenset[Stat]) -> Path:
        """The file of these statistics."""
        return self.work / f"statistics-{hashlib.sha256(repr(sorted(needs, key=repr)).encode()).hexdigest()[:16]}.safetensors"

    def known(self) -> Known:
        """What was evaluated before an interruption; a line that was cut off is no evaluation."""
        out: Known = {}
        file = self.work / NOTES
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                key, batches, loss, stored = json.loads(line)
            except ValueError:
                continue
            out[key, batches] = loss, stored
        return out

    def note(self, recipe: Recipe, batches: int, loss: float, stored: float) -> None:
        """Record an evaluation."""
        with open(self.work / NOTES, "a", encoding="utf-8") as file:
            file.write(json.dumps([key_of(recipe), batches, loss, stored]) + "\n")

    def parts(self, sizes: Sequence[float]) -> dict[float, Path]:
        """Where the winner of each size is compressed to."""
        if self.result.exists():
            shutil.rmtree(self.result)
        if len(sizes) == 1:
            return {sizes[0]: self.result}
        self.result.mkdir()
        return {size: self.result / f"keep-{size:g}" for size in sizes}

    def finish(self, report: Mapping[str, Any], timings: Mapping[str, float]) -> Path:
        """Add the report, and move everything to its place."""
        from ..report.html import render, to_json

        pages = {JSON: to_json(lasting_part(report)), HTML: render(dict(report) | {"timings": dict(timings)})}
        for name, text in pages.items():
            replace_file(self.result / name, text.encode())
        if self.out.exists():
            os.rename(self.out, self.work / OLD)
        os.rename(self.result, self.out)
        shutil.rmtree(self.work)
        return self.out


def key_of(recipe: Recipe) -> str:
    """What an evaluation depends on beside model, text and settings of the search."""
    said = {k: v for k, v in to_dict(recipe).items() if k not in ("name", "title", "paper", "fidelity", "differs")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _holds_sizes(out: Path) -> bool:
    """Whether a search over several sizes has made this folder, and nobody has added to it."""
    if out.is_symlink() or not (out / JSON).is_file():
        return False
    return all(p.name in (JSON, HTML) or (p.name.startswith("keep-") and p.is_dir() and not p.is_symlink()) for p in out.iterdir())
