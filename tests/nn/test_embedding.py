import copy

import pytest
import torch
from torch import nn

from eckart.errors import Refused, UsageError
from eckart.nn import LowRankEmbedding, LowRankLinear
from eckart.nn.surgery import factored_layers, put_dense, put_pair, resize, restore_dense, share, shared_groups

G = torch.Generator().manual_seed(0)


def factors(rows=7, width=5, rank=2):
    return torch.randn(width, rank, generator=G), torch.randn(rows, rank, generator=G), torch.randn(width, generator=G)


def test_table_is_the_product_and_its_bias() -> None:
    up, down, bias = factors()
    layer = LowRankEmbedding.from_factors(up, down, bias, padding_idx=0)
    ids = torch.tensor([[0, 3], [6, 1]])
    assert torch.allclose(layer(ids), down[ids] @ up.T + bias)
    assert torch.allclose(layer.dense_weight()[ids], layer(ids), atol=1e-6)
    assert layer.weight.shape == (1,)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "weight": (1,), "down.weight": (7, 2), "up.weight": (5, 2), "up.bias": (5,)
    }  # fmt: skip
    assert "7, 5, rank=2, bias=True" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(dtype) -> None:
    layer = LowRankEmbedding.from_factors(*(t.to(dtype) for t in factors()))
    assert layer(torch.tensor([1])).dtype == layer.dense_weight().dtype == dtype


@pytest.mark.parametrize("bad", [(0, 4, 1), (4, 0, 1), (4, 4, 5), (4, 4, 0), (4, 4, True)])
def test_sizes_are_checked(bad) -> None:
    with pytest.raises(UsageError, match="rank from 1"):
        LowRankEmbedding(*bad)
    with pytest.raises(UsageError, match="expected up"):
        LowRankEmbedding.from_factors(torch.ones(3, 2), torch.ones(4, 3))


def test_put_and_back() -> None:
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=2), nn.Linear(5, 5)).eval()
    kinds = copy.deepcopy(model)
    model[0].weight.requires_grad_(False)
    up, down, bias = factors()
    put_pair(model, "0", up, down, bias)
    assert model[0].padding_idx == 2
    assert not model[0].training
    assert not any(p.requires_grad for p in model[0].parameters())
    before = model(torch.tensor([1, 2]))
    assert restore_dense(model, kinds) == ["0"]
    assert type(model[0]) is nn.Embedding
    assert torch.allclose(model(torch.tensor([1, 2])), before, atol=1e-5)


def test_tables_that_cannot_be_factors_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 5, max_norm=1.0), nn.Embedding(6, 5))
    up, down, bias = factors()
    with pytest.raises(Refused, match="max_norm"):
        put_pair(model, "0", up, down, bias)
    with pytest.raises(UsageError, match="table of 6x5"):
        put_pair(model, "1", up, down, bias)


def chain():
    model = nn.Sequential(*(nn.Linear(6, 4 + i, bias=False) for i in range(3)))
    for i in range(3):
        put_pair(model, str(i), torch.randn(4 + i, 5, generator=G), torch.ones(5, 6), None, common=True)
    return model


def test_sharing_is_one_parameter_that_survives_copies_and_moves() -> None:
    model = chain()
    share(model, ["0", "2"], "in")
    for m in (model, copy.deepcopy(model), model.to(torch.float64)):
        assert m[0].down.weight is m[2].down.weight
        assert m[1].down.weight is not m[0].down.weight
        assert shared_groups(m) == [{"side": "in", "modules": ["0", "2"]}]
        assert sum(p.numel() for p in m.parameters()) == 2 * 30 + 5 * (4 + 5 + 6)
    assert model[2]._tied_weights_keys == {"down.weight": "down.weight"}


def test_rank_above_the_smaller_side_is_for_common_factors_only() -> None:
    assert LowRankLinear(6, 4, rank=5, common=True).rank == 5
    with pytest.raises(UsageError, match="from 1 to 4"):
        LowRankLinear(6, 4, rank=5)
    with pytest.raises(UsageError, match="from 1 to 6"):
        LowRankLinear(6, 4, rank=7, common=True)


@pytest.mark.parametrize(
    ("names", "side", "words"), [([], "in", "no layers"), (["0", "1"], "both", "side 'in' or 'out'"), (["0", "1"], "out", "shape")]
)
def test_what_cannot_share(names, side, words) -> None:
    with pytest.raises(UsageError, match=words):
        share(chain(), names, side)


def test_layers_of_another_size() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(4, 6), Conv1D(6, 4))
    resize(model, "0", 3, 4)
    assert (model[0].weight.device.type, model[0].out_features, tuple(model[0].bias.shape)) == ("meta", 3, (3,))
    resize(model, "1", 3, 4)
    assert (tuple(model[1].weight.shape), model[1].nf, model[1].nx) == ((4, 3), 3, 4)
    model = nn.Sequential(nn.Linear(4, 6))
    put_dense(model, "0", torch.ones(2, 4), torch.zeros(2))
    assert model(torch.ones(4)).tolist() == [4.0, 4.0]
    put_dense(model, "0", torch.zeros(2, 4))
    assert model[0].bias is not None
    assert factored_layers(model) == {}
