"""Numbers that no weight enters (masks, positions) in a pass without data: models ask them questions before they run a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..catalogue.trace import storage_id

LARGEST = 1 << 26  # numbers in the arguments of an operation that is also carried out


class Known:
    """Values of tensors on the meta device, as far as they follow from what was learnt. Weights have none, nor has what they touch.

    With them a pass on the meta device can answer what it is asked ("is this mask all ones?") instead of failing.

    Example:
        >>> known = Known()
        >>> mask = torch.empty(2, device="meta")
        >>> known.learn(mask, torch.tensor([1.0, 0.0]))
        >>> total = known.call(torch.ops.aten.sum.default, (mask,), {})
        >>> total.device.type, known.value(total)
        ('meta', tensor(1.))
        >>> known.call(torch.ops.aten.equal.default, (mask, mask), {})
        True
    """

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()
        self._stale: dict[int, Tensor] = {}  # held, so that no storage comes twice

    def learn(self, tensor: Tensor, value: Tensor) -> None:
        """A tensor on the meta device has this value on the CPU."""
        self._values[tensor] = value

    def value(self, tensor: Tensor) -> Tensor | None:
        """Its value, None where it is not known."""
        if not tensor.is_meta:
            return tensor
        return None if storage_id(tensor) in self._stale else self._values.get(tensor)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives, its value learnt where all it reads is known.

        Raises:
            RuntimeError: as torch does, where the result depends on numbers that are not known.
        """
        real = self._carried_out(func, args, kwargs)
        if real is None:
            for tensor in written(func, args, kwargs):
                self._stale[storage_id(tensor)] = tensor
            return func(*args, **kwargs)
        values = list(tensors_in(real[0]))
        if not values:
            return real[0]
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # its shape depends on the numbers
            out = _mapped(real[0], lambda t: t.to("meta"))
        for tensor, value in zip(tensors_in(out), values, strict=True):
            if tensor.is_meta and tensor.shape == value.shape:
                self.learn(tensor, value)
        return out

    def _carried_out(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        given = list(tensors_in((args, kwargs)))
        if torch.Tag.nondeterministic_seeded in func.tags or sum(t.numel() for t in given) > LARGEST:
            return None
        found = [self.value(t) for t in given]
        if any(v is None for v in found):
            return None
        on_cpu = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        return (func(*_mapped(args, self.value), **_mapped(on_cpu, self.value)),)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation changes in place."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[at] if at < len(args) else kwargs.get(argument.name))


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: _mapped(v, change) for k, v in value.items()}
    return type(value)(_mapped(v, change) for v in value) if type(value) in (tuple, list) else value
