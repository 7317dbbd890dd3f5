"""A 7B-shaped checkpoint streamed through `eckart compress`, and the plan of a 70B-shaped one: memory, disk, throughput.

    python -m bench.stream --folder /somewhere/with/40GB

The checkpoint is synthetic: bf16 Gaussian matrices whose columns are scaled by a power law, another exponent for each role and depth, so
that spectra decay like those of trained weights. Peak memory is anonymous plus file pages of the whole process, sampled every 20 ms; files
are read with pread, so the page cache does not count. Disk is the source, the output and its work folder, sampled every second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
SHARD = 4 << 30
BLOCKS = (0, 31)  # blocks whose matrices the run with spectra factorises; the others are copied
LIMIT = 2.5 * 2**30


def shapes(config: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """(name, shape, exponent of its spectrum) of every tensor."""
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = d // heads * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], d), 0.1
    roles = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d)}
    roles |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    for layer in range(config["num_hidden_layers"]):
        for number, (role, shape) in enumerate(roles.items()):
            yield f"model.layers.{layer}.{role}.weight", shape, 0.15 + 0.05 * number + 0.2 * layer / config["num_hidden_layers"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (d,), 0.0
    yield "model.norm.weight", (d,), 0.0
    yield "lm_head.weight", (config["vocab_size"], d), 0.1


def write_config(folder: Path, config: dict[str, int]) -> None:
    extra = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config | extra))


def make(folder: Path, config: dict[str, int]) -> None:
    """A checkpoint with values."""
    import torch
    from safetensors.torch import save_file

    from eckart.seeds import generator

    folder.mkdir(parents=True)
    write_config(folder, config)
    base: dict[tuple[int, ...], torch.Tensor] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    index: dict[str, str] = {}
    total = sum(2 * torch.Size(s).numel() for _, s, _ in shapes(config))
    count = -(-total // (SHARD - (512 << 20)))

    def flush() -> None:
        number = len(index_files) + 1
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        index_files.append(name)
        index.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    index_files: list[str] = []
    for number, (name, shape, exponent) in enumerate(shapes(config)):
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            if shape not in base:
                base[shape] = torch.randn(shape, generator=generator(0, str(shape)))
            scale = torch.arange(1, shape[1] + 1).float() ** -exponent
            tensor = (base[shape].roll(number * 17, 0) * (0.02 * scale)).to(torch.bfloat16)
        shards[-1][name] = tensor
        size += 2 * tensor.numel()
        if size > SHARD - (512 << 20):
            flush()
            size = 0
    if shards[-1]:
        flush()
    if len(index_files) != count:  # names carry the count
        for number, old in enumerate(list(index_files), 1):
            new = f"model-{number:05d}-of-{len(index_files):05d}.safetensors"
            (folder / old).rename(folder / new)
            index.update({k: new for k, v in index.items() if v == old})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def make_headers(folder: Path, config: dict[str, int]) -> None:
    """A checkpoint of the right names, shapes and lengths, without values: sparse files."""
    folder.mkdir(parents=True)
    write_config(folder, config)
    groups: list[dict[str, Any]] = [{}]
    offset = 0
    for name, shape, _ in shapes(config):
        size = 2
        for n in shape:
            size *= n
        if offset + size > SHARD:
            groups.append({})
            offset = 0
        groups[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        head = json.dumps({"__metadata__": {"format": "pt"}, **group}).encode()
        head += b" " * (-len(head) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + max(v["data_offsets"][1] for v in group.values()))
        index |= dict.fromkeys(group, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def child(argv: list[str]) -> None:
    """The command line itself, with the time of its parts counted."""
    import hashlib

    spent: dict[str, float] = {}
    lock = threading.Lock()

    def timed(key: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kw: Any) -> Any:
            start = time.perf_counter()
            try:
                return fn(*args, **kw)
            finally:
                with lock:
                    spent[key] = spent.get(key, 0.0) + time.perf_counter() - start

        return wrapper

    class Digest:
        def __init__(self, data: bytes = b"") -> None:
            self.inner = plain(data)
            self.hexdigest = self.inner.hexdigest
            self.digest = self.inner.digest
            self.update = timed("hashing", self.inner.update)

    plain = hashlib.sha256
    hashlib.sha256 = Digest  # type: ignore[assignment, misc]
    from eckart.linalg import weighted
    from eckart.store import _os, files

    files.read_at = timed("reading", files.read_at)
    files.write_at = timed("writing", files.write_at)
    _os.fsync = timed("syncing", _os.fsync)
    weighted.solve = timed("factorising", weighted.solve)
    from eckart.cli import main

    start = time.perf_counter()
    try:
        main(argv)
    finally:
        print("SPENT " + json.dumps(spent | {"all": time.perf_counter() - start}), file=sys.stderr)


def resident(pid: int) -> int:
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return sum(int(fields[k].split()[0]) for k in ("RssAnon", "RssFile")) << 10
    except (OSError, KeyError):
        return 0


def used(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except OSError:
                continue
    return total


def run(argv: list[str], folder: Path) -> dict[str, Any]:
    """One run of the command line in a process of its own, watched."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.stream", "--child", *argv], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    peak = disk = 0
    tick = 0.0

    def watch() -> None:
        nonlocal peak, disk, tick
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            if time.perf_counter() - tick > 1:
                disk, tick = max(disk, used(folder)), time.perf_counter()
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(err[-3000:])
    spent = json.loads(next(line for line in err.splitlines() if line.startswith("SPENT ")).removeprefix("SPENT "))
    return {"seconds": seconds, "peak": peak, "disk": disk, "spent": spent, "out": out}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are made; 40 GB")
    parser.add_argument("--only", default="", help="rank8, water or plan")
    args = parser.parse_args()
    from bench.machine import describe

    folder = args.folder
    seven, seventy = folder / "llama-7b-shaped", folder / "llama-70b-shaped"
    if not seven.exists():
        make(seven, LLAMA_7B)
    if not seventy.exists():
        make_headers(seventy, LLAMA_70B)
    source = used(seven)
    blocks = "|".join(map(str, BLOCKS))
    runs: dict[str, tuple[Path, list[str]]] = {
        "rank8": (seven, ["--recipe", "svd", "--set", "budget.rank=8"]),
        "water": (
            seven,
            [
                "--recipe",
                "svd",
                "--keep",
                "0.8",
                "--set",
                "allocate.kind=water_fill",
                "--set",
                f'target.only=["layers\\\\.({blocks})\\\\."]',
            ],
        ),
        "plan": (seventy, ["--recipe", "svd", "--keep", "0.8", "--dry-run"]),
    }
    path = RESULTS / "stream.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, (model, options) in runs.items():
        if args.only not in ("", name):
            continue
        out = folder / f"out-{name}"
        shutil.rmtree(out, ignore_errors=True)
        argv = ["compress", str(model), *options, "--json", *(["-o", str(out), "--max-memory", "2.5GiB"] if name != "plan" else [])]
        one = run(argv, folder)
        made = json.loads(one.pop("out"))
        plan = made["plan"]
        one |= {"jobs": len(plan["stages"][-1]["jobs"]), "promised": sum(v for k, v in plan["memory"].items() if k != "disk")}
        one |= {"promised_disk": plan["memory"]["disk"], "predicted_seconds": sum(j["seconds"] for s in plan["stages"] for j in s["jobs"])}
        one |= {"source": source if name != "plan" else 0, "output": used(out) if out.exists() else 0, "machine": describe()}
        one["disk"] = one["disk"] - (used(seventy) if name != "plan" else one["disk"])
        found[name] = one
        shutil.rmtree(out, ignore_errors=True)
        print(name, json.dumps({k: v for k, v in one.items() if k != "machine"}), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "stream.md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """The result as a table."""
    gib = 2**30
    lines = ["# Checkpoints larger than memory", "", next(iter(found.values()))["machine"], ""]
    lines += [
        "| run | time | peak memory | promised | disk | throughput | reading | writing, syncing | hashing | factorising |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    titles = {
        "rank8": "7B-shaped, 12.6 GiB, `svd`, rank 8, all 224 matrices",
        "water": f"7B-shaped, `svd`, keep 0.8, water-filling, the 14 matrices of blocks {' and '.join(map(str, BLOCKS))}",
        "plan": "70B-shaped, headers only, the full plan",
    }
    for name, one in found.items():
        spent, all_ = one["spent"], one["spent"]["all"]
        share = {k: f"{spent.get(k, 0) / all_:.0%}" for k in ("reading", "hashing", "factorising")}
        writing = f"{(spent.get('writing', 0) + spent.get('syncing', 0)) / all_:.0%}"
        disk = f"{one['disk'] / gib:.1f} GiB" if one["disk"] > 0 else "-"
        speed = f"{one['source'] / one['seconds'] / 1e6:.0f} MB/s" if one["source"] else "-"
        lines.append(
            f"| {titles[name]} | {one['seconds']:.0f} s | {one['peak'] / gib:.2f} GiB | {one['promised'] / gib:.2f} GiB | {disk} | {speed} "
            f"| {share['reading']} | {writing} | {share['hashing']} | {share['factorising']} |"
        )
    lines += [
        "",
        "Disk is source, output and work folder together at their largest. Shares are of the time inside the process; the rest is copying, checking and start-up.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
