"""LoRA-Pro against least squares in float64, and against Adam on the full matrix done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import eckart as ek
from eckart.axes.gradient import adjusted, full_gradient
from eckart.errors import UsageError
from eckart.linalg.sylvester import pinv_psd, sylvester_psd

M, N, R, S = 7, 9, 3, 1.7


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    b, a, full = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((M, R), (R, N), (M, N)))
    return b, a, full, S * full @ a.T, S * b.T @ full


def moves(b: np.ndarray, a: np.ndarray, s: float) -> np.ndarray:
    """The linear map from (f_B, f_A), flattened, to the step of the product s B A."""
    m, r = b.shape
    n = a.shape[1]
    columns = []
    for i in range(m * r + r * n):
        e = np.zeros(m * r + r * n)
        e[i] = 1
        columns.append((s * (e[: m * r].reshape(m, r) @ a + b @ e[m * r :].reshape(r, n))).ravel())
    return np.stack(columns, 1)


def test_step_is_the_nearest_that_both_factors_can_make(case) -> None:
    b, a, full, gb, ga = case
    jacobian = moves(b.numpy(), a.numpy(), S)
    best = jacobian @ np.linalg.lstsq(jacobian, full.numpy().ravel(), rcond=None)[0]
    found = full_gradient(b, a, gb, ga, S)
    assert np.allclose(found.numpy().ravel(), best, atol=1e-10)
    f_b, f_a = adjusted(b, a, gb, ga, S)
    assert torch.allclose(S * (b @ f_a + f_b @ a), found, atol=1e-10)


def test_pair_is_the_one_nearest_to_the_gradients(case) -> None:
    """Among all pairs with that step, by least squares over the null space."""
    b, a, _, gb, ga = case
    f_b, f_a = adjusted(b, a, gb, ga, S)
    found = np.concatenate([f_b.numpy().ravel(), f_a.numpy().ravel()])
    wanted = np.concatenate([gb.numpy().ravel(), ga.numpy().ravel()])
    jacobian = moves(b.numpy(), a.numpy(), S)
    _, values, vh = np.linalg.svd(jacobian)
    null = vh[(values > 1e-9).sum() :]
    assert len(null) == R * R
    assert np.allclose(null @ found, null @ wanted, atol=1e-9)


def test_full_rank_factors_make_the_step_of_the_full_matrix() -> None:
    g = torch.Generator().manual_seed(1)
    b, a, full = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((5, 5), (5, 8), (5, 8)))
    assert torch.allclose(full_gradient(b, a, 2 * full @ a.T, 2 * b.T @ full, 2.0), full, atol=1e-9)


def test_zero_left_factor(case) -> None:
    _, a, full, _, _ = case
    zero = torch.zeros(M, R, dtype=torch.float64)
    gb, ga = S * full @ a.T, S * zero.T @ full
    f_b, f_a = adjusted(zero, a, gb, ga, S)
    assert torch.allclose(f_b, gb @ torch.linalg.inv(a @ a.T) / S**2)
    assert not f_a.any()
    # rank deficient: the direction that is missing says nothing
    b = torch.randn(M, R, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    b[:, 2] = b[:, 1]
    assert all(torch.isfinite(f).all() for f in adjusted(b, a, gb, S * b.T @ full, S))


def test_small_solvers_against_numpy() -> None:
    g = torch.Generator().manual_seed(3)
    p, q, c = torch.randn(4, 4, generator=g).double(), torch.randn(6, 6, generator=g).double(), torch.randn(4, 6, generator=g).double()
    p, q = p @ p.T, q @ q.T
    x = sylvester_psd(p, q, c)
    whole = np.kron(p.numpy(), np.eye(6)) + np.kron(np.eye(4), q.numpy())
    assert np.allclose(x.numpy().ravel(), np.linalg.solve(whole, c.numpy().ravel()), atol=1e-8)
    low = torch.randn(5, 2, generator=g).double()
    assert np.allclose(pinv_psd(low @ low.T).numpy(), np.linalg.pinv((low @ low.T).numpy(), rcond=1e-9), atol=1e-9)
    assert not pinv_psd(torch.zeros(3, 3)).any()
    assert not sylvester_psd(torch.zeros(2, 2), torch.zeros(3, 3), torch.ones(2, 3)).any()


def by_hand(b, a, x, y, w, s, lr, decay, steps):
    """AdamW on the equivalent gradient, written from the paper's equations with dense inverses."""
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, steps + 1):
        error = x @ (w + s * b @ a).T - y
        full = 2 * error.T @ x / error.size
        gb, ga = s * full @ a.T, s * b.T @ full
        inv_a = np.linalg.inv(a @ a.T)
        if not b.any():
            g = s * (gb @ inv_a / s**2) @ a
        else:
            inv_b = np.linalg.inv(b.T @ b)
            g = s * (b @ (inv_b @ ga) + (gb - b @ inv_b @ b.T @ gb) @ inv_a @ a) / s**2
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        d = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        gb, ga = s * d @ a.T, s * b.T @ d
        if not b.any():
            fb, fa = gb @ inv_a / s**2, np.zeros_like(a)
        else:
            fa0, fb0 = inv_b @ ga / s**2, (gb - b @ inv_b @ b.T @ gb) @ inv_a / s**2
            whole = np.kron(b.T @ b, np.eye(len(a))) + np.kron(np.eye(len(a)), a @ a.T)
            turn = np.linalg.solve(whole, (-fa0 @ a.T).ravel()).reshape(len(a), len(a))
            fa, fb = fa0 + turn @ a, fb0 - b @ turn
        b, a = b * (1 - lr * decay) - lr * fb, a * (1 - lr * decay) - lr * fa
    return b, a


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=lambda c: c.__name__)
def test_training_follows_adam_on_the_full_matrix(world, kind) -> None:
    model = ek.adapt(world.make(), "lora_pro", rank=R, alpha=2 * R)
    branch = next(m for m in model.modules() if hasattr(m, "eckart_branch")).branch("default")
    y = torch.randn(50, world.shape[0], generator=torch.Generator().manual_seed(5))
    want = by_hand(
        branch.left.detach().double().numpy(), branch.right.detach().double().numpy(), world.x.double().numpy(),
        (y - world.bias).double().numpy(), world.W.numpy(), 2.0, 1e-2, 0.1, 6,
    )  # fmt: skip
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    with ek.glue(model).begin(optimizer) as glue:
        for _ in range(6):
            optimizer.zero_grad()
            (model(world.x) - y).square().mean().backward()
            glue.before_step()
            optimizer.step()
            glue.after_step()
    assert np.allclose(branch.left.detach().numpy(), want[0], atol=2e-4)
    assert np.allclose(branch.right.detach().numpy(), want[1], atol=2e-4)


