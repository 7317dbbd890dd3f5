"""CorDA against its equations in float64 and against PEFT's own, both on the covariance that PEFT measured."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from eckart.axes import metric
from eckart.axes.protocols import Stat


class Given:
    """Statistics that are one covariance."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix.double()

    def get(self, stat: Stat, site: object) -> SimpleNamespace:
        assert (stat.kind, stat.at) == ("moments", "in")
        return SimpleNamespace(second=lambda: self.matrix)


def samples(n: int, count: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    mix = torch.randn(n, n, generator=g) * torch.logspace(0, -1, n)
    return [torch.randn(1, 40, n, generator=g) @ mix for _ in range(count)]


def peft_model(world, mode: str, alpha: int):
    data = samples(world.shape[1])
    config = LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode, prune_temporary_fields=False),
    )  # fmt: skip
    model = world.make()
    preprocess_corda(model, config, run_model=lambda: [model(x) for x in data])
    covariance = model[0].covariance_matrix.clone()
    for name in ("sample_count", "covariance_matrix", "corda_method", "rank"):
        delattr(model[0], name)
    return get_peft_model(model, config), covariance


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [4, 8])
def test_same_factors_and_residual_as_peft(world, adapted, angles, mode, alpha) -> None:
    theirs, covariance = peft_model(world, mode, alpha)
    layer = theirs.base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    ours, branch = adapted(world.make(), "corda", 4, variant=mode, alpha=alpha, stats=Given(covariance), base="mutate")
    assert angles(branch.left, b).max() < 2e-3
    assert angles(branch.right.T, a.T).max() < 2e-3
    assert torch.allclose(
        ours.base_model.model[0].base_layer.weight, layer.base_layer.weight, atol=2e-3 if mode == "kpm" else 1e-4
    )  # theirs inverts in float32
    # and the same balance between the factors, which a metric's unit decides
    assert torch.allclose(branch.left.norm(dim=0), b.norm(dim=0), rtol=1e-2)
    assert torch.allclose(branch.right.norm(dim=1), a.norm(dim=1), rtol=1e-2)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_equations_in_float64(world, adapted, mode) -> None:
    c = torch.stack([x[0].T @ x[0] for x in samples(world.shape[1])]).mean(0).double()
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(world.W @ damped, full_matrices=False)
    v = vh @ torch.linalg.inv(damped)
    assert torch.allclose(u * s @ v, world.W, atol=1e-9)
    part = slice(0, 4) if mode == "ipm" else slice(-4, None)
    _, branch = adapted(world.make(), "corda", 4, variant=mode, stats=Given(c))
    assert torch.allclose(branch.gain_matrix().double(), u[:, part] * s[part] @ v[part], atol=1e-5)
    assert torch.allclose(branch.left.norm(dim=0).double(), s[part].sqrt(), rtol=1e-5)


def test_no_covariance_is_pissa_and_minor_components(world, adapted) -> None:
    eye = Given(torch.eye(world.shape[1]))
    for mode, part in (("ipm", slice(0, 4)), ("kpm", slice(-4, None))):
        _, branch = adapted(world.make(), "corda", 4, variant=mode, stats=eye)
        assert torch.allclose(branch.gain_matrix().double(), (world.U[:, part] * world.S[part]) @ world.Vh[part], atol=1e-5)


def test_unit_of_the_covariance_moves_the_balance_only(world, adapted) -> None:
    c = torch.stack([x[0].T @ x[0] for x in samples(world.shape[1])]).mean(0)
    _, one = adapted(world.make(), "corda", 4, stats=Given(c))
    _, hundred = adapted(world.make(), "corda", 4, stats=Given(100 * c))
    assert torch.allclose(one.gain_matrix(), hundred.gain_matrix(), atol=1e-5)
    assert torch.allclose(hundred.left, 10 * one.left, rtol=1e-3, atol=1e-3)
    assert torch.allclose(hundred.right, one.right / 10, rtol=1e-3, atol=1e-4)


def test_calibration_is_the_second_moment_of_the_inputs(world, adapted) -> None:
    rows = [x[0] for x in samples(world.shape[1])]
    everything = torch.cat(rows).double()
    _, measured = adapted(world.make(), "corda", 4, calib=rows)
    _, given = adapted(world.make(), "corda", 4, stats=Given(everything.T @ everything / len(everything)))
    assert torch.allclose(measured.left, given.left, atol=1e-5)
    assert torch.allclose(measured.right, given.right, atol=1e-5)


def test_ridge_is_a_share_of_the_mean_diagonal_entry() -> None:
    from eckart.axes.protocols import Bundle, Site

    site = Site("0", (2, 2), ("0.weight",))
    c = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    weight = metric.InputGram(power=1.0, ridge=0.5).sides(Bundle("0", (site,)), Given(c))[1]
    assert torch.equal(weight.matrix, torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    assert math.isclose(float(Given(c).matrix[0, 0]), 3.0)
