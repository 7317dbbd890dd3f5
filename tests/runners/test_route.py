"""`compress` with one block in memory: same bytes, chosen when it should be, refused or left aside with a reason, resumed after a kill."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import eckart as ek
from eckart.errors import UsageError
from eckart.plan import Plan
from eckart.runners import blocks
from eckart.runners.budget import PROGRAM, fitted, refuse_beyond
from eckart.runners.jobs import Context
from eckart.verbs.host import FolderHost
from tests.runners.chains import VOCAB, make

NOTES = {"run.json", "report.html"}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in NOTES)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts(count: int = 24) -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCAB, (16 + i % 9,), generator=g).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("route") / "model")


def notes(made: Any) -> str:
    return " ".join(n["text"] for n in made.report.get("notes", []))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("svd_llm", ()),
        ("basis_sharing", ()),
        ("svd_llm_v2", ()),
        ("swift_svd", ()),
    ],
)
def test_the_same_bytes_as_with_the_whole_model(recipe, settings, llama, tmp_path) -> None:
    made = {}
    for how in ("whole", "blocks"):
        made[how] = ek.compress(llama, recipe, 0.5, calib=texts(), settings=settings, out=tmp_path / how, calibrate=how)
    assert digests(tmp_path / "whole") == digests(tmp_path / "blocks")
    assert "block by block" in notes(made["blocks"])
    assert not notes(made["whole"])
    again = ek.compress(llama, recipe, 0.5, calib=texts(), settings=settings, out=tmp_path / "whole", calibrate="blocks")
    assert again.path == tmp_path / "whole", "a finished output is recognised whoever measured"


def test_experts_of_a_mixture(tmp_path) -> None:
    folder = make("mixtral", tmp_path / "model")
    for how in ("whole", "blocks"):
        ek.compress(folder, "sub_moe", 0.5, calib=texts(), out=tmp_path / how, calibrate=how)
    assert digests(tmp_path / "whole") == digests(tmp_path / "blocks")


def test_auto_takes_the_whole_model_while_it_fits(llama) -> None:
    def route(**options: Any) -> tuple[str, Plan]:
        made = ek.compress(llama, "svd_llm", 0.5, calib=texts(), dry_run=True, **options)
        return notes(made), made.plan

    said, plan = route()
    assert not said
    assert "model" in plan.memory
    said, plan = route(max_memory="8GiB")
    assert not said
    assert {"model", "activations", "statistics"} <= plan.memory.keys()
    said, less = route(max_memory=plan.peak - 1)
    assert "block by block for --max-memory" in said
    assert less.peak < plan.peak
    assert "calibration" in less.memory
    said, _ = route(calibrate="whole", max_memory=plan.peak - 1)
    assert "block by block" not in said
    assert "block by block:" in route(calibrate="blocks")[0]


def test_the_plan_is_below_the_limit_or_refused(llama) -> None:
    call: dict[str, Any] = {"calib": texts(), "dry_run": True, "calibrate": "blocks"}
    free = ek.compress(llama, "svd_llm", 0.5, **call).plan
    beside = free.peak - PROGRAM
    tight = ek.compress(llama, "svd_llm", 0.5, max_memory=beside - 1, **call)
    assert tight.plan.peak - PROGRAM <= beside - 1, "activations go to disk"
    assert tight.plan.memory["disk"] > free.memory["disk"]
    assert any("kept beside Python and its libraries" in w for w in tight.report["warnings"])
    with pytest.raises(UsageError, match=r"--max-memory: .* is less than this run takes beside the program, .*calibration"):
        ek.compress(llama, "svd_llm", 0.5, max_memory="1MiB", **call)


def test_what_cannot_be_walked_falls_back_and_says_so(tmp_path) -> None:
    folder = make("albert", tmp_path / "model")
    limit = ek.compress(folder, "svd_llm", 0.5, calib=texts(), dry_run=True, calibrate="whole", max_memory="8GiB").plan.peak - 1
    made = ek.compress(folder, "svd_llm", 0.5, calib=texts(), out=tmp_path / "auto", max_memory=limit)
    (said,) = [w for w in made.report["warnings"] if "Block by block it cannot be" in w]
    assert "not called once each" in said
    assert said in notes(made)
    ek.compress(folder, "svd_llm", 0.5, calib=texts(), out=tmp_path / "whole", calibrate="whole")
    assert digests(tmp_path / "auto") == digests(tmp_path / "whole"), "no word of it is in files that are compared"
    assert said in (tmp_path / "auto/report.html").read_text().replace("&#x27;", "'")
    assert said not in (tmp_path / "auto/report.json").read_text()
    with pytest.raises(UsageError, match=r"cannot be calibrated block by block: .*not called once each.*Use --calibrate auto or whole"):
        ek.compress(folder, "svd_llm", 0.5, calib=texts(), calibrate="blocks")


@pytest.mark.parametrize(
    ("recipe", "reason"), [("two_sided", "gradients, which run through the whole model"), ("dobi_svd", "losses of the whole model")]
)
def test_recipes_that_need_the_whole_model_say_so(recipe, reason, llama) -> None:
    with pytest.raises(UsageError, match=reason):
        ek.compress(llama, recipe, 0.5, calib=texts(), calibrate="blocks", dry_run=True)
    with pytest.raises(UsageError, match=rf"--max-memory: .*Block by block it cannot be: .*{reason}"):
        ek.compress(llama, recipe, 0.5, calib=texts(), max_memory="1MiB", dry_run=True)


def test_wrong_calls(llama, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"calibrate: expected auto, whole, blocks, found 'block'. Did you mean 'blocks'"):
        ek.compress(llama, "svd_llm", 0.5, calib=texts(), calibrate="block")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="in memory already"):
        ek.compress(ek.load(llama), "svd_llm", 0.5, calib=texts(), calibrate="blocks")
    plain = ek.compress(llama, "svd", 0.5, calibrate="blocks", out=tmp_path / "svd")
    assert not notes(plain), "nothing is measured"


def test_two_blocks_of_statistics_never_lie_in_memory_together(llama, tmp_path, monkeypatch) -> None:
    """And none when the plan has a first wave: they lie on disk then."""
    sweep, cut = blocks.sweep, Context.cut
    held: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        for step in sweep(*args, **options):
            gc.collect()
            alive.append(sum(r() is not None for r in held))
            assert step.stats is not None
            held.extend(weakref.ref(v.gram) for v in step.stats.values.values())
            yield step

    def cutting(self: Context, *args: Any) -> Any:
        calls.append(sum(r() is not None for r in held))
        return cut(self, *args)

    calls: list[int] = []
    monkeypatch.setattr(blocks, "sweep", watched)
    monkeypatch.setattr(Context, "cut", cutting)
    ek.compress(llama, "svd_llm", 0.5, calib=texts(), out=tmp_path / "a", calibrate="blocks")
    assert alive == [0, 0, 0]
    assert set(calls) == {4}, "each job has the four Grams of its block"
    held.clear()
    calls.clear()
    ek.compress(llama, "svd_llm_v2", 0.5, calib=texts(), out=tmp_path / "b", calibrate="blocks")
    assert set(calls) == {0}


def test_statistics_are_kept_in_the_same_file(llama, tmp_path) -> None:
    for how in ("whole", "blocks"):
        ek.compress(llama, "svd_llm", 0.5, calib=texts(), out=tmp_path / how, stats=tmp_path / f"{how}.safetensors", calibrate=how)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "blocks.safetensors").read_bytes()
    ek.compress(llama, "svd_llm", 0.5, calib=texts(), out=tmp_path / "read", stats=tmp_path / "whole.safetensors", calibrate="blocks")
    assert digests(tmp_path / "read") == digests(tmp_path / "whole")


def test_the_live_model_is_never_loaded(llama, tmp_path, monkeypatch) -> None:
    def live(self: FolderHost) -> Any:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(FolderHost, "live", live)
    for name, options in {
        "a": {},
        "b": {"settings": ("metric.inputs=propagated",)},
        "c": {"settings": ("allocate.kind=water_fill",)},
    }.items():
        ek.compress(llama, "svd_llm", 0.5, calib=texts(), out=tmp_path / name, calibrate="blocks", **options)
    ek.compress(make("gpt2", tmp_path / "gpt2"), "modegpt", 0.7, calib=texts(), out=tmp_path / "d", calibrate="blocks")


def test_a_propagated_result_in_memory_equals_the_one_on_disk(llama, tmp_path) -> None:
    call: dict[str, Any] = {"calib": texts(), "settings": ("metric.inputs=propagated",)}
    memory: Any = ek.compress(llama, "svd_llm", 0.5, **call).model
    folder = ek.compress(llama, "svd_llm", 0.5, out=tmp_path / "out", **call).path
    assert folder is not None
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(memory(ids).logits, ek.load(folder)(ids).logits)


PROGRAM_TEXT = """
import json, os, signal, sys
import eckart as ek
from eckart.store import writer
at, count, put = int(sys.argv[1]), 0, writer.Writer.put
def counted(self, *args, **options):
    global count
    put(self, *args, **options)
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
writer.Writer.put = counted
model, out, settings, texts = json.loads(sys.argv[2])
ek.compress(model, "svd_llm", 0.5, calib=texts, out=out, settings=settings, calibrate="blocks", threads=1)
"""


@pytest.mark.parametrize("settings", [(), ("metric.inputs=propagated",)])
def test_killed_in_the_middle_of_a_block_and_resumed(settings, llama, tmp_path) -> None:
    out = tmp_path / "out"
    argv = [sys.executable, "-c", PROGRAM_TEXT, "10", json.dumps([str(llama), str(out), settings, texts()])]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (journal,) = tmp_path.glob("out.partial-*/journal.jsonl")
    assert journal.read_bytes().count(b"\n") == 10, "a block and a half are stored"
    began = time.time_ns()
    measured: list[set[int]] = []
    sweep = blocks.sweep

    def watched(*args: Any, **options: Any) -> Any:
        measured.append(set(options["skip"]))
        return sweep(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "sweep", watched)
        ek.compress(llama, "svd_llm", 0.5, calib=texts(), out=out, settings=settings, calibrate="blocks", threads=1)
    assert measured == [set() if settings else {0}], "the first block is not measured again, where nothing passes through it"
    ek.compress(llama, "svd_llm", 0.5, calib=texts(), out=tmp_path / "once", settings=settings, threads=1)
    assert digests(out) == digests(tmp_path / "once")
    assert all(p.stat().st_mtime_ns > began for p in out.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once", "out"]


def test_bases_are_kept_as_far_as_the_limit_leaves_room_for_them(llama) -> None:
    plan = ek.compress(llama, "svd_llm_v2", 0.5, calib=texts(), dry_run=True).plan
    full = fitted(plan, workers=1, cache=1 << 30, parts={}, disk=0, limit=None)
    bases = full.memory["bases"]
    assert fitted(plan, workers=1, cache=1 << 30, parts={}, disk=0, limit=full.peak).memory["bases"] == bases
    less = fitted(plan, workers=1, cache=1 << 30, parts={}, disk=0, limit=full.peak - 1000)
    assert less.memory["bases"] == bases - 1000
    assert "bases" not in fitted(plan, workers=1, cache=1 << 30, parts={}, disk=0, limit=1 << 20).memory
    refuse_beyond(less, full.peak - 1000, None)
    with pytest.raises(UsageError, match=r"takes beside the program, .* Because\. Try"):
        refuse_beyond(less, 1 << 20, None, "Because.")
