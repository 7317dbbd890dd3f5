"""Base layers whose weight is quantised, read through PEFT's own backends."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ...errors import Refused
from .probe import floating

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


def backend_of(layer: Any, model: nn.Module | None = None) -> QuantizationBackend | None:
    """How a quantised weight is read and written; None for a plain weight.

    Args:
        layer: the base layer.
        model: its model, which knows the config under which torchao quantised it.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and floating(weight):
        return None
    try:
        again = attrgetter("hf_quantizer.quantization_config.get_apply_tensor_subclass")(model)
    except AttributeError:
        again = _unknown
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=again)


def _unknown() -> Any:
    raise Refused(
        "torchao: the model does not know the config of its quantisation, so merged weights cannot be quantised again. Unload the adapter instead."
    )


def read(layer: Any, backend: QuantizationBackend | None) -> Tensor | None:
    """The weight in its own storage order and plain numbers; None where the library cannot give them."""
    if backend is None:
        weight = getattr(layer, "weight", None)
        return weight.detach() if isinstance(weight, Tensor) and floating(weight) else None
    try:
        return backend.get_base_weight(layer).detach()
    except (TypeError, NotImplementedError):  # forward-only backends
        return None
