"""What the store asks of anything that tensors are taken from: a `Reader`, or tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from .header import TensorInfo


class Source(Protocol):
    """Named tensors with an identity."""

    @property
    def id(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def left_behind(self) -> Mapping[str, str]: ...
    def keys(self) -> tuple[str, ...]: ...
    def info(self, name: str) -> TensorInfo: ...
    def raw(self, name: str) -> Iterator[bytes]: ...


def infos_of(source: Source) -> dict[str, TensorInfo]:
    """{name: TensorInfo} of all its tensors."""
    names = source.keys()
    return {name: source.info(name) for name in names}
