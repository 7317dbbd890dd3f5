"""The command line: what it prints, what it imports, and how it fails."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

import eckart as ek
from eckart.axes.border import to_dict
from eckart.cli import main
from eckart.registry import entry


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        main(list(argv))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    "argv", [["--help"], ["ls"], ["ls", "--json"], ["show", "svd_llm"], ["show", "two_sided:weight_grads"], ["compress", "--help"]]
)
def test_listing_and_help_work_without_torch(argv) -> None:
    code = f"import sys\nfrom eckart.cli import main\ntry:\n    main({argv!r})\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.split()[-2:] == ["False", "False"]


def test_ls_lists_every_system(capsys) -> None:
    code, out, _ = run(capsys, "ls", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {"name", "kind", "verb", "title", "paper", "fidelity"} <= rows[0].keys()
    assert {r["name"] for r in rows if r["kind"] == "recipe"} == set(ek.list_recipes())
    assert {r["verb"] for r in json.loads(run(capsys, "ls", "--verb", "inspect", "--json")[1])} == {"inspect"}


def test_show_says_what_differs_and_what_is_measured(capsys) -> None:
    _, out, _ = run(capsys, "show", "two_sided")
    assert "Differs: " in out
    assert "moments at out (backward)" in out
    assert "kind: water_fill" in out
    assert json.loads(run(capsys, "show", "svd", "--json")[1])["recipe"]["factor"]["kind"] == "svd"
    assert "eckart inspect MODEL --measures stable_rank" in run(capsys, "show", "stable_rank")[1]


def test_show_takes_a_variant(capsys) -> None:
    _, out, _ = run(capsys, "show", "two_sided:weight_grads")
    assert out.startswith("two_sided:weight_grads (compress)")
    assert "gradient_gram at weight (backward)" in out
    assert "kind: weight_grads" in out
    assert "kind: grad_gram" not in out
    found = json.loads(run(capsys, "show", "two_sided:weight_grads", "--json")[1])
    assert (found["name"], found["axes"]["metric"]) == ("two_sided:weight_grads", "weight_grads")
    assert found["recipe"] == to_dict(ek.get_recipe("two_sided:weight_grads"))
    plain = json.loads(run(capsys, "show", "two_sided", "--json")[1])
    assert plain == asdict(entry("two_sided")) | {"recipe": to_dict(ek.get_recipe("two_sided"))}


def test_compress_eval_verify_inspect_on_the_bundled_model(capsys, lm_folder, tmp_path) -> None:
    out = tmp_path / "small"
    code, text, _ = run(capsys, "compress", str(lm_folder), "-o", str(out), "--recipe", "svd", "--set", "budget.rank=40")
    assert code == 0
    assert "model.layers.0.mlp.up_proj" in text
    assert str(out / "report.html") in text
    text_file = tmp_path / "text.txt"
    text_file.write_text("def main():\n    return sum(range(10))\nimport os\n")
    found = json.loads(run(capsys, "eval", str(out), "--text", str(text_file), "--against", str(lm_folder), "--json")[1])
    assert found["model"]["bits_per_byte"] > 0
    assert found["rows"][0]["before"] == found["against"]["bits_per_byte"]
    assert run(capsys, "verify", str(out), "--against", str(lm_folder))[0] == 0
    weights = out / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-7] ^= 1
    weights.write_bytes(raw)
    code, _, err = run(capsys, "verify", str(out))
    assert code == 3
    assert "not as recorded" in err
    records = json.loads(
        run(capsys, "inspect", str(lm_folder), "--measures", "stable_rank,energy_ranks", "--only", "layers.0", "--json")[1]
    )
    assert len(records) == 14
    assert all(r["valid"] for r in records)


def test_yaml_of_a_run_repeats_it(capsys, tiny_llama, tmp_path) -> None:
    run(capsys, "compress", str(tiny_llama), "-o", str(tmp_path / "a"), "--recipe", "svd", "--keep", "0.5", "--set", "form.balance=left")
    code, _, err = run(capsys, "compress", str(tiny_llama), "-o", str(tmp_path / "b"), "--recipe", str(tmp_path / "a" / "eckart.yaml"))
    assert (code, err) == (0, "")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["compress", "MODEL", "-o", "OUT", "--recipe", "svdllm"], 2, "Did you mean 'svd_llm'"),
        (["compress", "MODEL", "--recipe", "svd"], 2, "give -o OUT, or --dry-run"),
        (["compress", "MODEL", "-o", "OUT", "--recipe", "svd_llm"], 2, "Give --calib FILE"),
        (["compress", "MODEL", "-o", "OUT", "--recipe", "svd", "--keep", "2"], 2, "expected a share in (0, 1]"),
        (["compress", "MODEL", "-o", "OUT", "--recipe", "svd", "--set", "metrc.kind=x"], 2, "Did you mean 'metric'"),
        (["compress", "MODEL", "-o", "MODEL", "--recipe", "svd"], 3, "MODEL"),
        (["compress", "/nowhere", "-o", "OUT", "--recipe", "svd"], 3, "/nowhere"),
        (["inspect", "MODEL", "--measures", "stable_rnk"], 2, "Did you mean 'stable_rank'"),
        (["eval", "MODEL", "--text", "missing.txt"], 3, "missing.txt"),
        (["verify", "MODEL"], 3, "eckart.json"),
        (["ls", "--verb", "compres"], 2, "Did you mean 'compress'"),
        (["show", "two_sided:weight_grad"], 2, "no variant 'weight_grad'. Did you mean 'weight_grads'"),
        (["show", "two_side:weight_grads"], 2, "Did you mean 'two_sided'"),
        (["show", "stable_rank:x"], 2, "stable_rank is a measure, not a recipe"),
    ],
)
def test_bad_calls_say_why_and_exit_honestly(argv, code, message, capsys, tiny_llama, tmp_path) -> None:
    places = {"MODEL": str(tiny_llama), "OUT": str(tmp_path / "out")}
    found, _, err = run(capsys, *(places.get(a, a) for a in argv))
    assert found == code
    assert places.get(message, message) in err
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_exit_with_2(capsys) -> None:
    assert run(capsys, "compress", "x", "--recpe", "svd")[0] == 2


def test_dry_run_prints_caps(capsys, tiny_llama, tmp_path) -> None:
    ids = tmp_path / "calib.txt"
    ids.write_text("words\n")
    code, out, _ = run(capsys, "compress", str(tiny_llama), "--recipe", "two_sided", "--keep", "0.5", "--calib", str(ids), "--dry-run")
    assert code == 0
    assert "<= 29" in out  # 48 x 80: rank 30 would store as much as the matrix
