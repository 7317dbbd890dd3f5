"""The same plan gives the same bytes on every engine, with any number of workers, and after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eckart as ek
from eckart.engine import Local
from eckart.errors import Refused, UsageError

NOTES = {"run.json", "report.html"}
RUNS = {
    "svd": ["--recipe", "svd", "--keep", "0.6", "--set", "allocate.kind=water_fill"],
    "svd_llm": ["--recipe", "svd_llm", "--keep", "0.6"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with grouped-query attention, and text for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("engines") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (ek.demo_model() / name).is_file():
            shutil.copy(ek.demo_model() / name, folder / name)
    shutil.copy(ek.demo_model() / "calibration.jsonl", folder.parent / "calibration.jsonl")
    return folder


def arguments(source: Path, out: Path, run: str) -> list[str]:
    lines = (source.parent / "calibration.jsonl").read_text().splitlines()[:6]
    text = source.parent / "few.jsonl"
    text.write_text("\n".join(lines) + "\n")
    calib = ["--calib", str(text), "--batch-size", "2", "--max-length", "64"] if run == "svd_llm" else []
    return ["compress", str(source), "-o", str(out), *RUNS[run], *calib, "--threads", "1", "--quiet"]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in NOTES)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def call(argv: list[str], *before: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run([sys.executable, *before, "-m", "eckart", *argv], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """One worker, never interrupted."""
    out = tmp_path_factory.mktemp("reference")
    for run in RUNS:
        call(arguments(source, out / run, run))
    return {run: digests(out / run) for run in RUNS}


@pytest.mark.parametrize("run", list(RUNS))
def test_two_threads_of_jobs(source, reference, tmp_path, run) -> None:
    call([*arguments(source, tmp_path / "out", run), "--workers", "2"])
    assert digests(tmp_path / "out") == reference[run]


@pytest.mark.parametrize("run", list(RUNS))
def test_two_ranks_of_torchrun(source, reference, tmp_path, run) -> None:
    argv = [*arguments(source, tmp_path / "out", run), "--engine", "torchrun"]
    call(argv, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    assert digests(tmp_path / "out") == reference[run]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left beside the output"


def test_statistics_by_blocks_are_read_by_all_ranks(source, reference, tmp_path) -> None:
    argv = [*arguments(source, tmp_path / "out", "svd_llm"), "--engine", "torchrun", "--calibrate", "blocks"]
    call(argv, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    assert digests(tmp_path / "out") == reference["svd_llm"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left beside the output"


@pytest.mark.parametrize("run", list(RUNS))
def test_two_workers_of_ray(source, reference, tmp_path, run) -> None:
    pytest.importorskip("ray")
    call([*arguments(source, tmp_path / "out", run), "--engine", "ray", "--workers", "2"])
    assert digests(tmp_path / "out") == reference[run]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left beside the output"


@pytest.mark.parametrize("run", list(RUNS))
def test_killed_and_resumed_by_another_engine(source, reference, tmp_path, run) -> None:
    argv = arguments(source, tmp_path / "out", run)
    child = subprocess.Popen([sys.executable, "-m", "eckart", *argv], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while child.poll() is None and not any(_lines(p) >= 3 for p in tmp_path.glob("out.partial-*/journal.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    call([*argv, "--workers", "2"])
    assert digests(tmp_path / "out") == reference[run]


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_a_finished_output_is_recognised_and_another_run_is_refused(source, tmp_path) -> None:
    first = ek.compress(source, "svd", 0.6, out=tmp_path / "out", threads=1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = ek.compress(source, "svd", 0.6, out=tmp_path / "out", threads=1)
    assert again.path == first.path
    assert again.report["sizes"] == json.loads((tmp_path / "out/report.json").read_text())["sizes"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(Refused, match="overwrite"):
        ek.compress(source, "svd", 0.5, out=tmp_path / "out", threads=1)


def test_a_plan_beyond_the_memory_limit_is_refused_before_anything_is_written(source, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"--max-memory: 10.0 MiB is less than this run takes beside the program.*jobs"):
        ek.compress(source, "svd", 0.6, out=tmp_path / "out", max_memory="10MiB")
    with pytest.raises(UsageError, match="expected a size such as"):
        ek.compress(source, "svd", 0.6, out=tmp_path / "out", max_memory="many")
    assert list(tmp_path.iterdir()) == []


def test_engines_that_run_elsewhere_need_a_folder(source, monkeypatch) -> None:
    class Elsewhere(Local):
        remote = True  # type: ignore[assignment]

    with pytest.raises(UsageError, match="needs a checkpoint folder"):
        ek.compress(source, "svd", 0.6, engine=Elsewhere())


def test_another_number_of_threads_is_another_run(source) -> None:
    one = ek.compress(source, "svd", 0.6, dry_run=True, threads=1).plan
    assert one.threads == 1
    assert one.fingerprint != ek.compress(source, "svd", 0.6, dry_run=True, threads=2).plan.fingerprint
    with pytest.raises(UsageError, match="threads"):
        ek.compress(source, "svd", 0.6, dry_run=True, threads=0)
