"""Train the small language model that ships in `eckart/assets/python-lm` on Python's own standard library and documentation.

    python scripts/train_lm.py --docs /usr/share/doc/python3.11/html/_sources --work build/lm --steps 2400

`--docs` is a folder of reStructuredText sources (Debian's `python3.11-doc` ships one). Files are split by the hash of their path
into train, calibration and held-out text, so that no file is in two of them. `--resume` continues from `WORK/state.safetensors`.
The result is a plain Hugging Face folder in bf16 beside `calibration.jsonl` and `heldout.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, CONTEXT = 4096, 512
SKIP_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "lib2to3"}
SHIPPED_BYTES = 400_000  # of calibration text, and as much of held-out text


def corpus(docs: Path | None) -> list[tuple[str, str]]:
    """(name, text) of every file, sorted by name."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [("lib/" + str(p.relative_to(stdlib)), p) for p in stdlib.rglob("*.py") if not SKIP_FOLDERS & set(p.relative_to(stdlib).parts)]
    if docs:
        files += [("doc/" + str(p.relative_to(docs)), p) for p in docs.rglob("*.rst.txt")]
    out = []
    for name, path in sorted(files):
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if len(text) >= 400:
            out.append((name, text))
    return out


def split(name: str) -> str:
    """Which part a file belongs to: 3% calibration, 3% held out, by the hash of its path."""
    h = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "calibration" if h < 0.03 else "heldout" if h < 0.06 else "train"


def shipped(texts: list[str], limit: int = SHIPPED_BYTES, piece: int = 4000) -> list[str]:
    """Pieces of about `piece` characters, taken from every file in turn until `limit` bytes."""
    queues = []
    for text in texts:
        lines, parts, size = text.splitlines(keepends=True), [[]], 0
        for line in lines:
            parts[-1].append(line)
            size += len(line)
            if size >= piece:
                parts.append([])
                size = 0
        queues.append(["".join(p) for p in parts if sum(map(len, p)) >= 400])
    out, total = [], 0
    for row in range(max(map(len, queues))):
        for queue in queues:
            if row < len(queue) and total < limit:
                out.append(queue[row])
                total += len(queue[row].encode())
    return out


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tok.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tok.token_to_id("<|bos|>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", model_max_length=CONTEXT
    )


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, rms_norm_eps=1e-6,
    )  # fmt: skip


