"""The catalogue of a checkpoint, from names, shapes and types alone: no tensor is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from ..axes.protocols import Site
from .catalogue import Catalogue, natural
from .live import from_model

if TYPE_CHECKING:
    from torch import nn


class Info(Protocol):
    """What a checkpoint says of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...


class Headers(Protocol):
    """A checkpoint's table of contents: `store.Reader`, or anything like it."""

    def keys(self) -> Sequence[str]: ...
    def info(self, name: str) -> Info: ...


EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe|emb)($|[._])")
NORM = re.compile(r"norm|(^|[._])ln(_|\d|$|\.)")


def from_headers(
    reader: Headers, meta_model: nn.Module | None = None, example: Any = None, names: Mapping[str, tuple[str, ...]] | None = None
) -> Catalogue:  # fmt: skip
    """The catalogue of a checkpoint. It never fails on a tensor it does not know: that tensor is in `others`, and is copied.

    With a meta model, sites carry the names of its modules and the keys and types of the file; one of the two may have a prefix that the
    other lacks ("bert.encoder..." and "encoder..."). A tied weight that the file stores once gives two sites that name the same key.
    Without a model, names and shapes decide: a 2-D floating `*.weight` is a linear, unless it is an embedding or a norm by its name.
    Then a matrix whose bias has the length of its second dimension, not of its first, is stored transposed, and so are the square ones
    beside it; inputs are unknown, so every site reads its own name.

    Args:
        reader: `.keys()` and `.info(name)` with `.dtype` (a safetensors name) and `.shape`.
        meta_model: the model on the meta device.
        example: as for `from_model`, to trace shared inputs on the meta model.
        names: for tensors of the model the keys of the file, where they are known: several for a stack that the file holds in parts.

    Returns:
        The catalogue.

    Example:
        >>> from types import SimpleNamespace
        >>> table = {"layers.0.up.weight": (8, 4), "layers.0.norm.weight": (4,)}
        >>> headers = SimpleNamespace(keys=lambda: sorted(table), info=lambda k: SimpleNamespace(dtype="F32", shape=table[k]))
        >>> from_headers(headers).get("layers.0.up").shape
        (8, 4)
    """
    infos = {key: reader.info(key) for key in reader.keys()}  # noqa: SIM118 - a method of the reader, not of a dict
    return _by_name(infos) if meta_model is None else _by_model(infos, meta_model, example, names or {})


def _by_model(infos: Mapping[str, Info], model: nn.Module, example: Any, names: Mapping[str, tuple[str, ...]]) -> Catalogue:
    known = from_model(model, example)
    parameters = dict(model.state_dict(keep_vars=True))
    file_key = file_keys(parameters, infos) | {k: found[0] for k, found in names.items()}
    notes = dict(known.notes)
    sites: list[Site] = []
    for site in known.sites:
        (key,) = site.tensors
        found = file_key.get(key) or next((file_key[t] for t in site.tied if t in file_key), None)
        if found is None:
            notes[site.name] = "not in the checkpoint"
            continue
        parts = names.get(key, (found,))
        expected, stored = tuple(parameters[key].shape), tuple(infos[found].shape)
        if len(parts) > 1:
            stored = expected if sum(prod(infos[p].shape) for p in parts) == prod(expected) else stored
        if stored != expected:
            notes[site.name] = f"the checkpoint holds {found} of shape {stored}, the model expects {expected}"
            continue
        bias = file_key.get(site.bias) if site.bias else None
        tied = tuple(file_key.get(t, t) for t in site.tied)
        sites.append(replace(site, tensors=parts if len(parts) > 1 else (found,), bias=bias, tied=tied, dtype=infos[found].dtype))
    return Catalogue(tuple(sites), _rest(infos, sites), known.blocks, notes)


