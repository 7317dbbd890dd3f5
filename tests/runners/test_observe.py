"""The one pass: what observers see is what each text gives when it runs alone, and the model is left as it was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eckart.axes.protocols import Site
from eckart.data import Batch, batches
from eckart.errors import Refused, UsageError
from eckart.measures.base import OfText, Record
from eckart.runners.observe import observe
from tests.measures.text_models import KINDS, last, make, states, texts, view_of


class Spy:
    """Keeps everything it is shown."""

    def __init__(self, view: Any, wanted: list[tuple[str, str]]) -> None:
        self.view, self.wanted = view, wanted
        self.rows: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.lost: dict[tuple[str, str], str] = {}
        self.ends = 0

    def wants(self) -> Any:
        return self.wanted

    def see(self, module: str, side: str, x: torch.Tensor, text: torch.Tensor) -> None:
        self.rows.setdefault((module, side), []).append((x.clone(), text.clone()))

    def lose(self, module: str, side: str, why: str) -> None:
        assert (module, side) not in self.lost
        self.lost[module, side] = why

    def end_batch(self) -> None:
        self.ends += 1

    def records(self) -> list[Record]:
        return [Record(m, "spy", None, "") for m, _ in self.wanted]

    def of(self, module: str, side: str, text: int) -> torch.Tensor:
        return torch.cat([x[t == text] for x, t in self.rows[module, side]])


def spying(wanted: list[tuple[str, str]]) -> tuple[OfText, list[Spy]]:
    spies: list[Spy] = []

    def observer(view: Any) -> Spy:
        spies.append(Spy(view, wanted))
        return spies[-1]

    return OfText(name="spy", title="", paper="", estimator="", observer=observer), spies  # type: ignore[arg-type]


def watch(model: Any, rows: Any, wanted: list[tuple[str, str]], count: int = 8, **more: Any) -> Spy:
    measure, spies = spying(wanted)
    observe(model, rows, view_of(model, count, **more), [measure])
    return spies[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_rows_are_those_of_each_text_alone(kind, size) -> None:
    model, ids = make(kind), texts()
    view = view_of(model, len(ids))
    block, linear = view.catalogue.blocks[0], view.sites[0].name
    places = [(block, "in"), (block, "out"), (linear, "in"), (linear, "out"), ("", "out")]
    spy = watch(model, batches(ids, None, batch_size=size), places)
    assert spy.ends == -(-len(ids) // size)
    for module, side in places[:-1]:
        calls = states(model, ids, module, side)
        each = len(calls) // len(ids)
        for number in range(len(ids)):
            expected = torch.cat(calls[number * each : (number + 1) * each])
            assert torch.allclose(spy.of(module, side, number), expected, atol=1e-9), (module, side, number)
    for number, expected in enumerate(last(model, ids)):
        assert torch.allclose(spy.of("", "out", number), expected, atol=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(fails) -> None:
    model = make("llama")
    model.model.layers[0].eval()
    next(model.parameters()).requires_grad_(False)

    def mark() -> Any:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return [m.training for m in model.modules()], hooks, flags

    before, tensors = mark(), {k: t.clone() for k, t in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    rows = batches(texts(), None, batch_size=3)
    if fails:
        rows.append(Batch(torch.full((1, 2), 10**6), torch.ones(1, 2, dtype=torch.long)))
        with pytest.raises(IndexError):
            watch(model, rows, [("", "out")])
    else:
        watch(model, rows, [("model.layers.0", "in"), ("", "out")])
    assert mark() == before
    assert all(torch.equal(t, tensors[k]) for k, t in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_the_text_runs_once_whatever_the_number_of_measures() -> None:
    model = make("llama")
    view, calls = view_of(model, 8), []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    measures = [spying([("", "out"), (f"model.layers.{i % 2}", "out")])[0] for i in range(5)]
    found = observe(model, batches(texts(), None, batch_size=3), view, measures)
    assert len(calls) == 3
    assert len(found) == 10


def test_an_activation_that_is_not_finite_loses_its_place_and_no_other() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    spy = watch(model, [torch.eye(2), torch.ones(1, 2)], [("0", "out"), ("1", "out"), ("", "out")])
    assert spy.lost == {
        ("1", "out"): "2 of 4 activations are NaN or Inf in calibration batch 0",
        ("", "out"): "2 of 4 activations are NaN or Inf in calibration batch 0",
    }
    assert len(spy.rows["0", "out"]) == 2
    assert ("1", "out") not in spy.rows


def test_what_cannot_be_seen_is_lost_with_a_reason() -> None:
    model = make("bert")
    places = [("nowhere", "in"), ("embeddings.word_embeddings", "in"), ("embeddings.position_embeddings", "out"), ("pooler.dense", "in")]
    spy = watch(model, batches(texts(), None, batch_size=3), places)
    assert spy.lost["nowhere", "in"] == "the model has no such module"
    assert spy.lost["embeddings.word_embeddings", "in"] == "its input is a tensor of torch.int64, not of activations"
    assert "Collect with batch_size=1" in spy.lost["embeddings.position_embeddings", "out"]
    assert [t.tolist() for _, t in spy.rows["pooler.dense", "in"]] == [[0, 1, 2], [3, 4, 5], [6, 7]]  # one row per text, padding or not


def test_no_batches_and_modules_that_do_not_run() -> None:
    assert set(watch(make("bert"), [], [("", "out")]).lost.values()) == {"there is no calibration text: the list of batches is empty"}

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    assert watch(Half(), [torch.eye(2)], [("idle", "in")]).lost == {("idle", "in"): "no row of text passed this module"}


def test_tensors_tuples_mappings_and_sequences_of_vectors() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    x = torch.arange(12.0).reshape(2, 3, 2)
    for batch in (x, (x,)):
        spy = watch(model, [batch, batch], [("0", "in")])
        assert [t.tolist() for _, t in spy.rows["0", "in"]] == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
        assert torch.equal(spy.rows["0", "in"][0][0], x.reshape(6, 2))
    ids = batches(texts(), None, batch_size=3)
    as_mapping = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in ids]
    bert = make("bert")
    one, two = (watch(bert, rows, [("", "out")]) for rows in (ids, as_mapping))
    for (a, s), (b, t) in zip(one.rows["", "out"], two.rows["", "out"], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(s, t)
    with pytest.raises(UsageError, match="calibration batch 0: expected a Batch"):
        watch(model, ["text"], [("0", "in")])


def test_rows_that_are_not_texts_are_lost_unless_there_is_one_text() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.expert(x.reshape(-1, 2)[1:6])

    x = torch.arange(16.0).reshape(2, 4, 2)
    assert "cannot be told apart by the 2 texts" in watch(Routed(), [x], [("expert", "in")]).lost["expert", "in"]
    assert watch(Routed(), [x[:1]], [("expert", "in")]).rows["expert", "in"][0][1].tolist() == [0, 0, 0]


def test_token_weights_do_not_drop_rows() -> None:
    rows = batches([[1, 2, 3], [4]], None, batch_size=2)
    weighted = [Batch(b.input_ids, b.attention_mask, torch.tensor([[0.0, 1, 2], [1, 0, 0]])) for b in rows]
    spy = watch(make("bert"), weighted, [("", "out")])
    assert spy.rows["", "out"][0][1].tolist() == [0, 0, 0, 1]


def test_weights_are_read_from_the_model_and_begin_of_sequence_tokens_are_counted() -> None:
    model = make("gpt2")
    ids = [b.input_ids for b in batches(texts(), None, batch_size=3)]
    rows = [Batch(i, torch.ones_like(i), bos=True) for i in ids]
    spy = watch(model, rows, [("", "out")])
    assert spy.view.specials == (1, 0)
    site = next(s for s in spy.view.sites if s.name.endswith("mlp.c_fc"))
    assert site.view == "transposed"
    assert torch.equal(spy.view.read(site), model.get_submodule(site.name).weight.T)
    with pytest.raises(Refused, match="has no tensor 'nowhere.weight'"):
        spy.view.read(Site("nowhere", (2, 2), ("nowhere.weight",)))
    assert watch(model, [*rows, Batch(ids[0], torch.ones_like(ids[0]))], [("", "out")]).view.specials == (0, 0)


def test_in_half_precision_and_under_inference_mode() -> None:
    model = make("llama").to(torch.bfloat16)
    view, (measure, spies) = view_of(model, 8), spying([("", "out")])
    with torch.inference_mode():
        observe(model, batches(texts(), None, batch_size=3), view, [measure])
    assert spies[0].rows["", "out"][0][0].dtype == torch.bfloat16
    assert not spies[0].lost
