"""A linear layer whose matrix is stored in 8 or 4 bits and run by torchao, weights only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

Bits = Literal["int8", "int4"]
_INT4: Any = getattr(torch, "int4")  # noqa: B009  (torch's annotations do not list it)
GROUP = 32
"""Inputs that share a scale in int4; the smallest group torchao has kernels for."""


def bits_of(columns: int, wanted: str) -> Bits:
    """What a matrix is stored in: int4 takes rows that are whole groups of 32, others get int8.

    Example:
        >>> bits_of(64, "int4"), bits_of(60, "int4")
        ('int4', 'int8')
    """
    return "int4" if wanted == "int4" and columns % GROUP == 0 else "int8"


def parts_of(rows: int, columns: int, bits: Bits) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name of a tensor: (storage type, shape)} of a stored matrix; "" is the type of the layer."""
    if bits == "int8":
        return {"qdata": ("I8", (rows, columns)), "scale": ("", (rows, 1))}
    return {"qdata": ("U8", (rows, columns // 2)), "scale": ("", (rows, columns // GROUP))}


def torchao() -> Any:
    """torchao's quantisation module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import torchao.quantization as found  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise UsageError('weights in int8 or int4 are made and run by torchao. Next: pip install "eckart[torchao]"') from error
    return found


def encode(weight: Tensor, bits: Bits) -> dict[str, Tensor]:
    """The stored tensors of a matrix, quantised by torchao: symmetric, a scale per output (int8) or per 32 inputs (int4).

    Scales have the type of the matrix, so that they survive a load in that type; integers are those of the rounded scale.

    Args:
        weight: (m, n), float32 or a 16-bit float.
        bits: "int8" or "int4".

    Returns:
        `qdata` (m, n) int8, or (m, n/2) uint8 with the even column in the low half of each byte; `scale` (m, 1) or (m, n/32).

    Example:
        >>> import torch
        >>> stored = encode(torch.tensor([[1.27, -0.5]]), "int8")
        >>> stored["qdata"].tolist()
        [[127, -50]]
    """
    ao = torchao()
    if bits == "int8":
        if weight.shape[1] == 1:  # torchao 0.18 takes one scale for all rows of a single column; by its own formula
            scale = (weight.float().abs() / 127.5).clamp_min(torch.finfo(torch.float32).eps).to(weight.dtype)
        else:
            scale = ao.Int8Tensor.from_hp(weight, granularity=ao.PerRow()).scale.to(weight.dtype)
        found = ao.Int8Tensor.from_hp(weight, granularity=ao.PerRow(), scale=scale.float())
        return {"qdata": found.qdata.contiguous(), "scale": scale.contiguous()}
    found = ao.IntxUnpackedToInt8Tensor.from_hp(weight, (1, GROUP), _INT4)
    return {"qdata": pack(found.qdata), "scale": found.scale.to(weight.dtype).contiguous()}


def pack(values: Tensor) -> Tensor:
    """Two numbers from -8 to 7 in each byte, the even column in its low half: (m, n) int8 -> (m, n/2) uint8.

    Example:
        >>> import torch
        >>> unpack(pack(torch.tensor([[-8, 7]], dtype=torch.int8))).tolist()
        [[-8, 7]]
    """
    low, high = values[:, ::2], values[:, 1::2]
    return ((low & 15) | ((high & 15) << 4)).view(torch.uint8).contiguous()


def unpack(stored: Tensor) -> Tensor:
    """(m, n/2) uint8 -> (m, n) int8."""
    both = torch.stack([stored & 15, stored >> 4], dim=-1).reshape(len(stored), -1).to(torch.int8)
    return torch.where(both > 7, both - 16, both)


class QuantisedLinear(nn.Module):
    """A linear layer that stores integers and scales, and multiplies through torchao's weight-only tensor. It does not train.

    Not a `torch.nn.Linear`: what reads `weight` as the matrix must ask `dense_weight`. The buffer `weight` of shape (1,) is always zero; a
    loader that expects the dense matrix there stops at the shape, and it tells the type and the device of the layer. torchao's tensor is made at
    the first call and is no part of the state: in int4 the values are held as int8 from then on, so that memory is 8 bits per number, not 4.

    Args:
        in_features: n.
        out_features: m.
        bits: "int8" or "int4"; int4 takes multiples of 32 inputs.
        bias: whether there is one.
        device, dtype: of the parameters; None is torch's default.

    Raises:
        UsageError: int4 for another number of inputs.

    Example:
        >>> import torch
        >>> layer = QuantisedLinear.from_linear(torch.nn.Linear(64, 8), "int4")
        >>> layer(torch.zeros(3, 64)).shape, layer.qdata.dtype, tuple(layer.qdata.shape)
        (torch.Size([3, 8]), torch.uint8, (8, 32))
    """

    qdata: Tensor
    scale: Tensor
    weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: Bits,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bits != bits_of(in_features, bits):
            raise UsageError(f"QuantisedLinear: int4 stores whole groups of {GROUP} inputs, and {in_features} is no multiple of it.")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        types = {"I8": torch.int8, "U8": torch.uint8, "": dtype}
        for name, (kind, shape) in parts_of(out_features, in_features, bits).items():
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=types[kind]))
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        self._made: Any = None

    @classmethod
    def from_stored(cls, stored: Mapping[str, Tensor], bits: Bits, bias: Tensor | None = None) -> QuantisedLinear:
        """The layer of tensors that `encode` made; they are copied.

        Args:
            stored: `qdata` and `scale`.
            bits: as for the layer.
            bias: (m,), or None.
        """
        rows, columns = stored["qdata"].shape
        scale = stored["scale"]
        layer = cls(columns * (2 if bits == "int4" else 1), rows, bits, bias is not None, "meta", scale.dtype)
        layer.qdata, layer.scale = stored["qdata"].clone(), scale.clone()
        layer.weight = torch.zeros(1, dtype=scale.dtype, device=scale.device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, wanted: Bits) -> QuantisedLinear:
        """A linear layer in integers; int8 where `wanted` is int4 and does not fit."""
        bits = bits_of(linear.in_features, wanted)
        return cls.from_stored(encode(linear.weight.detach(), bits), bits, linear.bias).train(linear.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a copy makes its own

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._made = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._made = None
        super()._load_from_state_dict(*args, **kwargs)

    def matrix(self) -> Tensor:
        """torchao's tensor of the weight."""
        ao = torchao()
        dtype, scale = self.weight.dtype, self.scale
        if self.bits == "int8":
            return ao.Int8Tensor(self.qdata, scale.float(), [1, self.in_features], dtype)
        zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        return ao.IntxUnpackedToInt8Tensor(unpack(self.qdata), scale, zero, _INT4, (1, GROUP), dtype, None)

    def dense_weight(self) -> Tensor:
        """The matrix (m, n) that the integers stand for, in the layer's type."""
        values = (self.qdata if self.bits == "int8" else unpack(self.qdata)).float()
        groups = values.reshape(self.out_features, self.scale.shape[1], -1)
        return (groups * self.scale.float()[:, :, None]).reshape(values.shape).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        made = self._made
        if made is None or made[0] is not self.qdata or made[1] is not self.scale:
            made = self._made = (self.qdata, self.scale, self.matrix())
        return nn.functional.linear(x, made[2], self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.bits}, bias={self.bias is not None}"


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Name and module of every layer that is stored in integers, those inside of pairs included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def restore_linear(model: nn.Module) -> None:
    """Put ordinary linear layers, of the values that the integers stand for, in the place of quantised ones, in place."""
    for name, layer in quantised_layers(model).items():
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.dense_weight())
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain.train(layer.training))
