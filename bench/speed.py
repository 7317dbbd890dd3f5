"""Tokens per second and memory of compressed language models, beside the dense one: prefill and decode, batch 1 and 16.

    python -m bench.speed             # writes bench/results/speed-cpu.json and .md
    python -m bench.speed --dtypes bfloat16,float32    # the random shape in both types; an hour on one core
    python -m bench.speed --quick     # the bundled model alone, few repeats, writes nothing
    python -m bench.speed --device cuda    # a random shape of width 4096 on the GPU; writes bench/results/speed-cuda

Models: the bundled one as `eckart compress` writes it, and a random Llama shape (width 2048, 4 layers; speed does not depend on the values), whose
factors have the ranks of a uniform allocation. Variants: pairs at keep 0.8, 0.6 and 0.4; smaller dense matrices of the same share, as MoDeGPT leaves
them (narrower MLP and heads); int8 dense and int8 pairs through torchao, without a compiler. Every variant of a model runs in a process of its
own, opened by `ek.load`. Prefill: one forward pass over a prompt; decode: one token after the other behind it, with the cache. Memory: the most
that is resident from the load on, over what the process had before. On a GPU all variants run in one process, memory is that of
the device, and every step is launched by itself, as `generate` does without a compiler. With one thread (the default) seconds are those of the processor that the
process used, which other work on the machine does not stretch; with more they are those of the clock. Rounds go through all variants in turn; figures are medians over all repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.8, 0.6, 0.4)
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # for a GPU
PROMPT, STEPS = 128, 16
BATCHES = (1, 16)


def wide(dtype: Any, keep: float = 1.0, shape: dict[str, int] = WIDE, device: str = "cpu") -> Any:
    """A random Llama shape; with `keep`, MLP and heads narrower by that share."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = shape["hidden_size"] // shape["num_attention_heads"]
    step = 2 if device == "cpu" else 8  # tensor cores want multiples of 8
    own = shape | {
        "intermediate_size": step * round(shape["intermediate_size"] * keep / step),
        "head_dim": step * round(heads * keep / step),
    }
    config = LlamaConfig(**own, vocab_size=4096, max_position_embeddings=1024, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    g = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, device=device) * (0.02 if p.ndim > 1 else 0.0) + (p.ndim == 1))
    return model.eval()


def linears(model: Any) -> list[str]:
    import torch

    return [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]


def factor(model: Any, keep: float) -> None:
    """Random pairs of the rank that stores the share, in the place of every linear layer of the blocks."""
    import torch

    from eckart.nn import LowRankLinear
    from eckart.nn.surgery import replace_linear

    device = next(model.parameters()).device
    g = torch.Generator(device).manual_seed(1)
    for name in linears(model):
        old = model.get_submodule(name)
        m, n = old.weight.shape
        rank = int(keep * m * n / (m + n))
        rank -= rank % 8 if device.type == "cuda" else 0
        up, down = (torch.randn(s, generator=g, device=device).to(old.weight.dtype) * 0.02 for s in ((m, rank), (rank, n)))
        replace_linear(model, name, LowRankLinear.from_factors(up, down))


def integers(model: Any) -> None:
    """Every linear layer of the blocks, and every factor, in int8."""
    from eckart.nn.quantised import QuantisedLinear
    from eckart.nn.surgery import put

    for name in linears(model):
        put(model, name, QuantisedLinear.from_linear(model.get_submodule(name), "int8"))


def bundled_variants(folder: Path) -> dict[str, Path]:
    """The bundled model in all variants, as folders."""
    import eckart as ek

    path = ek.demo_model()
    calib = [json.loads(x)["text"] for x in (path / "calibration.jsonl").read_text().splitlines()[:8]]
    out = {"dense": path}
    for keep in RATIOS:
        out[f"pairs {keep:g}"] = ek.compress(path, "svd", keep, out=folder / f"pairs{keep}").path
        out[f"smaller dense {keep:g}"] = ek.compress(path, "modegpt", keep, calib=calib, out=folder / f"smaller{keep}").path
    out["int8 dense"] = ek.compress(path, "svd", 1.0, out=folder / "int8", quantise="int8").path
    out["int8 pairs 0.6"] = ek.compress(path, "svd", 0.6, out=folder / "int8pairs", quantise="int8").path
    return out


def wide_variants(folder: Path, dtype: Any) -> dict[str, Path]:
    """The random shape in all variants, as folders."""
    from eckart.hub.attach import attach

    steps: dict[str, tuple[float, Callable[[Any], None] | None]] = {"dense": (1.0, None)}
    for keep in RATIOS:
        steps[f"pairs {keep:g}"] = (1.0, lambda m, keep=keep: factor(m, keep))
        steps[f"smaller dense {keep:g}"] = (keep, None)
    steps["int8 dense"] = (1.0, integers)
    steps["int8 pairs 0.6"] = (1.0, lambda m: (factor(m, 0.6), integers(m)))
    out = {}
    for name, (keep, change) in steps.items():
        model = wide(dtype, keep)
        if change is not None:
            change(model)
            attach(model)
        out[name] = folder / name.replace(" ", "-")
        model.save_pretrained(out[name])
    return out


