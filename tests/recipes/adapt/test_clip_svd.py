"""CLIP-SVD: all singular values by numpy, their gradient u^T G v, and each matrix of a fused layer for itself."""

import torch
from torch import nn

import eckart as ek


def test_every_singular_value_trains_and_nothing_else(world, adapted) -> None:
    model, b = adapted(world.make(), "clip_svd")
    assert {k for k, _ in b.named_parameters()} == {"core"}
    assert torch.allclose(b.core.detach().double(), world.S, atol=1e-5)
    y = model(world.x)
    y.square().sum().backward()
    g = (2 * y.detach()).double().T @ world.x.double()
    want = torch.stack([b.left.double()[:, i] @ g @ b.right.double()[i] for i in range(world.k)])
    assert torch.allclose(b.core.grad.double(), want, rtol=1e-4, atol=1e-3)


def test_merged_weight_is_u_s_v(world, adapted) -> None:
    model, b = adapted(world.make(), "clip_svd")
    new = world.S * torch.linspace(0.5, 1.5, world.k)
    with torch.no_grad():
        b.core.copy_(new)
    want = (world.U * new) @ world.Vh
    assert torch.allclose(model.merge_and_unload()[0].weight.detach().double(), want, atol=1e-5)


def test_below_full_rank_the_rest_stays(world, adapted) -> None:
    model, b = adapted(world.make(), "clip_svd", 3)
    with torch.no_grad():
        b.core.zero_()
    want = world.W - (world.U[:, :3] * world.S[:3]) @ world.Vh[:3]
    assert torch.allclose(model.merge_and_unload()[0].weight.detach().double(), want, atol=1e-5)


def test_fused_attention_has_a_decomposition_for_each_matrix() -> None:
    net = nn.ModuleDict({"qkv": nn.Linear(12, 36)})
    weight = net["qkv"].weight.detach().double().clone()
    model = ek.adapt(net, "clip_svd")
    blocks = model.base_model.model["qkv"].branch("default").layers()
    assert list(blocks) == ["q", "k", "v"]
    for i, block in enumerate(blocks.values()):
        assert torch.allclose(block.core.detach().double(), torch.linalg.svdvals(weight[12 * i : 12 * (i + 1)]), atol=1e-5)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 36  # the 12 of the fused matrix would be 24 too few
