"""One block in memory at a time gives the sums of the whole model, whatever the architecture; what is no chain of blocks says why."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.axes.protocols import Stat
from eckart.axes.target import Linears
from eckart.data import batches, load_texts
from eckart.errors import Refused, UsageError
from eckart.runners import blocks
from eckart.runners.materialise import Weights
from eckart.runners.predict import predict, sums_of
from eckart.runners.walk import Unwalkable
from eckart.stats import Stats, Tree, collect
from eckart.stats.moments import Moments
from eckart.verbs.host import FolderHost, ModuleHost
from tests.runners import chains
from tests.runners.chains import LAYERS, make, opened, rows

NEEDS = {Stat("moments"), Stat("moments", at="out"), Stat("absmean")}
SHAPES = ("llama", "llama-tied", "qwen2", "mistral", "gpt-neox", "gpt2", "bert", "mixtral")


def assert_equal(found: Stats, expected: Stats, tolerance: float = 1e-5) -> None:
    """Relative to the largest entry of each sum."""
    assert found.fingerprint == expected.fingerprint
    assert set(found.values) == set(expected.values)
    for key, want in expected.values.items():
        have = found.values[key]
        if isinstance(want, Moments):
            assert isinstance(have, Moments)
            assert have.count == want.count
            pairs = [(have.gram, want.gram), (have.total, want.total)]
        else:
            assert not isinstance(have, Moments)
            pairs = [(have[1], want[1])]
        for a, b in pairs:
            assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), key


@pytest.mark.parametrize("kind", SHAPES)
def test_the_sums_are_those_of_the_whole_model(kind, tmp_path) -> None:
    given = rows()
    host, sites, chain = opened(make(kind, tmp_path), given)
    assert all(t.is_meta for t in chain.model.parameters())
    found = blocks.collect(chain, given, NEEDS, sites, model_id="x", memory=1 << 14, folder=tmp_path)
    assert_equal(found, collect(host.live(), given, NEEDS, sites, model_id="x"))
    assert all(t.is_meta for t in chain.model.parameters()), "weights are given back"


@pytest.mark.parametrize("name", ["python-lm", "minilm"])
def test_on_real_models(name, lm_folder) -> None:
    host = FolderHost(chains.real(name))
    texts = [t[:500] for t in load_texts(lm_folder / "calibration.jsonl")[:6]]
    given = list(batches(texts, host.tokenizer(), max_length=64, batch_size=2))
    sites = list(Linears().sites(host.catalogue)[0])
    found = blocks.collect(host.chain(given[0]), given, {Stat("moments")}, sites, model_id="x")
    assert_equal(found, collect(host.live(), given, {Stat("moments")}, sites, model_id="x"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_half_precision_and_sites_outside_of_the_blocks(kind, tmp_path) -> None:
    given = rows()
    host = FolderHost(make(kind, tmp_path, torch.bfloat16, tie_word_embeddings=False))
    sites = [s for s in host.catalogue.sites if s.kind == "linear"]
    assert any(s.block < 0 for s in sites), "the head"
    found = blocks.collect(host.chain(given[0]), given, {Stat("moments")}, sites, model_id="x")
    assert_equal(found, collect(host.live(), given, {Stat("moments")}, sites, model_id="x"))


def test_experts_block_influence_and_rows_of_the_embedding(tmp_path) -> None:
    given = rows()
    host = FolderHost(make("mixtral", tmp_path))
    for stat, kind in (
        (Stat("experts", at="block"), "experts"),
        (Stat("influence", at="block"), "linear"),
        (Stat("frequency"), "embedding"),
    ):
        sites = [s for s in host.catalogue.sites if s.kind == kind]
        assert sites
        found = blocks.collect(host.chain(given[0]), given, {stat}, sites, model_id="x")
        assert_equal(found, collect(host.live(), given, {stat}, sites, model_id="x"))


def test_steps_come_in_order_and_leave_nothing_behind(tmp_path) -> None:
    given = rows()
    _, sites, chain = opened(make("llama", tmp_path), given)
    seen: list[int] = []
    before: list[weakref.ref[torch.Tensor]] = []
    for step in blocks.sweep(chain, given, {Stat("moments")}, sites, model_id="x"):
        gc.collect()
        assert all(r() is None for r in before), "the sums of a block are gone when the next one comes"
        assert {s.block for s in step.sites} == {step.block}
        assert step.stats is not None
        assert all(step.stats.has(Stat("moments"), s) for s in step.sites)
        assert all(p.is_meta for p in chain.model.parameters()), "no weight lies in memory while a step is held"
        before = [weakref.ref(v.gram) for v in step.stats.values.values() if isinstance(v, Moments)]
        seen.append(step.block)
    assert seen == list(range(LAYERS))


def test_no_more_than_one_block_is_loaded(tmp_path, monkeypatch) -> None:
    given = rows()
    _, sites, chain = opened(make("llama", tmp_path), given)
    loaded: list[set[str]] = []
    original = Weights._read

    def read(self: Weights, lead: str) -> torch.Tensor:
        value = original(self, lead)
        loaded.append({n for n, p in self.model.named_parameters() if not p.is_meta} | {lead})
        return value

    monkeypatch.setattr(Weights, "_read", read)
    blocks.collect(chain, given, {Stat("moments")}, sites, model_id="x")
    assert loaded
    for names in loaded:
        assert len({n.split(".")[2] for n in names if n.startswith("model.layers.")}) <= 1
    assert not any("lm_head" in n for names in loaded for n in names), "what is not needed is not read"


def test_skipped_blocks_are_run_and_not_measured(tmp_path) -> None:
    given = rows()
    host, sites, chain = opened(make("llama", tmp_path), given)
    steps = {}
    for step in blocks.sweep(chain, given, {Stat("moments")}, sites, model_id="x", skip={0, 2}):
        assert step.stats is not None
        steps[step.block] = dict(step.stats.values)
    assert list(steps) == [1]
    whole = collect(host.live(), given, {Stat("moments")}, sites, model_id="x").values
    for key, value in steps[1].items():
        assert torch.equal(value.gram, whole[key].gram)


def test_blocks_that_are_solved_together_are_one_step(tmp_path) -> None:
    given = rows()
    host, sites, chain = opened(make("llama", tmp_path), given)
    steps = {}
    for step in blocks.sweep(chain, given, {Stat("moments")}, sites, model_id="x", spans=[range(1, 3)]):
        assert step.stats is not None
        steps[step.block] = ({s.block for s in step.sites}, dict(step.stats.values))
    assert {k: v[0] for k, v in steps.items()} == {0: {0}, 2: {1, 2}}
    whole = collect(host.live(), given, {Stat("moments")}, sites, model_id="x").values
    both = steps[0][1] | steps[2][1]
    assert both.keys() == whole.keys()
    assert all(torch.equal(both[k].gram, whole[k].gram) for k in whole)


@pytest.mark.parametrize(("kind", "reason"), [("albert", "not called once each"), ("t5", "2 stacks of blocks")])
def test_what_is_no_chain_says_why(kind, reason, tmp_path) -> None:
    host = FolderHost(make(kind, tmp_path))
    with pytest.raises(Unwalkable, match=reason):
        host.chain(rows()[0])


def test_a_module_in_memory_has_no_chain() -> None:
    with pytest.raises(Unwalkable, match="in memory already"):
        ModuleHost(torch.nn.Sequential(torch.nn.Linear(2, 2)), example=torch.ones(1, 2)).chain(torch.ones(1, 2))


class Mixed(torch.nn.Module):
    """Two blocks, and something between or beside them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](x)
        if self.how == "skip":  # the second block's input is not the first one's output
            return self.layers[1](first + x)
        second = self.layers[1](first)
        return second + first if self.how == "tail" else second


