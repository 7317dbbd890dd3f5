"""Everything that PEFT and transformers do with an adapter, on ours: many adapters, switching, deleting, loading, half precision, quantised bases."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import eckart as ek
from eckart.hub.peft.config import EckartConfig
from eckart.hub.peft.glue import adapter_layers
from eckart.hub.peft.layer import EckartLayer


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("recipe", ["pissa", "soma"])
def test_real_architectures(kind, recipe, tiny, logits, shake, tmp_path) -> None:
    before = logits(tiny(kind))
    model = ek.adapt(tiny(kind), recipe, rank=4)
    assert torch.equal(logits(model), before)
    after = logits(shake(model))
    assert not torch.allclose(after, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert torch.equal(logits(again), after)
    assert torch.allclose(logits(again.merge_and_unload()), after, atol=1e-4)


def test_fused_attention_is_split_and_fused_again(tiny, logits, shake) -> None:
    model = ek.adapt(tiny("gpt2"), "soma", rank=4)
    config = model.peft_config["default"]
    fused = [n for n in config.ranks if "c_attn" in n]
    assert fused == [f"transformer.h.{i}.attn.c_attn[{p}]" for i in range(2) for p in "qkv"]
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    weight = layer.base_layer.weight.detach().T.double()  # Conv1D stores (in, out)
    for i, branch in enumerate(layer.branch("default").layers().values()):
        u, s, vh = torch.linalg.svd(weight[32 * i : 32 * (i + 1)], full_matrices=False)
        assert torch.allclose(branch.gain_matrix().double(), (u[:, -4:] * s[-4:]) @ vh[-4:], atol=1e-5)
    after = logits(shake(model))
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), after, atol=1e-4)
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


class TestSeveralAdapters:
    @pytest.fixture
    def two(self, tiny, logits, shake):
        """(model with adapters "default" and "two", logits of the base, of each)."""
        base = logits(tiny("llama"))
        model = ek.adapt(tiny("llama"), "pissa", rank=4)
        one = logits(shake(model))
        assert ek.adapt(model, "kasa", rank=3, adapter_name="two", target=["q_proj", "down_proj"]) is model
        two = logits(shake(model, 1))
        return model, base, one, two

    def test_switching_and_disabling(self, two, logits) -> None:
        model, base, one, second = two
        model.set_adapter("default")
        assert torch.equal(logits(model), one)
        model.set_adapter("two")
        assert torch.equal(logits(model), second)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)

    def test_both_at_once_add_up(self, two, logits, tiny) -> None:
        model, *_ = two
        model.base_model.set_adapter(["default", "two"])
        plain = tiny("llama")
        with torch.no_grad():
            for name, layer in model.base_model.model.named_modules():
                if isinstance(layer, EckartLayer):
                    for adapter in ("default", "two"):
                        if adapter in layer.eckart_branch:
                            plain.get_submodule(name).weight.add_(layer.branch(adapter).delta_matrix())
        assert torch.allclose(logits(model), logits(plain), atol=1e-4)
        both = logits(model)
        model.merge_adapter()
        assert torch.allclose(logits(model), both, atol=1e-4)
        model.unmerge_adapter()
        assert torch.allclose(logits(model), both, atol=1e-4)

    def test_saving_each_and_loading_in_the_other_order(self, two, logits, tiny, tmp_path) -> None:
        model, _, one, second = two
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "two", adapter_name="two")
        assert torch.equal(logits(again), second)
        again.load_adapter(tmp_path, "default")
        again.set_adapter("default")
        assert torch.equal(logits(again), one)

    def test_deleting(self, two, logits, tiny) -> None:
        model, base, _, second = two
        model.set_adapter("two")
        model.delete_adapter("default")
        assert torch.equal(logits(model), second)
        assert not any(".default." in k for k in model.state_dict())
        assert torch.equal(logits(model.unload()), base)

    def test_only_the_active_one_trains(self, two) -> None:
        model, *_ = two
        model.set_adapter("default")
        assert {k.split("eckart_branch.")[1].split(".")[0] for k, p in model.named_parameters() if p.requires_grad} == {"default"}

    def test_another_method_beside_is_refused(self, two) -> None:
        from peft import LoraConfig

        with pytest.raises(ValueError, match="different peft types"):
            two[0].add_adapter("third", LoraConfig(r=2, target_modules=["q_proj"]))


class TestMutate:
    """The papers' own way: the initial branch is taken out of the weight."""

    def test_weights_are_the_residual_and_outputs_the_same(self, tiny, logits) -> None:
        base = tiny("llama")
        before = logits(base)
        model = ek.adapt(base, "pissa", rank=4, base="mutate")
        layer = next(adapter_layers(model))
        original = tiny("llama").model.layers[0].self_attn.q_proj.weight
        assert torch.allclose(layer.base_layer.weight, original - layer.branch("default").gain_matrix(), atol=1e-6)
        assert torch.allclose(logits(model), before, atol=1e-4)

    def test_disabled_deleted_unloaded_and_beside_another_it_is_the_base(self, tiny, logits, shake) -> None:
        before = logits(tiny("llama"))
        model = shake(ek.adapt(tiny("llama"), "pissa", rank=4, base="mutate"))
        one = logits(model)
        with model.disable_adapter():
            assert torch.allclose(logits(model), before, atol=1e-4)
        ek.adapt(model, "svfit", rank=4, adapter_name="two")
        assert torch.allclose(logits(model), before, atol=1e-4)
        # the second adapter is made of the original weight, not of the residual
        fresh = ek.adapt(tiny("llama"), "svfit", rank=4)
        mine, theirs = next(adapter_layers(model)).branch("two"), next(adapter_layers(fresh)).branch("default")
        assert torch.allclose(mine.left.abs(), theirs.left.abs(), atol=1e-2)
        model.set_adapter("default")
        assert torch.allclose(logits(model), one, atol=1e-4)
        model.set_adapter("two")
        model.delete_adapter("default")
        assert torch.allclose(logits(model), before, atol=1e-4)
        assert torch.allclose(logits(model.unload()), before, atol=1e-4)

    def test_reload_is_exact_and_mutates_once(self, tiny, logits, shake, tmp_path) -> None:
        model = shake(ek.adapt(tiny("llama"), "pissa", rank=4, base="mutate"))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(logits(again), logits(model))
        assert torch.allclose(logits(again.merge_and_unload()), logits(model), atol=1e-4)


