"""Partial statistics on disk, so that processes which measured disjoint batches can merge them: bit for bit what one process would get.

A sum is a tree over numbered batches, and every node travels; nothing depends on how many processes there were, or on their order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Refused
from .collect import Partial
from .moments import Centred
from .record import Part, Sums
from .tree import Tree

META = "eckart.partial"


def save_partial(partial: Partial, path: str | Path) -> None:
    """Write a part as a safetensors file, whole or not at all."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    empty: list[str] = []
    for key, tree in partial.trees.items():
        for (level, index), part in tree.nodes.items():
            name = f"{key}|{level}|{index}"
            if part is None:
                empty.append(name)
                continue
            tensors[f"{name}|count"] = torch.tensor(part.count, dtype=torch.float64)
            fields = {"mean": part.mean, "scatter": part.scatter} if isinstance(part, Centred) else {"total": part.total}
            tensors |= {f"{name}|{field}": value.contiguous() for field, value in fields.items()}
    meta = {
        "empty": empty,
        "digests": {str(k): v for k, v in partial.digests.items()},
        "model": partial.model_id,
        "run": _plain(partial.run),
    }
    path = Path(path)
    work = path.with_name(path.name + ".part")
    with open(work, "wb") as file:
        file.write(save(tensors, metadata={META: json.dumps(meta, sort_keys=True)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, path)


def load_partial(path: str | Path, like: Partial) -> Partial:
    """Read a part that another process of the same run has written.

    Args:
        path: what `save_partial` wrote.
        like: the part of this process: sums, sites and run are the same.

    Raises:
        Refused: not such a file, or a part of another run.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {})[META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Refused(f"{path}: expected partial statistics of this run, found something else ({error}). Start the run again.") from error
    if (meta["model"], meta["run"]) != (like.model_id, _plain(like.run)):
        raise Refused(f"{path}: partial statistics of another run. Remove the file and start again.")
    nodes: dict[str, dict[tuple[int, int], Part | None]] = {key: {} for key in like.trees}
    for name in {n.rpartition("|")[0] for n in tensors} | set(meta["empty"]):
        key, level, index = name.rsplit("|", 2)
        nodes[key][int(level), int(index)] = None if name in meta["empty"] else _part(name, tensors)
    trees = {key: Tree(tree.combine, nodes[key]) for key, tree in like.trees.items()}
    return replace(like, trees=trees, digests={int(k): v for k, v in meta["digests"].items()})


def _part(name: str, tensors: Mapping[str, Tensor]) -> Part:
    count = tensors[f"{name}|count"].item()
    total = tensors.get(f"{name}|total")
    return Sums(count, total) if total is not None else Centred(count, tensors[f"{name}|mean"], tensors[f"{name}|scatter"])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True))
