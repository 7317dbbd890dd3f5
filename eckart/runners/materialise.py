"""Weights that are read from a checkpoint for as long as they are needed, into a model on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..catalogue.headers import file_keys
from ..store.dtypes import nbytes, torch_dtype
from .walk import Unwalkable

if TYPE_CHECKING:
    from ..store import Reader


class Weights:
    """The parameters and stored buffers of a model on the meta device, and where a checkpoint has them.

    A tensor that the model uses under several names (a head tied to its embedding) is read once and put in all its places.

    Args:
        model: changed only while something is loaded.
        reader: the checkpoint; keys may have a first part more or less than the model's.
        device: where tensors go; None is the CPU.
        names: for tensors of the model the keys of the file, where they are known; several are the parts of a stack in the order in which they
            lie in it, as `hub.names.file_names` gives them.

    Raises:
        Unwalkable: the checkpoint lacks a tensor of the model, or has it in another shape.
    """

    def __init__(
        self, model: nn.Module, reader: Reader, device: torch.device | str | None = None, names: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.model, self.reader, self.device = model, reader, torch.device(device or "cpu")
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._meta: dict[str, Tensor] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        self._twins: dict[str, str] = {}
        state = {k: t for k, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        found = {name: (key,) for name, key in file_keys(state, reader.keys()).items()} | {n: tuple(k) for n, k in (names or {}).items()}
        first: dict[int, str] = {}
        for name, tensor in state.items():
            lead = first.setdefault(id(tensor), name)
            self._twins[name] = lead
            path, _, local = name.rpartition(".")
            self._places.setdefault(lead, []).append((model.get_submodule(path), local))
            self._meta[lead] = tensor
            if name in found:
                self._keys.setdefault(lead, found[name])
        self._check()

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes that these tensors take when they are loaded, each counted once."""
        return sum(self._meta[n].numel() * self._meta[n].element_size() for n in {self._twins[n] for n in names})

    def widest(self, names: Iterable[str]) -> int:
        """Bytes that reading takes beside, where a type is converted or a stack put together: of the largest tensor as it is stored."""
        most = 0
        for lead in {self._twins[n] for n in names}:
            infos = [self.reader.info(k) for k in self._keys[lead]]
            most = max(
                [most, *(nbytes(i.dtype, i.shape) for i in infos if len(infos) > 1 or torch_dtype(i.dtype) != self._meta[lead].dtype)]
            )
        return most

    def under(self, path: str) -> list[str]:
        """Names of all tensors in a module; "" is the whole model."""
        return [name for name in self._twins if not path or name.startswith(path + ".")]

    @contextlib.contextmanager
    def loaded(self, names: Collection[str]) -> Generator[None]:
        """Within the block these tensors are in the model; afterwards they are back on the meta device and their memory is free.

        Raises:
            Refused: a file has changed or cannot be read.
        """
        leads = sorted({self._twins[n] for n in names})
        try:
            for lead in leads:
                value = self._read(lead)
                self._put(lead, nn.Parameter(value, requires_grad=False) if isinstance(self._meta[lead], nn.Parameter) else value)
            yield
        finally:
            for lead in leads:
                self._put(lead, self._meta[lead])

    def _read(self, lead: str) -> Tensor:
        keys, like = self._keys[lead], self._meta[lead]
        if len(keys) == 1:
            return self.reader.read(keys[0]).to(self.device, like.dtype)
        out = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        for place, key in zip(out.view(-1).split(like.numel() // len(keys)), keys, strict=True):
            place.copy_(self.reader.read(key).reshape(-1))
        return out

    def _put(self, lead: str, value: Any) -> None:
        for module, local in self._places[lead]:
            setattr(module, local, value)

    def _check(self) -> None:
        for lead, tensor in self._meta.items():
            if lead not in self._keys:
                raise Unwalkable(f"the checkpoint stores no tensor under the name {lead}, nor under one that it is tied to.")
            shapes = {tuple(self.reader.info(k).shape) for k in self._keys[lead]}
            fits = shapes == {tuple(tensor.shape)}
            if len(self._keys[lead]) > 1:  # equal parts that fill the stack
                fits = len(shapes) == 1 and len(self._keys[lead]) * prod(*shapes) == tensor.numel()
            if not fits:
                found = " and ".join(map(str, sorted(shapes)))
                raise Unwalkable(f"{lead}: the checkpoint stores the shape {found}, the model uses {tuple(tensor.shape)}.")
