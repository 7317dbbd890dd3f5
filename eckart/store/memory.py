"""Tensors in memory, read like a checkpoint on disk: same names, same questions, same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import Refused, did_you_mean
from . import dtypes, files
from .header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class Memory:
    """A reader over named tensors, for models that were never a folder. Tensors that share their storage are listed once, under the first name,
    and can be read under each.

    Args:
        tensors: {name: tensor}; not copied, and not to be changed while this is in use.
        config: what `config.json` would hold.
        id: what the source is called.

    Example:
        >>> import torch
        >>> Memory({"w": torch.ones(2, 3)}).info("w").shape
        (2, 3)
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, id: str = "memory") -> None:
        self.config = dict(config or {})
        self.id = id
        self._tensors: dict[str, Tensor] = {}
        self._alias: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in tensors.items():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tensor.numel() and place in first:
                self._alias[name] = first[place]
                continue
            first[place] = name
            self._tensors[name] = tensor.detach()

    def keys(self) -> tuple[str, ...]:
        """Names, sorted; of a tied tensor the first one."""
        return tuple(sorted(self._tensors))

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and size of one tensor."""
        tensor = self.read(name)
        kind = dtypes.name_of(tensor.dtype)
        return TensorInfo(name, kind, tuple(tensor.shape), dtypes.nbytes(kind, tensor.shape), "memory", 0)

    @property
    def left_behind(self) -> Mapping[str, str]:
        """No file is left behind."""
        return MappingProxyType({})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self._tensors)

    def read(self, name: str) -> Tensor:
        """The tensor itself, not a copy."""
        name = self._alias.get(name, name)
        if name not in self._tensors:
            raise Refused(f"{self.id}: there is no tensor {name!r}.{did_you_mean(name, self._tensors)}")
        return self._tensors[name]

    def raw(self, name: str, chunk: int = files.CHUNK) -> Iterator[bytes]:
        """The bytes as a file would hold them."""
        data = dtypes.to_bytes(self.read(name))
        for at in range(0, len(data), chunk):
            yield bytes(data[at : at + chunk])

    @property
    def fingerprint(self) -> str:
        """sha256 over names, types, shapes and all bytes."""
        return self._fingerprint

    @property
    def stamp(self) -> str:
        """The fingerprint: it sees every byte."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"eckart memory 1\n")
        for name in self.keys():
            info = self.info(name)
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            for piece in self.raw(name):
                digest.update(piece)
        return digest.hexdigest()

    def carry(self) -> dict[str, Path]:
        """No side files."""
        return {}
