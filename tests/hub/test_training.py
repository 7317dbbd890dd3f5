"""Factored models train like any other: Trainer, gradient checkpointing, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from eckart.hub.load import load
from eckart.nn.surgery import low_rank_layers


class Same(Dataset):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[0], "labels": self.ids[0]}


def test_trainer(saved: Any, ids: torch.Tensor, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    model = load(saved("llama")[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Same(ids))
    trainer.train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    layers = low_rank_layers(model)
    assert {f"{n}.{part}.weight" for n in layers for part in ("up", "down")} <= changed
    assert not any(f"{n}.weight" in changed for n in layers)  # the guard is no parameter
    trainer.save_model(str(tmp_path / "trained"))
    again = load(tmp_path / "trained")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_those_of_the_dense_model(kind: str, tiny: Any, factorise: Any, ids: torch.Tensor) -> None:
    dense, model = tiny(kind), factorise(tiny(kind))
    dense(input_ids=ids, labels=ids).loss.backward()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, layer in low_rank_layers(model).items():
        want = dense.get_submodule(name).weight.grad
        want = want.T if kind == "gpt2" else want
        assert torch.allclose(layer.up.weight.grad, want @ layer.down.weight.T, atol=1e-4)
        assert torch.allclose(layer.down.weight.grad, layer.up.weight.T @ want, atol=1e-4)
        if layer.bias is not None:
            assert torch.allclose(layer.bias.grad, dense.get_submodule(name).bias.grad, atol=1e-4)


def test_gradient_checkpointing_and_autocast(saved: Any, ids: torch.Tensor) -> None:
    plain, thrifty = load(saved("llama")[0]).train(), load(saved("llama")[0]).train()
    thrifty.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, thrifty):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        half = plain(input_ids=ids).logits
    with torch.no_grad():
        full = plain(input_ids=ids).logits
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()
    assert not torch.equal(half.float(), full)
