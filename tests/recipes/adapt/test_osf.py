"""OSF: what is protected stays out of what trains, under Adam too; PEFT's own beside it."""

import pytest
import torch
from peft import OSFConfig, get_peft_model

import eckart as ek
from eckart.axes import gradient
from eckart.errors import UsageError
from eckart.registry import get_recipe


def test_protected_and_trained_part_are_the_singular_triples(world, adapted) -> None:
    _, b = adapted(world.make(), "osf", 5)
    assert b.rank == world.k - 5
    assert torch.allclose(b.core.double(), world.S[5:], atol=1e-5)
    assert torch.allclose((b.kept_left.double().T @ world.U[:, :5]).abs(), torch.eye(5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose((b.kept_right.double() @ world.Vh[:5].T).abs(), torch.eye(5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(b.left.T @ b.kept_left, torch.zeros(b.rank, 5), atol=1e-5)
    assert sum(p.numel() for p in b.parameters()) == (world.k - 5) * (sum(world.shape) + 1)


def test_half_is_the_default(world, adapted) -> None:
    assert adapted(world.make(), "osf")[1].rank == world.k - world.k // 2


def test_same_start_and_merged_weight_as_peft(world, adapted, angles) -> None:
    theirs = get_peft_model(world.make(), OSFConfig(effective_rank=5, target_modules=["0"]))
    ours, b = adapted(world.make(), "osf", 5)
    svd = theirs.base_model.model[0].osf_svd_params["default"]
    assert torch.allclose(b.core, svd["S_low"], atol=1e-5)
    assert angles(b.left, svd["U_low"]).max() < 1e-3
    assert torch.allclose(ours(world.x), theirs(world.x), atol=1e-4)
    with torch.no_grad():
        b.core.mul_(1.5)
        svd["S_low"].mul_(1.5)
    assert torch.allclose(ours.merge_and_unload()[0].weight, theirs.merge_and_unload()[0].weight, atol=1e-5)


def train(model, b, optimizer, world, steps: int = 30) -> None:
    model.train()
    g = torch.Generator().manual_seed(3)
    y = torch.randn(len(world.x), world.shape[0], generator=g)
    with ek.glue(model).begin(optimizer) as glue:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(world.x) - y).square().mean().backward()
            glue.before_step()
            optimizer.step()
            glue.after_step()
    model.eval()


def leak(b) -> float:
    return max(float((b.kept_left.T @ b.left.detach()).abs().max()), float((b.right.detach() @ b.kept_right.T).abs().max()))


def test_adam_does_not_leak_into_the_protected_subspace(world, adapted) -> None:
    model, b = adapted(world.make(), "osf", 5)
    train(model, b, torch.optim.AdamW(b.parameters(), lr=1e-2), world)
    assert leak(b) < 1e-6
    assert not torch.allclose(b.left, b.initial_left, atol=1e-2)
    merged = model.merge_and_unload()[0].weight.double()
    # the protected part is untouched: U_h^T W V_h^T is still diag(S_h)
    inside = world.U[:, :5].T @ merged.detach() @ world.Vh[:5].T
    assert torch.allclose(inside, torch.diag(world.S[:5]), atol=1e-4)


def test_projecting_gradients_alone_would_leak_under_adam(world, adapted) -> None:
    osf = get_recipe("osf")
    model, b = adapted(world.make(), osf.with_(gradient=(gradient.Project(),)), 5)
    model.train()
    optimizer = torch.optim.AdamW(b.parameters(), lr=1e-2)
    with ek.glue(model).begin(optimizer) as glue:
        for _ in range(30):
            optimizer.zero_grad()
            (model(world.x) - 1).square().mean().backward()
            before = b.left.grad.clone(), b.right.grad.clone()
            glue.before_step()
            assert torch.allclose(b.left.grad, before[0] - b.kept_left @ (b.kept_left.T @ before[0]), atol=1e-5)
            assert torch.allclose(b.right.grad, before[1] - (before[1] @ b.kept_right.T) @ b.kept_right, atol=1e-5)
            optimizer.step()  # and no projection of the factors after it
        assert leak(b) > 0.01
        glue.after_step()
        assert leak(b) < 1e-6


@pytest.mark.parametrize("rank", [1, 19])
def test_one_or_all_but_one_protected(world, adapted, rank) -> None:
    model, b = adapted(world.make(), "osf", rank)
    assert b.rank == world.k - rank
    assert torch.equal(model(world.x), world.make()(world.x))


def test_nothing_left_to_train_is_refused(world, adapted) -> None:
    with pytest.raises(UsageError, match=r"leaves 0 triples to train; its shape is"):
        adapted(world.make(), "osf", world.k)


def test_a_metric_leaves_nothing_that_could_be_protected(world) -> None:
    mixed = get_recipe("osf").with_(metric=get_recipe("corda").metric)
    with pytest.raises(UsageError, match=r"parts chosen in a metric \(input_gram\) share theirs"):
        ek.adapt(world.make(), mixed, rank=5, calib=[world.x])
