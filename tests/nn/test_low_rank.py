"""LowRankLinear against dense float64 arithmetic, and inside torch's own machinery."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eckart.errors import UsageError
from eckart.nn import LowRankLinear


def factors(m: int, n: int, r: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(m * 100 + n * 10 + r)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((m, r), (r, n), (m,)))  # type: ignore[return-value]


@pytest.mark.parametrize(("m", "n", "r"), [(5, 7, 3), (7, 5, 5), (1, 4, 1), (4, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product(m: int, n: int, r: int, bias: bool) -> None:
    up, down, b = factors(m, n, r)
    layer = LowRankLinear.from_factors(up, down, b if bias else None)
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = torch.einsum("mr,rn,ijn->ijm", up, down, x) + (b if bias else 0)
    assert torch.allclose(layer(x), want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.dense_weight(), torch.einsum("mr,rn->mn", up, down), rtol=1e-12, atol=1e-12)
    assert (layer.in_features, layer.out_features, layer.rank) == (n, m, r)
    assert (layer.bias is layer.up.bias) if bias else layer.bias is None


def test_what_is_on_disk() -> None:
    layer = LowRankLinear(6, 4, 2, dtype=torch.bfloat16)
    shapes = {k: tuple(v.shape) for k, v in layer.state_dict().items()}
    assert shapes == {"weight": (1,), "down.weight": (2, 6), "up.weight": (4, 2), "up.bias": (4,)}
    assert {v.dtype for v in layer.state_dict().values()} == {torch.bfloat16}
    assert [n for n, _ in layer.named_parameters()] == ["down.weight", "up.weight", "up.bias"]  # the guard is never trained
    other = LowRankLinear(6, 4, 2, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    with pytest.raises(RuntimeError, match="size mismatch"):  # what the guard is for
        nn.Linear(6, 4, dtype=torch.bfloat16).load_state_dict(layer.state_dict(), strict=False)


def test_factors_are_copied_and_no_random_number_is_drawn() -> None:
    up, down, b = factors(4, 6, 2)
    state = torch.get_rng_state()
    layer = LowRankLinear.from_factors(up.T.contiguous().T, down, b)
    assert torch.equal(state, torch.get_rng_state())
    before = layer.dense_weight().detach().clone()
    up.zero_()
    down.zero_()
    assert torch.equal(layer.dense_weight(), before)
    assert all(p.is_contiguous() and p.requires_grad for p in layer.parameters())
    assert torch.equal(layer.weight, torch.zeros(1, dtype=torch.float64))


def test_half_precision_is_multiplied_in_float32() -> None:
    up, down, _ = factors(8, 8, 8, torch.bfloat16)
    got = LowRankLinear.from_factors(up, down).dense_weight()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (up.double() @ down.double()).float().to(torch.bfloat16))


def test_gradients_match_the_dense_layer() -> None:
    up, down, b = factors(5, 7, 3)
    layer = LowRankLinear.from_factors(up, down, b)
    x = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer(x).square().sum().backward()
    weight = (up @ down).requires_grad_()
    (nn.functional.linear(x, weight, b)).square().sum().backward()
    assert torch.allclose(layer.up.weight.grad, weight.grad @ down.T)
    assert torch.allclose(layer.down.weight.grad, up.T @ weight.grad)


def test_torch_machinery() -> None:
    layer = LowRankLinear(6, 4, 2)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    assert torch.equal(program.module()(x), want)
    assert program.module()(x.repeat(2, 1)).shape == (6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(checkpoint(layer, x, use_reentrant=False), want)
    assert layer.to(torch.float64).weight.dtype == torch.float64
    assert LowRankLinear(6, 4, 2, device="meta").dense_weight().shape == (4, 6)
    assert "in_features=6, out_features=4, rank=2, bias=True" in repr(layer)


@pytest.mark.parametrize("bad", [(0, 4, 1), (4, 0, 1), (4, 6, 0), (4, 6, 5), (4, 6, -1), (4, 6, True), (4, 6, 2.0)])
def test_sizes_that_make_no_layer(bad: tuple) -> None:
    with pytest.raises(UsageError, match="LowRankLinear"):
        LowRankLinear(*bad)


def test_factors_that_do_not_fit() -> None:
    up, down, b = factors(4, 6, 2)
    for args in ((up, down.T), (up[0], down), (up, down, b[:3]), (up.float(), down), (up, down, b.float())):
        with pytest.raises(UsageError, match="from_factors"):
            LowRankLinear.from_factors(*args)