def bits_per_byte(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Every text on its own, behind BOS, in windows of the context length: bits of all its tokens over its UTF-8 bytes."""
    bits, size = 0.0, 0
    model.eval()
    with torch.no_grad():
        for text in texts:
            ids = tok(text, add_special_tokens=False)["input_ids"]
            for at in range(0, len(ids), CONTEXT - 1):
                window = torch.tensor([[tok.bos_token_id, *ids[at : at + CONTEXT - 1]]])
                logits = model(window).logits[0, :-1].float()
                bits += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item() / math.log(2)
            size += len(text.encode())
    model.train()
    return bits / size


def baselines(texts: list[str], train: list[str], tok: PreTrainedTokenizerFast) -> dict[str, float]:
    """gzip of the held-out text as one file, and a unigram over the same tokens with counts from the training text."""
    raw = "".join(texts).encode()
    counts: Counter[int] = Counter()
    for t in train:
        counts.update(tok(t, add_special_tokens=False)["input_ids"])
    total = sum(counts.values()) + VOCAB
    bits = sum(-math.log2((counts[i] + 1) / total) for t in texts for i in tok(t, add_special_tokens=False)["input_ids"])
    return {"gzip": 8 * len(zlib.compress(raw, 9)) / len(raw), "unigram": bits / len(raw)}


def batches(stream: torch.Tensor, size: int, steps: int, seed: int):
    """Windows of the token stream, a new seeded order every epoch."""
    count = len(stream) // (CONTEXT + 1)
    done, epoch = 0, 0
    while done < steps:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        for at in range(0, count - size + 1, size):
            rows = [stream[i * (CONTEXT + 1) : (i + 1) * (CONTEXT + 1)] for i in order[at : at + size].tolist()]
            yield torch.stack(rows).long()
            done += 1
            if done == steps:
                return
        epoch += 1


def card(result: dict[str, float]) -> str:
    """The model card."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [eckart, llama]
---
# python-lm

A small language model of Python source and documentation: Llama architecture with grouped-query attention (8 heads, 2 key/value heads),
6 layers of width 256, a byte-level BPE of 4096 tokens, tied embeddings, {result["parameters"]:,} parameters in bf16. It exists so that
compression can be tried and tested on a real model without a download. It is no assistant, and its code is not to be trusted.

| on held-out text | bits per byte |
|---|---|
| this model (bf16) | {result["heldout_bits_per_byte"]:.3f} |
| gzip -9, the held-out text as one file | {result["gzip"]:.3f} |
| unigram over the same tokens | {result["unigram"]:.3f} |

- Trained by `scripts/train_lm.py` on CPython's standard library (without tests) and documentation sources, {result["train_tokens"]:,} tokens;
  {result["tokens_seen"]:,} tokens seen, about {result["tokens_seen"] / result["train_tokens"]:.1f} passes.
- Files are split by the hash of their path: 94% training, 3% calibration, 3% held out. `calibration.jsonl` and `heldout.jsonl` hold
  about 400 kB of each, so neither was trained on, and they share no file.
- Measured with BOS in front of every window of {CONTEXT} tokens; every token is predicted once; bytes are UTF-8 bytes of the text.
- The texts are Copyright the Python Software Foundation, under the PSF License Version 2.
"""


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--docs", type=Path)
    ap.add_argument("--work", type=Path, required=True)
    ap.add_argument("--steps", type=int, default=2400)
    ap.add_argument("--decay", type=float, default=0.4, help="share of the steps, at the end, over which the rate falls to zero")
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--resume", action="store_true")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    parts: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    for name, text in corpus(args.docs):
        parts[split(name)].append(text)
    calibration, heldout = shipped(parts["calibration"]), shipped(parts["heldout"])
    out = args.work / "python-lm"
    out.mkdir(exist_ok=True)
    for part, texts in (("calibration", calibration), ("heldout", heldout)):
        (out / f"{part}.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    tok = make_tokenizer(parts["train"])
    tok.save_pretrained(out)
    stream = torch.tensor([i for t in parts["train"] for i in [1, *tok(t, add_special_tokens=False)["input_ids"], 2]], dtype=torch.int16)
    base = baselines(heldout, parts["train"], tok)
    print(
        f"{sum(len(t.encode()) for t in parts['train']):,} bytes, {len(stream):,} tokens; held out {sum(len(t.encode()) for t in heldout):,} bytes; {base}",
        flush=True,
    )

    model = LlamaForCausalLM(config())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original")
    adam = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    peak = [(g, g["lr"]) for o in (muon, adam) for g in o.param_groups]
    start, state = 0, args.work / "state.safetensors"
    if args.resume:  # optimiser moments are not kept: they are rebuilt within tens of steps, the rate schedule goes on
        saved = load_file(state)
        start = int(saved.pop("step"))
        model.load_state_dict(saved, strict=False)
    began, mean = time.time(), 0.0
    for step, rows in enumerate(batches(stream, args.batch, args.steps, args.seed)):
        if step < start:
            continue
        rate = min(1.0, (step + 1 - start) / 50, (args.steps - step) / (args.decay * args.steps))
        for group, lr in peak:
            group["lr"] = lr * rate
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        mean = loss.item() if step == start else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 20 == 0:
            print(
                f"step {step + 1}/{args.steps} loss {mean:.3f} {(step + 1 - start) * args.batch * CONTEXT / (time.time() - began):.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            weights = {n: p.detach().clone() for n, p in model.named_parameters()}
            save_file({**weights, "step": torch.tensor(step + 1)}, state)
    model.to(torch.bfloat16).save_pretrained(out)
    model.float()
    result = {
        "parameters": model.num_parameters(),
        "tokens_seen": args.steps * args.batch * CONTEXT,
        "train_tokens": len(stream),
        "heldout_bits_per_byte": bits_per_byte(model, tok, heldout),
        **base,
    }
    (args.work / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "README.md").write_text(card(result), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