def chain_of(model: torch.nn.Module, example: torch.Tensor) -> blocks.Chain:
    from eckart.store.memory import Memory

    reader: Any = Memory(model.state_dict())
    return blocks.chain(Weights(model.to("meta"), reader), [f"layers.{i}" for i in range(2)], example)


def test_inputs_between_and_behind_blocks_are_watched() -> None:
    example = torch.ones(3, 4)
    chain_of(Mixed("plain"), example)
    with pytest.raises(Unwalkable, match="changed or read before the next block"):
        chain_of(Mixed("skip"), example)
    assert "more than the output of the last one" in chain_of(Mixed("tail"), example).walk.tail


def test_refusals(tmp_path) -> None:
    given = rows()
    host, sites, chain = opened(make("llama", tmp_path), given)
    with pytest.raises(UsageError, match="gradients run through the whole model"):
        list(blocks.sweep(chain, given, {Stat("fisher", at="weight", via="backward")}, sites, model_id="x"))
    with pytest.raises(UsageError, match="cut one after the other"):
        blocks.collect(chain, given, {Stat("moments", inputs="propagated")}, sites, model_id="x")
    with pytest.raises(Refused, match="at least one calibration batch"):
        list(blocks.sweep(chain, [], {Stat("moments")}, sites, model_id="x"))
    file = next(Path(tmp_path).glob("*.safetensors"))
    file.write_bytes(file.read_bytes())
    with pytest.raises(Refused, match="changed"):
        blocks.collect(chain, given, {Stat("moments")}, sites, model_id="x")
    assert all(p.is_meta for p in chain.model.parameters())
    assert host.path == tmp_path


