"""Gradients of single samples as thin factors, against autograd's own on each text alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.catalogue import from_model
from eckart.data import Batch, batches
from eckart.errors import Refused, UsageError
from eckart.stats.gradients import drawn, each_gradient, outer_square, samples, token_losses
from tests.measures.text_models import make, texts
from tests.stats.stats_models import linears


def gather(model, rows, sites, scalars):
    found = {}

    def take(sample, name, site, x, delta):
        found[sample.number, name, site.name] = delta.double().T @ x.double()

    done = each_gradient(model, samples(rows), sites, scalars, take)
    return found, done


def mean_loss(sample, output):
    return [("loss", token_losses(output, sample.ids).mean())] if sample.ids.shape[1] > 1 else []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_those_of_each_text_alone(kind) -> None:
    model, ids = make(kind), texts()
    sites = [s for s in linears(model) if s.block >= 0]
    found, done = gather(model, batches(ids, None, batch_size=3), sites, mean_loss)
    assert done == sum(len(i) > 1 for i in ids)
    assert len(found) == done * len(sites)
    model.eval()
    for number, row in enumerate(ids):
        if len(row) < 2:
            continue
        model.zero_grad()
        one = torch.tensor([row])
        model(input_ids=one, labels=one).loss.backward()
        for site in sites:
            grad = model.get_submodule(site.name).weight.grad
            expected = grad.T if site.view == "transposed" else grad
            assert torch.allclose(found[number, "loss", site.name], expected, rtol=1e-4, atol=1e-6), (
                number,
                site.name,
            )  # transformers rounds the logits to float32


def test_a_layer_that_is_called_twice_gives_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.idle = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.idle(x)
            return self.a(torch.tanh(self.a(x)))

    model = Twice()
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, _ = gather(model, [x[:3], x[3:]], from_model(model).sites, lambda s, y: [("one", y.square().sum()), ("two", y.sum())])
    assert {k for _, _, k in found} == {"a"}
    for number in range(4):
        for name, power in (("one", 2), ("two", 1)):
            model.zero_grad()
            model(x[number]).pow(power).sum().backward()
            assert torch.allclose(found[number, name, "a"], model.a.weight.grad)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(fails) -> None:
    model = make("llama")
    model.model.norm.eval()
    next(model.parameters()).requires_grad_(False)

    def mark():
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return [m.training for m in model.modules()], flags, [len(m._forward_hooks) for m in model.modules()]

    sites, before = linears(model), mark()

    def scalars(sample, output):
        if fails and sample.number == 1:
            raise ValueError("stop")
        return mean_loss(sample, output)

    if fails:
        with pytest.raises(ValueError, match="stop"):
            gather(model, batches(texts(), None), sites, scalars)
    else:
        gather(model, batches(texts(), None), sites, scalars)
    assert mark() == before


def test_samples_of_every_kind_of_batch() -> None:
    b = Batch(torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0.0, 1, 1], [1, 1, 2]]))
    one, two = samples([b])
    assert (one.ids.tolist(), one.weights.tolist(), one.batch.attention_mask.tolist()) == ([[1, 2]], [[0.0, 1.0]], [[1, 1]])
    assert (two.number, two.ids.tolist()) == (1, [[3, 4, 5]])
    first = next(
        iter(samples([{"input_ids": b.input_ids, "attention_mask": b.attention_mask, "labels": torch.tensor([7, 8]), "flag": True}]))
    )
    assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in first.batch.items()} == {
        "input_ids": [[1, 2]], "attention_mask": [[1, 1]], "labels": [7], "flag": True,
    }  # fmt: skip
    x = torch.arange(6.0).reshape(3, 2)
    assert [s.batch.tolist() for s in samples([x])] == [[[0.0, 1.0]], [[2.0, 3.0]], [[4.0, 5.0]]]
    assert [len(s.batch[1]) for s in samples([(x, torch.tensor([1, 2, 3]))])] == [1, 1, 1]
    with pytest.raises(UsageError, match="expected a Batch"):
        list(samples(["text"]))


def test_samples_are_drawn_by_the_seed() -> None:
    rows = batches([[i, i] for i in range(20)], None, batch_size=3)
    assert [s.number for s in drawn(rows, 20, 0, "x")] == list(range(20))
    one, two = ([s.number for s in drawn(rows, 5, seed, "x")] for seed in (0, 1))
    assert len(one) == 5
    assert one == sorted(one) == [s.number for s in drawn(rows, 5, 0, "x")]
    assert one != two
    assert [s.ids.tolist() for s in drawn(rows, 5, 0, "x")] == [[[i, i]] for i in one]


def test_a_loss_or_input_that_will_not_do_is_refused() -> None:
    net = nn.Linear(2, 2)
    sites = from_model(net).sites
    with pytest.raises(Refused, match="the loss of sample 0 is not finite"):
        gather(net, [torch.ones(1, 2)], sites, lambda s, y: [("loss", y.sum() / 0)])
    with pytest.raises(Refused, match="the model has no such module"):
        gather(nn.Sequential(net), [torch.ones(1, 2)], [sites[0].__class__("nowhere", (2, 2), ("w",))], lambda s, y: [])
    with pytest.raises(UsageError, match=r"expected a causal model with .logits"):
        token_losses(torch.ones(2), torch.ones(1, 2, dtype=torch.long))

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            y = self.a(x)
            x.add_(1)
            return y

    made = InPlace()
    with pytest.raises(Refused, match="changed in place"):
        gather(made, [torch.ones(1, 2)], from_model(made).sites, lambda s, y: [("loss", y.sum())])


@pytest.mark.parametrize("shape", [(2, 30, 40), (50, 4, 6), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squared_norms_of_products(shape, dtype) -> None:
    t, n, m = shape
    g = torch.Generator().manual_seed(0)
    x, delta = torch.randn(t, n, generator=g).to(dtype), torch.randn(t, m, generator=g).to(dtype)
    assert outer_square(x, delta) == pytest.approx(float((delta.double().T @ x.double()).square().sum()), rel=1e-5)
