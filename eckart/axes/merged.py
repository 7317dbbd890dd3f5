"""Fewer experts: those that do alike become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import Refused, UsageError
from ..seeds import generator
from .base import FormChoice
from .experts import CHOSEN, COUNTS, unstack
from .protocols import Bundle, Cost, Edits, Made, Outcome, Parts, Ranked, Read, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor

ReadBias = Callable[[str], "Tensor"]
EXPERTS = Stat("experts", at="block")
RESTARTS = 10  # of k-means; the best one counts
ROUNDS = 100


@dataclass(frozen=True)
class Merged(FormChoice):
    """Cluster the experts of a layer by how alike their outputs are, and merge each cluster into one expert; the rank is how many remain.

    Of a cluster with routing frequencies f_i, each matrix becomes U_r U_r^T sum f_i W_i / sum f_i, where U_r spans the leading left singular
    vectors of [W_1 ... W_k]: without truncation, the frequency-weighted average. So do the rows of the router. Every layer keeps equally many
    experts, so the plain class loads the result.

    Args:
        energy: share of the squared singular values of [W_1 ... W_k] that U_r holds; 1 truncates nothing.
        align: permute the hidden units of each expert to fit those of the most frequent one of its cluster first (needs scipy).
        layout: one only; the experts themselves change.
    """

    kind: ClassVar[str] = "merged"
    solves: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"merged experts"})

    energy: float = 1.0
    align: bool = False
    layout: Literal["merged"] = "merged"

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise UsageError(f"form.energy: expected a share in (0, 1], found {self.energy:g}.")

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({EXPERTS})

    @property
    def parts(self) -> tuple[str, ...]:
        return ("experts", "router")

    def cost(self, bundle: Bundle) -> Cost:
        """Parameters of an expert and its row of the router."""
        dense = sum(s.shape[0] * s.shape[1] for s in bundle.sites)
        return Cost(dense=dense, per_rank=dense // bundle.fact("experts"), full=bundle.fact("experts"), role="experts")

    def spectrum(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor:
        """Singular values of the matrix of mean cosines: how many different things the experts do."""
        from ..linalg.psd import eigh_psd

        return eigh_psd(_alike(bundle, stats)[0], bundle.name)[0]

    def build(self, kept: Parts, rest: Parts | None, bundle: Bundle, read_bias: ReadBias, seed: int) -> Edits:
        raise AssertionError("form.merged solves by itself")

    def solve(self, bundle: Bundle, read: Read, read_bias: ReadBias, stats: StatsView, *, rank: int, seed: int) -> Edits:
        """The merged experts of one layer."""
        import torch

        from ..spectra.numbers import thin

        _check_rank(bundle, rank)
        gate_up, down, router = bundle.sites
        count, hidden = bundle.fact("experts"), bundle.fact("hidden")
        cosines, frequency = _alike(bundle, stats)
        owner = cluster(cosines, rank, seed)
        first = read(gate_up).reshape(count, -1, hidden).to(torch.float64)
        last = read(down).reshape(count, hidden, -1).to(torch.float64)
        rows = read(router).to(torch.float64)
        new: list[list[Tensor]] = []
        lost = total = 0.0
        for c in range(rank):
            members = (owner == c).nonzero().flatten()
            weight = frequency[members] if float(frequency[members].sum()) > 0 else torch.ones(len(members), dtype=torch.float64)
            weight = weight / weight.sum()
            ups, downs = (aligned if self.align else _as_is)(first[members], last[members], weight)
            merged = [merge([u.chunk(2)[i] for u in ups], weight, self.energy) for i in range(2)]
            new.append([torch.cat(merged), merge(list(downs), weight, self.energy), weight @ rows[members]])
            for stack, result in ((ups, new[-1][0]), (downs, new[-1][1])):
                lost += float((weight[:, None, None] * (stack - result).square()).sum())
                total += float((weight[:, None, None] * stack.square()).sum())
        dtypes = [_dtype(s.dtype) for s in bundle.sites]
        tensors = unstack(gate_up, torch.stack([n[0] for n in new]).to(dtypes[0])) | unstack(
            down, torch.stack([n[1] for n in new]).to(dtypes[1])
        )
        tensors[router.tensors[0]] = torch.stack([n[2] for n in new]).to(dtypes[2])
        record = {"rank": rank, "loss": lost, "relative_error": (lost / total) ** 0.5 if total > 0 else 0.0, "clusters": owner.tolist()}
        return Edits(tensors, self.outcome(bundle, rank, False).gone, record=record | thin(self.spectrum(bundle, read, stats)))

    def outcome(self, bundle: Bundle, rank: int, adds_bias: bool) -> Outcome:
        """Shorter stacks under the old names; experts that are files of their own beyond the rank are gone."""
        _check_rank(bundle, rank)
        gate_up, down, router = bundle.sites
        count, hidden = bundle.fact("experts"), bundle.fact("hidden")
        width = down.shape[1] // hidden
        tensors: dict[str, Made] = {router.tensors[0]: Made(router.dtype, (rank, hidden), router.tensors)}
        gone: dict[str, str] = {}
        for site, shape in ((gate_up, (2 * width, hidden)), (down, (hidden, width))):
            if len(site.tensors) == 1:
                tensors[site.tensors[0]] = Made(site.dtype, (rank, *shape), site.tensors)
                continue
            each = len(site.tensors) // count
            for i, key in enumerate(site.tensors):
                if i < rank * each:
                    tensors[key] = Made(site.dtype, (shape[0] // each, shape[1]), site.tensors[i % each :: each])
                else:
                    gone[key] = f"{count} experts are merged into {rank}"
        return Outcome(tensors, gone)

    def apply(self, model: Any, bundle: Bundle, edits: Edits) -> None:
        """Shorten the experts and the router of a model in memory."""
        import torch

        count = bundle.fact("experts")
        for site in bundle.sites:
            found = [edits.tensors[k] for k in site.tensors if k in edits.tensors]
            rank = int(edits.record["rank"])
            value = (
                found[0]
                if len(site.tensors) == 1
                else torch.stack([torch.cat(list(e)) for e in zip(*[iter(found)] * (len(found) // rank), strict=True)])
            )
            path, _, last = (site.name if site.kind != "linear" else f"{site.name}.weight").rpartition(".")
            home = model.get_submodule(path)
            old = getattr(home, last)
            setattr(home, last, torch.nn.Parameter(value.to(old.device), requires_grad=old.requires_grad))
            parent = path.rpartition(".")[0]
            for module in (home, model.get_submodule(parent), model):
                for name in (*COUNTS, "out_features"):
                    if getattr(module, name, None) == count:
                        setattr(module, name, rank)

    def config_of(
        self, done: Ranked, adds_bias: bool, config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """The new number of experts, one for all layers."""
        ranks = {r for _, r in done}
        if len(ranks) > 1:
            raise Refused(f"form.merged: every layer must keep equally many experts, found {sorted(ranks)}. Use allocate.uniform.")
        key = next((k for k in COUNTS if k in config), None)
        return {}, {key: ranks.pop()} if key and ranks else {}


def _check_rank(bundle: Bundle, rank: int) -> None:
    if rank < bundle.fact("chosen"):
        raise Refused(f"{bundle.name}: {rank} experts would remain, and a token takes {bundle.fact('chosen')} ({CHOSEN[0]}). Keep more.")


def _dtype(name: str) -> Any:
    from ..store.dtypes import torch_dtype

    return torch_dtype(name)


def _alike(bundle: Bundle, stats: StatsView) -> tuple[Tensor, Tensor]:
    """(mean cosines (E, E), routing frequencies (E,))."""
    count = bundle.fact("experts")
    found = stats.get(EXPERTS, bundle.sites[0])
    return found[: count * count].reshape(count, count), found[count * count :]


def merge(weights: list[Tensor], frequency: Tensor, energy: float = 1.0) -> Tensor:
    """U_r U_r^T sum f_i W_i, with U_r from [W_1 ... W_k]: the eigenvectors of sum W_i W_i^T that hold the share of its trace.

    Args:
        weights: W_i (m, n).
        frequency: (k,), summing to 1.
        energy: share, in (0, 1]; 1 gives the average itself.

    Example:
        >>> import torch
        >>> merge([torch.eye(2), 3 * torch.eye(2)], torch.tensor([0.5, 0.5])).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    mean = sum(f * w for f, w in zip(frequency[1:], weights[1:], strict=True)) + frequency[0] * weights[0]
    if energy == 1 or len(weights) == 1:
        return mean
    from ..linalg.psd import eigh_psd

    values, vectors = eigh_psd(sum(w @ w.T for w in weights[1:]) + weights[0] @ weights[0].T, "experts")
    rank = int((values.cumsum(0) < energy * values.sum() * (1 - 1e-12)).sum()) + 1
    basis = vectors[:, :rank]
    return basis @ (basis.T @ mean)


