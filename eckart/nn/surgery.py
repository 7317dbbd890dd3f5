"""Exchange the layers of a model in place: dense for a pair of factors, and back."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..errors import Refused, UsageError, did_you_mean
from .low_rank import LowRankLinear


def _is_conv1d(module: nn.Module) -> bool:
    # a model can only hold transformers' Conv1D if its module was imported
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and type(module) is home.Conv1D


def factorable(module: nn.Module) -> bool:
    """True for layers that a pair of factors can stand in for: exactly `nn.Linear`, or GPT-2's `Conv1D`.

    Subclasses are not: their own `forward`, or a parent that reads their weight directly (`nn.MultiheadAttention` and its
    `out_proj`), would silently compute something else.

    Example:
        >>> import torch
        >>> factorable(torch.nn.Linear(2, 3)), factorable(torch.nn.Embedding(2, 3))
        (True, False)
    """
    return type(module) is nn.Linear or _is_conv1d(module)


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer that is `factorable` or a `LowRankLinear`, whichever way round it stores its matrix."""
    if isinstance(module, LowRankLinear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # pyright: ignore[reportGeneralTypeIssues,reportAttributeAccessIssue]
    return (int(columns), int(rows)) if _is_conv1d(module) else (int(rows), int(columns))


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Name and layer of every `LowRankLinear` in a model, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def _at(model: nn.Module, name: str) -> nn.Module:
    if not name:
        raise UsageError(f"the {type(model).__name__} itself has no name to be replaced under; use the pair in its place.")
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in model.named_modules()]
        raise UsageError(f"{type(model).__name__} has no module {name!r}.{did_you_mean(name, known)}") from None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def replace_linear(model: nn.Module, name: str, module: LowRankLinear) -> None:
    """Put a pair of factors in the place of a linear layer, in place.

    It takes over the layer's training mode and whether its weight and bias are trained. It does not make the model ready to be
    saved; `attach` does, once, after the last layer.

    Args:
        model: the model to change.
        name: dotted path of a layer that is `factorable`, or of a `LowRankLinear` to be replaced by another.
        module: what takes its place; same (out, in).

    Raises:
        UsageError: no such module, another kind of module, or another shape.
        Refused: the layer's weights are offloaded, so that the pair would be lost.

    Example:
        >>> import torch
        >>> from eckart.nn import LowRankLinear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> replace_linear(model, "0", LowRankLinear(4, 4, rank=1))
        >>> model[0].rank
        1
    """
    old = _at(model, name)
    if not factorable(old) and not isinstance(old, LowRankLinear):
        raise UsageError(f"{name} is a {type(old).__name__}; only torch.nn.Linear and Conv1D can be held as a pair of factors.")
    if dense_shape(old) != dense_shape(module):
        raise UsageError(f"{name} maps (out, in) = {dense_shape(old)}, the pair of factors {dense_shape(module)}.")
    weight: Any = old.up.weight if isinstance(old, LowRankLinear) else old.weight
    if weight.device.type == "meta" and module.up.weight.device.type != "meta":
        raise Refused(f"{name} is offloaded (its weight is on the meta device). Load the model without offloading and compress it then.")
    module.train(old.training)
    for parameter in module.parameters():
        parameter.requires_grad_(weight.requires_grad)
    bias: Any = old.bias
    if module.bias is not None and bias is not None:
        module.bias.requires_grad_(bias.requires_grad)
    _put(model, name, module)


def _dense(layer: LowRankLinear, kind: Any) -> nn.Module:
    """The product of the factors in a layer like `kind`: its class, its way round, and a bias where it has one."""
    matrix = layer.dense_weight().detach()
    with torch.device("meta"):
        if _is_conv1d(kind):
            out: Any = type(kind)(layer.out_features, layer.in_features)  # Conv1D(nf, nx)
            matrix = matrix.T.contiguous()
        else:
            out = nn.Linear(layer.in_features, layer.out_features, bias=kind.bias is not None)
    out.weight = nn.Parameter(matrix, requires_grad=layer.up.weight.requires_grad)
    if kind.bias is not None:
        own = layer.bias
        bias = torch.zeros(layer.out_features, dtype=matrix.dtype, device=matrix.device) if own is None else own.detach().clone()
        out.bias = nn.Parameter(bias, requires_grad=True if own is None else own.requires_grad)
    return out.train(layer.training)


def restore_dense(model: nn.Module, kinds: nn.Module) -> list[str]:
    """Multiply every pair of factors back, in place. `kinds` is the same model with its dense layers. Returns the names."""
    dense = dict(kinds.named_modules())
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        if type(layer.up) is not nn.Linear or type(layer.down) is not nn.Linear:
            raise Refused(f"{name}: its factors were wrapped (by an adapter?). Merge or unload what wraps them, then dequantize.")
        if layer.up.weight.device.type == "meta":
            raise Refused(f"{name} is offloaded (its factors are on the meta device). Load the model without offloading, then dequantize.")
        if name not in dense or not factorable(dense[name]) or dense_shape(dense[name]) != dense_shape(layer):
            raise Refused(f"{name}: {type(model).__name__} has no linear layer of shape {dense_shape(layer)} there to go back to.")
        kind: Any = dense[name]
        if layer.bias is not None and kind.bias is None:
            raise Refused(
                f"{name} has a bias, and {type(model).__name__} has no place for one there: a dense copy would lose it when saved and "
                "loaded. Keep the model factored, or compress it with a recipe that adds no bias."
            )
    for name, layer in layers.items():
        _put(model, name, _dense(layer, dense[name]))
    return list(layers)
