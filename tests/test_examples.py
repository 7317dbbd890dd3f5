"""The scripts in `examples/` run."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_mix_recipes(tmp_path, capsys) -> None:
    runpy.run_path(str(EXAMPLES / "mix_recipes.py"))["main"](tmp_path / "mixed", texts=4)
    assert "written:" in capsys.readouterr().out
    assert (tmp_path / "mixed" / "model.safetensors").is_file()


def test_afm_ctr(capsys) -> None:
    found = runpy.run_path(str(EXAMPLES / "afm_ctr.py"))["main"](quick=True)
    assert found["original"] > 0.7  # clicks can be learnt
    assert found["original"] - 0.02 < found["afm, tables and MLP"] <= found["original"] + 0.005
    assert "AUC" in capsys.readouterr().out


def test_sub_moe(capsys) -> None:
    found = runpy.run_path(str(EXAMPLES / "sub_moe.py"))["main"](quick=True)
    assert list(found) == ["8 experts", "6 experts", "4 experts"]
    assert found["8 experts"] < 6  # less than eight bits: something was learnt
    assert "bits per byte" in capsys.readouterr().out


def test_adapt_hybrid(capsys) -> None:
    found = runpy.run_path(str(EXAMPLES / "adapt_hybrid.py"))["main"](quick=True)
    assert found["eva with kasa's penalties"] < found["before"]
    assert found["eva"] < found["before"]
    assert "bits per byte" in capsys.readouterr().out
