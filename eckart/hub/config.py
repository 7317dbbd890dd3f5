"""What `config.json` says about a compressed model, read as if it came from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import Refused, did_you_mean
from ..nn.surgery import dense_shape, factorable

METHOD = "eckart"
FORMAT_VERSION = 1
_OWN = ("quant_method", "format_version", "ranks", "bias")


class EckartConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model whose linear layers are held as pairs of factors.

    It says which modules and at which rank; it holds no tensors, and it is not a recipe: `recipe` and any other key are
    provenance, kept word for word and never acted on.

    Args:
        ranks: module name -> rank, at least 1. Names are those of the model class that was saved.
        bias: module name -> whether the pair has a bias, for layers that differ from the dense model in that.
        format_version: 1.
        **info: provenance, anything that JSON holds.

    Raises:
        Refused: a value of the wrong type, or a format version this release does not know.

    Example:
        >>> EckartConfig({"model.layers.0.mlp.up_proj": 8}, recipe="svd").to_dict()["quant_method"]
        'eckart'
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        bias: Mapping[str, bool] | None = None,
        format_version: int = FORMAT_VERSION,
        **info: Any,
    ) -> None:
        where = "config.json, quantization_config"
        method = info.pop("quant_method", METHOD)
        if method != METHOD:
            raise Refused(f"{where}: expected quant_method {METHOD!r}, found {method!r}.")
        if isinstance(format_version, bool) or not isinstance(format_version, int) or format_version < 1:
            raise Refused(f"{where}: expected format_version to be an integer of at least 1, found {format_version!r}.")
        if format_version > FORMAT_VERSION:
            raise Refused(
                f"{where}: format_version {format_version} was written by a newer eckart; this one reads up to {FORMAT_VERSION}. "
                "Next: pip install -U eckart"
            )
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  (an enum of their own methods)
        self.format_version = format_version
        self.ranks = _table(where, "ranks", ranks, _is_rank, "an integer of at least 1")
        self.bias = _table(where, "bias", bias, lambda v: isinstance(v, bool), "true or false")
        for name in self.bias:
            if name not in self.ranks:
                raise Refused(f"{where}: bias names {name!r}, which has no rank.")
        # one attribute, so that no key of a stranger's file can pose as a switch of transformers ("dequantize")
        self.info = dict(info)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config from the dict in `config.json`; keyword arguments are not part of it and are handed back when asked for."""
        info = {k: v for k, v in config_dict.items() if k not in _OWN}
        config = cls(
            config_dict.get("ranks"),
            config_dict.get("bias"),
            config_dict.get("format_version", FORMAT_VERSION),
            quant_method=config_dict.get("quant_method", METHOD),
        )
        config.info = info
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What is written to `config.json`, in a fixed order."""
        out: dict[str, Any] = {"quant_method": METHOD, "format_version": self.format_version, "ranks": dict(sorted(self.ranks.items()))}
        if self.bias:
            out["bias"] = dict(sorted(self.bias.items()))
        return out | {k: self.info[k] for k in sorted(self.info)}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def renamed(self, names: Mapping[str, str]) -> EckartConfig:
        """The same with other module names; those that `names` leaves out are dropped."""
        ranks = {names[k]: r for k, r in self.ranks.items() if k in names}
        bias = {names[k]: b for k, b in self.bias.items() if k in names}
        other = EckartConfig(ranks, bias, self.format_version)
        other.info = dict(self.info)
        return other


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _table(where: str, field: str, value: Any, good: Any, expected: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused(f"{where}: expected {field} to be a table of module names, found {type(value).__name__}.")
    for name, entry in value.items():
        if not isinstance(name, str) or not name:
            raise Refused(f"{where}: {field} has a module name that is not a text: {name!r}.")
        if not good(entry):
            raise Refused(f"{where}: {field} of {name!r}: expected {expected}, found {entry!r}.")
    return dict(value)


def check(model: nn.Module, config: EckartConfig) -> None:
    """Refuse a config that does not fit the dense model it is to be applied to. Nothing is allocated.

    Args:
        model: the model with its dense layers, on the meta device or not.
        config: names must be those of this model.

    Raises:
        Refused: a module that does not exist, is no plain linear layer, is tied to another tensor, or is smaller than its rank.
    """
    modules = dict(model.named_modules())
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied.keys(), *tied.values()}
    kind = type(model).__name__
    for name, rank in config.ranks.items():
        if name not in modules:
            raise Refused(f"quantization_config names {name!r}, but {kind} has no such module.{did_you_mean(name, modules)}")
        module = modules[name]
        if not factorable(module):
            raise Refused(f"quantization_config gives {name!r} a rank, but it is a {type(module).__name__}, no torch.nn.Linear or Conv1D.")
        if rank > min(dense_shape(module)):
            raise Refused(f"quantization_config gives {name!r} rank {rank}, but its shape is {dense_shape(module)}.")
        if f"{name}.weight" in tied_names:
            raise Refused(
                f"{name!r} shares its weight with another module, so it cannot be a pair of factors. Leave it out, or untie it first "
                "(model.config.tie_word_embeddings = False, and its own copy of the weight)."
            )
