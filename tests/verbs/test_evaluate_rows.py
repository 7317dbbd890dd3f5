"""What the before/after table says of the texts: once, whether or not they have a name."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

import eckart as ek
from eckart.report import tables
from eckart.report.card import model_card

TEXTS = ["one text", "and another", "a third"]


def letters(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def encoder():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(BertConfig(vocab_size=128, max_position_embeddings=32, **sizes)).eval()


def test_the_number_of_texts_stands_once_in_each_row_of_an_encoder(encoder) -> None:
    report = ek.compress(encoder, "svd", 0.5, evaluate_on=TEXTS, tokenizer=letters).report
    rows = report["evaluation"]
    assert {row["text"] for row in rows} == {"3 texts"}
    for shown in (json.dumps(rows), str(tables.evaluation(rows)), model_card(report)):
        assert shown.count("3 texts") == len(rows) == 3


def test_a_file_is_named_and_its_texts_are_counted(encoder, tmp_path) -> None:
    (tmp_path / "held.txt").write_text("\n".join(TEXTS))
    rows = ek.evaluate(encoder, tmp_path / "held.txt", against=encoder, tokenizer=letters)["rows"]
    assert {(row["text"], row["note"]) for row in rows} == {("held.txt", "3 texts")}
