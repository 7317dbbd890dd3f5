"""A model without its weights: built from the config alone, on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch


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
