"""Products of weight gradients against the gradients themselves, formed token by token in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eckart.axes.protocols import Stat
from eckart.data import Batch
from eckart.seeds import generator
from eckart.stats import collect, moments, products
from eckart.stats.products import gradient_products, through_gradient
from tests.stats.stats_models import linears

BOTH = ("in", "out")
WAYS = tuple(c for k in range(3) for c in combinations(BOTH, k))


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def padded(lengths: list[int], n: int, m: int, dtype: torch.dtype = torch.float64):
    """x and g of samples of these lengths; padding has inputs, and no gradient."""
    x, g = draw(len(lengths), max(lengths), n, dtype=dtype), draw(len(lengths), max(lengths), m, dtype=dtype)
    for sample, length in enumerate(lengths):
        g[sample, length:] = 0
    return x, g


def brute(calls, lengths):
    """Both sums, from one outer product per token that is no padding."""
    n, m = calls[0][0].shape[-1], calls[0][1].shape[-1]
    sums = {"in": torch.zeros(n, n, dtype=torch.float64), "out": torch.zeros(m, m, dtype=torch.float64)}
    for sample, length in enumerate(lengths):
        grad = torch.zeros(m, n, dtype=torch.float64)
        for x, g in calls:
            for t in range(length):
                grad += torch.outer(g[sample, t].double(), x[sample, t].double())
        sums["in"] += grad.T @ grad
        sums["out"] += grad @ grad.T
    return sums


def check(found, expected, sides=BOTH, rel=1e-13):
    assert set(found) == set(sides)
    for side in sides:
        assert found[side].dtype == torch.float64
        assert torch.equal(found[side], found[side].T)
        assert (found[side] - expected[side]).norm() < rel * expected[side].norm()


@pytest.mark.parametrize("sides", [("in",), ("out",), BOTH])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(24, 9), (9, 24), (7, 7), (1, 6), (230, 100)])
def test_both_ways_give_the_sums_over_samples(n, m, dtype, sides, monkeypatch) -> None:
    lengths = [3, 40, 0, 1, 17, 2]  # fewer tokens than channels, and more
    x, g = padded(lengths, n, m, dtype)
    expected = brute([(x, g)], lengths)
    check(gradient_products([(x, g)], sides), expected, sides)
    for way in WAYS:
        monkeypatch.setattr(products, "through_gradient", lambda t, n, m, wanted, way=way: tuple(s for s in wanted if s in way))
        check(gradient_products([(x, g)], sides), expected, sides)


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_one_module_are_one_gradient(way, monkeypatch) -> None:
    monkeypatch.setattr(products, "through_gradient", lambda *_: way)
    lengths = [5, 2, 4]
    calls = [padded(lengths, 8, 6), tuple(-0.5 * v.flip(-1) for v in padded(lengths, 8, 6))]
    expected = brute(calls, lengths)
    check(gradient_products(calls, BOTH), expected)
    alone = [brute([c], lengths)["in"] for c in calls]
    assert (sum(alone) - expected["in"]).norm() > 0.01 * expected["in"].norm()
    short = (draw(3, 1, 8), draw(3, 1, 6))  # a call on fewer rows
    grads = [calls[0][1][s].T @ calls[0][0][s] + short[1][s].T @ short[0][s] for s in range(3)]
    check(gradient_products([calls[0], short], BOTH), {"in": sum(a.T @ a for a in grads), "out": sum(a @ a.T for a in grads)})


@pytest.mark.parametrize("rows", [1, 5, 6, 11, 4096])
def test_chunks_leave_out_no_sample(rows, monkeypatch) -> None:
    monkeypatch.setattr(products, "ROWS", rows)
    lengths = [3, 3, 5, 1, 30, 2]
    x, g = padded(lengths, 10, 12)
    check(gradient_products([(x, g)], BOTH), brute([(x, g)], lengths))


@pytest.mark.parametrize("width", [95, 96, 97, 192, 800])
def test_panels_leave_out_no_channel(width) -> None:
    x, g = padded([4, 2], width, 3)
    check(gradient_products([(x, g)], BOTH), brute([(x, g)], [4, 2]))


def test_wide_products_are_in_float32_and_their_sums_in_float64(monkeypatch) -> None:
    x, g = padded([30, 4, 12], 16, 20, torch.float32)
    expected = brute([(x, g)], [30, 4, 12])
    monkeypatch.setattr(moments, "WIDTH_OF_F64_PRODUCTS", 19)
    found = gradient_products([(x, g)], BOTH)
    check(found, expected, rel=1e-5)
    assert (found["in"] - expected["in"]).norm() > 1e-11 * expected["in"].norm()
    monkeypatch.setattr(products, "ROWS", 1)
    big, small = padded([1, 1], 16, 20, torch.float32)
    small[0] *= 1e6  # next to it the second sample is lost in a sum of float32
    check({"in": gradient_products([(big, small)], ("in",))["in"] - gradient_products([(big[:1], small[:1])], ("in",))["in"]},
          brute([(big[1:], small[1:])], [1]), ("in",), rel=1e-2)  # fmt: skip


@pytest.mark.parametrize("sides", [("in",), ("out",), BOTH])
@pytest.mark.parametrize(("n", "m"), [(16, 16), (30, 8), (8, 30), (5, 60)])
def test_the_way_taken_has_the_fewest_multiplications(n, m, sides, monkeypatch) -> None:
    monkeypatch.setattr(products, "PANELS", 1)

    def count(t):
        x, g = padded([t], n, m)
        with FlopCounterMode(display=False) as counter:
            gradient_products([(x, g)], sides)
        return counter.get_total_flops()

    taken = set()
    for t in range(1, 70):
        way = through_gradient(t, n, m, sides)
        taken.add(way)
        found = count(t)
        with monkeypatch.context() as patch:
            others = []
            for other in WAYS:
                if set(other) <= set(sides):
                    patch.setattr(products, "through_gradient", lambda *_, other=other: other)
                    others.append(count(t))
        assert found == min(others), (t, way, others)
    assert {(), sides} <= taken


def test_padding_is_not_multiplied() -> None:
    def count(lengths):
        x, g = padded(lengths, 12, 10)
        with FlopCounterMode(display=False) as counter:
            gradient_products([(x, g)], BOTH)
        return counter.get_total_flops()

    assert count([3, 20, 5]) == count([3]) + count([20]) + count([5])


def test_one_side_alone_is_charged_the_gradient_that_both_would_share() -> None:
    assert [through_gradient(10, 16, 16, sides) for sides in (BOTH, ("in",), ("out",))] == [BOTH, (), ()]


class Texts(nn.Module):
    """Two linears over tokens, and attention to what is no padding between them."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, n)
        self.up, self.down = nn.Linear(n, m), nn.Linear(m, n)

    def forward(self, input_ids, attention_mask):
        y = torch.tanh(self.up(self.embed(input_ids)))
        scores = (y @ y.mT).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return self.down(y + scores.softmax(-1) @ y)


