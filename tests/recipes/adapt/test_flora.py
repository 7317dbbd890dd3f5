"""FLoRA: numpy's einsum for the tensor, the tensor's own shape for convolutions of every kind, and counts by the paper's formula."""

import numpy as np
import pytest
import torch
from torch import nn

import eckart as ek
from eckart.axes import form
from eckart.registry import get_recipe

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2), (6, 17)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 9, 9)),
    "circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (6, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, dilation=2), (6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6, bias=False), (6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3)), (4, 2, 5, 5)),
}


def shaken(layer, rank: int = 3):
    model = ek.adapt(nn.Sequential(layer), "flora", rank=rank, target=["0"], dropout=0.0)
    branch = model.base_model.model[0].branch("default")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in branch.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return model.eval(), branch


@pytest.mark.parametrize("name", LAYERS)
def test_kernel_and_output(name) -> None:
    make, shape = LAYERS[name]
    layer = make()
    weight = layer.weight.detach().clone()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    model, b = shaken(layer)
    t = {k: v.detach().double().numpy() for k, v in b.parts().items()}
    names = ["left", "right", "height", "width", "depth"][: weight.ndim]
    letters = "abcde"[: weight.ndim]
    terms = ",".join([letters, *(f"{x.upper()}{x}" for x in letters)])
    kernel = 4.0 * np.einsum(f"{terms}->{letters.upper()}", t["core"], *(t[n].T if n == "right" else t[n] for n in names))  # s = 4
    assert kernel.shape == weight.shape
    assert np.allclose(b.gain_matrix().detach().numpy(), kernel.reshape(len(kernel), -1), atol=1e-4)
    plain = make()
    with torch.no_grad():
        plain.weight.copy_(weight + torch.tensor(kernel))
        if plain.bias is not None:
            plain.bias.copy_(model.base_model.model[0].base_layer.bias)
        want = plain(x)
        assert torch.allclose(model(x), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        assert torch.allclose(model.merge_and_unload()(x), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_counts(name) -> None:
    layer = LAYERS[name][0]()
    sizes = tuple(layer.weight.shape)
    model = ek.adapt(nn.Sequential(layer), "flora", rank=3, target=["0"])
    ranks = [min(3 if i < 2 else 2, d) for i, d in enumerate(sizes)]
    want = int(np.prod(ranks)) + sum(d * r for d, r in zip(sizes, ranks, strict=True))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want
    recipe = get_recipe("flora")
    assert recipe.form.trainable(sizes, 3, recipe.roles, bias=True) == want


def test_the_papers_example_count() -> None:
    """3 x 3, C -> C, ranks (16, 16, 2, 2): 1024 + 32 C + 12."""
    recipe = get_recipe("flora")
    assert recipe.form.trainable((64, 64, 3, 3), 16, recipe.roles, bias=False) == 1024 + 32 * 64 + 12


def test_start_and_first_gradients(world, adapted) -> None:
    model, b = adapted(world.make(), "flora", 4)
    assert torch.equal(model(world.x), world.make()(world.x))
    y = model(world.x)
    y.square().sum().backward()
    g = (2 * y.detach()).double().T @ world.x.double()
    want = 4 * b.left.detach().double().T @ g @ b.right.detach().double().T
    assert torch.allclose(b.core.grad.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert not b.left.grad.any()
    assert not b.right.grad.any()


def test_draws(adapted) -> None:
    _, b = adapted(nn.Sequential(nn.Linear(400, 300)), "flora", 16)
    for part in (b.left, b.right):
        assert float(part.detach().std()) == pytest.approx((0.5 / 16) ** 0.5, rel=0.05)


def test_of_two_axes_it_is_slora_with_a_core_of_zeros(world, adapted) -> None:
    _, a = adapted(world.make(), "flora", 4)
    _, b = adapted(world.make(), "slora", 4, alpha=16)  # s = 4
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("left", "core", "right"):
            value = torch.randn(b.parts()[name].shape, generator=g)
            b.parts()[name].copy_(value)
            a.parts()[name].copy_(value)
    assert torch.allclose(a.delta_matrix(), b.delta_matrix(), rtol=1e-4, atol=1e-4)


def test_a_convolution_reloads_and_exports(tmp_path) -> None:
    from peft import PeftModel

    from eckart.hub.peft.export import export_lora

    layer = LAYERS["conv2d"][0]()
    plain = nn.Sequential(LAYERS["conv2d"][0]())
    plain[0].load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    model, _ = shaken(layer)
    with torch.no_grad():
        want = model(x)
        model.save_pretrained(tmp_path / "a")
        export_lora(model, tmp_path / "b")
        import copy

        assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a").eval()(x), want)
        assert torch.allclose(PeftModel.from_pretrained(plain, tmp_path / "b").eval()(x), want, rtol=1e-3, atol=1e-3)


def test_refusals() -> None:
    from eckart.errors import UsageError

    with pytest.raises(UsageError, match="form.kernel: expected a rank of at least 1"):
        form.Tucker(kernel=0)
    with pytest.raises(UsageError, match="rank 9 is above the layer"):
        ek.adapt(nn.Sequential(nn.Conv2d(6, 8, 3)), "flora", rank=9, target=["0"])
    with pytest.raises(UsageError, match="form=tucker takes nothing away"):
        ek.adapt(nn.Sequential(nn.Linear(6, 8)), "flora", rank=2, base="mutate")
