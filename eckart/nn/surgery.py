"""Exchange the layers of a model in place: dense for a pair of factors, narrower ones, and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused, UsageError, did_you_mean
from .embedding import LowRankEmbedding
from .low_rank import LowRankLinear


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's `Conv1D`, a linear layer that stores (in, out)."""
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
    return type(module) is nn.Linear or is_conv1d(module)


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer that is `factorable` or a `LowRankLinear`, whichever way round it stores its matrix."""
    if isinstance(module, LowRankLinear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # pyright: ignore[reportGeneralTypeIssues,reportAttributeAccessIssue]
    return (int(columns), int(rows)) if is_conv1d(module) else (int(rows), int(columns))


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Name and layer of every `LowRankLinear` in a model, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def factored_layers(model: nn.Module) -> dict[str, LowRankLinear | LowRankEmbedding]:
    """Name and module of every layer held as factors, tables included, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear | LowRankEmbedding)}


def _at(model: nn.Module, name: str) -> nn.Module:
    if not name:
        raise UsageError(f"the {type(model).__name__} itself has no name to be replaced under; use the pair in its place.")
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in model.named_modules()]
        raise UsageError(f"{type(model).__name__} has no module {name!r}.{did_you_mean(name, known)}") from None


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, whatever that is."""
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
    put(model, name, module)


def _dense(layer: LowRankLinear, kind: Any) -> nn.Module:
    """The product of the factors in a layer like `kind`: its class, its way round, and a bias where it has one."""
    matrix = layer.dense_weight().detach()
    with torch.device("meta"):
        if is_conv1d(kind):
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
    """Multiply every pair of factors back, tables included, in place. `kinds` is the same model with its dense layers. Returns the names."""
    dense = dict(kinds.named_modules())
    layers = factored_layers(model)
    for name, layer in layers.items():
        if type(layer.up) is not nn.Linear or type(layer.down) not in (nn.Linear, nn.Embedding):
            raise Refused(f"{name}: its factors were wrapped (by an adapter?). Merge or unload what wraps them, then dequantize.")
        if layer.up.weight.device.type == "meta":
            raise Refused(f"{name} is offloaded (its factors are on the meta device). Load the model without offloading, then dequantize.")
        kind: Any = dense.get(name)
        if isinstance(layer, LowRankEmbedding):
            if type(kind) is not nn.Embedding or (kind.num_embeddings, kind.embedding_dim) != (layer.num_embeddings, layer.embedding_dim):
                raise Refused(f"{name}: {type(model).__name__} has no table of that shape there to go back to.")
            continue
        if kind is None or not factorable(kind) or dense_shape(kind) != dense_shape(layer):
            raise Refused(f"{name}: {type(model).__name__} has no linear layer of shape {dense_shape(layer)} there to go back to.")
        if layer.bias is not None and kind.bias is None:
            raise Refused(
                f"{name} has a bias, and {type(model).__name__} has no place for one there: a dense copy would lose it when saved and "
                "loaded. Keep the model factored, or compress it with a recipe that adds no bias."
            )
    for name, layer in layers.items():
        put(model, name, _table(layer) if isinstance(layer, LowRankEmbedding) else _dense(layer, dense[name]))
    return list(layers)


def _table(layer: LowRankEmbedding) -> nn.Embedding:
    """The product of the factors as a table."""
    with torch.device("meta"):
        out = nn.Embedding(layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx)
    out.weight = nn.Parameter(layer.dense_weight().detach(), requires_grad=layer.up.weight.requires_grad)
    return out.train(layer.training)


def put_pair(
    model: nn.Module, name: str, up: Tensor | None, down: Tensor | None, bias: Tensor | None, common: bool = False
) -> LowRankLinear | LowRankEmbedding:  # fmt: skip
    """Put factors in the place of a linear layer or of an embedding; on the model's device, under the switches of `replace_linear`.

    Args:
        model: the model to change.
        name: dotted path of the layer.
        up, down: (m, r) and (r, n); of an embedding (d, r) and (rows, r).
        bias: (m,), or None.
        common: one of the factors serves other layers too: see `share`.

    Raises:
        UsageError, Refused: as `replace_linear`.
    """
    assert up is not None
    assert down is not None
    old: Any = _at(model, name)
    device = _device(model)
    up, down, bias = up.to(device), down.to(device), None if bias is None else bias.to(device)
    if type(old) is not nn.Embedding and not isinstance(old, LowRankEmbedding):
        pair = LowRankLinear.from_factors(up, down, bias, common)
        replace_linear(model, name, pair)
        return pair
    if getattr(old, "max_norm", None) is not None or getattr(old, "sparse", False):
        raise Refused(f"{name}: an embedding with max_norm or sparse gradients cannot be held as factors.")
    table = LowRankEmbedding.from_factors(up, down, bias, old.padding_idx)
    if (table.num_embeddings, table.embedding_dim) != (old.num_embeddings, old.embedding_dim):
        raise UsageError(f"{name} is a table of {old.num_embeddings}x{old.embedding_dim}, the factors make another.")
    trained = (old.up if isinstance(old, LowRankEmbedding) else old).weight.requires_grad
    table.train(old.training).requires_grad_(trained)
    put(model, name, table)
    return table


def put_dense(model: nn.Module, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a layer another weight, in its own storage order, and another bias; also one where it had none, also of another size.

    Args:
        model: the model to change.
        name: dotted path of a layer that is `factorable`, or of an embedding.
        weight: as the layer stores it.
        bias: None leaves the bias as it is.
    """
    layer: Any = _at(model, name)
    if layer.weight.device.type == "meta":
        raise Refused(f"{name} is offloaded (its weight is on the meta device). Load the model without offloading and compress it then.")
    device = _device(model)
    for key, value in (("weight", weight), ("bias", bias)):
        old = getattr(layer, key, None)
        if value is None:
            continue
        with torch.no_grad():
            if old is not None and old.shape == value.shape:
                old.copy_(value.to(device))
            else:
                setattr(layer, key, nn.Parameter(value.to(device).clone(), requires_grad=layer.weight.requires_grad))
    _sizes(layer)


