"""What a forward pass on the meta device does with its tensors: who reads what, and how many bytes live at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..catalogue.trace import storage_id
from .known import Known, tensors_in, written

OUTSIDE = -1
"""The scope of operations outside of all blocks; the others are the numbers of the blocks."""


class Watch(TorchDispatchMode):
    """Sees every operation below it. Nothing is executed differently, with or without it.

    Args:
        names: storage -> name of the parameter or buffer that it belongs to.

    Attributes:
        known: values of tensors that no weight enters.
        crossing: called as (scope of origin, storage, written) for every tensor that is no parameter, if set.
        scope: where the operations that follow belong; set by the owner.
        reads: scope -> names of what was read there.
        live, peak: bytes of the storages made since the start: now, and the most since the owner last set `peak`.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.known = Known()
        self.scope = OUTSIDE
        self.reads: dict[int, set[str]] = {}
        self.live = self.peak = 0
        self.crossing: Callable[[int | None, int, bool], None] | None = None
        self._made: dict[int, int] = {}

    def origin(self, tensor: Tensor) -> int | None:
        """The scope in which the storage of a tensor was made; None where it came from without."""
        return self._made.get(storage_id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changed = {id(t) for t in written(func, args, kwargs)}
        for tensor in tensors_in((args, kwargs)):
            self.touch(tensor, id(tensor) in changed)
        out = self.known.call(func, args, kwargs)
        for tensor in tensors_in(out):
            self._note(tensor)
        return out

    def touch(self, tensor: Tensor, changed: bool = False) -> None:
        """An operation of the present scope reads a tensor, or writes it in place."""
        storage = storage_id(tensor)
        name = self.names.get(storage)
        if name is not None:
            self.reads.setdefault(self.scope, set()).add(name)
        elif self.crossing is not None:
            self.crossing(self._made.get(storage), storage, changed)

    def _note(self, tensor: Tensor) -> None:
        storage = storage_id(tensor)
        if storage in self._made or storage in self.names:
            return
        self._made[storage] = self.scope
        held = tensor.untyped_storage()
        size = held.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(held, self._gone, storage, size)

    def _gone(self, storage: int, size: int) -> None:
        self._made.pop(storage, None)
        self.live -= size


class FusedKernels(TorchFunctionMode):
    """On the meta device, what fused kernels give and keep. Attention: no matrix of all pairs of tokens, into which torch would take it apart.
    Products of groups of rows with a matrix each, the experts of a mixture: torch knows their shape for bfloat16 alone.

    Args:
        watch: told of what is read.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {torch.nn.functional.scaled_dot_product_attention: self._attention}
        if hasattr(torch, "_grouped_mm"):  # what transformers runs experts with; newer versions of torch may rename it
            known[torch._grouped_mm] = self._grouped  # pyright: ignore
        shape = known.get(func)
        tensors = list(tensors_in((args, kwargs)))
        out = shape(args, kwargs) if shape is not None and all(t.is_meta for t in tensors) else None
        if out is None:
            return func(*args, **kwargs)
        for tensor in tensors:
            self.watch.touch(tensor)
        return out

    def _attention(self, args: Any, kwargs: Any) -> Tensor | None:
        query, _, value, mask = ([*args, *(kwargs.get(k) for k in ("query", "key", "value", "attn_mask")[len(args) :])])[:4]
        if query.ndim < 3:
            return None
        made = torch.empty(0 if mask is None else mask.numel(), dtype=query.dtype, device="meta")  # the kernel adds a mask of numbers
        out = torch.empty((*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1]), dtype=query.dtype, device="meta")
        del made
        return out.transpose(-3, -2)

    def _grouped(self, args: Any, kwargs: Any) -> Tensor | None:
        rows, matrices = args[:2]
        return torch.empty((len(rows), matrices.shape[-1]), dtype=rows.dtype, device="meta") if rows.ndim == 2 < matrices.ndim else None
