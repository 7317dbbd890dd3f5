"""Householder: products of reflections written out in float64, bases that stay orthonormal, and spectra that do not move."""

import numpy as np
import pytest
import torch
from torch import nn

import eckart as ek
from eckart.errors import UsageError
from eckart.linalg.householder import reflect, reflectors


def product(vectors: np.ndarray) -> np.ndarray:
    """H(v_1) ... H(v_r), one by one."""
    m = len(vectors)
    out = np.eye(m)
    for v in vectors.T:
        out = out @ (np.eye(m) - 2 * np.outer(v, v) / (v @ v))
    return out


class TestReflections:
    @pytest.mark.parametrize("shape", [(7, 3), (5, 5), (6, 1), (1, 1)])
    def test_compact_form_is_the_product(self, shape) -> None:
        v = np.random.default_rng(0).standard_normal(shape)
        q = product(v)
        assert np.allclose(reflect(torch.tensor(v)).numpy(), q[:, : shape[1]])
        assert np.linalg.det(q) == pytest.approx((-1) ** shape[1])

    @pytest.mark.parametrize("shape", [(7, 3), (5, 5), (6, 1), (1, 1)])
    @pytest.mark.parametrize("flip", [1, -1])
    def test_every_basis_is_reached(self, shape, flip) -> None:
        """Of either determinant: without the signs half of the square ones are out of reach."""
        basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal(shape))
        basis[:, 0] *= flip
        v, signs = reflectors(torch.tensor(basis))
        assert np.allclose((reflect(v) * signs).numpy(), basis)
        assert np.allclose(product(v.numpy())[:, : shape[1]] * signs.numpy(), basis)

    @pytest.mark.parametrize("basis", [torch.eye(5)[:, :3], -torch.eye(4), torch.eye(4).flip(0)])
    def test_bases_that_are_axes(self, basis) -> None:
        v, signs = reflectors(basis)
        assert torch.allclose(reflect(v) * signs, basis, atol=1e-6)

    def test_gradient(self) -> None:
        v = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert torch.autograd.gradcheck(reflect, (v,))

    def test_what_is_no_basis(self) -> None:
        with pytest.raises(UsageError, match="w: expected orthonormal columns"):
            reflectors(torch.ones(3, 2), "w")


def train(model, x: torch.Tensor, steps: int = 20) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=1e-2)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_singular_values_stay_while_vectors_train(world, adapted) -> None:
    model, b = adapted(world.make(), "householder", 5)
    assert torch.equal(model(world.x), world.make()(world.x))
    assert torch.allclose(b.gain_matrix().detach().double(), (world.U[:, :5] * world.S[:5]) @ world.Vh[:5], atol=1e-5)
    assert {k for k, _ in b.named_parameters()} == {"left", "right"}
    assert sum(p.numel() for p in b.parameters()) == 5 * sum(world.shape)
    train(model, world.x)
    left, right = b.bases()
    assert torch.allclose(left.T @ left, torch.eye(5), atol=1e-5)
    assert torch.allclose(right @ right.T, torch.eye(5), atol=1e-5)
    gain = b.gain_matrix().detach().double()
    assert torch.allclose(torch.linalg.svdvals(gain)[:5], world.S[:5], rtol=1e-4)
    moved = gain - (world.U[:, :5] * world.S[:5]) @ world.Vh[:5]
    assert float(moved.norm() / gain.norm()) > 0.05


def test_the_papers_form_replaces_the_weight_by_a_flat_projector(world, adapted) -> None:
    model, _ = adapted(world.make(), "householder", 5, variant="paper")
    want = world.U[:, :5] @ world.Vh[:5]
    assert torch.allclose(model(world.x).double(), world.x.double() @ want.T + world.bias, atol=1e-3)
    train(model, world.x)
    weight = model.merge_and_unload()[0].weight.detach().double()
    s = torch.linalg.svdvals(weight)
    assert torch.allclose(s[:5], torch.ones(5, dtype=s.dtype), atol=1e-4)
    assert s[5:].max() < 1e-4


def test_directions_are_the_right_singular_vectors(world, adapted, angles) -> None:
    _, b = adapted(world.make(), "householder", 5, variant="paper")
    assert angles(b.bases()[1].detach().T, world.Vh[:5].T)[0] < 1e-3


def test_a_metric_gives_no_orthonormal_bases() -> None:
    from eckart.axes import metric
    from eckart.registry import get_recipe

    recipe = get_recipe("householder").with_(metric=metric.InputGram())
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    with pytest.raises(UsageError, match=r"expected orthonormal columns.*set metric.kind=identity"):
        ek.adapt(nn.Sequential(nn.Linear(6, 6)), recipe, rank=2, calib=[x])


def test_settings_that_contradict_each_other() -> None:
    for setting in ("form.scale=alpha/r", "form.of=fresh", "form.rest=drop", "form.balance=even"):
        with pytest.raises(UsageError):
            ek.adapt(nn.Sequential(nn.Linear(6, 6)), "householder", rank=2, settings=[setting])


@pytest.mark.parametrize(
    ("name", "piece"), [("householder", "orth"), ("soka", "orth"), ("kind", "refactor"), ("flora", "refactor"), ("householder", "refactor")]
)
def test_what_works_on_plain_factors_is_refused_on_others(name, piece) -> None:
    """A refresh would take reflections for factors, and silently train something else."""
    from eckart.axes import penalty, refresh
    from eckart.registry import get_recipe

    recipe = get_recipe(name)
    recipe = recipe.with_(penalty=(penalty.Orth(),)) if piece == "orth" else recipe.with_(refresh=(refresh.Refactor(),))
    with pytest.raises(UsageError, match=f"{piece} works on the factors L and R of a branch, which form={recipe.form.kind}"):
        ek.adapt(nn.Sequential(nn.Linear(8, 8)), recipe, rank=2)
