"""The plug that lets transformers' own `from_pretrained` and `save_pretrained` read and write factored models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..errors import Refused
from ..nn import LowRankEmbedding, LowRankLinear
from ..nn.heads import narrow, narrowed
from ..nn.quantised import Bits, QuantisedLinear, bits_of, restore_linear, torchao
from ..nn.surgery import dense_shape, put, replace_linear, resize, restore_dense, share
from .config import METHOD, EckartConfig, check
from .skeleton import skeleton


class EckartQuantizer(HfQuantizer):
    """Called by transformers while a factored model is loaded, saved, trained or turned back into a dense one.

    It moves no weights and computes no factors: a dense checkpoint cannot be compressed by passing an `EckartConfig` at load.
    """

    requires_calibration = True
    quantization_config: EckartConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config = settle(model, self.quantization_config)
        plant(model, self.quantization_config)
        return model

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        # the class's rules split q_proj and its like as one matrix; applied to a pair they would compute something else
        size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None)
        if size is not None and size > 1:
            raise Refused("eckart: tensor parallelism of factored layers is not supported. Load without tp_plan, or dequantize first.")

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return not self.quantization_config.integers

    @property
    def is_qat_trainable(self) -> bool:
        # transformers' Trainer refuses models flagged as quantised without this; factors are ordinary float parameters, integers are not
        return not self.quantization_config.integers

    @property
    def is_compileable(self) -> bool:
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """A plain dense model, in place; in its own types unless `dtype` says otherwise."""
        model = self._dequantize(model, dtype=dtype)
        self.remove_quantization_config(model)
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and "_is_quantized" in vars(config):
                del config._is_quantized
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        config = getattr(model.config, "quantization_config", None)
        if narrowed(model) or getattr(config, "shapes", None):
            raise Refused(
                f"{type(model).__name__}: layers of it are smaller than in its class, and no plain dense model has that shape. It needs eckart to load."
            )
        restore_linear(model)
        for key in [k for k in getattr(model, "all_tied_weights_keys", None) or {} if k.endswith((".down.weight", ".up.weight"))]:
            del model.all_tied_weights_keys[key]
        restore_dense(model, skeleton(type(model), model.config))
        if dtype is not None:
            model = model.to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


def plant(model: nn.Module, config: EckartConfig) -> None:
    """Put empty pairs, and empty layers of smaller shape, on the meta device in the place of the dense layers that the config names."""
    modules = dict(model.named_modules())
    for name, rank in config.ranks.items():
        dense: Any = modules[name]
        meta: dict[str, Any] = {"device": "meta", "dtype": dense.weight.dtype}
        if isinstance(dense, nn.Embedding):
            bias = config.bias.get(name, False)
            table = LowRankEmbedding(dense.num_embeddings, dense.embedding_dim, rank, bias=bias, padding_idx=dense.padding_idx, **meta)
            put(model, name, table)
            continue
        rows, columns = dense_shape(dense)
        bias = config.bias.get(name, dense.bias is not None)
        replace_linear(model, name, LowRankLinear(columns, rows, rank, bias=bias, common=name in config.common, **meta))
    for name, (rows, columns) in config.shapes.items():
        resize(model, name, rows, columns)
    for name, heads in config.heads.items():
        narrow(modules[name], heads["head_dim"], heads.get("rope"))
    for group in config.shared:
        share(model, group["modules"], group["side"])
        declare_ties(model, group)
    for name in config.integers:
        plant_integers(model, name, config.torchao["type"])


def plant_integers(model: nn.Module, name: str, wanted: Bits) -> None:
    """Empty quantised layers on the meta device in the place of a linear layer, or of both factors of a pair."""
    torchao()
    layer = model.get_submodule(name)
    for part in ("down", "up") if isinstance(layer, LowRankLinear) else ("",):
        path = f"{name}.{part}" if part else name
        old: Any = model.get_submodule(path)
        bits = bits_of(old.in_features, wanted)
        put(model, path, QuantisedLinear(old.in_features, old.out_features, bits, old.bias is not None, "meta", old.weight.dtype))


def declare_ties(model: Any, group: Mapping[str, Any]) -> None:
    """Tell transformers that a factor of these pairs is one tensor, in the file under the name of the first."""
    factor = {"in": "down", "out": "up"}[group["side"]]
    first, *others = group["modules"]
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    model.all_tied_weights_keys = ties | {f"{n}.{factor}.weight": f"{first}.{factor}.weight" for n in others}


def settle(model: Any, config: EckartConfig) -> EckartConfig:
    """The config in the names of this model, checked against it.

    A checkpoint may be loaded under another class than it was saved from (`AutoModel` on a language model: without the leading
    "model."), and some architectures name their tensors on disk otherwise than their modules.
    """
    names = _names(model, config)
    settled = config.renamed(names)
    seen: dict[str, str] = {}
    for old, new in names.items():
        if new in seen:
            raise Refused(f"quantization_config names one module twice, as {seen[new]!r} and as {old!r}.")
        seen[new] = old
    check(model, settled)
    return settled


def _names(model: Any, config: EckartConfig) -> dict[str, str]:
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "") or ""
    other_class = type(model).__name__ not in (getattr(model.config, "architectures", None) or ())
    rules: list[Any] | None = None
    names: dict[str, str] = {}
    for name in config.modules:
        tries = [name]
        if prefix:
            tries += [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
        found = next((t for t in tries if t in modules), None)
        if found is None:
            rules = _renamings(model) if rules is None else rules
            found = next((t for t in _respelled(tries, rules) if t in modules), None)
        if found is not None:
            names[name] = found
        elif not (other_class and prefix and not name.startswith(f"{prefix}.")):
            names[name] = name  # `check` refuses it by name
        # else: a head of the class it was saved from, which this class does not have
    return names


def _renamings(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]


def _respelled(tries: list[str], rules: list[Any]) -> list[str]:
    from transformers.core_model_loading import apply_renamings

    return [apply_renamings(f"{t}.weight", rules).removesuffix(".weight") for t in tries]


def register() -> None:
    """Enter the config and the quantizer into transformers' tables. Calling it again, also after a reload, is harmless."""
    tables: tuple[tuple[dict[str, Any], type, Any], ...] = (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, EckartConfig, auto.register_quantization_config),
        (auto.AUTO_QUANTIZER_MAPPING, EckartQuantizer, auto.register_quantizer),
    )
    for table, cls, enter in tables:
        known = table.get(METHOD)
        if known is cls:
            continue
        if known is not None:
            if known.__module__ != cls.__module__:
                raise Refused(f"transformers already knows a quant_method {METHOD!r}, from {known.__module__}; two cannot share the name.")
            del table[METHOD]
        enter(METHOD)(cls)


def mark(model: Any, config: EckartConfig) -> None:
    """Set what transformers sets on a model that it loaded with this config."""
    quantizer = EckartQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD


register()
