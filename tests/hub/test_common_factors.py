"""Pairs that share a factor, and narrower layers, through transformers' own save and load."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_roundtrip import all_but, on_disk
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from eckart.errors import Refused
from eckart.hub.attach import attach, dequantize
from eckart.hub.load import load, meta_model
from eckart.nn.surgery import put_pair, shared_groups

SITES = {
    "llama": ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj", "model.layers.{}.mlp.down_proj"),
    "bert": ("encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.value", "encoder.layer.{}.output.dense"),
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
}


def auto(kind: str) -> Any:
    return AutoModel if kind == "bert" else AutoModelForCausalLM


def shared(model: Any, kind: str, rank: int = 20) -> Any:
    """The first two parts of each block over one `down`, the third of both blocks over one `up`; ranks above the size of k."""
    from eckart.nn.surgery import dense_shape, share

    g = torch.Generator().manual_seed(0)
    groups = [([SITES[kind][0].format(i), SITES[kind][1].format(i)], "in") for i in (0, 1)]
    groups.append(([SITES[kind][2].format(i) for i in (0, 1)], "out"))
    for names, side in groups:
        for name in names:
            layer = model.get_submodule(name)
            (m, n), bias = dense_shape(layer), layer.bias
            up, down = torch.randn(m, rank, generator=g) / 8, torch.randn(rank, n, generator=g) / 8
            put_pair(model, name, up, down, None if bias is None else bias.detach(), common=True)
        share(model, names, side)
    return attach(model, recipe="basis_sharing")


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: Any) -> Any:
    done: dict[str, Any] = {}

    def run(kind: str) -> Any:
        if kind not in done:
            model = shared(tiny(kind), kind)
            model.save_pretrained(tmp_path_factory.mktemp("shared") / kind, max_shard_size="12KB")
            done[kind] = tmp_path_factory.getbasetemp() / next(tmp_path_factory.getbasetemp().glob(f"shared*/{kind}")), model
        return done[kind][0], copy.deepcopy(done[kind][1])

    return run


@pytest.mark.parametrize("kind", list(SITES))
@pytest.mark.parametrize("how", ["plain", "cpu", "auto", "low_cpu_mem", "disk", "ours"])
def test_common_factors_reload_exactly_and_stay_one(kind: str, how: str, folder: Any, out: Any, tmp_path: Any) -> None:
    path, model = folder(kind)
    if how == "ours":
        again = load(path)
    elif how == "disk":
        blocks = {"llama": "model.layers", "bert": "encoder.layer", "gpt2": "transformer.h"}[kind]  # a common factor is on one device
        again = auto(kind).from_pretrained(path, device_map=all_but(model, blocks), offload_folder=tmp_path)
    else:
        options = {"cpu": {"device_map": "cpu"}, "auto": {"device_map": "auto"}, "low_cpu_mem": {"low_cpu_mem_usage": True}}
        again = auto(kind).from_pretrained(path, **options.get(how, {}))
    assert torch.equal(out(again), out(model))
    if how != "disk":
        assert shared_groups(again) == shared_groups(model)
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", list(SITES))
def test_a_common_factor_is_stored_once(kind: str, folder: Any, tmp_path: Any) -> None:
    path, _ = folder(kind)
    tensors = on_disk(path)
    first, second, third = (s.format(0) for s in SITES[kind])
    assert f"{first}.down.weight" in tensors
    assert f"{second}.down.weight" not in tensors
    assert f"{second}.up.weight" in tensors
    assert f"{third}.up.weight" in tensors
    assert f"{SITES[kind][2].format(1)}.up.weight" not in tensors
    table = json.loads((path / "config.json").read_text())["quantization_config"]
    assert table["format_version"] == 2
    assert {"side": "out", "modules": [SITES[kind][2].format(i) for i in (0, 1)]} in table["shared"]
    load(path).save_pretrained(tmp_path, max_shard_size="12KB")
    assert (tmp_path / "config.json").read_text() == (path / "config.json").read_text()
    again = on_disk(tmp_path)
    assert sorted(again) == sorted(tensors)
    assert all(torch.equal(again[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_body_alone(kind: str, folder: Any, out: Any, tmp_path: Any) -> None:
    path, model = folder(kind)
    body = AutoModel.from_pretrained(path)
    assert torch.equal(out(body), out(model.base_model))
    assert len(shared_groups(body)) == 3
    body.save_pretrained(tmp_path)
    assert torch.equal(out(AutoModelForCausalLM.from_pretrained(tmp_path)), out(model))


def test_other_types_and_training_keep_the_tie(folder: Any, out: Any, tmp_path: Any) -> None:
    path, _ = folder("llama")
    half = load(path, dtype="bfloat16")
    assert len(shared_groups(half)) == 3
    model = load(path)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    assert len(shared_groups(model)) == 3
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(out(load(tmp_path)), out(model))


@pytest.mark.parametrize("kind", list(SITES))
def test_multiplied_back(kind: str, folder: Any, out: Any, tmp_path: Any) -> None:
    path, model = folder(kind)
    dense = dequantize(load(path))
    assert torch.allclose(out(dense), out(model), atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(out(auto(kind).from_pretrained(tmp_path)), out(dense))


def test_without_eckart_the_load_fails_loudly(folder: Any) -> None:
    path, _ = folder("llama")
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(path)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "mismatch" in found.stderr


def test_meta_model_shows_the_ties(folder: Any) -> None:
    path, model = folder("gpt2")
    assert shared_groups(meta_model(path)) == shared_groups(model)


A, B = (f"model.layers.0.self_attn.{p}_proj" for p in "qk")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared": {}}, "shared to be a list"),
        ({"shared": [A]}, "expected a side"),
        ({"shared": [{"side": "both", "modules": [A, B]}]}, "expected a side"),
        ({"shared": [{"side": "in", "modules": [A]}]}, "at least two"),
        ({"shared": [{"side": "in", "modules": [A, 3]}]}, "at least two"),
        ({"shared": [{"side": "in", "modules": [A, A]}]}, "twice"),
        ({"shared": [{"side": "in", "modules": [A, "x"]}]}, "modules of one rank"),
        ({"shared": [{"side": "out", "modules": [A, B]}], "ranks": {A: 4, B: 4}}, "cannot share a factor on the out side"),
        ({"shared": [], "ranks": {B: 20}}, "rank 20, but its shape is"),
        ({"shapes": {A: [4]}}, "already|expected two integers"),
        ({"shapes": {A: [4, 4]}}, "a rank and a shape"),
        ({"shapes": {"model.norm": [4, 4]}}, "no torch.nn.Linear"),
        ({"shapes": {"model.layers.0.mlp.up_proj": [4, 33]}}, "larger than"),
        ({"shapes": {"model.layers.0.mlp.up_proj": [0, 4]}}, "two integers of at least 1"),
        ({"heads": {"model.layers.0.self_attn": 4}}, "a head_dim of at least 1"),
        ({"heads": {"model.layers.0.self_attn": {"head_dim": 4, "rope": [0]}}}, "a head_dim of at least 1"),
        ({"heads": {"model.layers.0.self_attn": {"head_dim": 99, "rope": None}}}, "heads of width 99"),
        ({"heads": {"model.layers.0.self_attn": {"head_dim": 2, "rope": [0, 99]}}}, "positions of"),
        ({"heads": {"model.layers.0.mlp": {"head_dim": 2}}}, "cannot have"),
        ({"heads": {"nowhere": {"head_dim": 2}}}, "no such module"),
    ],
)
def test_hostile_tables(changes: dict[str, Any], words: str, folder: Any, tmp_path: Any) -> None:
    path, _ = folder("llama")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (load, meta_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(Refused, match=words):
            read(tmp_path)


def test_embeddings_as_factors(tiny: Any, out: Any, tmp_path: Any) -> None:
    model = tiny("bert")
    g = torch.Generator().manual_seed(1)
    put_pair(model, "embeddings.word_embeddings", torch.randn(32, 5, generator=g), torch.randn(96, 5, generator=g), torch.ones(32))
    attach(model).save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert table["format_version"] == 2
    assert table["bias"] == {"embeddings.word_embeddings": True}
    again = load(tmp_path)
    assert torch.equal(out(again), out(model))
    assert again.embeddings.word_embeddings.padding_idx == 0
    dense = dequantize(again)
    assert type(dense.embeddings.word_embeddings) is nn.Embedding
    assert torch.allclose(out(dense), out(model), atol=1e-5)
