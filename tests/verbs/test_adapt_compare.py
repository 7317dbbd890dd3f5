"""`--compare`: one protocol, one table, the curves, a folder each; what diverges costs its row, what does not fit is refused before any work."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel

import eckart as ek
from eckart.errors import Refused, UsageError
from eckart.hub.peft import train
from eckart.hub.peft.train import Diverged, Protocol, compare, entry
from eckart.registry import get_recipe

PROTOCOL = Protocol(steps=3, batch_size=2, length=32, lr=2e-3, warmup=0.0)
TEXTS = ["alpha beta gamma delta " * 12, "beta alpha delta gamma " * 12, "gamma delta alpha beta " * 12, "delta gamma beta alpha " * 12]


@pytest.fixture(scope="module")
def done(lm_folder, tmp_path_factory) -> Any:
    """(folder, report) of three recipes, one of which trains in no finite numbers."""
    out = tmp_path_factory.mktemp("compare") / "c"

    def with_wild(text: str, *args: Any, **how: Any) -> Any:
        if text != "wild":
            return entry(text, *args, **how)
        return get_recipe("lora").with_(train={"lr": 1e30})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "entry", with_wild)
        own = Protocol(steps=3, batch_size=2, length=32, warmup=0.0)  # each at the rate of its recipe
        report = compare(lm_folder, TEXTS, ["lora", "wild", "pissa+lora_pro"], 4, out=out, protocol=own)
    return out, report


def test_table_curves_and_folders(done, lm_folder) -> None:
    out, report = done
    (table,) = report["tables"]
    assert [row[0] for row in table["rows"]] == ["lora", "pissa+lora_pro"]
    at = {c: i for i, c in enumerate(table["columns"])}
    lora, mixed = table["rows"]
    blocks = ek.load(lm_folder).model.layers
    per_rank = sum(sum(m.weight.shape) for m in blocks.modules() if isinstance(m, torch.nn.Linear))
    assert lora[at["trained numbers"]] == mixed[at["trained numbers"]] == 4 * per_rank
    assert lora[at["bits per byte before"]] == mixed[at["bits per byte before"]]
    (curve,) = report["curves"]
    assert {s["name"]: [p[0] for p in s["points"]] for s in curve["series"]} == {"lora": [1, 2, 3], "pissa+lora_pro": [1, 2, 3]}
    assert {p.name for p in out.iterdir()} == {"lora", "pissa+lora_pro", "report.html", "report.json"}
    assert json.loads((out / "report.json").read_text())["tables"][0]["rows"][1][0] == "pissa+lora_pro"
    page = (out / "report.html").read_text()
    assert "eckart adapt" in page
    assert "nothing was changed" not in page
    assert "arxiv.org/abs/2404.02948" in page


def test_what_diverges_costs_its_row(done) -> None:
    _, report = done
    assert any(w.startswith("wild: training diverged at step") and "--lr 2.5e+29" in w for w in report["warnings"])


def test_every_folder_is_an_adapter_that_scores_as_the_table_says(done, lm_folder) -> None:
    out, report = done
    for row in report["tables"][0]["rows"]:
        model = PeftModel.from_pretrained(ek.load(lm_folder, dtype=torch.float32), out / row[0])
        again = ek.evaluate(model, TEXTS[-1:], tokenizer=ek.load_tokenizer(lm_folder))["model"]["bits_per_byte"]
        assert again == pytest.approx(row[report["tables"][0]["columns"].index("bits per byte")], rel=1e-4)


def test_all_learn_from_the_same_rows_in_the_same_order_at_the_same_rate(lm_folder, tmp_path, monkeypatch) -> None:
    seen: list[tuple[list[list[int]], float, float]] = []
    real = train._train

    def spy(model: Any, rows: Any, protocol: Any, rate: float, decay: float, glue: Any) -> Any:
        seen.append(([r["input_ids"].tolist() for r in rows], rate, decay))
        return real(model, rows, protocol, rate, decay, glue)

    monkeypatch.setattr(train, "_train", spy)
    report = compare(lm_folder, TEXTS, ["lora", "svfit"], 4, out=tmp_path / "c", protocol=PROTOCOL)
    assert seen[0] == seen[1]
    assert seen[0][1] == PROTOCOL.lr
    alone = train.finetune(lm_folder, TEXTS, "svfit", 4, out=tmp_path / "alone", protocol=PROTOCOL)
    assert alone["tables"][0]["rows"][0] == report["tables"][0]["rows"][1]  # in a comparison a recipe does what it does alone


@pytest.mark.parametrize(
    ("names", "rank", "error", "message"),
    [
        (["pissa", "pissa"], 4, UsageError, "at least two different recipes"),
        (["pissa", "lora", "nothing"], 4, UsageError, "there is no system 'nothing'"),
        (["pissa", "corda:kmp"], 4, UsageError, "corda has no variant 'kmp'. Did you mean 'kpm'"),
        (["lora", "svfit", "pissa"], 100, UsageError, "rank 100 is above the layer"),
        (["full", "lora:none"], 4, UsageError, "lora has no variant"),
    ],
)
def test_refused_before_any_work(names, rank, error, message, lm_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train.measures, "causal", lambda *_: pytest.fail("something was scored"))
    with pytest.raises(error, match=message):
        compare(lm_folder, TEXTS, names, rank, out=tmp_path / "c", protocol=PROTOCOL)
    assert not (tmp_path / "c").exists()


def test_when_all_diverge_nothing_is_left(lm_folder, tmp_path) -> None:
    with pytest.raises(Diverged, match=r"lora: training diverged .*; allora: training diverged"):
        compare(lm_folder, TEXTS, ["lora", "allora"], 4, out=tmp_path / "c", protocol=Protocol(steps=3, batch_size=2, length=32, lr=1e30))
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_comparison_is_replaced(done, lm_folder, tmp_path) -> None:
    with pytest.raises(Refused, match="exists and is not empty"):
        compare(lm_folder, TEXTS, ["lora", "pissa"], 4, out=done[0], protocol=PROTOCOL)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "report.json").write_text("{}")
    (other / "thesis.txt").write_text("years")
    with pytest.raises(Refused, match=r"holds more than an earlier comparison \(thesis.txt\)"):
        compare(lm_folder, TEXTS, ["lora", "pissa"], 4, out=other, protocol=PROTOCOL, overwrite=True)
    assert (other / "thesis.txt").read_text() == "years"