class TestTransformers:
    """transformers' own methods, without PeftModel."""

    def test_load_adapter_and_switch(self, tiny, logits, shake, tmp_path) -> None:
        model = shake(ek.adapt(tiny("llama"), "sorsa", rank=4))
        want = logits(model)
        model.save_pretrained(tmp_path)
        plain = tiny("llama")
        before = logits(plain)
        plain.load_adapter(str(tmp_path))
        assert torch.equal(logits(plain), want)
        plain.disable_adapters()
        assert torch.equal(logits(plain), before)
        plain.enable_adapters()
        plain.save_pretrained(tmp_path / "saved")
        again = tiny("llama")
        again.load_adapter(str(tmp_path / "saved"))
        assert torch.equal(logits(again), want)

    def test_add_adapter(self, tiny, logits) -> None:
        model = tiny("llama")
        before = logits(model)
        model.add_adapter(EckartConfig(recipe="pissa", r=4, target_modules=["q_proj", "v_proj"]))
        assert torch.equal(logits(model), before)
        assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 2


class TestConfig:
    def test_it_holds_the_whole_recipe(self, tiny, tmp_path) -> None:
        model = get_peft_model(tiny("llama"), EckartConfig(recipe="corda", variant="kpm", r=4, settings=["metric.kind=identity"]))
        model.save_pretrained(tmp_path)
        data = json.loads((tmp_path / "adapter_config.json").read_text())
        assert data["recipe"]["filter"] == {"kind": "bottom"}
        assert data["recipe"]["metric"] == {"kind": "identity"}
        assert data["peft_type"] == "ECKART"
        found = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(found, EckartConfig)
        assert found.value == model.peft_config["default"].value
        assert found.ranks == model.peft_config["default"].ranks

    @pytest.mark.parametrize("target", ["all-linear", r".*\.(q|v)_proj", ["q_proj", "v_proj"], None])
    def test_targets_as_in_peft(self, tiny, target) -> None:
        model = get_peft_model(tiny("llama"), EckartConfig(recipe="pissa", r=2, target_modules=target))
        found = {n.rpartition(".")[2] for n in model.peft_config["default"].ranks}
        assert found == (
            {"q_proj", "v_proj"} if target and target != "all-linear" else {f"{n}_proj" for n in ["q", "k", "v", "o", "gate", "up", "down"]}
        )
        second = EckartConfig(recipe="pissa", r=2, target_modules=target)
        model.add_adapter("two", second)
        assert second.ranks == model.peft_config["default"].ranks

    def test_exclude_layers_and_patterns(self, tiny) -> None:
        config = EckartConfig(recipe="pissa", r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[1])
        get_peft_model(tiny("llama"), config)
        assert list(config.ranks) == ["model.layers.1.self_attn.q_proj"]
        config = EckartConfig(recipe="pissa", r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.*q_proj": 2})
        get_peft_model(tiny("llama"), config)
        assert sorted(config.ranks.values()) == [2, 4, 4, 4]

    def test_one_config_for_two_models(self, tiny, logits) -> None:
        config = EckartConfig(recipe="pissa", r=4, target_modules=["q_proj"])
        one, two = (get_peft_model(tiny("llama"), config) for _ in range(2))
        assert torch.equal(logits(one), logits(two))

    def test_modules_to_save(self, tiny, logits, tmp_path) -> None:
        model = ek.adapt(tiny("bert"), "pissa", rank=2, modules_to_save=["pooler"])
        with torch.no_grad():
            for k, p in model.named_parameters():
                if "pooler.modules_to_save" in k:
                    p.add_(0.1)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny("bert"), tmp_path)
        assert torch.equal(logits(again), logits(model))

    def test_inject_without_a_wrapper(self, tiny, logits) -> None:
        before = logits(tiny("llama"))
        model = inject_adapter_in_model(EckartConfig(recipe="pissa", r=4, target_modules=["q_proj"]), tiny("llama"))
        assert torch.equal(logits(model), before)
        assert any(isinstance(m, EckartLayer) for m in model.modules())


