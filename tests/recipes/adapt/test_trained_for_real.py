"""Every parametrisation trains the language model that ships: a few steps on words it has not seen lower the loss on other such words."""

from __future__ import annotations

import pytest
import torch

import eckart as ek
from eckart.registry import get_recipe, list_recipes

RUNS = {  # rank, learning rate; the others: 8, 5e-3
    "clip_svd": (None, 2e-2), "salt": (None, 5e-3), "svfit": (None, 2e-2), "full": (None, 2e-3), "lisa": (None, 5e-3), "osf": (0.5, 2e-3), "loldu": (64, 2e-2),
    "nlora": (8, 2e-3), "pissa": (8, 2e-3), "corda": (8, 5e-4), "ba_lora": (8, 2e-3), "inttune": (16, 1e-2), "lora_xs": (16, 1e-2), "lora_sb": (16, 5e-3),
    "adalora": (8, 3e-2), "flora": (8, 1e-2), "orthoreg": (8, 2e-2), "lora": (8, 2e-2), "allora": (8, 2e-2), "eva": (8, 2e-2),
    "kasa": (8, 2e-2), "rdp_lora": (8, 2e-2),
}  # fmt: skip
NAMES = [n for n in list_recipes("adapt") if n != "cross_init"]  # which trains rows of new tokens: below


@pytest.fixture(scope="module")
def world(lm_folder):
    """(model in float32, batches to train on, a batch held out, its loss before)."""
    tokenizer = ek.load_tokenizer(lm_folder)
    words = ["alpha", "beta", "gamma", "delta"]
    g = torch.Generator().manual_seed(0)
    texts = [" ".join(words[i] for i in torch.randint(0, 4, (40,), generator=g).tolist()) for _ in range(20)]
    rows = torch.stack([tokenizer(t, return_tensors="pt").input_ids[0, :24] for t in texts])
    model = ek.load(lm_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        before = float(model(input_ids=rows[12:], labels=rows[12:]).loss)
    return model, rows[:12].split(3), rows[12:], before


def fitted(model, batches, lr: float, steps: int):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    with ek.glue(model).begin(optimizer, total_steps=steps) as glue:
        for step in range(steps):
            rows = batches[step % len(batches)]
            model(input_ids=rows, labels=rows).loss.backward()
            glue.before_step()
            optimizer.step()
            glue.after_step()
            optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_held_out_loss_falls_and_unloading_gives_the_model_back(world, name) -> None:
    model, batches, held, before = world
    rank, lr = RUNS.get(name, (8, 5e-3))
    calib = [row.tolist() for rows in batches for row in rows] if get_recipe(name).needs() else None
    adapted = fitted(ek.adapt(model, name, rank=rank, calib=calib), batches, lr, 5)
    with torch.no_grad():
        after = float(adapted(input_ids=held, labels=held).loss)
        plain = adapted.unload()
        assert plain is model
        assert float(model(input_ids=held, labels=held).loss) == before
    assert after < 0.9 * before


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_new_token_learns_what_it_stands_for(world, lm_folder) -> None:
    """One word in all texts becomes the last token of the table: its row, begun with the encoder's state of that word, is all that trains."""
    model, batches, held, _ = world
    word = int(held[0, 4])
    new = model.config.vocab_size - 1

    def renamed(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(rows == word, torch.full_like(rows, new), rows)

    def loss(m) -> float:
        labels = torch.where(held == word, torch.full_like(held, -100), held)  # what follows the token, not the token itself
        with torch.no_grad():
            return float(m(input_ids=renamed(held), labels=labels).loss)

    adapted = ek.adapt(model, "cross_init", rank=1, calib=[[word]]).eval()
    began = loss(adapted)
    trained = fitted(adapted, [renamed(b) for b in batches], 5e-2, 12)
    assert loss(trained) < 0.99 * began
    trained.unload()
