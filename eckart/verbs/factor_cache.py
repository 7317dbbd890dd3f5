"""Leading singular triples of a base model's weights, kept on disk: every adapter that is made of them, at any smaller rank, costs a read.

With a cache a matrix is always factorised at the canonical rank and cut below it, whether the file was there or not, so a hit gives the bytes
that a miss gives. Without one it is factorised at its own rank.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..axes import Recipe
from ..axes.protocols import Parts, Site
from ..errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

CANONICAL = 128  # rank up to which triples are kept: the largest default of the published recipes
FORMAT = "1"


def cacheable(recipe: Recipe) -> bool:
    """Whether what a recipe factorises is the plain weight, and only its leading triples are wanted."""
    form = recipe.form
    return (
        form.uses_triples
        and not form.uses_rest
        and (recipe.source.kind, recipe.metric.kind, recipe.factor.kind, recipe.filter.kind) == ("weights", "identity", "svd", "top")
    )


@dataclass(frozen=True)
class FactorCache:
    """A folder of triples.

    Args:
        folder: made when it is missing.
        base: fingerprint of the model.
        rank: canonical rank.
    """

    folder: Path
    base: str
    rank: int = CANONICAL

    def get(self, site: Site, rank: int, compute: Callable[[int], Parts]) -> Parts | None:
        """The triples of a matrix, from the folder or computed and put there; None for ranks above the canonical one.

        Args:
            site: the matrix.
            rank: that is wanted.
            compute: rank -> triples.
        """
        most = min(self.rank, *site.shape)
        if rank > most:
            return None
        file = self._file(site)
        if not file.exists():
            self._write(file, compute(most))
        return self._read(file, site, most)

    def _file(self, site: Site) -> Path:
        text = "\x00".join((FORMAT, site.name, str(site.shape), str(self.rank)))
        return self.folder / self.base[:32] / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _write(self, file: Path, parts: Parts) -> None:
        from safetensors.torch import save_file

        assert parts.values is not None
        file.parent.mkdir(parents=True, exist_ok=True)
        work = file.with_suffix(f".{os.getpid()}.part")
        tensors: dict[str, Tensor] = {"left": parts.left, "values": parts.values, "right": parts.right}
        save_file({k: v.float().contiguous() for k, v in tensors.items()}, work)
        os.replace(work, file)

    def _read(self, file: Path, site: Site, most: int) -> Parts:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            t = load_file(file)
            m, n = site.shape
            good = t["left"].shape == (m, most) and t["right"].shape == (most, n) and t["values"].shape == (most,)
        except (SafetensorError, KeyError, OSError) as error:
            raise Refused(f"{file}: this file of the factor cache cannot be read ({error}). Delete it, and it is made again.") from error
        if not good:
            raise Refused(f"{file}: expected {most} triples of a {m}x{n} matrix, found other shapes. Delete it, and it is made again.")
        return Parts(t["left"], t["right"], t["values"], {"cached": True}, values=t["values"])
