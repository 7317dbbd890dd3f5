"""Plain LoRA out of an adapter: read by PEFT in a process that never hears of eckart."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from torch import nn

import eckart as ek
from eckart.errors import Refused, UsageError
from eckart.hub.peft.export import export_lora
from eckart.hub.peft.glue import adapter_layers

STRANGER = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
base, lora, wanted = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
want = load_file(wanted)
with torch.no_grad():
    got = model(input_ids=want["ids"]).logits
assert "eckart" not in sys.modules
print(float((got - want["logits"]).abs().max()))
"""


def test_a_process_without_eckart_computes_the_same(tiny, logits, shake, ids, tmp_path) -> None:
    from safetensors.torch import save_file

    tiny("llama").save_pretrained(tmp_path / "base")
    model = shake(ek.adapt(tiny("llama"), "sorsa", rank=3))
    model.save_pretrained(tmp_path / "adapter")
    found = export_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")
    assert found.logits is not None
    assert found.logits < 1e-5
    assert set(found.ranks.values()) == {6}
    save_file({"ids": ids, "logits": logits(model)}, tmp_path / "wanted.safetensors")
    code = [sys.executable, "-I", "-c", STRANGER, *(str(tmp_path / n) for n in ("base", "lora", "wanted.safetensors"))]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-4


@pytest.mark.parametrize(
    ("recipe", "rank", "want"), [("lora", 3, 3), ("pissa", 3, 6), ("lora_xs", 3, 3), ("svfit", 3, 3), ("kasa", 3, 6), ("osf", 3, None)]
)
def test_ranks(recipe, rank, want, tiny, shake, tmp_path) -> None:
    found = export_lora(shake(ek.adapt(tiny("llama"), recipe, rank=rank, target=["q_proj"])), tmp_path / "lora")
    assert set(found.ranks.values()) == {want if want else 32}  # 2 (32 - 3) factors have no more than 32 directions


def test_mutated_bases_become_lora_on_the_original_one(tiny, logits, shake, tmp_path) -> None:
    model = shake(ek.adapt(tiny("llama"), "pissa", rank=3, base="mutate"))
    want = logits(model)
    export_lora(model, tmp_path / "lora")
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "lora")), want, atol=1e-4)
    assert torch.equal(logits(model), want)  # the model itself is as it was


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_transposed_and_fused_layers_and_biases(kind, tiny, logits, shake, tmp_path) -> None:
    model = shake(ek.adapt(tiny(kind), "soma", rank=3))
    found = export_lora(model, tmp_path / "lora")
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny(kind), tmp_path / "lora")), logits(model), atol=1e-4)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["lora_bias"] is True
    if kind == "gpt2":
        assert found.ranks["transformer.h.0.attn.c_attn"] == 3 * 6


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5))


def test_embeddings_and_modules_without_a_tokenizer(shake, tmp_path) -> None:
    model = shake(ek.adapt(net(), "pissa", rank=2, target=["0", "1"])).eval()
    found = export_lora(model, tmp_path / "lora")
    assert found.logits is None
    x = torch.tensor([[1, 5, 10]])
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora")
    assert torch.allclose(plain(x), model(x), atol=1e-5)


def test_a_convolution(shake, tmp_path) -> None:
    def conv(groups: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups))

    model = shake(ek.adapt(conv(1), "pissa", rank=2, target=["0"])).eval()
    export_lora(model, tmp_path / "lora")
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(PeftModel.from_pretrained(conv(1), tmp_path / "lora")(x), model(x), atol=1e-5)
    with pytest.raises(Refused, match="convolution with groups"):
        export_lora(ek.adapt(conv(2), "pissa", rank=2, target=["0"]), tmp_path / "grouped")
    assert not (tmp_path / "grouped").exists()


def test_a_core_that_is_no_matrix_is_refused_and_not_merged(tmp_path) -> None:
    model = ek.adapt(nn.Sequential(nn.Linear(6, 5)), "lora", rank=2)
    branch = next(adapter_layers(model)).branch("default")
    branch.not_mergeable = "its core depends on the class of the sample"
    with pytest.raises(Refused, match=r"0: its core depends on the class of the sample, so there is no LoRA that does the same"):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(Refused, match="so it cannot be merged into the weight"):
        model.merge_and_unload()


def test_what_is_no_adapter_of_ours(tiny, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UsageError, match="holds no adapter_config.json"):
        export_lora(tmp_path / "none", tmp_path / "out")
    get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match="is an adapter of type .*LORA, not one of ours"):
        export_lora(tmp_path / "lora", tmp_path / "out")
    ek.adapt(tiny("llama"), "pissa", rank=2, target=["q_proj"]).save_pretrained(tmp_path / "ours")
    with pytest.raises(UsageError, match="does not say what its base model is"):
        export_lora(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(Refused, match="exists and is not empty"):
        export_lora(tmp_path / "ours", tmp_path / "lora", base=tiny("llama"))
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_can_be_replaced(tiny, shake, tmp_path) -> None:
    model = shake(ek.adapt(tiny("llama"), "pissa", rank=2, target=["q_proj"]))
    export_lora(model, tmp_path / "lora")
    first = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
    shake(model, 5)
    export_lora(model, tmp_path / "lora", overwrite=True)
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() != first
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