def test_an_activation_that_is_not_finite_is_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    make("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    given = rows()
    _, sites, chain = opened(tmp_path, given)
    with pytest.raises(Refused, match="layers.2"):
        blocks.collect(chain, given, {Stat("moments")}, sites, model_id="x")


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 6, 7, 8, 13])
def test_sums_are_counted_as_the_tree_holds_them(leaves) -> None:
    """Against a real tree over values that are counted while they live."""
    alive = most = 0

    class Value:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    tree = Tree[Value](lambda a, b: Value())
    held = 0
    for leaf in range(leaves):
        held = max(held, alive)
        tree = tree.add(leaf, Value())
    before, adding, ending = sums_of([100], leaves)
    assert before == 100 * held
    assert adding == 100 * most
    assert ending >= 100 * (alive + 1)


def test_the_prediction_counts_weights_activations_and_sums(tmp_path) -> None:
    given = rows(lengths=(20, 20, 20, 20), size=2)
    _, sites, chain = opened(make("llama", tmp_path), given)
    peak = predict(chain, given, {Stat("moments")}, sites, memory=0)
    params = sum(p.numel() for p in chain.model.get_submodule("model.layers.1").parameters())
    grams = sum(8 * (n * n + n + 1) for n in (32, 32, 32, 48))  # q/k/v share one; o; gate/up share one; down
    assert peak.weights == 4 * params
    assert peak.statistics >= 2 * grams
    assert peak.spooled > 0
    assert peak.step == grams
    both = predict(chain, given, {Stat("moments")}, sites, memory=0, spans=[range(3)])
    assert both.step == 3 * grams
    ahead = predict(chain, given, {Stat("moments", inputs="propagated")}, sites, memory=0, spans=[range(3)])
    assert ahead.weights == 3 * 4 * params
    assert ahead.step == 3 * grams + 3 * 4 * params


def test_a_block_shared_input_is_measured_once(tmp_path) -> None:
    """q, k and v read one tensor: one Gram, under each of their names."""
    given = rows()
    _, sites, chain = opened(make("qwen2", tmp_path), given)
    found = blocks.collect(chain, given, {Stat("moments")}, sites, model_id="x")
    assert len(found.values) == 4 * LAYERS < len(sites) == 7 * LAYERS
    q, k = (next(s for s in sites if s.name.endswith(n)) for n in ("0.self_attn.q_proj", "0.self_attn.k_proj"))
    assert torch.equal(found.get(Stat("moments"), q).gram, found.get(Stat("moments"), k).gram)
