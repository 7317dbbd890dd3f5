"""A model without its weights: built from the config alone, on the meta device."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from ..errors import Refused
from ..store import Reader
from ..store.dtypes import torch_dtype


def skeleton(cls: Any, config: Any) -> Any:
    """An instance of a transformers class on the meta device: shapes, names and ties, no memory, no random numbers.

    Args:
        cls: a `PreTrainedModel` class.
        config: its config; copied. A `quantization_config` in it is ignored: the layers are dense.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype())
    return model.eval()


def unloaded(path: str | os.PathLike[str], reader: Reader) -> Any:
    """What `load` would give, short of the weights: parameters and stored buffers on the meta device in the types they will have, the
    buffers that no file holds (rotary frequencies, position ids) with their values on the CPU.

    Args:
        path: a local folder, dense.
        reader: the same folder.

    Raises:
        Refused: as `load`, for what the config can show; also where the types cannot be known from config and headers, or a buffer
            cannot be computed without the weights.
    """
    from . import identify

    identify.need_transformers()
    where, options = identify.locate(path, {})
    config = identify.read_config(where, options)
    cls = identify.model_class(where, config)
    if getattr(config, "dtype", None) is None:
        config.dtype = _stored_type(where, reader)
    try:
        model = skeleton(cls, config)
        fill_buffers(model)
    except Refused:
        raise
    except Exception as error:  # sizes in a stranger's config.json that no module can have
        reason = f"{type(error).__name__}: {identify.first_line(error)}"
        raise Refused(f"{path}: {cls.__name__} cannot be built from its config.json: {reason}") from error
    if model._get_dtype_plan(model.dtype):
        raise Refused(f"{path}: {cls.__name__} keeps some of its layers in float32, which only the loaded model shows.")
    return model


def _stored_type(where: str, reader: Reader) -> torch.dtype:
    found = sorted({dtype for dtype in (reader.info(k).dtype for k in reader) if dtype in ("F64", "F32", "BF16", "F16")})
    if len(found) != 1:
        raise Refused(f"{where}: config.json names no dtype, and the file holds {', '.join(found) or 'no floating type'}.")
    return torch_dtype(found[0])


def fill_buffers(model: Any) -> None:
    """Give the buffers that no file holds their values, on the CPU, by the model's own initialiser: what `from_pretrained` does once all
    weights are in place. Weights are not touched and no random numbers are drawn.

    Args:
        model: a transformers model on the meta device.

    Raises:
        Refused: the initialiser leaves such a buffer as it is.
    """
    kept = dict(model.named_non_persistent_buffers())
    for stored in model.state_dict(keep_vars=True).values():
        stored._is_hf_initialized = True  # transformers skips what is marked so
    new: dict[str, torch.Tensor] = {}
    for name, buffer in kept.items():
        path, _, local = name.rpartition(".")
        owner = model.get_submodule(path)
        new[name] = _unlikely(buffer)
        owner.register_buffer(local, new[name], persistent=False)
        for module in (model, *(model.get_submodule(p) for p in _prefixes(path))):
            module._is_hf_initialized = False
    model.initialize_weights()
    for name, before in new.items():
        path, _, local = name.rpartition(".")
        value: torch.Tensor = getattr(model.get_submodule(path), local)
        left = torch.isnan(value) if value.is_floating_point() else value == _unlikely(before)
        if bool(left.all() if value.dtype == torch.bool else left.any()):
            raise Refused(f"{type(model).__name__}: the buffer {name} is in no file, and its own initialiser does not compute it.")


def _unlikely(like: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape that no initialiser makes."""
    if like.is_floating_point():
        return torch.full(like.shape, torch.nan, dtype=like.dtype)
    return torch.full(like.shape, -(1 << 30) if like.dtype in (torch.int32, torch.int64) else 1, dtype=like.dtype)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))] if path else []
