"""Gradient spectra and Fisher traces against autograd and exact expectations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from eckart.data import Batch, batches
from eckart.measures import grad_spectra as grad_file
from eckart.measures.fisher_trace import MEASURE as FISHER
from eckart.measures.grad_spectra import MEASURE as SPECTRA
from tests.measures.text_models import CAUSAL, make, model_view, texts

LONG = [t for t in texts() if len(t) > 1]


def of(measure, view):
    return {r.module: r for r in measure.compute(view)}


def gradients(model, ids, weights=None):
    """Per text, the gradient of the mean loss by each weight (out, in)."""
    model = model.eval()
    out = []
    for i, row in enumerate(ids):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none")
        w = torch.ones_like(losses) if weights is None else weights[i].to(losses)
        ((losses * w).sum() / w.sum()).backward()
        out.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    return out


def _nuclear(gradient):
    return np.linalg.svd(gradient.numpy(), compute_uv=False).sum()


@pytest.mark.parametrize("kind", CAUSAL)
def test_spectra_are_those_of_the_gradients_of_single_texts(kind) -> None:
    model = make(kind)
    found = of(SPECTRA, model_view(model, texts()))
    grads = gradients(model, LONG)
    names = [k for k in found if k]
    parts = ("q_proj", "k_proj", "v_proj", "o_proj") if kind == "llama" else ("c_attn", "c_proj")
    assert {n.rpartition(".")[2] for n in names} == set(parts)
    assert all("mlp" not in n for n in names)
    for name in names:
        s = [np.linalg.svd(g[f"{name}.weight"].numpy(), compute_uv=False) for g in grads]
        if kind == "llama" and name.endswith(
            ("q_proj", "k_proj")
        ):  # the text of two tokens has one position to look at: no gradient but rounding
            assert sum(v.sum() < 1e-5 for v in s) == 1
            s = [v for v in s if v.sum() > 1e-5]
        nuclear = np.array([v.sum() for v in s])
        rank = np.array([math.exp(-sum(p * math.log(p) for p in v / v.sum() if p > 1e-14)) for v in s])
        assert found[name].value["nuclear_norm"] == pytest.approx(nuclear.mean(), rel=1e-4)
        assert found[name].value["effective_rank"] == pytest.approx(rank.mean(), rel=1e-4)
        assert found[name].uncertainty["effective_rank"] == pytest.approx(rank.std(ddof=1) / math.sqrt(len(s)), rel=1e-3)
        assert found[name].settings["texts"] == len(s)
    whole = np.mean([np.mean([v for name in names if (v := _nuclear(g[f"{name}.weight"])) > 1e-5]) for g in grads])
    assert found[""].value["nuclear_norm"] == pytest.approx(whole, rel=1e-4)
    assert found[""].value["tokens"] == pytest.approx(np.mean([len(t) - 1 for t in LONG]))


def test_token_weights_leave_the_prompt_out_of_the_loss() -> None:
    model, ids = make("llama"), [t for t in LONG if len(t) > 4]
    rows = [
        Batch(torch.tensor([t]), torch.ones(1, len(t), dtype=torch.long), torch.tensor([[0.0] * 3 + [1.0] * (len(t) - 3)])) for t in ids
    ]
    found = of(SPECTRA, model_view(model, ids, rows=rows))
    grads = gradients(model, ids, [torch.tensor([0.0] * 2 + [1.0] * (len(t) - 3)) for t in ids])
    name = "model.layers.0.self_attn.v_proj"
    expected = np.mean([np.linalg.svd(g[f"{name}.weight"].numpy(), compute_uv=False).sum() for g in grads])
    assert found[name].value["nuclear_norm"] == pytest.approx(expected, rel=1e-4)


def test_rank_of_a_gradient_is_at_most_the_number_of_predicted_tokens() -> None:
    found = of(SPECTRA, model_view(make("llama"), [[5, 7], [3, 9]]))
    assert found["model.layers.1.self_attn.o_proj"].value["effective_rank"] == pytest.approx(1.0)


def test_layers_without_a_gradient_say_why() -> None:
    found = of(
        SPECTRA, model_view(make("llama"), [[5, 5, 5, 5]])
    )  # equal tokens, equal values: no query or key can change the attention's result
    assert found["model.layers.0.self_attn.q_proj"].value is None or found["model.layers.0.self_attn.q_proj"].value["nuclear_norm"] < 1e-9
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    net.forward = lambda x: net[1](x) * 0 + (net[2](x) * 0 + net[0](x)).detach() * net[1](x).sum()
    view = model_view(net, [[0]], causal=False, rows=[torch.zeros(1, 2)], loss=lambda y, b: y.sum())
    notes = {k: r.note for k, r in of(SPECTRA, view).items()}
    assert notes["0"] == "no gradient reaches it"
    assert notes["1"] == "its gradient is zero in every text"


def test_a_number_of_texts_is_drawn(monkeypatch) -> None:
    monkeypatch.setattr(grad_file, "SAMPLES", 3)
    found = of(SPECTRA, model_view(make("llama"), LONG))
    assert found[""].settings["texts"] == 3


@pytest.mark.parametrize("measure", [SPECTRA, FISHER])
def test_models_without_loss_text_or_layers(measure) -> None:
    bert = of(measure, model_view(make("bert"), LONG, causal=False))
    if measure is SPECTRA:
        assert all("there is no loss" in r.note and not r.valid for r in bert.values())
    empty = of(measure, model_view(make("llama"), [], rows=[]))
    assert all(r.note == "there is no calibration text: the list of batches is empty" for r in empty.values())
    short = of(measure, model_view(make("llama"), [[1], [2]]))
    assert {r.note for r in short.values()} == {"no text has a token to predict"}
    none = of(measure, model_view(nn.Sequential(nn.Embedding(3, 2)), [[1]]))
    assert none[""].note == "the run holds no linear layer"
    headless = of(measure, model_view(make("bert"), LONG, causal=True))
    assert all("expected a causal model with .logits" in r.note for r in headless.values())


def test_a_loss_of_one_s_own_on_tensors() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    view = model_view(net, [[0]] * 6, causal=False, rows=[x[:4], x[4:]], loss=lambda y, batch: y.square().sum(1) + batch.sum())
    spectra, fisher = of(SPECTRA, view), of(FISHER, view)
    squares, nuclear = [], []
    for row in x:
        net.zero_grad()
        net(row[None]).square().sum().backward()
        g = net[0].weight.grad
        squares.append(float(g.square().sum()))
        nuclear.append(float(torch.linalg.svdvals(g).sum()))
    assert spectra["0"].value["nuclear_norm"] == pytest.approx(np.mean(nuclear))
    assert fisher["0"].value == {"empirical_trace": pytest.approx(np.mean(squares))}
    assert "no labels can be drawn" in fisher["0"].note
    assert set(spectra) == {"0", "2", ""}


# ---- Fisher


def test_empirical_trace_is_the_squared_gradient_per_token() -> None:
    model = make("llama")
    found = of(FISHER, model_view(model, texts()))
    grads = gradients(model, LONG)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        n = [len(t) - 1 for t in LONG]
        expected = np.mean([float((k * g[f"{name}.weight"]).square().sum()) / k for k, g in zip(n, grads, strict=True)])
        assert found[name].value["empirical_trace"] == pytest.approx(expected, rel=1e-4)
    total = sum(r.value["fisher_trace"] for k, r in found.items() if k)
    assert found[""].value["fisher_trace"] == pytest.approx(total)


def test_drawn_labels_estimate_the_exact_trace(monkeypatch) -> None:
    """Of one linear layer with softmax output: sum over tokens and labels of p(y) |grad log p(y)|^2, in closed form."""
    from types import SimpleNamespace

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)

        def forward(self, input_ids, attention_mask=None):
            return SimpleNamespace(logits=self.head(self.emb(input_ids)))

    model = Tiny().double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    row = [0, 1, 2, 3, 4, 5, 0, 3]
    monkeypatch.setattr("eckart.measures.fisher_trace.SAMPLES", 500)
    found = of(FISHER, model_view(model, [row], rows=batches([row] * 500, None, batch_size=64)))["head"]
    exact = 0.0
    for token in row[:-1]:
        x = model.emb.weight[token].detach()
        p = (model.head.weight.detach() @ x).softmax(0)
        for y in range(6):
            delta = p - nn.functional.one_hot(torch.tensor(y), 6)
            exact += float(p[y] * torch.outer(delta, x).square().sum()) / (len(row) - 1)
    assert abs(found.value["fisher_trace"] - exact) < 4 * found.uncertainty["fisher_trace"]
    assert found.uncertainty["fisher_trace"] < 0.1 * exact


def test_trace_of_an_encoder_is_that_of_its_jacobian() -> None:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=16
        )
        model = BertModel(config).double().eval()
    row = [3, 5, 7]
    view = model_view(model, [row], causal=False, rows=batches([row] * 150, None, batch_size=50))
    from eckart.measures import fisher_trace as file

    old, file.SAMPLES = file.SAMPLES, 150
    try:
        found = of(FISHER, view)["encoder.layer.0.output.dense"]
    finally:
        file.SAMPLES = old
    weight = model.encoder.layer[0].output.dense.weight

    def embed(w):
        out = torch.func.functional_call(model, {"encoder.layer.0.output.dense.weight": w}, kwargs={"input_ids": torch.tensor([row])})
        return nn.functional.normalize(out.last_hidden_state.mean(1), dim=1)[0]

    exact = float(torch.autograd.functional.jacobian(embed, weight.detach()).square().sum())
    assert abs(found.value["fisher_trace"] - exact) < 4 * found.uncertainty["fisher_trace"]
    assert list(found.value) == ["fisher_trace"]


def test_seeds_decide_and_the_global_generator_is_left_alone() -> None:
    model = make("llama")
    state = torch.random.get_rng_state()
    one, two, three = (of(FISHER, model_view(model, LONG, seed=s))[""].value["fisher_trace"] for s in (0, 0, 1))
    assert one == two != three
    assert torch.equal(torch.random.get_rng_state(), state)


def test_float16_is_warned_of() -> None:
    net = nn.Sequential(nn.Linear(3, 2)).half()
    view = model_view(net, [[0]], causal=False, rows=[torch.ones(1, 3).half()], loss=lambda y, b: y.float().sum())
    assert "float16" in of(SPECTRA, view)["0"].note


def test_the_example_compares_two_sets_of_equal_length(capsys) -> None:
    import runpy
    from pathlib import Path

    found = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "gradient_spectra.py"))["main"](pairs=4, lines=5)
    assert found["tokens"]["one"] == pytest.approx(found["tokens"]["two"], rel=0.1)
    assert 1 < found["effective_rank"]["one"] < found["tokens"]["one"] + 1
    assert "effective_rank" in capsys.readouterr().out
