"""Train a mix of two published adapters that neither paper has: EVA's start with KaSA's penalties.

    python examples/adapt_hybrid.py            # half a minute on one core
    python examples/adapt_hybrid.py --quick    # a quarter of a minute

Prints the bits per byte of the bundled model on held-out text of a domain that is new to it (licence texts of installed packages), before and
after, for EVA alone and for the mix.
"""

from __future__ import annotations

import argparse
from importlib.metadata import distribution

import torch

import eckart as ek
from eckart.data import evaluate


def licences(*packages: str) -> list[str]:
    """Their licence files, in pieces of 1500 characters."""
    out: list[str] = []
    for package in packages:
        files = [f for f in distribution(package).files or [] if "LICENSE" in f.name and "dist-info" in str(f)]
        text = min(files, key=str).read_text()
        out += [text[at : at + 1500] for at in range(0, len(text), 1500)]
    return out


def train(model, rows: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    glue = ek.glue(model)  # what a recipe does between steps: here the penalties
    glue.begin(optimizer)
    model.train()
    for step in range(steps):
        batch = rows[step * 4 % len(rows) :][:4]
        model(input_ids=batch, labels=batch).loss.backward()
        glue.before_step()
        optimizer.step()
        glue.after_step()
        optimizer.zero_grad()
    model.eval()


def main(quick: bool = False) -> dict[str, float]:
    texts, kept = licences("numpy", "scipy")[: 16 if quick else None], licences("hypothesis")[: 4 if quick else 8]
    tokenizer = ek.load_tokenizer(ek.demo_model())
    ids = [i for t in texts for i in tokenizer(t).input_ids]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    found = {"before": evaluate.causal(ek.load(ek.demo_model()), tokenizer, kept)["bits_per_byte"]}
    for name, glue in (("eva", []), ("eva with kasa's penalties", ["kasa"])):
        model = ek.adapt(ek.load(ek.demo_model(), dtype=torch.float32), "eva", rank=8, glue=glue, calib=texts[:8], seed=0)
        train(model, rows, steps=30 if quick else 60)
        found[name] = evaluate.causal(model, tokenizer, kept)["bits_per_byte"]
    for name, bits in found.items():
        print(f"{name:28} {bits:.4f} bits per byte")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
