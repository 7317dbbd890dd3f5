"""The model card: metadata the Hub accepts, and Markdown that hostile names cannot bend."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from eckart.errors import Refused, UsageError
from eckart.report import model_card
from tests.report.sample import sample


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_metadata() -> None:
    assert front(model_card(sample(1))) == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["eckart"],
    }


@pytest.mark.parametrize("name", ["/home/me/model", "models", "a/b/c", "../x/y", "org/na me", "x: y/z\n- q", ""])
def test_a_folder_is_no_base_model(name: str) -> None:
    data = sample(1)
    data["model"]["name"] = name
    assert front(model_card(data)) == {"library_name": "transformers", "tags": ["eckart"]}


def test_the_hub_accepts_the_metadata() -> None:
    import huggingface_hub as hub

    card = hub.ModelCard(model_card(sample(1)))
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.tags == ["eckart"]
    assert card.text.lstrip().startswith("# all-MiniLM-L6-v2")


def test_it_says_what_a_reader_needs() -> None:
    data = sample(3)
    card = model_card(data)
    assert "| mean cosine to the original | 1,000 held-out docstrings; higher is better | 1.000 | 0.8921 | −10.8% worse |" in card
    assert 'import eckart\nfrom transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("path/to/this/folder")' in card
    assert 'ek.load("path/to/this/folder")' in card
    assert "--recipe two_sided --keep 0.6 --calib docstrings.jsonl" in card
    assert "budget: {keep: 0.6}" in card
    assert "[arXiv:2403.07378](<https://arxiv.org/abs/2403.07378>)" in card
    assert "built on the idea of the paper" in card
    assert "not claimed here" in card
    assert "Warning: Calibration holds 41,873 tokens" in card
    assert "torch 2.13.0" in card
    for role in dict.fromkeys(x["role"] for x in data["layers"]):
        members = [x for x in data["layers"] if x["role"] == role]
        row = next(line for line in card.splitlines() if line.startswith(f"| {role} |"))
        cells = [c.strip() for c in row.strip("|").split("|")]
        assert cells[1] == "3"
        assert float(cells[5]) == pytest.approx(max(x["error"] for x in members), rel=5e-3)
        assert float(cells[4]) == pytest.approx(sum(x["error"] for x in members) / 3, rel=5e-3)


def test_a_causal_model_names_its_class() -> None:
    data = sample(1)
    data["model"]["auto"] = "AutoModelForCausalLM"
    assert "from transformers import AutoModelForCausalLM" in model_card(data)
    data["model"]["auto"] = "AutoX; import os"
    assert "import os" not in model_card(data)


def test_a_dense_model_loads_without_us() -> None:
    card = model_card({**sample(1), "form": "dense"})
    assert "import eckart" not in card
    assert "from transformers import AutoModel" in card


def test_the_command_is_put_together_when_none_is_given() -> None:
    card = model_card({**sample(1), "command": None, "budget": {"rank": 8}})
    assert "eckart compress sentence-transformers/all-MiniLM-L6-v2 -o OUT --recipe two_sided --set budget.rank=8" in card
    data = {**sample(1), "command": None}
    data["model"]["name"] = "a; rm -rf /"
    assert "eckart compress 'a; rm -rf /' -o OUT --recipe two_sided --keep 0.6" in model_card(data)


def test_unmeasured_quality_is_said() -> None:
    assert "Its quality was not measured" in model_card({**sample(1), "evaluation": []})
    assert "Its quality was not measured" not in model_card(sample(1))


def test_hostile_words_stay_words() -> None:
    evil = "# x\n---\n| a | <script>alert(1)</script> ```` [x](javascript:alert(1)) ![y](http://z) _i_ **b**"
    data = sample(1)
    data["title"] = data["verdict"][0] = data["warnings"][0] = evil
    data["evaluation"][0]["metric"] = data["evaluation"][0]["text"] = data["recipe"]["name"] = data["recipe"]["title"] = evil
    data["recipe"]["yaml"] = "a: 1\n```\n# not a heading\n"
    data["layers"][0]["role"] = evil
    card = model_card(data)
    assert front(card) == front(model_card(sample(1)))
    outside = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "not a heading" not in outside
    outside = re.sub(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)", "", outside)
    assert not re.search(r"(?<!\\)<(?!https://arxiv)", outside)
    assert not re.search(r"(?<!\\)\]\((?!<https://arxiv)", outside)
    assert [line for line in card.splitlines() if line == "---"] == ["---", "---"]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("| ")}
    assert widths == {5, 6, 7}


def test_deterministic() -> None:
    assert model_card(sample(2)) == model_card(dict(reversed(list(sample(2).items()))))


def test_refusals() -> None:
    with pytest.raises(UsageError, match="only a compressed model gets a card"):
        model_card({**sample(1), "kind": "inspect"})
    with pytest.raises(Refused, match=r"report\.title: missing"):
        model_card({k: v for k, v in sample(1).items() if k != "title"})
