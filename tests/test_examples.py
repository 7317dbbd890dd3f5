"""The scripts in `examples/` run."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_mix_recipes(tmp_path, capsys) -> None:
    runpy.run_path(str(EXAMPLES / "mix_recipes.py"))["main"](tmp_path / "mixed", texts=4)
    assert "written:" in capsys.readouterr().out
    assert (tmp_path / "mixed" / "model.safetensors").is_file()
