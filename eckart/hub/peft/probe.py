"""Is this the base model that an adapter was made for? A few weights, read at places that follow from their names, compared with those it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...errors import Refused
from ...seeds import seed_of

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = 8
ENTRIES = 4
PRECISION = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

Read = Callable[[str], "Tensor | None"]
"""Name of a layer -> its weight as a matrix, or None where it is quantised."""


def take(shapes: Mapping[str, tuple[int, int]], read: Read) -> dict[str, Any]:
    """What is written into an adapter's config.

    Args:
        shapes: layer -> (out, in), of every layer that has an adapter.
        read: reads one of them.

    Returns:
        The number type, and for a few layers their shape and entries; no entries where the base is quantised.
    """
    names = _few(sorted(shapes))
    layers: dict[str, Any] = {}
    dtype = "quantised"
    for name in names:
        weight = read(name)
        row: dict[str, Any] = {"shape": list(shapes[name])}
        if weight is not None:
            dtype = str(weight.dtype).removeprefix("torch.")
            row["entries"] = [float(weight[i, j]) for i, j in _places(name, shapes[name])]
        layers[name] = row
    return {"dtype": dtype, "layers": layers}


def check(probe: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], read: Read) -> None:
    """Refuse another base model. The same weights in another precision pass.

    Raises:
        Refused: a layer that is missing, has another shape, or other numbers.
    """
    layers: Mapping[str, Any] = probe.get("layers", {})
    for name, row in layers.items():  # shapes of all layers first: they say more than numbers do
        if name not in shapes:
            raise Refused(f"the adapter was made for a model with the layer {name}, which this one lacks. Load it on its own base model.")
        if list(shapes[name]) != list(row["shape"]):
            raise Refused(
                f"{name}: the adapter was made for a layer of shape {tuple(row['shape'])}, this one is {tuple(shapes[name])}. Load it on its own base model."
            )
    for name, row in layers.items():
        weight = read(name)
        if weight is None or "entries" not in row:
            continue
        now = [float(weight[i, j]) for i, j in _places(name, shapes[name])]
        dtype = str(weight.dtype).removeprefix("torch.")
        slack = 0.0 if dtype == probe.get("dtype") else PRECISION.get(dtype, 2.0**-7) + PRECISION.get(str(probe.get("dtype")), 2.0**-7)
        for a, b in zip(now, row["entries"], strict=True):
            if abs(a - b) > slack * max(abs(a), abs(b)) + (1e-7 if slack else 0.0):
                raise Refused(
                    f"{name}: the adapter was made for other weights (an entry was {b:.6g}, here it is {a:.6g}). Load it on its own base model; "
                    "a fine-tuned or merged copy is another one."
                )


def _few(names: Sequence[str]) -> list[str]:
    step = max(1, len(names) // LAYERS)
    return list(names[::step][:LAYERS])


def _places(name: str, shape: tuple[int, int]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for i in range(ENTRIES):
        at = seed_of(0, "probe", name, str(i)) % (shape[0] * shape[1])
        out.append((at // shape[1], at % shape[1]))
    return out


def floating(weight: Tensor) -> bool:
    """Whether a weight holds its numbers plainly."""
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    )
