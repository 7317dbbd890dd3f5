"""The one table of storage types: name in a safetensors file, torch type, bytes per element.

Types of less than a byte (F4, F6) are not here: a file that uses them is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import Refused, UsageError

if TYPE_CHECKING:
    from torch import Tensor, dtype

# In the order of the safetensors package, which lays out the tensors of a file from the last type to the first:
# wide types first, so that every tensor starts at a multiple of its element size.
_TABLE = (
    ("BOOL", "bool", 1),
    ("U8", "uint8", 1),
    ("I8", "int8", 1),
    ("F8_E5M2", "float8_e5m2", 1),
    ("F8_E4M3", "float8_e4m3fn", 1),
    ("F8_E8M0", "float8_e8m0fnu", 1),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz", 1),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz", 1),
    ("I16", "int16", 2),
    ("U16", "uint16", 2),
    ("F16", "float16", 2),
    ("BF16", "bfloat16", 2),
    ("I32", "int32", 4),
    ("U32", "uint32", 4),
    ("F32", "float32", 4),
    ("C64", "complex64", 8),
    ("F64", "float64", 8),
    ("I64", "int64", 8),
    ("U64", "uint64", 8),
)
NAMES = tuple(name for name, _, _ in _TABLE)
ITEMSIZE = {name: size for name, _, size in _TABLE}
RANK = {name: position for position, name in enumerate(NAMES)}
_TO_TORCH = {name: attribute for name, attribute, _ in _TABLE}
_FROM_TORCH = {attribute: name for name, attribute, _ in _TABLE}
MAX_DIMS = 64  # torch's own limit


def torch_dtype(name: str) -> dtype:
    """The torch type of a safetensors name.

    Example:
        >>> torch_dtype("BF16")
        torch.bfloat16
    """
    import torch

    if name not in _TO_TORCH:
        raise UsageError(f"dtype: expected one of {', '.join(NAMES)}, found {name!r}.")
    return getattr(torch, _TO_TORCH[name])


def name_of(dtype: dtype) -> str:
    """The safetensors name of a torch type.

    Example:
        >>> import torch
        >>> name_of(torch.float8_e4m3fn)
        'F8_E4M3'
    """
    name = _FROM_TORCH.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise UsageError(f"dtype: {dtype} cannot be stored; expected one of {', '.join(NAMES)}.")
    return name


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; the shape is a checked one (see `header`)."""
    return math.prod(shape) * ITEMSIZE[dtype]


def empty(dtype: str, shape: Sequence[int]) -> tuple[Tensor, memoryview]:
    """A fresh CPU tensor and the writable bytes behind it."""
    import torch

    _little_endian()
    flat = torch.empty(nbytes(dtype, shape), dtype=torch.uint8)
    return flat.view(torch_dtype(dtype)).reshape(tuple(shape)), memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view of its memory when it is contiguous on the CPU."""
    import torch

    _little_endian()
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise UsageError(f"a tensor of layout {tensor.layout} on {tensor.device} cannot be stored; expected a plain dense tensor.")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise Refused("this machine is big-endian; safetensors files are little-endian and are not converted.")