def resize(model: nn.Module, name: str, rows: int, columns: int) -> None:
    """Give a linear layer another (out, in), empty on the meta device, with a bias where it had one."""
    layer: Any = _at(model, name)
    shape = (columns, rows) if is_conv1d(layer) else (rows, columns)
    with torch.device("meta"):
        put_meta = {"weight": torch.empty(shape, dtype=layer.weight.dtype)}
        if layer.bias is not None:
            put_meta["bias"] = torch.empty(rows, dtype=layer.bias.dtype)
    for key, value in put_meta.items():
        setattr(layer, key, nn.Parameter(value, requires_grad=getattr(layer, key).requires_grad))
    _sizes(layer)


def _sizes(layer: Any) -> None:
    """Tell a layer the size of its weight."""
    if type(layer) is nn.Linear:
        layer.out_features, layer.in_features = (int(n) for n in layer.weight.shape)
    elif is_conv1d(layer):
        layer.nx, layer.nf = (int(n) for n in layer.weight.shape)


def share(model: nn.Module, names: Sequence[str], side: str) -> None:
    """Make the pairs of these layers use one `down` ("in") or one `up` weight ("out"): that of the first.

    The others remember, in the attribute from which transformers reads such ties, that a saved model need not hold theirs.

    Raises:
        UsageError: a side that is neither, a layer that is no pair, or factors that do not fit together.
    """
    factor = {"in": "down", "out": "up"}.get(side)
    layers: list[Any] = [_at(model, n) for n in names]
    if factor is None or not layers or not all(isinstance(x, LowRankLinear) for x in layers):
        raise UsageError(f"share: expected pairs and the side 'in' or 'out', found {side!r} and {', '.join(names) or 'no layers'}.")
    first = getattr(layers[0], factor)
    for name, layer in zip(names[1:], layers[1:], strict=True):
        own = getattr(layer, factor)
        if own.weight.shape != first.weight.shape:
            raise UsageError(f"{name}.{factor} has shape {tuple(own.weight.shape)}, {names[0]}.{factor} {tuple(first.weight.shape)}.")
        own.weight = first.weight
        layer._tied_weights_keys = {f"{factor}.weight": f"{factor}.weight"}  # keys are read, values are not: the source is another module


def shared_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Pairs that use one factor together, as `share` made them: [{"side", "modules"}], modules in the model's order."""
    out: list[dict[str, Any]] = []
    for side, factor in (("in", "down"), ("out", "up")):
        groups: dict[int, list[str]] = {}
        for name, layer in low_rank_layers(model).items():
            groups.setdefault(id(getattr(getattr(layer, factor), "weight", None)), []).append(name)
        out += [{"side": side, "modules": names} for names in groups.values() if len(names) > 1]
    return out


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
