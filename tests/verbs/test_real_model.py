"""Quality and closed forms on the language model that ships with the package, on text it was not trained on."""

import pytest
import torch

import eckart as ek
from eckart.data import evaluate


@pytest.fixture(scope="module")
def tokenizer(lm_folder):
    return ek.load_tokenizer(lm_folder)


def test_the_shipped_model_is_a_real_one(lm_folder, heldout, tokenizer) -> None:
    import zlib

    found = evaluate.causal(ek.load(lm_folder), tokenizer, heldout)
    text = "".join(heldout).encode()
    assert found["bits_per_byte"] < 0.75 * 8 * len(zlib.compress(text, 9)) / len(text)
    assert found["bos"]


def test_metrics_that_see_data_beat_those_that_do_not(lm_folder, calib, heldout, tokenizer) -> None:
    bits = {}
    for name in ("svd", "svd_llm", "two_sided"):
        made = ek.compress(lm_folder, name, 0.6, calib=calib)
        bits[name] = evaluate.causal(made.model, tokenizer, heldout)["bits_per_byte"]
    assert bits["two_sided"] < bits["svd_llm"] < bits["svd"]


def test_recorded_loss_equals_the_loss_measured_on_a_real_layer(lm_folder, calib, tokenizer) -> None:
    """Inputs captured by a hook of our own, the loss in float64, against the figure in the report."""
    texts = [t[:800] for t in calib]
    made = ek.compress(lm_folder, "svd_llm", 0.5, calib=texts, max_length=512, batch_size=1)
    original, name = ek.load(lm_folder), "model.layers.3.mlp.gate_proj"
    rows = []
    module = original.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().reshape(-1, args[0].shape[-1]).double()))
    with torch.no_grad():
        for text in texts:
            original(torch.tensor([tokenizer(text)["input_ids"][:512]]))
    handle.remove()
    x = torch.cat(rows)
    pair = made.model.get_submodule(name)
    weight, up, down = (p.detach().double() for p in (module.weight, pair.up.weight, pair.down.weight))
    gap = weight - up @ down
    measured = float((x @ gap.T).norm() / (x @ weight.T).norm())
    recorded = next(layer["error"] for layer in made.report["layers"] if layer["name"] == name)
    assert recorded == pytest.approx(measured, rel=2e-2)  # the pair is stored in bf16


def test_predicted_loss_orders_the_real_loss(lm_folder, calib, heldout, tokenizer) -> None:
    """A smaller budget predicts and costs more, monotonically."""
    predicted, real = [], []
    made = None
    for keep in (0.8, 0.5, 0.3):
        made = ek.compress(lm_folder, "two_sided", keep, calib=calib, stats=made.stats if made else None)
        predicted.append(sum(layer["error"] for layer in made.report["layers"] if layer.get("error") is not None))
        real.append(evaluate.causal(made.model, tokenizer, heldout[:6])["bits_per_byte"])
    assert predicted == sorted(predicted)
    assert real == sorted(real)
