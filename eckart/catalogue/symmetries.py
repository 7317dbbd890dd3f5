"""Which units of a model may change places without changing what it computes: hidden units, attention heads, residual channels.

What is returned are candidates, read from names and shapes. Whether they are symmetries shows only when the model runs with its units permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from .parts import Attention, attentions, hidden, live_bias, live_key

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .catalogue import Catalogue

Member = tuple[str, int, "Tensor"]
Groups = dict[str, list[Member]]


def candidates(model: nn.Module, catalogue: Catalogue, config: Mapping[str, Any]) -> Groups:
    """Groups of units by name; each is a list of (tensor, dimension, positions), as `spectra.matching` takes them.

    - hidden units of feed-forward blocks (rows of up and gate, columns of down),
    - attention heads; with grouped queries the key heads with their queries, and the queries within such a group. Value channels inside a head,
      where queries are not grouped,
    - channels of the residual stream, when the model has attention,
    - otherwise, of a plain network, the outputs of each layer that the next one reads, with what lies between them.

    Args:
        model: the live model, for its parameters and the order of its modules.
        catalogue: its matrices.
        config: its config.json.

    Example:
        >>> from torch import nn
        >>> from eckart.catalogue import from_model
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [(t, d) for t, d, _ in candidates(net, from_model(net), {})["0"]]
        [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    """
    here = {k: t.shape for k, t in (*model.named_parameters(), *model.named_buffers())}
    groups: Groups = {}
    for name, ups, down in hidden(catalogue):
        groups[name] = [m for u in ups for m in _out(u, _each(u.shape[0]))] + _into(down, _each(down.shape[1]))
    heads, _ = attentions(catalogue, config)
    for one in heads:
        groups[one.name + " heads"] = _heads(one)
    if heads:
        groups["residual stream"] = _residual(catalogue, here, heads)
    if not groups:
        groups = _chain(model, catalogue)
    return {name: members for name, members in groups.items() if members and all(t in here for t, _, _ in members)}


def _heads(one: Attention) -> list[Member]:
    """Key heads as units. Their parts: the query heads that share them, or the value channels where each has its own query."""
    kv, shared = len(one.k.at), one.shared
    width = one.v.at.shape[1]
    columns = one.o.at.reshape(kv, shared, width)
    queries = one.q.at.reshape(kv, shared, -1)
    if shared > 1:
        return [*_out(one.q.site, queries), *_out(one.k.site, one.k.at), *_out(one.v.site, one.v.at), *_into(one.o.site, columns)]
    values, outputs = one.v.at[:, :, None], columns.reshape(kv, width, 1)
    return [*_out(one.q.site, one.q.at), *_out(one.k.site, one.k.at), *_out(one.v.site, values), *_into(one.o.site, outputs)]


def _residual(catalogue: Catalogue, here: Mapping[str, Any], heads: list[Attention]) -> list[Member]:
    """Every dimension that is the residual stream: what reads it, what writes it, norms and embeddings of its width."""
    size = heads[0].o.site.shape[0]
    writers = {a.o.site.name for a in heads} | {down.name for _, _, down in hidden(catalogue)}
    out: list[Member] = []
    for site in catalogue.sites:
        if live_key(site) not in here:  # a tied weight has one name among the parameters
            continue
        if site.name in writers and site.shape[0] == size:
            out += _out(site, _each(size))
        elif site.kind == "embedding" and site.shape[0] == size:
            out.append((live_key(site), 1, _each(size)))
        elif site.kind == "linear" and site.shape[1] == size:
            out += _into(site, _each(size))
    biases = {live_bias(s) for s in catalogue.sites}
    return out + [(k, 0, _each(size)) for k, shape in here.items() if tuple(shape) == (size,) and k not in biases]


def _chain(model: nn.Module, catalogue: Catalogue) -> Groups:
    """Layers in the order of their modules: outputs of one that the next one reads, with the vectors of that length in between."""
    groups: Groups = {}
    before: Site | None = None
    between: list[Member] = []
    known = {s.name: s for s in catalogue.sites if s.kind in ("linear", "conv")}
    for name, module in model.named_modules():
        site = known.get(name)
        if site is None:
            if before is not None:
                own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                size = before.shape[0]
                between += [(f"{name}.{k}" if name else k, 0, _each(size)) for k, t in own if tuple(t.shape) == (size,)]
            continue
        if before is not None:
            members = _reads(site, before)
            if members:
                groups[before.name] = [*_out(before, _each(before.shape[0])), *between, *members]
        before, between = site, []
    return groups


def _reads(site: Site, before: Site) -> list[Member]:
    """The dimension of a layer that runs over the outputs of the one before it, a convolution's kernel or a flattened image included."""
    import torch

    units, cols = before.shape[0], site.shape[1]
    if cols % units:
        return []
    if site.kind == "conv":  # stored (out, in, kernel...): the dimension of inputs is one of its own
        return [(live_key(site), 1, _each(units))] if site.view == "linear" else []
    return _into(site, torch.arange(cols).reshape(units, -1))


def _each(size: int) -> Tensor:
    import torch

    return torch.arange(size)[:, None]


def _out(site: Site, positions: Tensor) -> list[Member]:
    """Rows of y = W x: of the weight and of its bias."""
    dim = 1 if site.view == "transposed" else 0
    members: list[Member] = [(live_key(site), dim, positions)]
    bias = live_bias(site)
    return members if bias is None else [*members, (bias, 0, positions)]


def _into(site: Site, positions: Tensor) -> list[Member]:
    """Columns of y = W x."""
    return [(live_key(site), 0 if site.view == "transposed" else 1, positions)]
