"""The catalogue of a live module, on any device, the meta device included."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..errors import Refused, UsageError
from .catalogue import Catalogue
from .trace import storage_id, trace_reads

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def from_model(model: nn.Module, example: Any = None) -> Catalogue:
    """The catalogue of a module: found by walking it, never from a list of architectures. It changes nothing in the module.

    A linear is seen as y = W x. An embedding is the map of a one-hot vector, so its shape is (width, vocabulary) and its view is
    "transposed". A convolution is flattened to (out, in x kernel). A parameter of two or more dimensions that is the weight of none of
    these (relative positions) is a site of kind "other", named by its own key and flattened to (first, rest); so are stacked experts, of kind
    "experts".

    Args:
        model: the module, with weights or on the meta device.
        example: one input: a tensor, a tuple of positional arguments, or a mapping of keyword arguments. One forward runs on it in
            evaluation mode without gradients, and sites that read the very same tensor get the same `reads`. On the meta device only
            its shape matters. Without it, every site reads its own name.

    Returns:
        The catalogue.

    Raises:
        Refused: the model has no weights, has weights that are not yet materialised (lazy modules), or fails on the example.

    Example:
        >>> import torch
        >>> from_model(torch.nn.Sequential(torch.nn.Linear(3, 2))).get("0").tensors
        ('0.weight',)
    """
    import torch
    from torch.nn.parameter import is_lazy

    keys = {k: t for k, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    if not keys:
        raise Refused(f"{type(model).__name__}: expected a module with weights, found none.")
    for key, tensor in keys.items():
        if is_lazy(tensor):
            raise Refused(f"{key}: this weight has no shape yet (a lazy module). Run one forward pass first.")
    twins = _twins(keys)
    blocks = tuple(_blocks(model))
    sites = []
    for site in _sites(model, keys):
        own = (*site.tensors, site.bias)
        tied = tuple(k for k in twins[site.tensors[0]] if k not in own)
        sites.append(replace(site, tied=tied, block=_block_of(site.name, blocks)))
    used = {k for s in sites for k in (*s.tensors, *s.tied, *((s.bias,) if s.bias else ()))}
    reads, notes = trace_reads(model, sites, example) if example is not None else ({}, {})
    return Catalogue(
        sites=tuple(replace(s, reads=reads.get(s.name, s.name)) for s in sites),
        others=tuple(sorted(k for k in keys if k not in used)),
        blocks=blocks,
        notes=notes,
    )


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that show the same numbers; works without data. Valid while the tensors live."""
    return storage_id(tensor), tensor.storage_offset(), tensor.numel()


def _twins(keys: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """For every key, all keys of the same storage, itself included."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key, tensor in keys.items():
        groups.setdefault(_storage(tensor) if tensor.numel() else (0, 0, id(tensor)), []).append(key)
    return {key: tuple(group) for group in groups.values() for key in group}


def _kind(module: nn.Module) -> tuple[str, str] | None:
    """(kind, view) of a module whose `weight` is a matrix, None for any other."""
    from torch import nn

    hf = sys.modules.get("transformers.pytorch_utils")  # a model with Conv1D has imported it
    if hf is not None and isinstance(module, hf.Conv1D):
        return "linear", "transposed"
    if isinstance(module, nn.Linear):
        return "linear", "linear"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", "transposed"
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "conv", "transposed"
    return ("conv", "linear") if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def _sites(model: nn.Module, keys: dict[str, Tensor]) -> Iterator[Site]:
    """Sites without ties, blocks and reads, in the order of the modules."""
    seen: set[str] = set()
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        found = _kind(module)
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            key = dot + local
            if key not in keys or key in seen or parameter.ndim < 2:
                continue
            if found is not None and local == "weight":
                kind, view = found
                rows, cols = parameter.shape[0], prod(parameter.shape[1:])
                bias = dot + "bias" if dot + "bias" in keys else None
                shape = (cols, rows) if view == "transposed" else (rows, cols)
                yield Site(path, shape, (key,), bias, kind, view, dtype=_dtype(parameter.dtype))
            else:
                stacked = parameter.ndim == 3 and path.rpartition(".")[2] == "experts"
                shape = (parameter.shape[0], prod(parameter.shape[1:]))
                yield Site(key, shape, (key,), kind="experts" if stacked else "other", dtype=_dtype(parameter.dtype))
            seen.add(key)


def _dtype(dtype: torch.dtype) -> str:
    from ..store.dtypes import name_of

    try:
        return name_of(dtype)
    except UsageError:  # a type that safetensors lacks: the model can be walked and measured all the same, only not stored
        return str(dtype).removeprefix("torch.").upper()


def _blocks(model: nn.Module) -> Iterator[str]:
    """Names of the children of the outermost lists whose children have weights and repeat. Lists inside a block (experts, the parts of
    an encoder layer) are not looked at, so they never count."""
    from torch import nn

    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        path, module = todo.pop(0)
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        if isinstance(module, nn.ModuleList | nn.Sequential) and _repeats([c for _, c in children], module):
            yield from (name for name, _ in children)
        else:
            todo[:0] = children


def _repeats(children: list[nn.Module], owner: nn.Module) -> bool:
    from torch import nn

    solid = [c for c in children if next(c.children(), None) is not None and any(p.ndim >= 2 for p in c.parameters())]
    if not children or len(solid) < len(children):
        return False
    kinds = {type(c) for c in children}
    alone = len(children) == 1 and isinstance(owner, nn.ModuleList)  # a model of one layer
    return alone or len(kinds) < len(children)


def _block_of(name: str, blocks: tuple[str, ...]) -> int:
    return next((i for i, b in enumerate(blocks) if name == b or name.startswith(b + ".")), -1)
