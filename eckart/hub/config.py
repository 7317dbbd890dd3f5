"""What `config.json` says about a compressed model, read as if it came from a stranger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import Refused, did_you_mean
from ..nn.heads import head_attribute
from ..nn.quantised import GROUP
from ..nn.surgery import dense_shape, factorable

METHOD = "eckart"
FORMAT_VERSION = 3
"""1: ranks and bias. 2: what pairs share, layers of smaller shape, narrower heads, embeddings. 3: matrices in integers. A file names the lowest
that reads it."""
_OWN = ("quant_method", "format_version", "ranks", "bias", "shared", "shapes", "heads", "torchao")
_WHERE = "config.json, quantization_config"


class EckartConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model with layers held as factors, or of smaller shape than its class has.

    It says which modules and which sizes; it holds no tensors, and it is not a recipe: `recipe` and any other key are
    provenance, kept word for word and never acted on.

    Args:
        ranks: module name -> rank, at least 1. Names are those of the model class that was saved.
        bias: module name -> whether the pair has a bias, for layers that differ from the dense model in that.
        format_version: 1, 2 or 3.
        shared: {"side": "in" or "out", "modules": names}: pairs that use one `down` or one `up`, stored under the first.
        shapes: module name -> [out, in] of a dense layer that is smaller than in its class.
        heads: name of an attention module -> {"head_dim": width of its heads, "rope": dimensions kept of rotary codes, or null}.
        torchao: {"type": "int8" or "int4", "group_size": 32, "modules": names}: layers whose matrices are integers, both factors of a pair; a matrix
            whose inputs are no whole groups is int8 under either type.
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
        shared: Sequence[Mapping[str, Any]] | None = None,
        shapes: Mapping[str, Any] | None = None,
        heads: Mapping[str, Any] | None = None,
        torchao: Mapping[str, Any] | None = None,
        **info: Any,
    ) -> None:
        method = info.pop("quant_method", METHOD)
        if method != METHOD:
            raise Refused(f"{_WHERE}: expected quant_method {METHOD!r}, found {method!r}.")
        if isinstance(format_version, bool) or not isinstance(format_version, int) or format_version < 1:
            raise Refused(f"{_WHERE}: expected format_version to be an integer of at least 1, found {format_version!r}.")
        if format_version > FORMAT_VERSION:
            raise Refused(
                f"{_WHERE}: format_version {format_version} was written by a newer eckart; this one reads up to {FORMAT_VERSION}. "
                "Next: pip install -U eckart"
            )
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  (an enum of their own methods)
        self.ranks = _table("ranks", ranks, _is_size, "an integer of at least 1")
        self.bias = _table("bias", bias, lambda v: isinstance(v, bool), "true or false")
        self.shapes = _table("shapes", shapes, lambda v: _is_list(v, _is_size) and len(v) == 2, "two integers of at least 1")
        self.heads = _table("heads", heads, _is_heads, "a head_dim of at least 1, and rope: a list of positions or null")
        self.shared = _groups(shared, self.ranks)
        self.torchao = _integers(torchao)
        for name in self.bias:
            if name not in self.ranks:
                raise Refused(f"{_WHERE}: bias names {name!r}, which has no rank.")
        for name in self.shapes:
            if name in self.ranks:
                raise Refused(f"{_WHERE}: {name!r} has a rank and a shape of its own; it can have one of them.")
        self.embeddings = False  # whether a rank belongs to one; known once there is a model
        # one attribute, so that no key of a stranger's file can pose as a switch of transformers ("dequantize")
        self.info = dict(info)

    @property
    def format_version(self) -> int:
        """The lowest format that holds it."""
        if self.torchao:
            return 3
        return 2 if self.shared or self.shapes or self.heads or self.embeddings else 1

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config from the dict in `config.json`; keyword arguments are not part of it and are handed back when asked for."""
        own = {k: config_dict[k] for k in _OWN if k in config_dict}
        config = cls(**own)
        config.info = {k: v for k, v in config_dict.items() if k not in _OWN}
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What is written to `config.json`, in a fixed order."""
        out: dict[str, Any] = {"quant_method": METHOD, "format_version": self.format_version, "ranks": dict(sorted(self.ranks.items()))}
        for field in ("bias", "shapes", "heads"):
            if table := getattr(self, field):
                out[field] = dict(sorted(table.items()))
        if self.shared:
            out["shared"] = [dict(g) for g in self.shared]
        if self.torchao:
            out["torchao"] = dict(self.torchao)
        return out | {k: self.info[k] for k in sorted(self.info)}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that it names, each once."""
        return tuple(dict.fromkeys((*self.ranks, *self.shapes, *self.heads, *self.integers)))

    @property
    def integers(self) -> tuple[str, ...]:
        """Modules whose matrices are integers."""
        return tuple(self.torchao.get("modules", ()))

    def renamed(self, names: Mapping[str, str]) -> EckartConfig:
        """The same with other module names; those that `names` leaves out are dropped."""

        def table(found: Mapping[str, Any]) -> dict[str, Any]:
            return {names[k]: v for k, v in found.items() if k in names}

        groups = [{"side": g["side"], "modules": [names[n] for n in g["modules"] if n in names]} for g in self.shared]
        shared = [g for g in groups if len(g["modules"]) > 1]
        kept = [names[n] for n in self.integers if n in names]
        integers = {**self.torchao, "modules": kept} if kept else None
        other = EckartConfig(table(self.ranks), table(self.bias), FORMAT_VERSION, shared, table(self.shapes), table(self.heads), integers)
        other.info = dict(self.info)
        other.embeddings = self.embeddings
        return other

    @property
    def common(self) -> frozenset[str]:
        """Modules with a factor that others use too."""
        return frozenset(n for g in self.shared for n in g["modules"])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: object, good: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(good(v) for v in value)


