"""SALT: W' = U relu(C) Vh written out in float64, for both readings of the relu."""

import pytest
import torch

from eckart.errors import UsageError


def written_out(world, b, clip_all: bool) -> torch.Tensor:
    t = {k: v.detach().double() for k, v in b.parts().items()}
    p, k = len(t["core_gain"]), world.k
    c = torch.zeros(k, k, dtype=torch.float64)
    c[:p, :p] = torch.diag(t["core_gain"] * world.S[:p] + t["core_shift"])
    c[p:, p:] = torch.diag(world.S[p:]) + t["core_x"] @ t["core_y"]
    c = c.relu() if clip_all else torch.where(torch.eye(k, dtype=torch.bool), c.relu(), c)
    u, vh = t["left"], t["right"]  # numpy's, with other signs
    return u @ c @ vh


@pytest.mark.parametrize(("variant", "clip_all"), [("paper", False), ("released", True)])
def test_moved_weight(world, adapted, variant, clip_all) -> None:
    model, b = adapted(world.make(), "salt", variant=variant)
    assert torch.equal(model(world.x), world.make()(world.x))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.7 * torch.randn(p.shape, generator=g))
    want = written_out(world, b, clip_all)
    assert bool((written_out(world, b, True) != written_out(world, b, False)).any())  # the draw tells them apart
    assert torch.allclose(model(world.x).double(), world.x.double() @ want.T + world.bias, atol=1e-3)
    assert torch.allclose(model.merge_and_unload()[0].weight.detach().double(), want, atol=1e-4)


def test_shapes_counts_and_draw(world, adapted) -> None:
    _, b = adapted(world.make(), "salt")
    p = max(1, int(0.1 * world.k))
    q = min(256, world.k - p)
    assert sum(x.numel() for x in b.parameters()) == 2 * p + 2 * q * (world.k - p)
    assert not b.core_y.any()
    bound = (6 / ((1 + 20) * q)) ** 0.5  # kaiming, a = sqrt(20)
    assert 0.9 * bound < float(b.core_x.detach().abs().max()) <= bound


def test_the_released_clipping_raises_the_rank_of_the_update(world, adapted) -> None:
    settings = ["form.core.inner=2"]
    found = []
    for variant in ("paper", "released"):
        _, b = adapted(world.make(), "salt", variant=variant, settings=settings)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            b.core_y.copy_(0.05 * torch.randn(b.core_y.shape, generator=g))
        s = torch.linalg.svdvals(b.delta_matrix().detach().double())
        found.append(int((s > 1e-5 * s[0]).sum()))
    assert found[0] == 2 < found[1]


@pytest.mark.parametrize("setting", ["form.core.lead=0", "form.core.lead=7", "form.core.inner=-1"])
def test_sizes_that_will_not_do(world, adapted, setting) -> None:
    with pytest.raises(UsageError, match="core.block: expected a share"):
        adapted(world.make(), "salt", settings=[setting])
