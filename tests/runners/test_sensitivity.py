"""Measured loss of single cuts: against cutting by hand, what is made of it, and how well the two-sided spectrum foretells it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import eckart as ek
from eckart.axes import score
from eckart.axes.budgets import tails_of


def spearman(a, b) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.fixture
def spied(monkeypatch):
    """What `measure` finds: (predicted curve, [(rank, rise of the loss)]) of each matrix."""
    seen = []
    original = score.MeasuredLoss.measured

    def spy(self, curve, found):
        seen.append((list(curve), list(found)))
        return original(self, curve, found)

    monkeypatch.setattr(score.MeasuredLoss, "measured", spy)
    return seen


def test_the_rise_is_that_of_cutting_by_hand(spied, tiny_llama, token_ids) -> None:
    calib = token_ids[:16]
    made = ek.compress(
        tiny_llama, "svd", 0.6, calib=calib, batch_size=8, dry_run="spectra",
        settings=["score.kind=measured_loss", "score.grid=[0.3,0.6]", "score.batches=1", "allocate.kind=water_fill"],
    )  # fmt: skip
    model, ids = ek.load(tiny_llama), torch.tensor(calib[:8])

    def loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)))

    base = loss()
    for job, (_, found) in zip(made.plan.jobs, spied, strict=True):
        assert len(found) == 2
        weight = model.get_submodule(job.name).weight
        whole = weight.detach().clone()
        u, s, vh = np.linalg.svd(whole.double().numpy(), full_matrices=False)
        for rank, rise in found:
            weight.data.copy_(torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank]))
            assert rise == pytest.approx(loss() - base, abs=2e-6)
        weight.data.copy_(whole)


def test_the_curve_goes_through_what_was_measured_and_never_falls() -> None:
    predicted = [9.0, 4.0, 2.0, 1.0, 0.5, 0.25]
    values = score.MeasuredLoss().measured(predicted, [(2, 0.7), (4, 0.2), (5, 0.3)])  # rank 4 measured better than rank 5: noise
    lost = tails_of(values)
    assert lost[5] == pytest.approx(0.3)
    assert lost[4] == pytest.approx(0.3)
    assert lost[2] == pytest.approx(0.7)
    assert lost[3] == pytest.approx(0.3 + 0.4 * (1.75 - 0.75) / (3.75 - 0.75))  # in between by the predicted loss
    assert lost[0] == pytest.approx(0.7 * 16.75 / 3.75)
    assert all(a >= b for a, b in pairwise(lost))
    assert score.MeasuredLoss().measured(predicted, [(2, -0.1)]) == [0.0] * 6


def test_the_two_sided_spectrum_foretells_the_loss(spied, lm_folder, calib) -> None:
    """Over matrices of the shipped model cut to 20 and 60%, one at a time; a one-sided spectrum is in each layer's own unit and does it worse."""
    model, found = ek.load(lm_folder, dtype="float32"), {}
    for recipe in ("two_sided", "svd_llm"):
        spied.clear()
        settings = [
            "score.kind=measured_loss", "score.grid=[0.2,0.6]", "score.batches=1", "allocate.kind=water_fill", 'target.only=["layers.[04]"]',
        ]  # fmt: skip
        ek.compress(
            model,
            recipe,
            0.6,
            tokenizer=ek.load_tokenizer(lm_folder),
            calib=[t[:400] for t in calib[:4]],
            batch_size=4,
            settings=settings,
            dry_run="spectra",
        )
        points = [(tails_of(curve)[rank], rise) for curve, rises in spied for rank, rise in rises]
        assert len(points) == 28
        found[recipe] = spearman(*zip(*points, strict=True))
    assert found["two_sided"] > 0.6
    assert found["two_sided"] > found["svd_llm"] + 0.1