def test_sgd_form_hands_the_optimiser_the_adjusted_pair(world, adapted) -> None:
    model, b = adapted(world.make(), "lora_pro", R, variant="sgd")
    with torch.no_grad():
        b.left.normal_(generator=torch.Generator().manual_seed(1))
    before = b.left.detach().clone(), b.right.detach().clone()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with ek.glue(model).begin(optimizer) as glue:
        model(world.x).square().mean().backward()
        want = adjusted(*before, b.left.grad, b.right.grad, b.scale)
        glue.before_step()
        optimizer.step()
        glue.after_step()
    assert torch.allclose(b.left, before[0] - 0.1 * want[0].float(), atol=1e-5)
    assert torch.allclose(b.right, before[1] - 0.1 * want[1].float(), atol=1e-5)


def test_a_core_or_a_frozen_factor_does_not_fit(world) -> None:
    with pytest.raises(UsageError, match="without a core; this form has the tensors core"):
        ek.adapt(world.make(), "sorsa", rank=2, glue=["lora_pro"])
    model = ek.adapt(world.make(), "pissa", rank=2, glue=["lora_pro"])
    assert torch.equal(model.eval()(world.x), world.make()(world.x))
    other = ek.Recipe(**{**ek.get_recipe("lora_pro").__dict__, "roles": {"right": ek.roles.Freeze()}})
    model = ek.adapt(world.make(), other, rank=2)
    with pytest.raises(UsageError, match="does not train its right; both factors must train"):
        ek.glue(model).begin(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
