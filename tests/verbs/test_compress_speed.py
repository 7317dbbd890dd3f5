"""What the report says of speed: the nearest measured figures, in words that fit them, and nothing where nothing was measured."""

import json
from pathlib import Path

import pytest
from torch import nn

import eckart as ek
from eckart.verbs.summary import SPEED

FILE = Path(__file__).parents[2] / "bench" / "results" / "speed-cpu.json"
PHASES = ("prefill 1", "prefill 16", "decode 1", "decode 16")


def said(width: int, keep: float, **options) -> str:
    """The sentences for a stack of layers of one width, from the plan alone."""
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    made = ek.compress(net, options.pop("recipe", "svd"), keep, dry_run=True, **options)
    return " ".join(w for w in made.report["warnings"] if "per second" in w)


@pytest.mark.parametrize(
    ("width", "keep", "words"),
    [
        (128, 0.8, "Do not expect it to be faster: on one CPU core, at width 256 in bfloat16, pairs at 80% ran at 0.8 to 1 times"),
        (128, 0.55, "Do not expect it to be faster: on one CPU core, at width 256 in bfloat16, pairs at 60% ran at 0.9 to 1 times"),
        (128, 0.3, "Expect it to be somewhat faster: on one CPU core, at width 256 in bfloat16, pairs at 40% ran at 1.1 to 1.3 times"),
        (1024, 0.8, "Do not expect it to be faster: on one CPU core, at width 2048"),
        (1024, 0.6, "Expect it to be little faster: on one CPU core, at width 2048 in bfloat16, pairs at 60% ran at 1 to 1.2 times"),
    ],
)
def test_the_nearest_figures(width, keep, words) -> None:
    found = said(width, keep)
    assert found.startswith(words)
    assert "--recipe modegpt" in found
    assert "--form dense keeps the old speed" in found
    assert "Integers" not in found


def test_integers_and_what_has_no_figures() -> None:
    assert "Integers save bytes, not time" in said(128, 0.6, quantise="int8")
    assert "int4 was not measured" in said(128, 0.6, quantise="int4")
    assert said(128, 1.0, quantise="int8").startswith("Integers save bytes")
    assert said(1024, 0.6, quantise="int8").endswith("ran at 0.3 to 0.9 times the tokens per second of bfloat16 at width 2048.")
    assert said(128, 0.6, form="dense") == ""
    assert said(128, 1.0) == ""  # all stay dense


def test_ranks_that_are_not_decided_are_taken_at_the_budget(tiny_llama, token_ids) -> None:
    made = ek.compress(tiny_llama, "two_sided", 0.4, calib=token_ids, dry_run=True)
    assert any("pairs at 40% ran at" in w for w in made.report["warnings"])


def test_smaller_matrices_are_not_sent_to_themselves(tiny_llama, token_ids) -> None:
    made = ek.compress(tiny_llama, "modegpt", 0.6, calib=token_ids)
    found = next(w for w in made.report["warnings"] if "per second" in w)
    assert "smaller matrices at 60% ran at 0.9 to 1 times" in found
    assert "--recipe" not in found


@pytest.mark.skipif(not FILE.is_file(), reason="bench/speed.py has not written its results")
def test_the_figures_are_the_measured_ones() -> None:
    """To 0.1, which is what the report says."""
    for name, rows in json.loads(FILE.read_text())["models"].items():
        width = 256 if name.startswith("python-lm") else 2048
        for (what, of), table in SPEED.items():
            for keep, (low, high) in table.items() if of == width and "bfloat16" in name else ():
                keys = [f"{what} {keep:g}"] if what != "int8" else ["int8 dense", "int8 pairs 0.6"]
                ratios = [rows[k][f"{phase} ratio"] for k in keys for phase in PHASES]
                assert low == pytest.approx(min(ratios), abs=0.1), (name, what, keep)
                assert high == pytest.approx(max(ratios), abs=0.1), (name, what, keep)
