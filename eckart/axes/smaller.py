"""Dense matrices of smaller shape: fewer hidden units in an MLP, fewer dimensions in the heads of an attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .base import FormChoice
from .pairs import dense_tensors
from .protocols import Bundle, Cost, Edits, Made, Outcome, Parts, Ranked, Read, Site, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg.columns import Order

ReadBias = Callable[[str], "Tensor"]
MOMENTS = Stat("moments", at="in")
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
"""Keys of `config.json` under which the number of hidden units of every MLP stands."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Smaller(FormChoice):
    """Keep some channels of each MLP and attention; what reads them is refitted by least squares to stand in for the rest.

    One matrix product stays one matrix product, so this is faster where a pair need not be. Needs `group.channels`.

    - MLP: hidden units chosen by `by` from their second moment C; the matrix that reads them becomes W C_{:,S} C_SS^-1 (Nyström).
    - Values and output: in each key-value head the best r-dimensional subspace of what the heads pass on, as the outputs of all query heads that
      share it see it; then the output matrix is refitted across heads.
    - Queries and keys: the dimensions with the largest ‖C^1/2 W_q,i‖ ‖C^1/2 W_k,i‖, summed over the query heads that share a key; under rotary
      position codes the two dimensions of a frequency go together, and all heads of a layer keep the same frequencies.

    Where the readers have biases, moments are centred and the biases make the mean exact.

    Args:
        by: order of hidden units: ridge "leverage" scores, "greedy", or "energy".
        ridge: of the leverage scores, in mean eigenvalues.
        layout: one only; the shapes themselves change.
    """

    kind: ClassVar[str] = "smaller"
    solves: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({"grouped channels"})
    gives: ClassVar[frozenset[str]] = frozenset({"bias", "channels"})

    by: Literal["leverage", "greedy", "energy"] = "leverage"
    ridge: float = 1.0
    layout: Literal["smaller"] = "smaller"

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({MOMENTS})

    @property
    def parts(self) -> tuple[str, ...]:
        return ("dense",)

    def cost(self, bundle: Bundle) -> Cost:
        """Parameters per hidden unit, or per dimension (pair of dimensions) of all heads; of the biases those that become shorter."""
        *first, last = bundle.sites
        dense = sum(s.shape[0] * (s.shape[1] + bool(s.bias)) for s in first) + last.shape[0] * last.shape[1]
        full = _units(bundle)
        return Cost(dense=dense, per_rank=dense // full, full=full, role="attention" if bundle.fact("heads") else "mlp")

    def spectrum(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor:
        """Roots of the loss that each unit takes away, in the order in which units are kept; squares add up to the loss of keeping none."""
        if not bundle.fact("heads"):
            return self._mlp_order(bundle, read, stats).gains.sqrt()
        pairs = 2 if bundle.fact("rope") else 1
        gains = [g.reshape(-1, pairs).sum(1) for _, g in _value_subspaces(bundle, read, stats)]
        return sum(gains[1:], gains[0]).sqrt()

    def build(self, kept: Parts, rest: Parts | None, bundle: Bundle, read_bias: ReadBias, seed: int) -> Edits:
        raise AssertionError("form.smaller solves by itself")

    def solve(self, bundle: Bundle, read: Read, read_bias: ReadBias, stats: StatsView, *, rank: int, seed: int) -> Edits:
        """The smaller matrices of one bundle."""
        return (
            self._attention(bundle, read, read_bias, stats, rank)
            if bundle.fact("heads")
            else self._mlp(bundle, read, read_bias, stats, rank)
        )

    def _mlp_order(self, bundle: Bundle, read: Read, stats: StatsView) -> Order:
        from ..linalg.columns import order_columns

        last = bundle.sites[-1]
        return order_columns(_second(last, stats), read(last), self.by, ridge=self.ridge, name=bundle.name)

    def _mlp(self, bundle: Bundle, read: Read, read_bias: ReadBias, stats: StatsView, rank: int) -> Edits:
        *first, last = bundle.sites
        order = self._mlp_order(bundle, read, stats)
        kept = order.columns[:rank].sort().values
        tensors = _refitted(last, read, read_bias, stats, kept)
        for site in first:
            tensors |= _stored(site, read(site)[kept], read_bias(site.bias)[kept] if site.bias else None)
        return Edits(tensors, record=_record(rank, order.gains, order.total))

    def _attention(self, bundle: Bundle, read: Read, read_bias: ReadBias, stats: StatsView, rank: int) -> Edits:
        import torch

        heads, kv, width = bundle.fact("heads"), bundle.fact("kv"), bundle.fact("width")
        pairs = 2 if bundle.fact("rope") else 1
        q, k, v = _projections(bundle, read, read_bias)
        units = _query_key_units(bundle, read, read_bias, stats)[:, :rank].sort(dim=1).values
        dims = torch.cat([units + i * (width // pairs) for i in range(pairs)], dim=1)  # (kv, kept dimensions of a head)
        chosen = [(x + torch.arange(len(x))[:, None] * width).reshape(-1) for x in (dims.repeat_interleave(heads // kv, dim=0), dims)]
        bases = torch.stack([b[: rank * pairs] for b, _ in _value_subspaces(bundle, read, stats)])  # (kv, r, width)
        new = [q.rows(chosen[0]), k.rows(chosen[1]), v.turned(bases)]
        tensors: dict[str, Tensor] = {}
        for site, parts in ((bundle.sites[0], new),) if bundle.fact("fused") else zip(bundle.sites, ([p] for p in new), strict=False):
            weight = torch.cat([p.weight.to(torch.float64) for p in parts])
            bias = torch.cat([p.bias.to(torch.float64) for p in parts if p.bias is not None]) if site.bias else None
            tensors |= _stored(site, weight, bias)
        mixing = torch.block_diag(*bases.repeat_interleave(heads // kv, dim=0))
        tensors |= _refitted(bundle.sites[-1], read, read_bias, stats, mixing)
        gains = self.spectrum(bundle, read, stats).square()
        facts = {"head_dim": rank * pairs, "rope": dims[0].tolist() if pairs == 2 else None}
        return Edits(tensors, record=_record(rank, gains, float(gains.sum())) | {"heads": facts})

    def outcome(self, bundle: Bundle, rank: int, adds_bias: bool) -> Outcome:
        """Every matrix in its new shape, under its old name."""
        tensors: dict[str, Made] = {}
        every = bundle.keys
        for site, (m, n) in zip(bundle.sites, shapes_of(bundle, rank), strict=True):
            tensors[site.tensors[0]] = Made(site.dtype, (n, m) if site.view == "transposed" else (m, n), every)
            if site.bias:
                tensors[site.bias] = Made(site.dtype, (m,), every)
        return Outcome(tensors)

    def check(self, outline: Any, bundle: Bundle) -> None:
        """Refuse heads that do not work as assumed, before any work."""
        from ..nn.heads import check_narrowing

        if bundle.fact("heads"):
            path, names = _module_of(bundle)
            check_narrowing(outline().get_submodule(path), names, bundle.fact("heads"), bundle.fact("kv"), bool(bundle.fact("rope")))

    def apply(self, model: Any, bundle: Bundle, edits: Edits) -> None:
        """Resize the layers of a model in memory."""
        from ..nn.heads import narrow
        from ..nn.surgery import put_dense

        for site in bundle.sites:
            put_dense(model, site.name, edits.tensors[site.tensors[0]], edits.tensors.get(site.bias or ""))
        if bundle.fact("heads"):
            path, _ = _module_of(bundle)
            narrow(model.get_submodule(path), **{k: edits.record["heads"][k] for k in ("head_dim", "rope")})

    def config_of(
        self, done: Ranked, adds_bias: bool, config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """The new width of all MLPs where they have one and nothing else changed: any loader reads that. Else shapes, for ours."""
        layers = _number(config, LAYERS)
        width = next((k for k in WIDTHS if k in config), None)
        ranks = {r for _, r in done}
        if width is not None and len(ranks) == 1 and len(done) == layers and not any(b.fact("heads") for b, _ in done):
            return {}, {width: ranks.pop()}
        shapes = {s.name: list(shape) for b, r in done for s, shape in zip(b.sites, shapes_of(b, r), strict=True)}
        heads = {_module_of(b)[0]: dict(records.get(b.name, {}).get("heads", {})) for b, _ in done if b.fact("heads")}
        return ({"shapes": shapes} if shapes else {}) | ({"heads": heads} if heads else {}), {}


def shapes_of(bundle: Bundle, rank: int) -> list[tuple[int, int]]:
    """(out, in) of each site at a rank."""
    if not bundle.fact("heads"):
        *first, last = bundle.sites
        return [*((rank, s.shape[1]) for s in first), (last.shape[0], rank)]
    heads, kv, width = bundle.fact("heads"), bundle.fact("kv"), rank * (2 if bundle.fact("rope") else 1)
    *first, o = bundle.sites
    rows = [(heads + 2 * kv) * width] if bundle.fact("fused") else [heads * width, kv * width, kv * width]
    return [*((n, s.shape[1]) for n, s in zip(rows, first, strict=True)), (o.shape[0], heads * width)]


def _units(bundle: Bundle) -> int:
    return bundle.fact("width") // (2 if bundle.fact("rope") else 1) if bundle.fact("heads") else bundle.sites[-1].shape[1]


def _module_of(bundle: Bundle) -> tuple[str, dict[str, str]]:
    """The attention module, and the local names of the projections that are inside it."""
    path = bundle.sites[0].name.rpartition(".")[0]
    parts = ("qkv", "o") if bundle.fact("fused") else ("q", "k", "v", "o")
    return path, {p: s.name.removeprefix(f"{path}.") for p, s in zip(parts, bundle.sites, strict=True) if s.name.startswith(f"{path}.")}


@dataclass(frozen=True)
class _Projection:
    """Queries, keys or values: W (heads * width, in) and its bias."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, chosen: Tensor) -> _Projection:
        """Some of its rows."""
        return _Projection(self.weight[chosen], None if self.bias is None else self.bias[chosen])

    def turned(self, bases: Tensor) -> _Projection:
        """P_h applied to each head: bases (heads, r, width)."""
        count, _, width = bases.shape
        weight = (bases @ self.weight.to(bases.dtype).reshape(count, width, -1)).reshape(-1, self.weight.shape[1])
        bias = None if self.bias is None else (bases @ self.bias.to(bases.dtype).reshape(count, width, 1)).reshape(-1)
        return _Projection(weight, bias)


def _projections(bundle: Bundle, read: Read, read_bias: ReadBias) -> list[_Projection]:
    """Queries, keys and values, also where one matrix holds all three."""
    *first, _ = bundle.sites
    found = [_Projection(read(s), read_bias(s.bias) if s.bias else None) for s in first]
    if not bundle.fact("fused"):
        return found
    sizes = [bundle.fact("heads") * bundle.fact("width"), *[bundle.fact("kv") * bundle.fact("width")] * 2]
    biases = found[0].bias.split(sizes) if found[0].bias is not None else [None] * 3
    return [_Projection(w, b) for w, b in zip(found[0].weight.split(sizes), biases, strict=True)]


def _second(site: Site, stats: StatsView) -> Tensor:
    """What the errors of a reader count by: the covariance where its bias can make the mean exact."""
    moments = stats.get(MOMENTS, site)
    return moments.covariance() if site.bias else moments.second()


def _stored(site: Site, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {k: v.contiguous() for k, v in dense_tensors(site, weight, bias).items()}


def _refitted(site: Site, read: Read, read_bias: ReadBias, stats: StatsView, kept: Tensor) -> dict[str, Tensor]:
    """The reader of z as a reader of what is kept of it (indices, or P)."""
    from ..linalg.columns import refit

    old = read(site)
    new = refit(_second(site, stats), old, kept)
    bias = None
    if site.bias:
        mean = stats.get(MOMENTS, site).mean
        left = mean[kept] if kept.ndim == 1 else kept.to(mean.dtype) @ mean
        bias = read_bias(site.bias).to(mean.dtype) + old.to(mean.dtype) @ mean - new @ left
    return _stored(site, new, bias)


def _query_key_units(bundle: Bundle, read: Read, read_bias: ReadBias, stats: StatsView) -> Tensor:
    """(kv, units) dimensions of a head, or pairs of them, best first; the same for all heads under rotary codes."""
    import torch

    q, k, _ = _projections(bundle, read, read_bias)
    heads, kv, width = bundle.fact("heads"), bundle.fact("kv"), bundle.fact("width")
    moments = stats.get(MOMENTS, bundle.sites[0])

    def lengths(part: _Projection) -> Tensor:
        weight = part.weight.to(torch.float64)
        square = (weight @ moments.second()).mul(weight).sum(1)
        if part.bias is not None:
            bias = part.bias.to(torch.float64)
            square = square + 2 * bias * (weight @ moments.mean) + bias.square()
        return square.clamp_min(0).sqrt()

    merit = lengths(q).reshape(kv, heads // kv, width).sum(1) * lengths(k).reshape(kv, width)
    if bundle.fact("rope"):
        merit = merit.sum(0).reshape(2, -1).sum(0).expand(kv, -1)
    return torch.argsort(merit, dim=1, descending=True, stable=True)


def _value_subspaces(bundle: Bundle, read: Read, stats: StatsView) -> list[tuple[Tensor, Tensor]]:
    """(directions, gains) for each key-value head, from what attention passes to the output matrix."""
    import torch

    from ..linalg.columns import subspace

    o = bundle.sites[-1]
    heads, kv, width = bundle.fact("heads"), bundle.fact("kv"), bundle.fact("width")
    second = _second(o, stats).reshape(heads, width, heads, width)
    own = torch.stack([second[h, :, h] for h in range(heads)]).reshape(kv, -1, width, width).mean(1)
    weight = read(o).to(torch.float64).reshape(-1, kv, heads // kv, width)
    return [subspace(own[g], torch.einsum("mhi,mhj->ij", weight[:, g], weight[:, g])) for g in range(kv)]


def _record(rank: int, gains: Tensor, total: float) -> dict[str, Any]:
    from ..spectra.numbers import thin

    lost = max(0.0, total - float(gains[:rank].sum()))
    return {
        "rank": rank,
        "loss": lost,
        "relative_error": (lost / total) ** 0.5 if total > 0 else 0.0,
        **thin(gains.sort(descending=True).values.sqrt()),
    }


def _number(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((config[n] for n in names if isinstance(config.get(n), int)), None)
