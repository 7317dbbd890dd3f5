"""In which type a form's matrices are stored: as they came, or in int8 or int4 through torchao. It changes bytes, not the number of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .pairs import base_of
from .protocols import Bundle, Edits, Made, Outcome, Read, Site

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Store = Literal["same", "int8", "int4"]
STORES = ("same", "int8", "int4")


def matrices(sites: Iterable[Site]) -> frozenset[str]:
    """Keys under which the sites store a matrix that can be integers: factors, and dense weights. Tables of embeddings stay as they are, and so
    do dense weights stored (in, out)."""
    out: set[str] = set()
    for site in sites:
        if site.kind == "linear":
            out |= {f"{base_of(site)}.{f}.weight" for f in ("down", "up")}
            out |= set(site.tensors) if site.view == "linear" else set()
    return frozenset(out)


def outcome_as(found: Outcome, sites: Iterable[Site], store: str) -> Outcome:
    """The outcome with integers and scales in the place of its matrices."""
    from ..nn.quantised import bits_of, parts_of

    keys = matrices(sites)
    out: dict[str, Made] = {}
    for key, made in found.tensors.items():
        if key not in keys or len(made.shape) != 2:
            out[key] = made
            continue
        base, (rows, columns) = key.removesuffix(".weight"), made.shape
        for name, (dtype, shape) in parts_of(rows, columns, bits_of(columns, store)).items():
            out[f"{base}.{name}"] = Made(dtype or made.dtype, shape, made.sources)
        out[key] = Made(made.dtype, (1,), made.sources)
    return Outcome(out, found.gone)


def tensors_as(tensors: Mapping[str, Tensor], sites: Iterable[Site], store: str) -> dict[str, Tensor]:
    """The same for tensors."""
    import torch

    from ..nn.quantised import bits_of, encode

    keys = matrices(sites)
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key not in keys or tensor.ndim != 2:
            out[key] = tensor
            continue
        base = key.removesuffix(".weight")
        out |= {f"{base}.{name}": t for name, t in encode(tensor, bits_of(tensor.shape[1], store)).items()}
        out[key] = torch.zeros(1, dtype=tensor.dtype)  # guard, as beside factors
    return out


def untouched(bundle: Bundle) -> Outcome | None:
    """Tensors of a bundle that no rank suits, as they came; None where none of its matrices can be integers."""
    keys = matrices(bundle.sites)
    if not all(t in keys for s in bundle.sites for t in s.tensors) or any(s.tied or len(s.tensors) > 1 for s in bundle.sites):
        return None
    out: dict[str, Made] = {}
    for site in bundle.sites:
        out[site.tensors[0]] = Made(site.dtype, site.shape, site.tensors)
        if site.bias:
            out[site.bias] = Made(site.dtype, site.shape[:1], (site.bias,))
    return Outcome(out)


def leave(bundle: Bundle, read: Read, read_bias: Callable[[str], Tensor], store: str) -> Edits:
    """The edits of a bundle that stays dense, its matrices in integers."""
    tensors: dict[str, Tensor] = {}
    for site in bundle.sites:
        tensors[site.tensors[0]] = read(site)
        if site.bias:
            tensors[site.bias] = read_bias(site.bias)
    return Edits(tensors_as(tensors, bundle.sites, store), record={})


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors with a float matrix in the place of each guard that stands for integers."""
    from ..nn.quantised import QuantisedLinear

    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        base, _, last = key.rpartition(".")
        if last in ("qdata", "scale"):
            continue
        own = stored_of(tensors, base) if last == "weight" else None
        out[key] = tensor if own is None else QuantisedLinear.from_stored(*own).dense_weight()
    return out


def stored_of(tensors: Mapping[str, Tensor], base: str) -> tuple[dict[str, Tensor], Literal["int8", "int4"]] | None:
    """Integers and scales of the layer of that name, and what they are; None where it has none."""
    import torch

    if f"{base}.qdata" not in tensors:
        return None
    stored = {k: tensors[f"{base}.{k}"] for k in ("qdata", "scale")}
    return stored, "int4" if stored["qdata"].dtype == torch.uint8 else "int8"


def settle(model: Any, tensors: Mapping[str, Tensor], sites: Iterable[Site]) -> None:
    """Put the integers of the tensors into a model whose layers have their float values already."""
    from ..nn.quantised import QuantisedLinear
    from ..nn.surgery import put

    for site in sites:
        for part in ("", ".down", ".up"):
            own = stored_of(tensors, f"{base_of(site)}{part}")
            if own is not None:
                layer = model.get_submodule(f"{site.name}{part}")
                made = QuantisedLinear.from_stored(*own, layer.bias).train(layer.training)
                put(model, f"{site.name}{part}", made.to(layer.weight.device))
