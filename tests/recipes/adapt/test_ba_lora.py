"""BA-LoRA's terms against formulas written out in float64, and the gradients that reach the adapter."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eckart as ek
from eckart.axes import loss
from eckart.errors import Refused, UsageError
from eckart.hub.peft.outputs import positions
from eckart.linalg.nuclear import leading_share
from eckart.registry import get_recipe


def logits(rows: int, classes: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6), (1, 4)], ids=str)
class TestTerms:
    def test_values(self, shape) -> None:
        z, before = logits(*shape, 0), logits(*shape, 1)
        p, q = softmax(z.numpy()), softmax(before.numpy())
        kl = (q * (np.log(q) - np.log(p))).sum(-1).mean()
        assert float(loss.Consistency(measure="kl").of(z, before)) == pytest.approx(kl)
        unit = [t / np.linalg.norm(t, axis=-1, keepdims=True) for t in (z.numpy(), before.numpy())]
        assert float(loss.Consistency(measure="mse").of(z, before)) == pytest.approx(((unit[0] - unit[1]) ** 2).mean())
        assert float(loss.Diversity(measure="entropy").of(z, None)) == pytest.approx((p * np.log(p)).sum(-1).mean())
        spread = 0.0
        if shape[0] > 1:
            cov = np.cov(z.numpy(), rowvar=False)
            spread = ((cov - np.diag(np.diag(cov))) ** 2).sum() / shape[1]
        assert float(loss.Diversity(measure="covariance").of(z, None)) == pytest.approx(spread)
        s = np.linalg.svd(z.numpy(), compute_uv=False)
        assert float(loss.LeadingShare(k=3).of(z, None)) == pytest.approx(-s[:3].sum() / s.sum())

    def test_gradient_of_the_leading_share(self, shape) -> None:
        z = logits(*shape, 2).requires_grad_()
        (found,) = torch.autograd.grad(leading_share(z, 2), z)
        s = torch.linalg.svdvals(z)
        (want,) = torch.autograd.grad(s[:2].sum() / s.sum(), z)
        assert torch.allclose(found, want, atol=1e-9)


def test_bounds_and_degenerate_logits() -> None:
    z = logits(6, 9, 0)
    assert float(loss.Consistency(measure="kl").of(z, z)) == 0 == float(loss.Consistency(measure="mse").of(z, z))
    low = logits(6, 2, 1) @ logits(2, 9, 2)
    assert float(loss.LeadingShare(k=2).of(low, None)) == pytest.approx(-1)
    assert float(loss.LeadingShare(k=3).of(torch.eye(9), None)) == pytest.approx(-3 / 9)
    zero = torch.zeros(3, 4, requires_grad=True)
    assert float(leading_share(zero, 1)) == 1
    assert all(torch.isfinite(piece.of(torch.zeros(3, 4), torch.zeros(3, 4))) for piece in get_recipe("ba_lora").loss)
    far = torch.tensor([[1e4, -1e4, 0.0]])
    assert all(torch.isfinite(piece.of(far, -far)) for piece in get_recipe("ba_lora").loss)
    with pytest.raises(Refused, match="NaN or Inf"):
        leading_share(torch.full((2, 2), torch.nan), 1)
    many = logits(1000, 4, 3)
    picked = many[torch.linspace(0, 999, 10).round().long()]
    assert float(loss.LeadingShare(k=1, rows=10).of(many, None)) == pytest.approx(float(-leading_share(picked, 1)))
    with pytest.raises(UsageError, match="k of at least 1"):
        loss.LeadingShare(k=0)


STRONG = (
    loss.Consistency(weight=0.7, measure="kl"),
    loss.Diversity(weight=0.4, measure="entropy"),
    loss.LeadingShare(weight=0.5, k=2),
)


class Tagger(nn.Module):
    """Token logits and, with labels, their loss: what a language model gives, small."""

    config = SimpleNamespace(is_encoder_decoder=False, to_dict=dict)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)

    def forward(self, input_ids: torch.Tensor, labels: Any = None, num_items_in_batch: Any = None, **_: Any) -> Any:
        z = self.head(torch.tanh(self.mix(self.embed(input_ids))))
        value = None
        if labels is not None:
            items = num_items_in_batch or (labels != -100).sum()
            value = F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum") / items
        return SimpleNamespace(logits=z, loss=value)


def tagger() -> Tagger:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tagger().double()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[0, 3:] = -100
    return {"input_ids": ids, "labels": labels}


def adapted(terms: Any = STRONG) -> Any:
    model = ek.adapt(tagger(), get_recipe("ba_lora").with_(loss=terms), rank=3, target=["mix"]).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return model


def explicit(model: Any, data: dict[str, torch.Tensor], terms: Any = STRONG) -> dict[str, torch.Tensor]:
    """Gradients of the loss with the terms written into it, in a copy without any hook."""
    free = copy.deepcopy(model).eval()
    out = free(**data)
    keep = data["labels"] != -100
    before = tagger()(**data).logits[keep]
    now = out.logits[keep]
    total = out.loss + sum(t.weight * t.of(now, before) for t in terms)
    named = {k: p for k, p in free.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(one[k], two[k], atol=atol) for k in two)


@pytest.mark.parametrize("own_loss", [True, False], ids=["the model's loss", "a loss made of the logits"])
def test_gradients_are_those_of_the_whole_sum_and_the_reported_loss_is_the_task_s(own_loss) -> None:
    model, data = adapted(), batch()
    want = explicit(model, data)
    plain = float(copy.deepcopy(model).eval()(**data).loss.detach())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with ek.glue(model).begin(optimizer):
        if own_loss:
            value = model(**data).loss
        else:
            data = {**data, "shift_labels": data["labels"], "labels": None}
            value = F.cross_entropy(model(**data).logits.flatten(0, 1), data["shift_labels"].flatten())
        value.backward()
    assert float(value.detach()) == plain
    assert same(gradients(model), want)


def test_scaled_losses_scale_the_terms_too() -> None:
    model, data = adapted(), batch()
    want = explicit(model, data)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with ek.glue(model).begin(optimizer, scaler=scaler) as glue:
        scaler.scale(model(**data).loss).backward()
        glue.before_step()
        assert same(gradients(model), want, 1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model.zero_grad()
    with ek.glue(model).begin(optimizer, scaler=scaler) as glue:
        asked = {**data, "shift_labels": data["labels"], "labels": None}
        scaler.scale(F.cross_entropy(model(**asked).logits.flatten(0, 1), data["labels"].flatten())).backward()
        glue.before_step()
        assert same(gradients(model), want, 1e-4)


def test_accumulated_passes_average_the_terms_over_positions() -> None:
    """Terms that are means over positions: two passes of unequal length give what one pass over both gives."""
    terms = STRONG[:2]
    model, data = adapted(terms), batch()
    parts = [{k: v[:1] for k, v in data.items()}, {k: v[1:] for k, v in data.items()}]
    free = copy.deepcopy(model)
    items = int((data["labels"] != -100).sum())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with ek.glue(model).begin(optimizer):
        for part in parts:
            model(**part, num_items_in_batch=items).loss.backward()
    assert same(gradients(model), explicit(free, data, terms))


@pytest.mark.parametrize("processes", [1, 2])
def test_terms_keep_step_with_a_loss_that_is_made_of_the_logits(processes) -> None:
    """Trainer divides such a loss by the passes of a step; where it divides by the items of a batch instead, it multiplies by the processes."""
    terms = STRONG[:2]
    model, data = adapted(terms), batch()
    free = copy.deepcopy(model)
    parts = [{k: v[:1] for k, v in data.items()}, {k: v[1:] for k, v in data.items()}]
    items = int((data["labels"] != -100).sum())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    averaged = processes > 1
    with ek.glue(model).begin(optimizer, accumulate=2, processes=processes):
        for part in parts:
            more = {"num_items_in_batch": items} if averaged else {}
            logits = model(part["input_ids"], labels=None, shift_labels=part["labels"], **more).logits
            kept = part["labels"] != -100
            value = F.cross_entropy(logits[kept], part["labels"][kept], reduction="sum")
            (value * processes / items if averaged else value / kept.sum() / 2).backward()
    halves = [explicit(free, part, terms) for part in parts]
    if averaged:
        want = {k: processes * v for k, v in explicit(free, data, terms).items()}
    else:
        want = {k: (v + halves[1][k]) / 2 for k, v in halves[0].items()}
    assert same(gradients(model), want)


def test_evaluation_and_other_adapters_see_nothing() -> None:
    model, data = adapted(), batch()
    plain = model.eval()(**data).loss
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    glue = ek.glue(model).begin(optimizer)
    assert len(model._forward_hooks) == 1
    assert torch.equal(model(**data).loss, plain)
    with torch.no_grad():
        model.train()(**data)
    state = torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    model(**data)
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == [p.requires_grad for p in model.parameters()]
    glue.end()
    assert not model._forward_hooks


def test_an_output_without_logits_is_refused() -> None:
    class Odd(Tagger):
        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            return SimpleNamespace(loss=super().forward(input_ids, **more).logits.sum())

    model = ek.adapt(Odd(), "ba_lora", rank=2, target=["mix"]).train()
    with (
        ek.glue(model).begin(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)),
        pytest.raises(UsageError, match="is a term on logits, and .* returned SimpleNamespace without any"),
    ):
        model(batch()["input_ids"])


def test_positions() -> None:
    z = torch.zeros(2, 4, 3)
    labels = torch.tensor([[1, 2, -100, 2], [1, 1, 1, -100]])
    causal = positions(z, {"labels": labels}, True)
    assert causal.tolist() == [[True, False, True, False], [True, True, False, False]]
    assert torch.equal(positions(z, {"labels": labels}, False), labels != -100)
    assert torch.equal(positions(z, {"shift_labels": labels}, True), labels != -100)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert positions(z, {"attention_mask": mask}, True).sum() == 5
    assert positions(torch.zeros(4, 3), {"labels": torch.zeros(4)}, True).all()
    with pytest.raises(UsageError, match="do not fit"):
        positions(z, {"labels": labels[:, :2]}, True)
