"""Which sites are solved together; and what a common basis costs and keeps, against brute force."""

import numpy as np
import pytest
import torch

from eckart.axes import Budget, Bundle, Recipe, Site, form, group, metric
from eckart.axes.group import name_of, pack
from eckart.axes.protocols import World
from eckart.axes.solve import cost, solve, spectrum
from eckart.errors import UsageError

G = torch.Generator().manual_seed(0)


def site(name, shape, reads="", block=0, bias=False, dtype="F32"):
    return Site(name, shape, (f"{name}.weight",), bias=f"{name}.bias" if bias else None, reads=reads or name, block=block, dtype=dtype)


def llama(blocks=3):
    out = []
    for i in range(blocks):
        p = f"layers.{i}"
        shapes = {"attn.q_proj": (8, 8), "attn.k_proj": (4, 8), "attn.v_proj": (4, 8), "attn.o_proj": (8, 8)}
        shapes |= {"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
        reads = {"attn.q_proj": "a", "attn.k_proj": "a", "attn.v_proj": "a", "mlp.gate_proj": "m", "mlp.up_proj": "m"}
        out += [site(f"{p}.{n}", s, f"{p}.{reads.get(n, n)}", i) for n, s in shapes.items()]
    return out


def world(weights=None, **budget):
    weights = weights or {}
    return World(lambda s: weights[s.name], Budget(**(budget or {"keep": 0.8})))


def test_without_a_group_every_site_is_alone() -> None:
    found, left = pack(None, llama(1), world())
    assert [b.name for b in found] == [s.name for s in llama(1)]
    assert left == {}


def test_same_input_follows_what_was_traced() -> None:
    found, _ = pack(group.SameInput(), llama(2), world())
    assert [len(b.sites) for b in found] == [3, 1, 2, 1, 3, 1, 2, 1]
    assert found[0].name == "layers.0.attn.{q_proj,k_proj,v_proj}"
    assert found[0].shape == (16, 8)
    assert found[0].shares == "in"
    assert found[1].shares is None
    assert sum(len(b.sites) for b in found) == 14
    only, _ = pack(group.SameInput(types=("gate", "up")), llama(1), world())
    assert [len(b.sites) for b in only] == [1, 1, 1, 1, 2, 1]


def test_sites_of_different_types_are_not_stacked() -> None:
    a, b = site("a", (4, 4), "x"), site("b", (4, 4), "x", dtype="BF16")
    assert len(pack(group.SameInput(), [a, b], world())[0]) == 2


@pytest.mark.parametrize(("count", "sizes"), [(1, {1}), (2, {1, 2}), (3, {1, 3}), (7, {1, 3})])
def test_adjacent_blocks(count, sizes) -> None:
    found, _ = pack(group.Adjacent(count=count), llama(3), world())
    assert {len(b.sites) for b in found} == sizes
    assert sum(len(b.sites) for b in found) == 21
    for b in found:
        blocks = [s.block for s in b.sites]
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        assert len({s.role for s in b.sites}) == 1
        assert len(b.sites) == 1 or b.sites[0].role not in ("o_proj", "down_proj")


def test_adjacent_leaves_gaps_and_other_shapes_alone() -> None:
    sites = [site(f"l.{i}.up_proj", (6, 4), block=i) for i in (0, 1, 3, 4)] + [site("l.5.up_proj", (6, 5), block=5)]
    found, _ = pack(group.Adjacent(count=4), sites, world())
    assert [[s.block for s in b.sites] for b in found] == [[0, 1], [3, 4], [5]]


def test_names_keep_what_is_common() -> None:
    assert name_of([site("m.0.a.q", (1, 1)), site("m.1.a.q", (1, 1))]) == "m.{0,1}.a.q"
    assert name_of([site("layer.0.mid.dense", (1, 1)), site("layer.0.out.dense", (1, 1))]) == "layer.0.{mid,out}.dense"
    assert name_of([site("q", (1, 1)), site("k", (1, 1))]) == "{q,k}"


def clusters(kind="shared", **settings):
    basis = torch.linalg.qr(torch.randn(24, 3, generator=G))[0]
    weights = {}
    for i in range(6):
        alike = kind == "shared" and i < 4
        w = basis @ torch.randn(3, 10, generator=G) if alike else torch.randn(24, 10, generator=G)
        weights[f"w{i}"] = w * (1 + i)
    sites = [site(n, (24, 10)) for n in weights]
    how = group.ErrorClusters(**{"shares": "out", "rank": 3, **settings})
    return pack(how, sites, world(weights)), weights


@pytest.mark.parametrize("predictor", ["truncated", "residuals"])
@pytest.mark.parametrize("order", ["norm", "residual"])
def test_clusters_never_exceed_the_error_they_promise(predictor, order) -> None:
    (found, left), weights = clusters(predictor=predictor, order=order, eps=0.2)
    assert left == {}
    assert sorted(s.name for b in found for s in b.sites) == sorted(weights)
    for b in (b for b in found if len(b.sites) > 1):
        joined = np.concatenate([weights[s.name].numpy() for s in b.sites], axis=1)
        s = np.linalg.svd(joined, compute_uv=False)
        assert (s[3:] ** 2).sum() ** 0.5 <= 0.2 * (s**2).sum() ** 0.5 * (1 + 1e-5)
        assert b.shares == "out"


def test_the_estimate_finds_what_shares_a_basis_when_asked_in_order_of_residual() -> None:
    (found, _), _ = clusters(predictor="truncated", order="residual", eps=0.05)
    assert sorted(len(b.sites) for b in found) == [1, 1, 4]


def test_norm_predictor_joins_only_what_it_can_prove() -> None:
    (found, _), _ = clusters(predictor="norm", eps=0.2)
    assert all(len(b.sites) == 1 for b in found)


def test_nothing_is_clustered_at_no_error_and_singletons_can_stay_dense() -> None:
    (found, left), weights = clusters(kind="random", eps=0.0, singletons="dense")
    assert found == []
    assert set(left) == set(weights)
    assert "within 0" in next(iter(left.values()))


def test_patience_ends_the_search() -> None:
    (found, _), _ = clusters(kind="random", patience=1)
    assert [len(b.sites) for b in found] == [1] * 6


def test_the_rank_of_the_prediction_follows_the_budget() -> None:
    how = group.ErrorClusters()
    w = site("a", (40, 60))
    assert how._rank(w, world(keep=0.5)) == 12
    assert how._rank(w, world(rank=7)) == 7
    assert how._rank(w, world(rank=0.25)) == 10
    with pytest.raises(UsageError, match="says no rank to predict at"):
        how._rank(w, world(energy=0.9))


def test_the_side_of_the_stream_is_chosen() -> None:
    sites = [site("up", (12, 8)), site("down", (8, 12)), site("q", (8, 8)), site("o", (8, 8))]
    how = group.ErrorClusters()
    assert [how._side(s, sites) for s in sites] == ["in", "out", "in", "in"]


@pytest.mark.parametrize("bad", [{"eps": 1.0}, {"order": "residual", "predictor": "norm"}])
def test_settings_that_cannot_be(bad) -> None:
    with pytest.raises(UsageError, match="group"):
        group.ErrorClusters(**bad)


def test_a_group_wants_a_form_with_a_common_basis() -> None:
    with pytest.raises(UsageError, match="common basis.*form=shared_basis"):
        Recipe(name="x", verb="compress", paper="-", group=group.SameInput())
    with pytest.raises(UsageError, match="channels.*form=smaller"):
        Recipe(name="x", verb="compress", paper="-", group=group.Channels())
    with pytest.raises(UsageError, match="grouped channels.*group=channels"):
        Recipe(name="x", verb="compress", paper="-", form=form.Smaller())


SHARED = Recipe(name="shared", verb="compress", paper="-", metric=metric.InputGram(), form=form.SharedBasis())


class Known:
    """Moments of rows drawn per site."""

    def __init__(self, rows):
        self.rows = rows

    def get(self, stat, s):
        from eckart.stats.moments import moments

        return moments(self.rows[s.name])


def solved(bundle, weights, rows, rank, recipe=SHARED, bias=None):
    return solve(recipe, bundle, lambda s: weights[s.name], lambda k: (bias or {})[k], Known(rows), rank=rank, algorithm="gram")


def products(bundle, tensors):
    ups = [tensors.get(f"{s.name}.up.weight", tensors.get(f"{bundle.sites[0].name}.up.weight")) for s in bundle.sites]
    downs = [tensors.get(f"{s.name}.down.weight", tensors.get(f"{bundle.sites[0].name}.down.weight")) for s in bundle.sites]
    return [u.double() @ d.double() for u, d in zip(ups, downs, strict=True)]


@pytest.mark.parametrize("shares", ["in", "out"])
def test_grouping_of_one_equals_private(shares) -> None:
    s = site("a", (9, 12))
    weights, rows = {"a": torch.randn(9, 12, generator=G)}, {"a": torch.randn(50, 12, generator=G, dtype=torch.float64)}
    one = solved(group.bundle_of([s], shares), weights, rows, 4)
    private = solved(Bundle("a", (s,)), weights, rows, 4, SHARED.with_(form=form.Pair()))
    assert one.tensors.keys() == private.tensors.keys()
    assert all(torch.equal(v, private.tensors[k]) for k, v in one.tensors.items())


@pytest.mark.parametrize("shares", ["in", "out"])
def test_common_basis_is_the_best_one_by_brute_force(shares) -> None:
    shapes = [(9, 12), (5, 12), (7, 12)] if shares == "in" else [(9, 12), (9, 6), (9, 8)]
    sites = [site(n, s, reads="x" if shares == "in" else n) for n, s in zip("abc", shapes, strict=True)]
    weights = {s.name: torch.randn(*s.shape, generator=G, dtype=torch.float64) for s in sites}
    x = torch.randn(80, 12, generator=G, dtype=torch.float64)
    rows = {s.name: x if shares == "in" else torch.randn(80, s.shape[1], generator=G, dtype=torch.float64) for s in sites}
    bundle = group.bundle_of(sites, shares)
    recipe = SHARED.with_(refine=None)
    edits = solved(bundle, weights, rows, 4, recipe)
    lost = sum(
        float((rows[s.name] @ (weights[s.name] - p).T).square().sum() / 80)
        for s, p in zip(sites, products(bundle, edits.tensors), strict=True)
    )
    if shares == "in":
        y = torch.cat([x @ weights[s.name].T for s in sites], dim=1)
    else:
        y = torch.cat([weights[s.name] @ rows[s.name].T for s in sites], dim=1).T
    tail = torch.linalg.svdvals(y)[4:].square().sum() / 80
    assert lost == pytest.approx(float(tail), rel=1e-5)
    assert edits.record["loss"] == pytest.approx(float(tail), rel=1e-6)


@pytest.mark.parametrize("shares", ["in", "out"])
def test_parameters_are_counted_as_stored(shares) -> None:
    shapes = [(9, 12), (5, 12)] if shares == "in" else [(9, 12), (9, 6)]
    sites = [site(n, s) for n, s in zip("ab", shapes, strict=True)]
    bundle = group.bundle_of(sites, shares)
    weights = {s.name: torch.randn(*s.shape, generator=G) for s in sites}
    rows = {s.name: torch.randn(40, s.shape[1], generator=G, dtype=torch.float64) for s in sites}
    edits = solved(bundle, weights, rows, 3)
    stored = sum(t.numel() for k, t in edits.tensors.items() if not k.endswith(("a.weight", "b.weight")))
    assert cost(SHARED, bundle).at(3) == stored
    assert cost(SHARED, bundle).dense == sum(w.numel() for w in weights.values())
    made = SHARED.form.outcome(bundle, 3, False).tensors
    assert {k: tuple(t.shape) for k, t in edits.tensors.items()} == {k: m.shape for k, m in made.items()}


def test_each_site_keeps_its_own_mean_and_bias() -> None:
    sites = [site("a", (9, 12), bias=True), site("b", (5, 12))]
    weights = {s.name: torch.randn(*s.shape, generator=G) for s in sites}
    rows = {n: torch.randn(60, 12, generator=G, dtype=torch.float64) + i for i, n in enumerate("ab")}
    recipe = SHARED.with_(metric=metric.InputGram(centred=True, keep_mean=True))
    bundle = group.bundle_of(sites, "in")
    bias = {"a.bias": torch.randn(9, generator=G)}
    edits = solved(bundle, weights, rows, 3, recipe, bias)
    for s, p in zip(sites, products(bundle, edits.tensors), strict=True):
        mean = rows[s.name].mean(0)
        before = weights[s.name].double() @ mean + bias.get(f"{s.name}.bias", torch.zeros(s.shape[0])).double()
        after = p @ mean + edits.tensors[f"{s.name}.up.bias"].double()
        assert torch.allclose(before, after, atol=1e-5)
    assert cost(recipe, bundle).fixed == 5  # only the second had no bias


def test_two_sided_metrics_of_a_group_are_block_diagonal_on_the_free_side() -> None:
    sites = [site("a", (6, 8), reads="x"), site("b", (4, 8), reads="x")]
    weights = {s.name: torch.randn(*s.shape, generator=G, dtype=torch.float64) for s in sites}
    x = torch.randn(60, 8, generator=G, dtype=torch.float64)
    grads = {s.name: torch.randn(60, s.shape[0], generator=G, dtype=torch.float64) for s in sites}

    class Both:
        def get(self, stat, s):
            from eckart.stats.moments import moments

            return moments(grads[s.name] if stat.via == "backward" else x)

    recipe = SHARED.with_(metric=metric.Both(into=metric.InputGram(), out=metric.GradGram(clamp=0.0)))
    found = spectrum(recipe, group.bundle_of(sites, "in"), lambda s: weights[s.name], Both(), cap=4, algorithm="gram", seed=0)
    out = torch.block_diag(*(grads[s.name].T @ grads[s.name] / 60 for s in sites))
    values, vectors = torch.linalg.eigh(out)
    so = (vectors * values.sqrt()) @ vectors.T
    expected = torch.linalg.svdvals(so @ torch.cat(list(weights.values())) @ x.T / 60**0.5)
    assert torch.allclose(found.values, expected[: len(found.values)], rtol=1e-6)