def file_keys(wanted: Collection[str], infos: Collection[str]) -> dict[str, str]:
    """The file's name of each tensor of a module: as it is, else without or with the one first part that makes most names meet."""

    def best(names: Collection[str], others: Collection[str]) -> str:
        """The first part of `names` without which most of them are in `others`, or an empty string."""
        counts = Counter(head + "." for head, _, tail in (n.partition(".") for n in names) if tail in others)
        return max(sorted(counts), key=lambda p: counts[p], default="")

    drop, add = best(wanted, infos), best(infos, wanted)
    out = {}
    for key in wanted:
        candidates = [key]
        if drop and key.startswith(drop):
            candidates.append(key.removeprefix(drop))
        if add:
            candidates.append(add + key)
        found = next((c for c in candidates if c in infos), None)
        if found is not None:
            out[key] = found
    return out


def _rest(infos: Mapping[str, Info], sites: Sequence[Site]) -> tuple[str, ...]:
    used = {k for s in sites for k in (*s.tensors, *s.tied, *((s.bias,) if s.bias else ()))}
    return tuple(sorted(set(infos) - used))


def _by_name(infos: Mapping[str, Info]) -> Catalogue:
    keys = sorted(infos, key=natural)
    containers: dict[tuple[str, int], bool] = {}
    for key in keys:
        place = _place(key)
        if place is not None:
            containers[place] = containers.get(place, False) or key.count(".") - _prefix(*place).count(".") >= 2
    blocks = [place for place, solid in containers.items() if solid]
    matrices = [k for k in keys if len(infos[k].shape) >= 2 and "F" in infos[k].dtype]
    turned = _transposed({k: infos[k] for k in matrices}, infos)
    sites = [_named(k, infos, k in turned, blocks) for k in matrices]
    return Catalogue(tuple(sites), _rest(infos, sites), tuple(_prefix(*b) for b in blocks))


def _place(key: str) -> tuple[str, int] | None:
    """(path of the list, position) of the first integer in a key."""
    parts = key.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def _prefix(container: str, index: int) -> str:
    return f"{container}.{index}" if container else str(index)


def _is_linear(key: str, info: Info) -> bool:
    return len(info.shape) == 2 and key.endswith(".weight") and not EMBEDDING.search(key) and not NORM.search(key)


def _transposed(matrices: Mapping[str, Info], infos: Mapping[str, Info]) -> set[str]:
    """Linears stored (in, out). Decided by the length of the bias; square ones follow what the others in the file prove."""
    turned, straight, unclear = set(), set(), set()
    for key, info in matrices.items():
        bias = infos.get(key.removesuffix("weight") + "bias")
        if _is_linear(key, info) and bias is not None and len(bias.shape) == 1:
            rows, cols = info.shape
            group = unclear if rows == cols else turned if bias.shape[0] == cols else straight if bias.shape[0] == rows else None
            if group is not None:
                group.add(key)
    return turned | unclear if turned and not straight else turned


def _named(key: str, infos: Mapping[str, Info], turned: bool, blocks: Sequence[tuple[str, int]]) -> Site:
    info = infos[key]
    rows, cols = info.shape[0], prod(info.shape[1:])
    name = key.removesuffix(".weight")
    place = _place(key)
    block = blocks.index(place) if place in blocks else -1
    common: dict[str, Any] = {"tensors": (key,), "reads": name, "block": block, "dtype": info.dtype}
    bias_key = name + ".bias"
    bias = bias_key if name != key and bias_key in infos and len(infos[bias_key].shape) == 1 else None
    if _is_linear(key, info):
        return Site(
            name, (cols, rows) if turned else (rows, cols), kind="linear", bias=bias, view="transposed" if turned else "linear", **common
        )
    if name != key and len(info.shape) == 2 and EMBEDDING.search(key):
        return Site(name, (cols, rows), kind="embedding", view="transposed", **common)
    if name != key and 3 <= len(info.shape) <= 5 and not NORM.search(key):
        return Site(name, (rows, cols), kind="conv", bias=bias, **common)
    return Site(key, (rows, cols), (key,), kind="other", reads=key, block=block, dtype=info.dtype)
