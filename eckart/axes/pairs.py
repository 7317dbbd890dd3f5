"""One matrix as two: the tensors, their names, and the way into a model. What every form that stores pairs is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .protocols import Made, Outcome, Ranked, Site

if TYPE_CHECKING:
    from torch import Tensor

Balance = Literal["even", "left", "right"]
Layout = Literal["factored", "dense"]


def balance(left: Tensor, right: Tensor, how: Balance) -> tuple[Tensor, Tensor]:
    """Move the norm of each triple: half to each side ("even"), or all of it into the left or the right factor.

    For a plain SVD "even" is the square root of the singular value on each side.
    """
    a, b = left.norm(dim=0), right.norm(dim=1)
    zero = (a == 0) | (b == 0)
    a, b = a.masked_fill(zero, 1), b.masked_fill(zero, 1)
    to_left = {"even": (b / a).sqrt(), "left": b, "right": 1 / a}[how]
    return left * to_left, right / to_left[:, None]


def base_of(site: Site) -> str:
    """What the keys of a site's tensors begin with."""
    return site.tensors[0].removesuffix(".weight")


def bias_of(site: Site, adds: bool) -> str | None:
    """Key of the bias of a site's dense layer, also of one that is added."""
    return site.bias or (f"{base_of(site)}.bias" if adds else None)


def pair_tables(done: Ranked, adds_bias: bool) -> dict[str, Any]:
    """Ranks and added biases of every site, as the loader wants them."""
    ranks = {s.name: r for b, r in done for s in b.sites}
    added = {s.name: True for b, _ in done for s in b.sites if adds_bias and s.bias is None}
    return {"ranks": ranks, **({"bias": added} if added else {})} if ranks else {}


def pair_tensors(site: Site, up: Tensor | None, down: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
    """Tensors of one pair as they are stored; None leaves out a factor that another site stores."""
    import torch

    from ..store.dtypes import torch_dtype

    dtype, base = torch_dtype(site.dtype), base_of(site)
    out: dict[str, Tensor] = {}
    if down is not None:
        down = down.T if site.kind == "embedding" else down  # a table has a row per entry
        out[f"{base}.down.weight"] = down.to(dtype).contiguous()
    if up is not None:
        out[f"{base}.up.weight"] = up.to(dtype).contiguous()
    if bias is not None:
        out[f"{base}.up.bias"] = bias.to(dtype).contiguous()
    out[f"{base}.weight"] = torch.zeros(1, dtype=dtype)  # guard: an unregistered load must fail, not fill in random weights
    return out


def dense_tensors(site: Site, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """A dense site as it is stored. An embedding has no bias: it is added to every row."""
    from ..store.dtypes import torch_dtype

    dtype = torch_dtype(site.dtype)
    if site.kind == "embedding" and bias is not None:
        weight, bias = weight + bias[:, None].to(weight.dtype), None
    weight = weight.to(dtype)
    out = {site.tensors[0]: weight.T.contiguous() if site.view == "transposed" else weight}
    if bias is not None:
        out[site.bias or f"{base_of(site)}.bias"] = bias.to(dtype)
    return out


def pair_outcome(
    site: Site, rank: int, adds_bias: bool, layout: Layout, *, up: bool = True, down: bool = True, also: Iterable[str] = ()
) -> Outcome:  # fmt: skip
    """What becomes of one site, pair or product; `up` and `down` say whether that factor is stored here, `also` what else goes into it."""
    (m, n), base = site.shape, base_of(site)
    bias = bias_of(site, adds_bias)
    own = (*site.tensors, *((site.bias,) if site.bias else ()))
    sources = tuple(dict.fromkeys((*own, *also)))
    if layout == "dense":
        out = {site.tensors[0]: Made(site.dtype, (n, m) if site.view == "transposed" else (m, n), sources)}
        return Outcome(out | ({bias: Made(site.dtype, (m,), sources)} if bias and site.kind != "embedding" else {}))
    tensors: dict[str, Made] = {}
    if down:
        tensors[f"{base}.down.weight"] = Made(site.dtype, (n, rank) if site.kind == "embedding" else (rank, n), sources)
    if up:
        tensors[f"{base}.up.weight"] = Made(site.dtype, (m, rank), sources)
    if bias:
        tensors[f"{base}.up.bias"] = Made(site.dtype, (m,), own)
    tensors[f"{base}.weight"] = Made(site.dtype, (1,), site.tensors)
    return Outcome(tensors, {site.bias: f"moved to {base}.up.bias"} if site.bias else {})


def apply_site(
    model: Any, site: Site, tensors: Mapping[str, Tensor], layout: Layout, *, up: Tensor | None = None, down: Tensor | None = None,
    common: bool = False,
) -> Any:  # fmt: skip
    """Put one pair, or a dense product, in the place of a layer; returns the pair.

    Args:
        model, site: where.
        tensors: of the edits.
        layout: "factored" or "dense".
        up, down: a factor that is stored under another site.
        common: whether one of them is.
    """
    from ..nn.surgery import put_dense, put_pair

    base = base_of(site)
    if layout == "dense":
        bias = tensors.get(site.bias or f"{base}.bias")
        return put_dense(model, site.name, tensors[site.tensors[0]], bias)
    up, down = tensors.get(f"{base}.up.weight", up), tensors.get(f"{base}.down.weight", down)
    return put_pair(model, site.name, up, down, tensors.get(f"{base}.up.bias"), common)


def reread_site(model: Any, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one pair again, with the values that the model in memory has now."""
    base = base_of(site)
    layer = model.get_submodule(site.name)
    state = {f"{base}.{k}": v for k, v in layer.state_dict().items()}
    return {
        k: state[k].detach().to("cpu", t.dtype).contiguous() if k in state else t for k, t in tensors.items() if k.startswith(f"{base}.")
    }