@pytest.mark.parametrize("sides", [("in",), ("out",), BOTH])
@pytest.mark.parametrize("size", [2, 5])
def test_samples_of_a_padded_batch_against_autograd_on_each_alone(size, sides) -> None:
    """Three probes; texts shorter and longer than the layers are wide, so that both ways are taken within one batch."""
    lengths, n, m = [30, 3, 1, 12, 5], 6, 9
    model = Texts(n, m).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(*p.shape) * 0.5)
    ids = [torch.arange(t) * 7 % 40 for t in lengths]
    batches, draws = [], []
    for leaf, at in enumerate(range(0, 5, size)):
        part = ids[at : at + size]
        tokens = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=11)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in part], batch_first=True)
        weights = 1 + torch.arange(tokens.numel()).reshape(tokens.shape) % 3  # of tokens: they do not enter
        batches.append(Batch(tokens, mask, weights.double()))
        draws.append(torch.randn(3, len(part), n, generator=generator(4, "random_projection", str(leaf))).double())
    sites = linears(model, {"input_ids": ids[1][None], "attention_mask": torch.ones(1, 3)})
    needs = {side: Stat("gradient_gram", at="weight", via="backward", opts=(side,)) for side in sides}
    stats = collect(model, batches, set(needs.values()), sites, seed=4, probe="random_projection", probes=3)
    assert {bool(through_gradient(t, n, m, sides)) for t in lengths} == {True, False}
    for site in sites:
        weight = model.get_submodule(site.name).weight
        grads = []
        for i, v in zip(ids, torch.cat(draws, 1).unbind(1), strict=True):
            mean = model(i[None], torch.ones(1, len(i)))[0].mean(0)
            grads += [torch.autograd.grad(u @ (mean / mean.norm()), weight, retain_graph=True)[0] for u in v]
        for side, stat in needs.items():
            expected = sum(a.T @ a if side == "in" else a @ a.T for a in grads) / len(grads)
            assert stats.count(site, stat) == len(grads) == 15
            torch.testing.assert_close(stats.get(stat, site), expected.flatten(), rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
