"""Factors in int8 and int4: integers and scales by hand, torchao beside them, bytes as counted, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import eckart as ek
from eckart.axes import allocate
from eckart.errors import Refused, UsageError
from eckart.hub.attach import attach, dequantize
from eckart.hub.config import EckartConfig
from eckart.nn import LowRankLinear
from eckart.nn.quantised import QuantisedLinear, encode, pack, quantised_layers, unpack

IDS = torch.arange(3, 35)[None]
G = torch.Generator().manual_seed(0)
SMALL = {"vocab_size": 96, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Sizes that int4 takes; biases, grouped queries and tied embeddings among it."""
    folder = tmp_path_factory.mktemp("q") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                **SMALL, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                attention_bias=True, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return folder


def by_hand(tensors, name) -> np.ndarray:
    """The matrix in float64, from the file's bytes alone."""
    q, scale = tensors[f"{name}.qdata"], tensors[f"{name}.scale"].astype(np.float64)
    if q.dtype == np.uint8:
        low, high = q.astype(int) % 16, q.astype(int) // 16
        q = np.stack([np.where(x > 7, x - 16, x) for x in (low, high)], axis=2).reshape(len(q), -1)
    return q * np.repeat(scale, q.shape[1] // scale.shape[1], axis=1)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)[0]


def test_every_pair_of_numbers_survives_packing() -> None:
    both = torch.tensor([[a, b] for a in range(-8, 8) for b in range(-8, 8)], dtype=torch.int8)
    stored = pack(both)
    assert stored.dtype == torch.uint8
    assert stored.flatten().tolist() == [a % 16 + 16 * (b % 16) for a, b in both.tolist()]
    assert torch.equal(unpack(stored), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_integers_are_nearest_under_a_scale_per_row_or_group(bits, dtype) -> None:
    w = torch.randn(24, 96, generator=G).to(dtype)
    w[3] = 0
    stored = encode(w, bits)
    scale = stored["scale"].double().numpy()
    assert stored["scale"].dtype == dtype
    assert scale.shape == ((24, 1) if bits == "int8" else (24, 3))
    groups = w.double().numpy().reshape(24, scale.shape[1], -1)
    top, most = {"int8": (127.5, 127), "int4": (7.5, 7)}[bits]
    largest = np.abs(groups).max(axis=2)
    assert np.allclose(scale, largest / top, rtol=1e-2, atol=torch.finfo(dtype).eps)  # a group of zeros gets the least scale
    value = by_hand({"x.qdata": stored["qdata"].numpy(), "x.scale": stored["scale"].float().numpy()}, "x").reshape(groups.shape)
    slack = 1e-6 if dtype == torch.float32 else 8 * 2**-7  # torchao divides in the type of the matrix; quotients are at most 8 in int4
    bound = scale[:, :, None] * (0.5 + slack) + np.maximum(0, np.abs(groups) - most * scale[:, :, None])  # half a step, and what is clipped
    assert (np.abs(value - groups) <= bound * (1 + (0 if dtype == torch.float32 else 2**-7))).all()
    assert (value[3] == 0).all()


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
def test_a_single_row_or_column(shape) -> None:
    w = torch.randn(shape, generator=G)
    layer = QuantisedLinear.from_stored(encode(w, "int8"), "int8")
    top = w.abs().amax(1, keepdim=True)
    assert (torch.abs(layer.dense_weight() - w) <= top / 127.5 * 0.51).all()
    x = torch.randn(3, shape[1], generator=G)
    assert torch.allclose(layer(x), x @ layer.dense_weight().T, atol=1e-5)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_same_integers_as_torchaos_own_entry(bits) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    linear = nn.Linear(64, 24)
    config = Int8WeightOnlyConfig() if bits == "int8" else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    ours = QuantisedLinear.from_linear(linear, bits)
    quantize_(linear, config)
    stored = ours.qdata if bits == "int8" else unpack(ours.qdata)
    assert torch.equal(stored, linear.weight.qdata)
    assert torch.equal(ours.scale, linear.weight.scale)
    x = torch.randn(2, 5, 64, generator=G)
    assert torch.equal(ours(x), linear(x))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_saved_and_opened_by_transformers_to_the_last_bit(bits, llama, tmp_path) -> None:
    made = ek.compress(llama, "svd", 0.6, out=tmp_path / "small", quantise=bits, settings=["allocate.multiple=8"])
    plain = AutoModelForCausalLM.from_pretrained(made.path).eval()
    memory = ek.compress(llama, "svd", 0.6, quantise=bits, settings=["allocate.multiple=8"]).model
    assert torch.equal(logits(plain), logits(memory))
    memory.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ek.load(tmp_path / "again")), logits(plain))
    assert plain.generate(IDS[:, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)
    assert ek.verify(made.path, llama).ok
    tensors = load_numpy(tmp_path / "small" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    layer = plain.get_submodule(name)
    x = torch.randn(5, 96, generator=G)
    by64 = x.double().numpy() @ (by_hand(tensors, f"{name}.up") @ by_hand(tensors, f"{name}.down")).T
    assert np.allclose(layer(x).detach().double().numpy(), by64, atol=1e-5)
    assert np.allclose(layer.dense_weight().double().numpy(), by_hand(tensors, f"{name}.up") @ by_hand(tensors, f"{name}.down"), atol=1e-6)
    size = sum(t.nbytes for t in load_file(tmp_path / "small" / "model.safetensors").values())
    assert size == made.report["sizes"]["bytes_after"]
    nested = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert nested["format_version"] == 3
    assert nested["torchao"]["type"] == bits
    assert len(nested["torchao"]["modules"]) == len(made.plan.jobs)
    assert "store: " + bits in (made.path / "eckart.yaml").read_text()


def test_int4_takes_whole_groups_and_int8_the_rest(llama) -> None:
    made = ek.compress(llama, "svd", quantise="int4", settings=["budget.rank=20"])
    found = quantised_layers(made.model)
    assert {n.rpartition(".")[2]: x.bits for n, x in found.items()} == {"down": "int4", "up": "int8"}
    assert "int8, because int4 shares a scale among 32 inputs" in " ".join(made.report["warnings"])
    whole = ek.compress(llama, "svd", quantise="int4", settings=["budget.rank=32", 'target.skip=["lm_head","k_proj","v_proj"]'])
    factors = quantised_layers(whole.model)
    assert {x.bits for n, x in factors.items() if n.endswith((".up", ".down"))} <= {"int4"}


def test_layers_that_stay_dense_are_integers_too(llama, tmp_path) -> None:
    recipe = ek.get_recipe("svd").with_(allocate=allocate.Uniform())
    made = ek.compress(
        llama, recipe, out=tmp_path / "small", quantise="int8", settings=["budget.rank=33"]
    )  # above break-even where matrices are square
    dense = {j.name for j in made.plan.jobs if j.state == "dense"}
    assert dense
    model = AutoModelForCausalLM.from_pretrained(made.path)
    tensors, source = load_numpy(made.path / "model.safetensors"), load_file(llama / "model.safetensors")
    for name in dense:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantisedLinear)
        want = source[f"{name}.weight"].double().numpy()
        assert np.abs(by_hand(tensors, name) - want).max() <= np.abs(want).max() / 127.5
        assert torch.equal(layer.bias, source[f"{name}.bias"]) if f"{name}.bias" in source else layer.bias is None
    assert torch.equal(logits(model), logits(ek.compress(llama, recipe, quantise="int8", settings=["budget.rank=33"]).model))


def test_all_layers_dense_and_a_load_without_eckarts_config_fails(llama, tmp_path) -> None:
    made = ek.compress(llama, "svd", 1.0, out=tmp_path / "small", quantise="int8")
    assert {j.state for j in made.plan.jobs} == {"dense"}
    assert torch.equal(logits(ek.load(made.path)), logits(ek.compress(llama, "svd", 1.0, quantise="int8").model))
    shutil.copytree(made.path, tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="size mismatch|mismatched|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bare")


def test_same_bytes_with_two_workers_and_again(llama, tmp_path) -> None:
    files = []
    for name, workers in (("a", 1), ("b", 2)):
        made = ek.compress(llama, "svd", 0.6, out=tmp_path / name, quantise="int4", workers=workers)
        files.append((made.path / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_families(kind, tmp_path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            BertModel(
                BertConfig(**SMALL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
            ).save_pretrained(tmp_path / "m")
        else:
            GPT2LMHeadModel(
                GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
            ).save_pretrained(tmp_path / "m")
    made = ek.compress(tmp_path / "m", "svd", quantise="int4", out=tmp_path / "small", settings=["budget.rank=32"])
    memory = ek.compress(tmp_path / "m", "svd", quantise="int4", settings=["budget.rank=32"])
    assert torch.equal(logits(ek.load(made.path)), logits(memory.model))
    left = [j.name for j in made.plan.jobs if j.state == "dense"]
    assert left
    assert ("keep their type" in " ".join(made.report["warnings"])) == (kind == "gpt2")  # its dense weights are stored (in, out)


def test_dequantize_gives_the_plain_model_of_the_integers(llama, tmp_path) -> None:
    made = ek.compress(llama, "svd", 0.6, out=tmp_path / "small", quantise="int4")
    model = ek.load(made.path)
    before = logits(model)
    plain = dequantize(model)
    assert not any(isinstance(m, QuantisedLinear | LowRankLinear) for m in plain.modules())
    assert torch.allclose(logits(plain), before, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))


def test_a_model_quantised_by_hand_can_be_attached(llama) -> None:
    model = ek.load(llama)
    linear = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = QuantisedLinear.from_linear(linear, "int8")
    assert attach(model).config.quantization_config.integers == ("model.layers.0.mlp.up_proj",)
    pair = LowRankLinear(64, 96, rank=8, bias=False)
    pair.down = QuantisedLinear.from_linear(pair.down, "int8")
    other = ek.load(llama)
    other.model.layers[0].mlp.up_proj = pair
    with pytest.raises(Refused, match="Quantise both"):
        attach(other)


def test_other_types_and_training(llama, tmp_path) -> None:
    ek.compress(llama, "svd", 0.6, out=tmp_path / "small", quantise="int8")
    half = ek.load(tmp_path / "small", dtype="bfloat16")
    whole = ek.load(tmp_path / "small")
    assert half.model.layers[0].mlp.up_proj.up.scale.dtype == torch.bfloat16
    assert torch.allclose(logits(half).float(), logits(whole), atol=0.1)
    assert not whole.hf_quantizer.is_trainable
    assert not any(n.endswith((".down.weight", ".up.weight")) for n, _ in whole.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "basis_sharing"}, "factors that several matrices share"),
        ({"recipe": "modegpt"}, "smaller dense matrices"),
        ({"recipe": "welore_peft"}, "trains its factors after the cut"),
        ({"recipe": "svd", "form": "dense"}, "meant to load anywhere"),
        ({"recipe": "svd", "quantise": "int2"}, "expected one of same, int8, int4"),
        ({"recipe": "svd", "quantise": None, "settings": ["form.store=int3"]}, "store"),
        (
            {"recipe": "svd", "quantise": "int4", "settings": ["form.store=int8"]},
            r"--quantise int4 and --set form\.store=int8 .* Give one of them\.",
        ),
    ],
)
def test_what_cannot_be_integers_is_refused_before_work(arguments, message, llama, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        ek.compress(llama, **{"keep": 0.6, "calib": [[5, 6, 7]], "out": tmp_path / "out", "quantise": "int8", **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([1], "expected type, group_size and modules"),
        ({"type": "int8"}, "expected type, group_size and modules"),
        ({"type": "int2", "group_size": 32, "modules": ["a"]}, "expected int8 or int4"),
        ({"type": "int4", "group_size": 64, "modules": ["a"]}, "reads 32, found 64"),
        ({"type": "int4", "group_size": True, "modules": ["a"]}, "reads 32"),
        ({"type": "int4", "group_size": 32, "modules": []}, "each once"),
        ({"type": "int4", "group_size": 32, "modules": ["a", "a"]}, "each once"),
        ({"type": "int4", "group_size": 32, "modules": [3]}, "each once"),
    ],
)
def test_a_strangers_table_is_read_with_care(table, message) -> None:
    with pytest.raises(Refused, match=message):
        EckartConfig({}, torchao=table)


@pytest.mark.parametrize(
    ("modules", "message"),
    [(["model.norm"], "no torch.nn.Linear"), (["lm_head"], "shares its weight"), (["model.layers.7.mlp"], "no such module")],
)
def test_a_table_that_does_not_fit_the_model(modules, message, llama, tmp_path) -> None:
    made = ek.compress(llama, "svd", 0.6, out=tmp_path / "small", quantise="int8")
    file = made.path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["torchao"]["modules"] = modules
    file.write_text(json.dumps(config))
    with pytest.raises(Refused, match=message):
        ek.load(made.path)
