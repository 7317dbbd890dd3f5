"""Recovery after the cut: what moves, by how much at most, whether the loss falls by an own count, and what is refused."""

import re

import pytest
import torch
from transformers import BertConfig, BertModel

import eckart as ek
from eckart.errors import UsageError
from eckart.nn.surgery import low_rank_layers

RANK = 2


def cross_entropy(model, ids) -> float:
    with torch.no_grad():
        logits = model.train(False)(input_ids=ids).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)))


def divergence(model, original, ids) -> float:
    with torch.no_grad():
        new, old = (m.train(False)(input_ids=ids).logits.double().log_softmax(-1) for m in (model, original))
    return float(((new - old).neg() * old.exp()).sum(-1).mean())


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize(("goal", "lr"), [("task", 1e-2), ("original", 1e-3)])
def test_lora_moves_each_factor_by_its_rank_and_lowers_the_loss(in_turn, goal, lr, tiny_llama, token_ids, tmp_path) -> None:
    calib = token_ids[:8]
    ids, original = torch.tensor(calib), ek.load(tiny_llama)
    measured = {"task": lambda m: cross_entropy(m, ids), "original": lambda m: divergence(m, original, ids)}[goal]
    how = [
        "recover.kind=lora", "recover.steps=24", f"recover.lr={lr}", f"recover.rank={RANK}", f"recover.in_turn={str(in_turn).lower()}",
        f"recover.goal={goal}",
    ]  # fmt: skip
    state = torch.random.get_rng_state()
    plain = ek.compress(tiny_llama, "svd_llm", 0.5, calib=calib)
    tuned = ek.compress(tiny_llama, "svd_llm", 0.5, calib=calib, settings=how, stats=plain.stats)
    assert torch.equal(torch.random.get_rng_state(), state)
    factors = {f"{n}.{part}.weight" for n in low_rank_layers(plain.model) for part in ("up", "down")}
    before, after = dict(plain.model.named_parameters()), dict(tuned.model.named_parameters())
    assert before.keys() == after.keys()
    for name, old in before.items():
        moved = torch.linalg.svdvals((after[name] - old).detach().double()) if name in factors else (after[name] - old).abs().max()[None]
        if name in factors:
            assert moved[0] > 0, name
            assert moved[RANK] < 1e-3 * moved[0], name  # rounding of float32 weights
        else:
            assert moved[0] == 0, name
    assert measured(tuned.model) < measured(plain.model)
    said = next(x for x in tuned.report["verdict"] if "numbers were trained" in x)
    figures = [float(x) for x in re.search(r"calibration (\S+) before, (\S+) after", said).groups()]
    assert figures == pytest.approx([measured(plain.model), measured(tuned.model)], rel=5e-3)  # sums in float32
    written = ek.compress(tiny_llama, "svd_llm", 0.5, calib=calib, settings=how, stats=plain.stats, out=tmp_path / "small")
    stored = ek.load(written.path).state_dict()
    assert all(torch.equal(stored[k], v) for k, v in tuned.model.state_dict().items())


def test_an_encoder_recovers_towards_its_own_embedding(token_ids, tmp_path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=64
            )
        )
    model.save_pretrained(tmp_path / "bert")
    calib = token_ids[:8]

    def gap(other) -> float:
        with torch.no_grad():
            a, b = (
                torch.nn.functional.normalize(m.train(False)(torch.tensor(calib)).last_hidden_state.mean(1), dim=1) for m in (model, other)
            )
        return float(1 - (a * b).sum(1).mean())

    plain = ek.compress(tmp_path / "bert", "svd", 0.4)
    tuned = ek.compress(tmp_path / "bert", "svd", 0.4, calib=calib, settings=["recover.kind=lora", "recover.steps=20", "recover.lr=3e-3"])
    assert gap(tuned.model) < 0.8 * gap(plain.model)


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("basis_sharing", {"settings": ["recover.kind=lora"]}, "use recover=factors"),
        ("svd", {"settings": ["recover.kind=lora"], "quantise": "int8"}, "integers do not"),
        ("svd", {"settings": ["recover.kind=lora", "recover.steps=0"]}, "at least one step"),
        ("svd", {"settings": ["recover.kind=lora", "recover.rank=0"]}, "a rank of at least 1"),
        ("basis_sharing", {"settings": ["recover.kind=factors"]}, "nothing to train"),
        ("modegpt", {"settings": ["recover.kind=factors"]}, "recover"),
    ],
)
def test_what_cannot_recover_says_why(recipe, options, words, tiny_llama, token_ids) -> None:
    with pytest.raises(UsageError, match=words):
        ek.compress(tiny_llama, recipe, 0.5, calib=token_ids[:8], **options)
