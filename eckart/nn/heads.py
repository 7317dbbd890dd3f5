"""Attention with narrower heads: fewer dimensions per head than the class was built for, one matrix product each as before."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused
from ..seeds import generator
from .surgery import dense_shape, is_conv1d

SIZES = ("head_dim", "attention_head_size")
"""Attributes in which attention classes hold the width of a head."""
TOTALS = ("all_head_size", "split_size")
"""Attributes that hold it times the number of heads."""


def head_attribute(attention: nn.Module) -> str | None:
    """Name of the attribute with the width of a head, or None where a class has none or none beside a fixed scale of the scores.

    The scale of the scores must be an attribute of its own: it stays that of the original width.

    Example:
        >>> head_attribute(nn.Linear(2, 2)) is None
        True
    """
    found = next((a for a in SIZES if isinstance(getattr(attention, a, None), int)), None)
    return found if isinstance(getattr(attention, "scaling", None), int | float) else None


def narrow(attention: nn.Module, head_dim: int, rope: Sequence[int] | None = None) -> None:
    """Tell an attention module that its heads are `head_dim` wide, in place. Its projections are changed by the caller.

    Args:
        attention: a module with `head_attribute`.
        head_dim: the new width.
        rope: where rotary position codes are applied to the heads, the dimensions of the original head that were kept: `cos` and `sin` that the
            model hands down are cut to these. None where there are no position codes in the heads.

    Raises:
        Refused: the module holds the width of its heads nowhere that is known.
    """
    name = head_attribute(attention)
    if name is None:
        raise Refused(
            f"{type(attention).__name__}: the width of its heads cannot be changed (no attribute {' or '.join(SIZES)} beside `scaling`)."
        )
    module: Any = attention
    old = getattr(module, name)
    for total in TOTALS:
        if isinstance(getattr(module, total, None), int):
            setattr(module, total, getattr(module, total) // old * head_dim)
    setattr(module, name, head_dim)
    module.eckart_heads = {"head_dim": head_dim, "rope": None if rope is None else list(rope)}
    if rope is not None:
        module.register_forward_pre_hook(_CutRotary(tuple(rope)), with_kwargs=True)


class _CutRotary:
    """Forward hook: the kept columns of `position_embeddings`. A class and not a closure, so that the model can be copied and pickled."""

    def __init__(self, kept: tuple[int, ...]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = list(inspect.signature(module.forward).parameters)
        if "position_embeddings" in kwargs:
            return args, {**kwargs, "position_embeddings": self._cut(kwargs["position_embeddings"])}
        at = names.index("position_embeddings")
        return (*args[:at], self._cut(args[at]), *args[at + 1 :]), kwargs

    def _cut(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = pair
        kept = torch.tensor(self.kept, device=cos.device)
        return cos.index_select(-1, kept), sin.index_select(-1, kept)


def narrowed(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> {"head_dim", "rope"} of every attention module that `narrow` changed."""
    return {n: dict(m.eckart_heads) for n, m in model.named_modules() if isinstance(getattr(m, "eckart_heads", None), Mapping)}  # type: ignore[arg-type]


def check_narrowing(attention: nn.Module, names: Mapping[str, str], heads: int, kv: int, rope: bool) -> None:
    """Refuse an attention module whose heads do not work the way that narrowing assumes. The module is not changed.

    On random inputs, a copy whose dropped head dimensions are zero must give what the narrower copy gives. This finds normalised heads, rotary
    codes that pair other dimensions, and anything else that mixes the dimensions of a head.

    Args:
        attention: the module, with weights or on the meta device.
        names: local names of its projections: "q", "k", "v" or the fused "qkv", and "o" if that is inside the module.
        heads: of the queries.
        kv: heads of the keys and values.
        rope: whether position codes are applied to the heads.

    Raises:
        Refused: they do not.
    """
    kind = type(attention).__name__
    width_of = head_attribute(attention)
    if width_of is None:
        raise Refused(f"{kind}: the width of its heads cannot be changed (no attribute {' or '.join(SIZES)} beside `scaling`).")
    width: int = getattr(attention, width_of)
    half = width // 2
    kept = [0, *range(2, half), half, *range(half + 2, width)] if rope else [i for i in range(width) if i != 1]
    if width < 4:
        raise Refused(f"{kind}: heads of width {width} are too narrow to be cut.")
    whole = _on_cpu(attention)
    small = copy.deepcopy(whole)
    count = {"q": heads, "k": kv, "v": kv, "qkv": heads + 2 * kv, "o": heads}
    rows = torch.tensor(kept)
    dropped = [i for i in range(width) if i not in kept]
    for part, name in names.items():
        old: Any = whole.get_submodule(name)
        new: Any = small.get_submodule(name)
        turned = is_conv1d(old)
        weight = (old.weight.data.T if turned else old.weight.data).clone()
        if part == "o":
            cut = weight.reshape(-1, heads, width)[..., rows].reshape(len(weight), -1)
        else:
            cut = weight.reshape(count[part], width, -1)[:, rows].reshape(-1, weight.shape[1])
            weight.view(count[part], width, -1)[:, dropped] = 0
            old.weight = nn.Parameter((weight.T if turned else weight).contiguous())
            if old.bias is not None:
                new.bias = nn.Parameter(old.bias.data.reshape(count[part], width)[:, rows].reshape(-1).contiguous())
                old.bias.data.view(count[part], width)[:, dropped] = 0
            if turned:
                new.nf = len(cut)
        new.weight = nn.Parameter((cut.T if turned else cut).contiguous())
    narrow(small, len(kept), kept if rope else None)
    g = generator(0, "narrow", kind)
    first: Any = whole.get_submodule(names.get("q") or names["qkv"])
    x = torch.randn(1, 3, dense_shape(first)[1], generator=g)
    wanted = inspect.signature(whole.forward).parameters
    kwargs: dict[str, Any] = {"attention_mask": None} if "attention_mask" in wanted else {}
    if rope:
        kwargs["position_embeddings"] = tuple(torch.randn(1, 3, width, generator=g) for _ in range(2))
    with torch.no_grad():
        try:
            a, b = whole(x, **kwargs)[0], small(x, **kwargs)[0]
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{kind}: its heads cannot be cut, a narrower copy does not run: {error}") from error
    if "o" not in names:  # the heads come out side by side
        a = a.reshape(1, 3, -1, width)[..., rows].reshape(1, 3, -1)
    if a.shape != b.shape or float((a - b).abs().max()) > 1e-4 * float(a.abs().max().clamp_min(1e-6)):
        raise Refused(f"{kind}: its heads cannot be cut: something in it depends on all dimensions of a head together.")


def _on_cpu(attention: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode with random weights of its own."""
    out = copy.deepcopy(attention).to_empty(device="cpu").float().eval()
    g = generator(0, "narrow", type(attention).__name__, "weights")
    with torch.no_grad():
        for tensor in (*out.parameters(), *out.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=g) / max(1, tensor.shape[-1] if tensor.ndim else 1) ** 0.5)
    return out
