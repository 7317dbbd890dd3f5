"""Row frequencies, block influence and experts against sums over the tensors themselves."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from eckart.axes.protocols import Stat
from eckart.catalogue import from_model
from eckart.data.batches import Batch
from eckart.errors import Refused
from eckart.stats import collect

FREQUENCY, INFLUENCE, EXPERTS = Stat("frequency"), Stat("influence", at="block"), Stat("experts", at="block")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "num_key_value_heads": 1,
}


def build(cls, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config).eval()


def padded():
    ids = torch.randint(3, 30, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    ids[1, 4:] = 0
    return Batch(ids, mask)


def test_rows_are_counted_without_padding() -> None:
    model = build(LlamaForCausalLM, LlamaConfig(**SMALL))
    batch = padded()
    sites = from_model(model).sites
    found = collect(model, [batch], {FREQUENCY, Stat("moments")}, [s for s in sites if s.kind in ("embedding", "linear")])
    counts = torch.bincount(batch.input_ids[batch.attention_mask == 1], minlength=30).double()
    table = next(s for s in sites if s.kind == "embedding")
    assert torch.allclose(found.get(FREQUENCY, table), counts / counts.sum())
    assert found.count(table, FREQUENCY) == counts.sum()
    assert found.get(Stat("moments"), next(s for s in sites if s.name.endswith("q_proj"))).gram.shape == (16, 16)


def test_a_table_of_a_plain_module_with_several_fields() -> None:
    class Fields(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Embedding(5, 4), nn.Embedding(3, 4), nn.Linear(8, 1)

        def forward(self, x):
            return self.out(torch.cat([self.a(x[:, 0]), self.b(x[:, 1])], dim=1))

    model = Fields()
    x = torch.tensor([[0, 1], [4, 1], [4, 2]])
    sites = from_model(model).sites
    found = collect(model, [x], {FREQUENCY}, sites)
    assert torch.allclose(found.get(FREQUENCY, sites[0]), torch.tensor([1, 0, 0, 0, 2.0]).double() / 3)
    assert torch.allclose(found.get(FREQUENCY, sites[1]), torch.tensor([0, 2, 1.0]).double() / 3)


def test_influence_is_one_minus_the_mean_cosine() -> None:
    model = build(LlamaForCausalLM, LlamaConfig(**SMALL))
    batch = padded()
    sites = [s for s in from_model(model).sites if s.block >= 0]
    found = collect(model, [batch], {INFLUENCE}, sites)
    with torch.no_grad():
        states = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
    seen = {}
    model.model.layers[1].register_forward_hook(lambda m, a, out: seen.update(out=out if isinstance(out, torch.Tensor) else out[0]))
    with torch.no_grad():
        model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    good = batch.attention_mask == 1
    for block, (x, y) in enumerate([(states[0], states[1]), (states[1], seen["out"])]):
        cosine = nn.functional.cosine_similarity(x[good].double(), y[good].double(), dim=-1)
        site = next(s for s in sites if s.block == block)
        assert float(found.get(INFLUENCE, site)[0]) == pytest.approx(float(1 - cosine.mean()), rel=1e-6)
    assert found.get(INFLUENCE, sites[0]) is found.get(INFLUENCE, sites[1])  # one sum per block


def test_experts_against_their_formula() -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    model = build(MixtralForCausalLM, config)
    batch = padded()
    sites = [s for s in from_model(model).sites if "mlp" in s.name and ".0." in s.name]
    found = collect(model, [batch], {EXPERTS}, sites)
    caught = {}
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, a: caught.update(x=a[0], chosen=a[1]))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        good = batch.attention_mask.flatten() == 1
        x = caught["x"][good]
        outputs = []
        for i in range(4):
            gate, up = (x @ experts.gate_up_proj[i].T).chunk(2, dim=-1)
            outputs.append((nn.functional.silu(gate) * up) @ experts.down_proj[i].T)
    unit = nn.functional.normalize(torch.stack(outputs).double(), dim=-1)
    cosines = torch.einsum("ith,jth->ij", unit, unit) / len(x)
    value = found.get(EXPERTS, next(s for s in sites if s.kind == "experts"))
    assert torch.allclose(value[:16].reshape(4, 4), cosines, atol=1e-6)
    routed = torch.bincount(caught["chosen"][good].flatten(), minlength=4).double() / len(x)
    assert torch.allclose(value[16:], routed)
    assert float(value[16:].sum()) == pytest.approx(2)


def test_statistics_are_saved_and_merged_like_the_others(tmp_path) -> None:
    from eckart.stats import Stats, accumulate

    model = build(LlamaForCausalLM, LlamaConfig(**SMALL))
    sites = [s for s in from_model(model).sites if s.block >= 0 or s.kind == "embedding"]
    batches = [padded(), Batch(torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.long))]
    needs = {INFLUENCE, FREQUENCY}
    whole = collect(model, batches, needs, sites)
    parts = accumulate(model, batches[:1], needs, sites).merge(accumulate(model, batches[1:], needs, sites, start=1)).finish()
    whole.save(tmp_path / "s.safetensors")
    read = Stats.load(tmp_path / "s.safetensors", whole.fingerprint)
    for site, stat in ((sites[0], FREQUENCY), (next(s for s in sites if s.block == 1), INFLUENCE)):
        assert torch.equal(whole.get(stat, site), parts.get(stat, site))
        assert torch.equal(whole.get(stat, site), read.get(stat, site))


def test_what_is_no_block_or_row_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 3))])

        def forward(self, x):
            return self.layers[0](x)

    sites = from_model(Odd()).sites
    with pytest.raises(Refused, match="output like its input"):
        collect(Odd(), [torch.ones(2, 4)], {INFLUENCE}, sites)
