"""The catalogue: every matrix of a model as a `Site`, and the names of everything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..axes.protocols import Site
from ..errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Catalogue:
    """Every matrix of a model. It holds no weights and decides nothing: which sites are changed is a recipe's `target`.

    Args:
        sites: the matrices, in the order of the modules.
        others: keys of the tensors that belong to no site: norms, buffers, names nobody knows. Sorted.
        blocks: names of the repeated blocks; `Site.block` is an index into it.
        notes: what is unusual, by site name: an input that could not be traced, a tensor missing from the file.

    Example:
        >>> import torch
        >>> from eckart.catalogue import from_model
        >>> cat = from_model(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)))
        >>> cat.get("0").shape, cat.others
        ((2, 3), ('1.bias', '1.weight'))
    """

    sites: tuple[Site, ...]
    others: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {s.name: s for s in self.sites}

    def get(self, name: str) -> Site:
        """The site of that name.

        Raises:
            UsageError: there is none.
        """
        if name not in self._by_name:
            raise UsageError(f"no matrix named {name!r} in this model.{did_you_mean(name, self._by_name)}")
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self.sites)

    def by_block(self) -> dict[int, tuple[Site, ...]]:
        """The sites of each block, in ascending order; -1 holds those outside of all blocks."""
        out: dict[int, list[Site]] = {}
        for site in self.sites:
            out.setdefault(site.block, []).append(site)
        return {k: tuple(out[k]) for k in sorted(out)}


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `layers.2` comes before `layers.10`, and an encoder before its decoder."""
    return tuple((0, int(p), "") if p.isdigit() else (1, int(p == "decoder"), p) for p in re.split(r"[./]", name))
