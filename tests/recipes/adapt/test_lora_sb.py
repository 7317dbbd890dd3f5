"""LoRA-SB: the rank-r image of minus the sign of the mean gradient, by autograd and numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import eckart as ek
from eckart.errors import UsageError


def loss(output, _batch):
    return output.square().sum(1)


def batches(n: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(k, n, generator=g) for k in (8, 5, 11)]


def mean_gradient(world) -> torch.Tensor:
    net = world.make().double()
    total = sum(loss(net(x.double()), x).sum() for x in batches(world.shape[1])) / 24
    total.backward()
    return net[0].weight.grad


def test_start_is_the_image_of_the_first_step(world, adapted) -> None:
    model, b = adapted(world.make(), "lora_sb", 4, calib=batches(world.shape[1]), loss=loss, settings=["source.step=0.01"], alpha=8)
    step = -0.01 * mean_gradient(world).sign()
    u, s, vh = np.linalg.svd(step.numpy(), full_matrices=False)
    want = torch.tensor(u[:, :4] * s[:4] @ vh[:4])
    assert torch.allclose(b.gain_matrix().detach().double(), want, atol=1e-5)
    assert torch.allclose(b.core.detach().diagonal().double(), torch.tensor(s[:4]) / 2, rtol=1e-4)
    assert torch.allclose(b.left.T @ b.left, torch.eye(4), atol=1e-5)
    assert torch.allclose(b.right @ b.right.T, torch.eye(4), atol=1e-5)
    assert {k for k, _ in b.named_parameters()} == {"core"}
    assert torch.allclose(model(world.x).double(), world.x.double() @ (world.W + want).T + world.bias, atol=1e-3)


def test_the_first_step_lowers_the_loss(world, adapted) -> None:
    model, _ = adapted(world.make(), "lora_sb", 4, calib=batches(world.shape[1]), loss=loss, settings=["source.step=1e-4"])
    with torch.no_grad():
        before = sum(float(loss(world.make()(x), x).sum()) for x in batches(world.shape[1]))
        after = sum(float(loss(model(x), x).sum()) for x in batches(world.shape[1]))
    assert after < before


def test_the_plain_gradient_is_a_choice(world, adapted) -> None:
    settings = ["source.sign=false", "source.step=1"]
    _, b = adapted(world.make(), "lora_sb", world.k, calib=batches(world.shape[1]), loss=loss, settings=settings)
    want = -mean_gradient(world)
    assert torch.allclose(b.gain_matrix().detach().double(), want, atol=1e-4 * float(want.abs().max()))


def test_gradients_of_a_language_model(tiny_llama, token_ids) -> None:
    """Mean over texts, padded together, of the gradient of each text's summed loss: by autograd on the texts one by one."""
    model = ek.load(tiny_llama)
    texts = [ids[: 10 + 3 * i] for i, ids in enumerate(token_ids[:4])]
    adapted = ek.adapt(
        ek.load(tiny_llama), "lora_sb", rank=16, calib=texts, settings=["source.sign=false", "source.step=1"], target=["k_proj"]
    )
    for ids in texts:
        row = torch.tensor([ids])
        (model(input_ids=row, labels=row).loss * (len(ids) - 1) / 4).backward()
    for name, layer in adapted.base_model.model.named_modules():
        if name.endswith("k_proj"):
            want = -model.get_submodule(name).weight.grad
            u, s, vh = torch.linalg.svd(want.double(), full_matrices=False)
            best = (u[:, :16] * s[:16]) @ vh[:16]
            found = layer.branch("default").gain_matrix().detach().double()
            assert torch.allclose(found, best, atol=1e-4 * float(want.abs().max()))


def test_a_layer_that_is_called_twice_gives_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    net = Twice()
    x = [torch.randn(5, 6, generator=torch.Generator().manual_seed(0))]
    (loss(net(x[0]), x).sum() / 5).backward()
    want = -net.a.weight.grad.clone()
    net.zero_grad()
    model = ek.adapt(net, "lora_sb", rank=6, calib=x, loss=loss, settings=["source.sign=false", "source.step=1"])
    found = model.base_model.model.a.branch("default").gain_matrix()
    assert torch.allclose(found, want, atol=1e-4 * float(want.abs().max()))


def test_it_says_what_it_needs(world) -> None:
    with pytest.raises(UsageError, match="lora_sb measures gradient"):
        ek.adapt(world.make(), "lora_sb", rank=2)
