"""Every parametrisation trains the language model that ships: a few steps on words it has not seen lower the loss on other such words."""

from __future__ import annotations

import pytest
import torch

import eckart as ek

RUNS = {  # rank, learning rate
    "clip_svd": (None, 2e-2), "salt": (None, 5e-3), "effort": (4, 5e-3), "soka": (8, 5e-3), "loldu": (64, 2e-2), "nlora": (8, 2e-3), "slora": (8, 5e-3),
    "inttune": (16, 1e-2), "lora_sb": (16, 5e-3), "flora": (8, 1e-2), "kind": (8, 5e-3), "householder": (8, 5e-3),
}  # fmt: skip


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


@pytest.mark.parametrize("name", RUNS)
def test_held_out_loss_falls_and_unloading_gives_the_model_back(world, name) -> None:
    model, batches, held, before = world
    rank, lr = RUNS[name]
    calib = [row.tolist() for rows in batches for row in rows] if name == "lora_sb" else None
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
