"""Make a model that was compressed in memory one that transformers can save, and undo it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import Refused, UsageError
from ..nn.heads import narrowed
from ..nn.quantised import GROUP, QuantisedLinear, bits_of, quantised_layers
from ..nn.surgery import dense_shape, factorable, factored_layers, shared_groups


def attach(model: Any, ranks: Mapping[str, int] | None = None, bias: Mapping[str, bool] | None = None, **info: Any) -> Any:
    """Mark a model that already holds `LowRankLinear` layers, so that plain `save_pretrained` writes a folder that loads again.

    It changes no layer and writes nothing. What it accepts, `from_pretrained` accepts: names, shapes and biases are checked
    against the class of the model, built without weights from its config.

    Args:
        model: a transformers model with at least one `LowRankLinear`, or with layers that were made smaller.
        ranks: module name -> rank; None reads them from the model. If given it must name exactly the layers that are there.
        bias: module name -> whether the pair has a bias. None finds the layers that differ from the dense class.
        **info: provenance for `config.json`, for instance `recipe="svd_llm"`; anything that JSON holds.

    Returns:
        The same model.

    Raises:
        UsageError: not a transformers model, no `LowRankLinear` in it, `ranks` or `bias` that contradict it, or info that is no JSON.
        Refused: layers that a reload could not put back (renamed, tied, of another shape than the class has).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from eckart.nn import LowRankLinear
        >>> config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
        >>> model = BertModel(config)
        >>> model.pooler.dense = LowRankLinear(8, 8, rank=2)
        >>> attach(model, recipe="svd").config.quantization_config.ranks
        {'pooler.dense': 2}
    """
    from transformers import PreTrainedModel

    from .config import EckartConfig, check
    from .quantizer import declare_ties, mark
    from .skeleton import skeleton

    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"attach: expected a transformers model, found {type(model).__name__}.")
    layers = factored_layers(model)
    dense = skeleton(type(model), model.config)
    twins: dict[str, Any] = dict(dense.named_modules())
    here: dict[str, Any] = dict(model.named_modules())
    shapes = {
        n: list(dense_shape(m))
        for n, m in here.items()
        if factorable(m) and n in twins and factorable(twins[n]) and dense_shape(m) != dense_shape(twins[n])
    }
    heads = narrowed(model)
    integers = _integers(model)
    if not layers and not shapes and not integers:
        raise UsageError("attach: the model holds no LowRankLinear, and every layer has the shape of its class; there is nothing to mark.")
    found = {name: layer.rank for name, layer in layers.items()}
    if ranks is not None and dict(ranks) != found:
        name = sorted({k for k in {*ranks, *found} if ranks.get(k) != found.get(k)})[0]
        raise UsageError(f"attach: ranks says {name!r}: {ranks.get(name)}, the model holds {found.get(name)}.")
    try:
        json.dumps(info, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"attach: info must be plain JSON: {error}.") from error
    _refuse_other_methods(model)

    config = EckartConfig(found, None, shared=shared_groups(model), shapes=shapes, heads=heads, torchao=integers, **info)
    check(dense, config)
    for name, layer in layers.items():
        twin = twins[name]
        own, other = _shape(layer), _shape(twin)
        if own != other:
            raise Refused(f"{name}: the pair maps {own}, {type(model).__name__} expects {other} there.")
        if (layer.bias is not None) != (getattr(twin, "bias", None) is not None):
            config.bias[name] = layer.bias is not None
    for group in config.shared:
        declare_ties(model, group)
    for name, value in (bias or {}).items():
        if name not in layers or value != (layers[name].bias is not None):
            raise UsageError(f"attach: bias says {name!r}: {value}, which is not what the model holds.")
    mark(model, config)
    return model


def dequantize(model: Any, dtype: torch.dtype | str | None = None) -> Any:
    """Multiply every pair of factors back, in place: a plain dense model that saves and loads without eckart.

    It gives the compressed weights in dense form, not the original ones.

    Args:
        model: a transformers model with `LowRankLinear` layers, marked by `attach` or not.
        dtype: type of the whole model afterwards; None keeps its own.

    Returns:
        The same model, its `quantization_config` removed. A model without such layers comes back as it is.

    Raises:
        Refused: factors that are offloaded or wrapped by an adapter, or a bias that the dense class has no place for.
    """
    from .config import EckartConfig
    from .quantizer import EckartQuantizer, mark

    layers = factored_layers(model)
    if (
        not layers
        and not quantised_layers(model)
        and not narrowed(model)
        and not getattr(getattr(model.config, "quantization_config", None), "shapes", None)
    ):
        return model
    _refuse_other_methods(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, EckartQuantizer):
        mark(model, EckartConfig({name: layer.rank for name, layer in layers.items()}, torchao=_integers(model)))
        quantizer = model.hf_quantizer
    return quantizer.dequantize(model, dtype=dtype)


def _integers(model: Any) -> dict[str, Any] | None:
    """The table of layers in integers, as the config holds it.

    Raises:
        Refused: a pair of which only one factor is integers, or types that a reload would not choose.
    """
    found = quantised_layers(model)
    if not found:
        return None
    wanted = "int4" if any(layer.bits == "int4" for layer in found.values()) else "int8"
    pairs = [n for n, layer in factored_layers(model).items() if {type(layer.down), type(layer.up)} & {QuantisedLinear}]
    inside = {f"{n}.{part}" for n in pairs for part in ("down", "up")}
    if missing := sorted(inside - found.keys()):
        raise Refused(f"{missing[0]} is not in integers, and the other factor of its pair is. Quantise both.")
    other = [n for n, layer in found.items() if layer.bits != bits_of(layer.in_features, wanted)]
    if other:
        raise Refused(f"{other[0]} is {found[other[0]].bits} in a model that is stored in {wanted}; a reload would make it {wanted}.")
    return {"type": wanted, "group_size": GROUP, "modules": [*pairs, *(n for n in found if n not in inside)]}


def _shape(layer: Any) -> tuple[int, int]:
    """(out, in); of a table (width, rows)."""
    return (layer.embedding_dim, layer.num_embeddings) if hasattr(layer, "num_embeddings") else dense_shape(layer)


def _refuse_other_methods(model: Any) -> None:
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", "eckart")
    if method != "eckart":
        raise Refused(f"the model is already quantised with {getattr(method, 'value', method)}; two methods cannot share it.")