def test_half_precision_base_begins_bit_equal_and_branches_stay_float32(tiny, logits, shake, tmp_path) -> None:
    base = logits(tiny("llama").bfloat16())
    model = ek.adapt(tiny("llama").bfloat16(), "pissa", rank=4)
    assert torch.equal(logits(model), base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = logits(shake(model))
    model.save_pretrained(tmp_path)
    for lazily in (False, True):
        again = PeftModel.from_pretrained(tiny("llama").bfloat16(), tmp_path, low_cpu_mem_usage=lazily)
        assert torch.equal(logits(again), after)
        assert {p.dtype for n, p in again.named_parameters() if "eckart_branch" in n} == {torch.float32}
    # and the adapter fits the same model in another precision
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path)), after.float(), atol=0.3)


def test_over_a_quantised_base(tiny, logits, shake, tmp_path) -> None:
    quantisation = pytest.importorskip("torchao.quantization")

    def make():
        model = tiny("llama")
        quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
        return model

    before = logits(make())
    model = ek.adapt(make(), "pissa", rank=4)
    assert torch.equal(logits(model), before)
    weight = make().model.layers[0].self_attn.q_proj.weight.dequantize().double()
    u, s, vh = torch.linalg.svd(weight)
    branch = next(adapter_layers(model)).branch("default")
    assert torch.allclose(branch.gain_matrix().double(), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-4)
    after = logits(shake(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), after)
    assert torch.equal(logits(model.unload()), before)


def test_gradient_checkpointing_gives_the_same_gradients(tiny, ids) -> None:
    found = []
    for checkpointing in (False, True):
        model = ek.adapt(tiny("llama"), "pissa", rank=4)
        model.train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable()
            model.base_model.model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(found[0][k], found[1][k], atol=1e-6) for k in found[0])


def test_copies_are_independent(tiny, logits, shake) -> None:
    model = ek.adapt(tiny("llama"), "pissa", rank=4)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    shake(twin)
    assert torch.equal(logits(model), before)


def test_convolutions_and_embeddings(logits, shake, tiny, tmp_path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.embed = nn.Embedding(11, 6)
                self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2)
                self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.conv(self.embed(x).movedim(-1, 1)).movedim(1, -1))

    x = torch.tensor([[1, 2, 3, 4], [10, 0, 5, 5]])
    model = ek.adapt(Net(), "pissa", rank=2, target=["embed", "conv", "head"])
    with torch.no_grad():
        assert torch.equal(model(x), Net().requires_grad_(False)(x))  # torch adds in another order for weights that want gradients
        want = shake(model)(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), want)
        assert torch.allclose(model.merge_and_unload()(x), want, atol=1e-5)


def test_generation_and_the_shipped_model(lm_folder, tmp_path) -> None:
    base = ek.load(lm_folder)
    tokenizer = ek.load_tokenizer(lm_folder)
    ids = tokenizer("def read_file(path):\n", return_tensors="pt").input_ids
    before = base.generate(ids, max_new_tokens=8, do_sample=False)
    model = ek.adapt(base, "pissa", rank=8)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), before)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.1)
        want = model(ids).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(ek.load(lm_folder), tmp_path)(ids).logits, want)
