"""WeLore-PEFT: one threshold explains all ranks, and training touches the factors of the low-rank layers and nothing else."""

import numpy as np
import pytest
import torch

import eckart as ek
from eckart.nn.surgery import low_rank_layers

KEEP = 0.9


@pytest.fixture(scope="module")
def cut(tiny_llama, token_ids):
    """The cut alone, and the cut with one step of training on one batch."""
    calib = token_ids[:8]
    return (
        ek.compress(tiny_llama, "welore", KEEP),
        ek.compress(tiny_llama, "welore_peft", KEEP, calib=calib, settings=["recover.steps=1", "recover.lr=1e-3"]),
        torch.tensor(calib),
    )


def test_one_threshold_on_scaled_spectra_explains_every_rank(cut, tiny_llama) -> None:
    plain, tuned, _ = cut
    assert [(j.name, j.rank) for j in plain.plan.jobs] == [(j.name, j.rank) for j in tuned.plan.jobs]
    modules = dict(ek.load(tiny_llama).named_modules())
    low, high, dense = 0.0, 1.0, []
    for job in plain.plan.jobs:
        s = np.linalg.svd(modules[job.name].weight.detach().double().numpy(), compute_uv=False)
        scaled = (s - s.min()) / (s.max() - s.min())
        if job.rank is None:
            dense.append(scaled)
            continue
        low, high = max(low, scaled[job.rank]), min(high, scaled[job.rank - 1])
        assert 1 - job.rank / len(s) > 0.4999
    assert low < high + 1e-9
    assert dense
    assert all((scaled >= low).mean() >= 0.5 - 1e-3 or (scaled >= high).mean() >= 0.5 - 1e-3 for scaled in dense)


def test_the_first_step_is_adams_on_the_factors_and_nothing_else_moves(cut) -> None:
    plain, tuned, ids = cut
    model = plain.model.train(False).requires_grad_(True)
    logits = model(input_ids=ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    before, after = dict(model.named_parameters()), dict(tuned.model.named_parameters())
    factors = {f"{n}.{part}.weight" for n in low_rank_layers(model) for part in ("up", "down")}
    assert factors
    for name, old in before.items():
        move = after[name].detach() - old.detach()
        if name not in factors:
            assert (move == 0).all(), name
            continue
        clear = old.grad.abs() > 0.1 * old.grad.abs().max()
        assert clear.any()
        want = -1e-3 * old.grad / (old.grad.abs() + 1e-8)  # Adam's first step: the rate, whatever the size of the gradient
        assert torch.allclose(move[clear], want[clear], rtol=2e-2, atol=1e-6), name


def test_more_steps_lower_the_loss_that_is_trained_on(tiny_llama, token_ids) -> None:
    made = ek.compress(tiny_llama, "welore_peft", KEEP, calib=token_ids[:16], settings=["recover.steps=20", "recover.lr=3e-3"])
    words = next(v for v in made.report["verdict"] if "numbers were trained" in v)
    before, after = (float(x) for x in words.replace(" before", "").replace(" after.", "").rpartition("calibration ")[2].split(", "))
    assert after < before
