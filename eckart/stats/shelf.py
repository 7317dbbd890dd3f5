"""Finished values that are read when they are asked for, so that the Grams of a large model never lie in memory together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Refused
from .moments import Moments

Value = Moments | tuple[float, Tensor]
"""`Moments`, or (count, float64 vector); a count of 0 where calibration never came by."""

PARTS = ("count", "total", "gram", "mean")  # last part of a tensor's name


class Shelf(Mapping[str, Value]):
    """Values by key, each read anew at every look. Not a cache: who needs a value twice keeps it.

    Args:
        shapes: of the tensors behind the values, by name: "KEY|count" and, where the count is not 0, "KEY|total" and "KEY|gram", or
            "KEY|mean".
        read: name -> that tensor, float64.

    Example:
        >>> from .moments import moments
        >>> parts = parts_of("a", moments(torch.eye(2)))
        >>> shelf = Shelf({k: tuple(t.shape) for k, t in parts.items()}, parts.__getitem__)
        >>> list(shelf), shelf["a"].gram.tolist()
        (['a'], [[1.0, 0.0], [0.0, 1.0]])
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.shapes = dict(sorted(shapes.items()))
        self.read = read
        self._keys = tuple(k for k, _, part in (n.rpartition("|") for n in self.shapes) if part == "count")

    def __getitem__(self, key: str) -> Value:
        if f"{key}|count" not in self.shapes:
            raise KeyError(key)
        return value_from({p: self.read(f"{key}|{p}") for p in PARTS if f"{key}|{p}" in self.shapes})

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def parts_of(key: str, value: Value) -> dict[str, Tensor]:
    """The tensors of a value, by name."""
    if isinstance(value, Moments):
        count, named = value.count, {"total": value.total, "gram": value.gram}
    else:
        count, named = value[0], {"mean": value[1]}
    return {f"{key}|count": torch.tensor(count, dtype=torch.float64), **{f"{key}|{n}": t for n, t in named.items() if t.numel()}}


def shapes_of(key: str, value: Value) -> dict[str, tuple[int, ...]]:
    """The shapes of `parts_of`."""
    return {name: tuple(t.shape) for name, t in parts_of(key, value).items()}


def value_from(parts: Mapping[str, Tensor]) -> Value:
    """The value of its tensors by their last names.

    Raises:
        ValueError: they belong to no value.
    """
    count, total, gram, mean = parts["count"].item(), parts.get("total"), parts.get("gram"), parts.get("mean")
    if total is not None and gram is not None and gram.shape == (len(total), len(total)):
        return Moments(count, total, gram)
    if total is None and gram is None and (mean is not None or count == 0):
        return count, torch.zeros(0, dtype=torch.float64) if mean is None else mean
    raise ValueError("the tensors of a statistic do not belong together")


def on_disk(path: Path) -> Callable[[str], Tensor]:
    """name -> tensor of a statistics file, which must stay as it is."""
    from safetensors import safe_open

    before = _state(path)

    def read(name: str) -> Tensor:
        if not path.is_file() or _state(path) != before:
            raise Refused(f"{path}: this statistics file has changed while it was in use. Run again.")
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


def _state(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
