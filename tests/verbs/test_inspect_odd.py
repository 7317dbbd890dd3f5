"""Matrices and models that have no numbers: each measure gives a record with the reason, and the report is written all the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eckart as ek
from eckart.measures.base import Record
from eckart.registry import get_object, list_entries
from eckart.verbs.inspect_columns import plotted, profiles

WEIGHTS = [e.name for e in list_entries("measure") if get_object(e.name).reads in ("spectrum", "weight", "pair")] + ["zd"]
TEXT = [e.name for e in list_entries("measure") if get_object(e.name).reads in ("text", "model")]
SLOW = {"hessian_spectrum", "loss_landscape", "mode_connectivity"}


def odd(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "zero": torch.zeros(24, 20), "nan": torch.full((6, 4), float("nan")), "inf": torch.tensor([[1.0, float("inf")], [0.0, 1.0]]),
        "constant": torch.full((24, 20), 0.5), "rank_one": torch.outer(draw(24), draw(20)), "row": draw(1, 30), "column": draw(30, 1), "one": draw(1, 1),
        "empty": torch.zeros(0, 5), "half": draw(24, 20).half(), "brain": draw(24, 20).bfloat16(), "eight": draw(24, 20).to(torch.float8_e4m3fn),
        "double": draw(24, 20).double(), "int8": torch.ones(24, 20, dtype=torch.int8), "tiny": 1e-30 * draw(24, 20), "huge": 1e30 * draw(24, 20),
        "equal": torch.eye(20), "fine": draw(64, 48),
    }  # fmt: skip


NONE = {"nan": "24 of 24 values are NaN or Inf", "inf": "1 of 4 values are NaN or Inf", "empty": "the matrix is empty (0 x 5)",
        "int8": "stored as I8, not as real numbers"}  # fmt: skip
EXACT = ("constant", "rank_one", "row", "column", "one", "half", "brain", "eight", "double", "tiny", "huge", "equal", "fine")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("odd")
        save_file({f"layers.{i}.{k}.weight": v for i, (k, v) in enumerate(odd(seed).items())}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        folders.append(folder)
    return ek.inspect(folders[0], folders[1], measures=WEIGHTS)


def by_matrix(made: Any) -> dict[tuple[str, str], Record]:
    return {(r.module.rsplit(".", 1)[-1], r.measure): r for r in made.records}


@pytest.mark.parametrize("measure", WEIGHTS)
def test_every_matrix_has_a_record_or_a_reason(made: Any, measure: str) -> None:
    found = by_matrix(made)
    for name in odd(0):
        record = found[name, measure]
        assert record.valid or record.note
        if name in NONE:
            assert not record.valid
            assert record.value is None
            assert record.note == NONE[name] or (measure == "zd" and "not of finite real numbers" in record.note)
    assert not found["zero", measure].valid or measure in ("relative_change", "weight_change")


def test_numbers_hold_in_every_precision_and_size(made: Any) -> None:
    found = by_matrix(made)
    for name in EXACT:
        s = np.linalg.svd(odd(0)[name].double().numpy(), compute_uv=False)
        assert found[name, "stable_rank"].value == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
        assert found[name, "norms"].value["nuclear"] == pytest.approx(s.sum(), rel=1e-5)


def test_the_report_of_odd_matrices_is_written(made: Any, tmp_path: Path) -> None:
    made.save_html(tmp_path / "report.html")
    made.save_json(tmp_path / "records.json")
    assert len(json.loads((tmp_path / "records.json").read_text())) == len(made.records)
    skipped = {x["name"].rsplit(".", 1)[-1] for x in made.report["layers"] if x["state"] == "skipped"}
    assert set(NONE) <= skipped <= {*NONE, "zero"}
    warnings = " ".join(made.report["warnings"])
    assert all(f"Not measured, {why}" in warnings for why in NONE.values())
    assert "equal" not in warnings, "some measures have a number for it"


@pytest.fixture(scope="module")
def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def spoiled(model: Any, kind: str) -> Any:
    model = copy.deepcopy(model)
    with torch.no_grad():
        if kind == "nan":
            model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
        if kind == "zero":
            for name, p in model.named_parameters():
                if "layers" in name and "norm" not in name:
                    p.zero_()
    return model.bfloat16() if kind == "half" else model


@pytest.mark.parametrize("kind", ["fine", "nan", "zero", "half"])
def test_measures_that_run_the_model_always_answer(tiny: Any, kind: str, tmp_path: Path) -> None:
    texts = [[(7 * i + j * j) % 50 for j in range(12)] for i in range(3)] + [[1], [2, 3]]
    wanted = TEXT if kind == "fine" else [n for n in TEXT if n not in SLOW or kind == "nan"]
    other = spoiled(tiny, "half" if kind == "half" else "fine")
    made = ek.inspect(spoiled(tiny, kind), other, measures=wanted, calib=texts)
    assert {r.measure for r in made.records} == set(wanted)
    assert all(r.valid or r.note for r in made.records)
    if kind == "nan":
        whole = {r.measure: r for r in made.records if r.module == ""}
        assert not any(r.valid for r in whole.values())
    made.save_html(tmp_path / "report.html")
    json.dumps(made.to_list(), allow_nan=False)


def test_places_that_are_counted_make_a_spectrum_and_others_a_curve() -> None:
    record = Record("", "m", {"s": [3.0, 2.0, float("nan")], "s_at": [1, 2, 9], "d": [0.1, 0.9], "d_at": [-1.5, 2.0]}, "")
    assert plotted(record) == {"s": ([1, 2], [3.0, 2.0]), "d": ([-1.5, 2.0], [0.1, 0.9])}
    assert profiles(record) == {"s": ([1, 2], [3.0, 2.0])}


def test_a_tied_model_in_memory_is_read_under_both_names(tiny: Any) -> None:
    tied = copy.deepcopy(tiny)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.config.tie_word_embeddings = True
    found = {r.module: r.value for r in ek.inspect(tied, measures=["stable_rank"], kinds=("linear", "embedding")).records}
    s = np.linalg.svd(tied.lm_head.weight.detach().double().numpy(), compute_uv=False)
    assert found["lm_head"] == found["model.embed_tokens"] == pytest.approx((s**2).sum() / s[0] ** 2)