def cluster(features: Tensor, count: int, seed: int) -> Tensor:
    """k-means on the rows: (k,) number of the cluster of each row, none empty, numbered in the order of their first rows.

    Example:
        >>> import torch
        >>> cluster(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), 2, seed=0).tolist()
        [0, 1, 0, 1]
    """
    import torch

    x = features.to(torch.float64)
    best: tuple[float, Tensor] | None = None
    for restart in range(RESTARTS):
        g = generator(seed, "k-means", str(restart))
        chosen = [int(torch.randint(len(x), (1,), generator=g))]
        while len(chosen) < count:  # k-means++
            near = torch.stack([(x - x[c]).square().sum(1) for c in chosen]).amin(0)
            near[chosen] = 0
            free = [i for i in range(len(x)) if i not in chosen]
            chosen.append(int(torch.multinomial(near, 1, generator=g)) if float(near.sum()) > 0 else free[0])
        centres = x[chosen]
        owner = torch.full((len(x),), -1)
        for _ in range(ROUNDS):
            distance = (x[:, None] - centres[None]).square().sum(2)
            now = distance.argmin(1)
            for c in range(count):  # an empty cluster takes the row that is farthest from its own centre, of a cluster of several
                if not bool((now == c).any()):
                    several = torch.bincount(now, minlength=count)[now] > 1
                    far = distance.gather(1, now[:, None]).flatten().masked_fill(~several, -1)
                    now[int(far.argmax())] = c
            if torch.equal(now, owner):
                break
            owner = now
            centres = torch.stack([x[owner == c].mean(0) for c in range(count)])
        spread = float(sum((x[owner == c] - x[owner == c].mean(0)).square().sum() for c in range(count)))
        if best is None or spread < best[0] * (1 - 1e-12):
            best = (spread, owner)
    assert best is not None
    order = list(dict.fromkeys(best[1].tolist()))
    return torch.tensor([order.index(o) for o in best[1].tolist()])


def _as_is(ups: Tensor, downs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ups, downs


def aligned(ups: Tensor, downs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The experts with their hidden units permuted to fit those of the most frequent one; each still computes what it did.

    Args:
        ups: (k, 2 I, H), gate above up.
        downs: (k, H, I).
        weight: (k,).
    """
    import torch

    from ..spectra.matching import assignment

    best = assignment()

    def units(i: int) -> Tensor:
        gate, up = ups[i].chunk(2)
        return torch.nn.functional.normalize(torch.cat([gate, up, downs[i].T], dim=1), dim=1)

    lead = units(int(weight.argmax()))
    first, last = [], []
    for i in range(len(ups)):
        chosen = best(lead @ units(i).T)
        first.append(torch.cat([part[chosen] for part in ups[i].chunk(2)]))
        last.append(downs[i][:, chosen])
    return torch.stack(first), torch.stack(last)
