"""Two processes over gloo make the step that one makes on all rows: gradients are averaged before anything is added to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eckart as ek

RECIPES = ("sorsa", "osf", "adalora", "ba_lora", "lora_pro", "lisa")
STEPS = 3


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Rows with unequal numbers of labels, so that an average of averages would not do."""
    g = torch.Generator().manual_seed(1)
    out: list[dict[str, torch.Tensor]] = []
    for i in range(count):
        ids = torch.randint(3, 96, (10,), generator=g)
        labels = ids.clone()
        labels[: 7 * (i % 2)] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


def trained(folder: str, recipe: str, out: Path, batch: int) -> dict[str, torch.Tensor]:
    """The adapter after a few steps of plain gradient descent, whose steps follow the size of the gradient."""
    from transformers import Trainer, TrainingArguments

    from eckart.axes import refresh
    from eckart.registry import get_recipe

    found = get_recipe(recipe)
    if recipe == "lisa":
        found = found.with_(refresh=(refresh.Sample(blocks=1, every=1),))
    model = ek.adapt(ek.load(folder), found, rank={"osf": 0.5, "lisa": None}.get(recipe, 2), target=["q_proj", "down_proj"])
    args = TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=0.05, optim="sgd", report_to=[], disable_tqdm=True, use_cpu=True,
        seed=0, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False, ddp_find_unused_parameters=True,
    )  # fmt: skip
    data: Any = rows()
    Trainer(model, args, train_dataset=data, callbacks=[ek.glue(model)]).train()
    return {k: v.detach().clone().contiguous() for k, v in model.state_dict().items() if "eckart_branch" in k}


def child(folder: str, out: str) -> None:
    for recipe in RECIPES:
        save_file(trained(folder, recipe, Path(out), 2), Path(out) / f"{recipe}-{os.environ['RANK']}.safetensors")


@pytest.fixture(scope="module")
def both(tiny_llama, tmp_path_factory) -> Path:
    """Adapters of both ranks, recipe by recipe."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        f"import sys; sys.path.insert(0, {json.dumps(str(Path(__file__).parent))}); import test_peft_processes as t; t.child(*sys.argv[1:])"
    )
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tiny_llama), str(out)], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(p.returncode == 0 for p in running), "\n".join(said)
    return out


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_make_the_step_of_one(recipe, both, tiny_llama, tmp_path) -> None:
    first, second = (load_file(both / f"{recipe}-{r}.safetensors") for r in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    with torch.random.fork_rng():
        alone = trained(str(tiny_llama), recipe, tmp_path, 4)
    began = ek.adapt(ek.load(tiny_llama), recipe, rank={"osf": 0.5, "lisa": None}.get(recipe, 2), target=["q_proj", "down_proj"])
    state = began.state_dict()
    assert any(not torch.equal(alone[k], state[k]) for k in alone)
    for k in alone:
        assert torch.allclose(first[k], alone[k], rtol=1e-3, atol=1e-4 * float(alone[k].abs().max()) + 1e-7), k