def resident(key: str) -> int:
    """Bytes, from the kernel."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def child(path: str, threads: int, repeats: int) -> dict[str, Any]:
    """Times and memory of one folder, in a process that has done nothing else."""
    import torch

    import eckart as ek
    from eckart.nn.quantised import torchao

    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    torchao()
    wide(torch.bfloat16, 1 / 8)(input_ids=torch.zeros(1, 4, dtype=torch.long))  # imports and work spaces of torch are no model's
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = ek.load(path)
    out: dict[str, Any] = {"bytes": sum(f.stat().st_size for f in Path(path).glob("*.safetensors")), "times": timed(model, clock, repeats)}
    out["memory"] = resident("VmHWM") - before
    return out


def timed(model: Any, clock: Callable[[], float], repeats: int) -> dict[str, list[float]]:
    """{phase and batch: tokens per second of each repeat}."""
    import torch

    times: dict[str, list[float]] = {}
    for batch in BATCHES:
        g = torch.Generator().manual_seed(batch)
        ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT), generator=g).to(model.device)
        found: dict[str, list[float]] = {"prefill": [], "decode": []}
        with torch.inference_mode():
            for at in range(repeats + 1):
                began = clock()
                state = model(input_ids=ids, use_cache=True, logits_to_keep=1)
                middle = clock()
                token = state.logits[:, -1:].argmax(-1)
                for _ in range(STEPS):
                    state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True)
                    token = state.logits[:, -1:].argmax(-1)
                done = clock()
                if at:  # the first one warms up
                    found["prefill"].append(batch * PROMPT / (middle - began))
                    found["decode"].append(batch * STEPS / (done - middle))
        for phase, values in found.items():
            times[f"{phase} {batch}"] = values
    return times


def measure(variants: dict[str, Path], threads: int, repeats: int, rounds: int) -> dict[str, dict[str, Any]]:
    """{variant: medians, ratios to dense, memory}."""
    runs: dict[str, list[dict[str, Any]]] = {n: [] for n in variants}
    for _ in range(rounds):
        for name, path in variants.items():
            command = [sys.executable, "-m", "bench.speed", "--child", str(path), "--threads", str(threads), "--repeats", str(repeats)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return medians(runs)


def on_gpu(repeats: int, rounds: int) -> dict[str, dict[str, Any]]:
    """The large shape in all variants, in this process, in turn."""
    import torch

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    steps: dict[str, tuple[float, Callable[[Any], None] | None]] = {"dense": (1.0, None)}
    for keep in RATIOS:
        steps[f"pairs {keep:g}"] = (1.0, lambda m, keep=keep: factor(m, keep))
        steps[f"smaller dense {keep:g}"] = (keep, None)
    runs: dict[str, list[dict[str, Any]]] = {n: [] for n in steps}
    for _ in range(rounds):
        for name, (keep, change) in steps.items():
            model = wide(torch.bfloat16, keep, LARGE, "cuda")
            if change is not None:
                change(model)
            torch.cuda.reset_peak_memory_stats()
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            times = timed(model, clock, repeats)
            runs[name].append({"bytes": size, "times": times, "memory": torch.cuda.max_memory_allocated()})
            del model
            torch.cuda.empty_cache()
    return medians(runs)


def medians(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """{variant: medians, ratios to dense, memory}."""
    out: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        row: dict[str, Any] = {"bytes": found[0]["bytes"], "memory": statistics.median(f["memory"] for f in found)}
        for key in found[0]["times"]:
            row[key] = statistics.median(v for f in found for v in f["times"][key])
            row[f"{key} ratio"] = row[key] / (out["dense"][key] if name != "dense" else row[key])
        out[name] = row
        print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
    return out


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    keys = [f"{phase} {batch}" for phase in ("prefill", "decode") for batch in BATCHES]
    head = " | ".join(f"{k.split()[0]}, batch {k.split()[1]}" for k in keys)
    text = f"## {title}\n\n| | file | {head} | memory |\n|---|{'---|' * (len(keys) + 2)}\n"
    for name, row in rows.items():
        cells = " | ".join(f"{row[k]:,.0f} ({row[f'{k} ratio']:.2f})" for k in keys)
        text += f"| {name} | {row['bytes'] / 2**20:,.1f} MiB | {cells} | {row['memory'] / 2**20:,.0f} MiB |\n"
    return text + "\n"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--rounds", type=int, default=2)
    ap.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ap.add_argument("--dtypes", default="bfloat16", help="of the random shape, a comma list: bfloat16, float32")
    ap.add_argument("--child", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.threads, args.repeats)))
        return
    import torch

    from bench.machine import describe, processor

    torch.set_num_threads(args.threads)
    rounds = 1 if args.quick else args.rounds
    found: dict[str, Any] = {}
    if args.device == "cuda":
        found["random Llama shape of width 4096, 8 layers, bfloat16"] = on_gpu(args.repeats, rounds)
        write(found, args, processor("cuda"), describe("torchao", device="cuda"))
        return
    with tempfile.TemporaryDirectory() as folder:
        found["python-lm, bfloat16"] = measure(bundled_variants(Path(folder)), args.threads, args.repeats, rounds)
    for name in () if args.quick else args.dtypes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found[f"random Llama shape, {name}"] = measure(
                wide_variants(Path(folder), getattr(torch, name)), args.threads, args.repeats, rounds
            )
    write(found, args, processor(), describe("torchao"))


def write(found: dict[str, Any], args: argparse.Namespace, machine: str, words: str) -> None:
    """The result files, but for --quick."""
    from bench.machine import versions

    where = "a CPU" if args.device == "cpu" else "a GPU"
    text = f"# Speed and memory on {where}\n\nTokens per second, and in brackets the ratio to dense. Prompt of {PROMPT} tokens, {STEPS} tokens decoded. {words}\n\n"
    text += "".join(table(t, rows) for t, rows in found.items())
    print(text)
    if not args.quick:
        facts = {"processor": machine, "threads": args.threads, "versions": versions("torchao")}
        (RESULTS / f"speed-{args.device}.json").write_text(json.dumps({"machine": facts, "models": found}, indent=1) + "\n")
        (RESULTS / f"speed-{args.device}.md").write_text(text)


if __name__ == "__main__":
    main()