def _is_heads(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) - {"head_dim", "rope"} or not _is_size(value.get("head_dim")):
        return False
    rope = value.get("rope")
    positions = rope is None or _is_list(rope, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0)
    return positions and (rope is None or len(rope) == value["head_dim"] == len(set(rope)))


def _table(field: str, value: Any, good: Any, expected: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused(f"{_WHERE}: expected {field} to be a table of module names, found {type(value).__name__}.")
    for name, entry in value.items():
        if not isinstance(name, str) or not name:
            raise Refused(f"{_WHERE}: {field} has a module name that is not a text: {name!r}.")
        if not good(entry):
            raise Refused(f"{_WHERE}: {field} of {name!r}: expected {expected}, found {entry!r}.")
    return dict(value)


def _groups(value: Any, ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise Refused(f"{_WHERE}: expected shared to be a list, found {type(value).__name__}.")
    seen: set[tuple[str, str]] = set()
    out: list[dict[str, Any]] = []
    for group in value:
        side = group.get("side") if isinstance(group, Mapping) else None
        modules = group.get("modules") if isinstance(group, Mapping) else None
        if side not in ("in", "out") or not _is_list(modules, lambda n: isinstance(n, str)) or modules is None or len(modules) < 2:
            raise Refused(f"{_WHERE}: shared: expected a side, in or out, and at least two modules, found {group!r}.")
        if len({ranks.get(n) for n in modules}) > 1 or modules[0] not in ranks:
            raise Refused(f"{_WHERE}: shared: expected modules of one rank, found {', '.join(f'{n!r}: {ranks.get(n)}' for n in modules)}.")
        for name in modules:
            if (side, name) in seen:
                raise Refused(f"{_WHERE}: shared names {name!r} twice.")
            seen.add((side, name))
        out.append({"side": side, "modules": list(modules)})
    return out


def _integers(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or set(value) != {"type", "group_size", "modules"}:
        raise Refused(f"{_WHERE}: torchao: expected type, group_size and modules, found {value!r}.")
    if value["type"] not in ("int8", "int4"):
        raise Refused(f"{_WHERE}: torchao.type: expected int8 or int4, found {value['type']!r}.")
    if value["group_size"] != GROUP or isinstance(value["group_size"], bool):
        raise Refused(f"{_WHERE}: torchao.group_size: this release reads {GROUP}, found {value['group_size']!r}.")
    names = value["modules"]
    if not _is_list(names, lambda n: isinstance(n, str) and n != "") or not names or len(set(names)) < len(names):
        raise Refused(f"{_WHERE}: torchao.modules: expected module names, each once, found {names!r}.")
    return {"type": value["type"], "group_size": GROUP, "modules": list(names)}


def check(model: nn.Module, config: EckartConfig) -> None:
    """Refuse a config that does not fit the dense model it is to be applied to. Nothing is allocated.

    Args:
        model: the model with its dense layers, on the meta device or not.
        config: names must be those of this model.

    Raises:
        Refused: a module that does not exist, is no plain linear layer or table, is tied to another tensor, or is smaller than what is asked.
    """
    modules = dict(model.named_modules())
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied.keys(), *tied.values()}
    kind = type(model).__name__
    for name in config.modules:
        if name not in modules:
            raise Refused(f"quantization_config names {name!r}, but {kind} has no such module.{did_you_mean(name, modules)}")
    for name, rank in config.ranks.items():
        module = modules[name]
        table = type(module) is nn.Embedding
        if not factorable(module) and not table:
            raise Refused(f"quantization_config gives {name!r} a rank, but it is a {type(module).__name__}, no torch.nn.Linear or Conv1D.")
        shape = (module.embedding_dim, module.num_embeddings) if isinstance(module, nn.Embedding) else dense_shape(module)
        if rank > (max if name in config.common else min)(shape):
            raise Refused(f"quantization_config gives {name!r} rank {rank}, but its shape is {shape}.")
        if f"{name}.weight" in tied_names:
            raise Refused(
                f"{name!r} shares its weight with another module, so it cannot be a pair of factors. Leave it out, or untie it first "
                "(model.config.tie_word_embeddings = False, and its own copy of the weight)."
            )
        config.embeddings = config.embeddings or table
    for name, shape in config.shapes.items():
        module = modules[name]
        if not factorable(module):
            raise Refused(f"quantization_config gives {name!r} a shape, but it is a {type(module).__name__}, no torch.nn.Linear or Conv1D.")
        if any(new > old for new, old in zip(shape, dense_shape(module), strict=True)):
            raise Refused(f"quantization_config gives {name!r} the shape {list(shape)}, larger than {list(dense_shape(module))} in {kind}.")
    for name in config.integers:
        if type(modules[name]) is not nn.Linear and (name not in config.ranks or isinstance(modules[name], nn.Embedding)):
            raise Refused(
                f"quantization_config stores {name!r} in integers, but it is a {type(modules[name]).__name__}, no torch.nn.Linear."
            )
        if f"{name}.weight" in tied_names:
            raise Refused(f"{name!r} shares its weight with another module, so it cannot be stored in integers.")
        if any(name in g["modules"] for g in config.shared):
            raise Refused(f"{name!r} has a factor that other layers use, and such factors are not stored in integers.")
    for name, heads in config.heads.items():
        attribute = head_attribute(modules[name])
        if attribute is None or getattr(modules[name], attribute) < heads["head_dim"]:
            raise Refused(
                f"quantization_config gives {name!r} heads of width {heads['head_dim']}, which a {type(modules[name]).__name__} cannot have."
            )
        if any(p >= getattr(modules[name], attribute) for p in heads.get("rope") or ()):
            raise Refused(f"quantization_config keeps rotary positions of {name!r} that its heads do not have.")
    for group in config.shared:
        at = 1 if group["side"] == "in" else 0
        lengths = {dense_shape(modules[n])[at] if factorable(modules[n]) else None for n in group["modules"]}
        if len(lengths) > 1 or None in lengths:
            raise Refused(f"quantization_config: {', '.join(group['modules'])} cannot share a factor on the {group['side']} side.")
