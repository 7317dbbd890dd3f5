"""Merge the experts of a tiny mixture of experts that is trained here on real text: Sub-MoE, beside merging without an eye on the routing.

    python examples/sub_moe.py            # a minute or two on one core
    python examples/sub_moe.py --quick    # a few seconds, a weaker model

A Mixtral-shaped model with 8 experts learns bytes of the standard library's source. Then 8 experts become 6 and 4, and the loss on text that it was
not trained on is printed before and after. Merging costs: experts that do different things have no common average.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import eckart as ek

WINDOW = 64
TRAINED = ("argparse.py", "ast.py", "calendar.py", "dataclasses.py", "datetime.py", "difflib.py", "doctest.py", "inspect.py", "typing.py")
HELD = ("textwrap.py", "shlex.py", "statistics.py")


def windows(names: tuple[str, ...]) -> torch.Tensor:
    """(rows, WINDOW) bytes of files of the standard library."""
    text = b"".join((Path(sysconfig.get_path("stdlib")) / n).read_bytes() for n in names)
    return torch.tensor(list(text[: len(text) // WINDOW * WINDOW])).reshape(-1, WINDOW)


def model() -> Any:
    config = MixtralConfig(
        vocab_size=256, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=WINDOW, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.02, output_router_logits=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(config)


def train(net: Any, rows: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    net.train()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (32,), generator=g)]
        loss = net(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def bits(net: Any, rows: torch.Tensor) -> float:
    """Bits per byte."""
    total = 0.0
    for batch in rows.split(64):
        logits = net(input_ids=batch, output_router_logits=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.reshape(-1, 256), batch[:, 1:].reshape(-1), reduction="sum").item()
    return total / rows[:, 1:].numel() / 0.6931471805599453


def main(quick: bool = False) -> dict[str, float]:
    """Trains, merges, prints; returns bits per byte."""
    rows, held = windows(TRAINED), windows(HELD)[: 64 if quick else 512]
    net = model()
    train(net, rows, 20 if quick else 500)
    calib = rows[:: len(rows) // (32 if quick else 256)].tolist()
    found = {"8 experts": bits(net, held)}
    print(f"8 experts          {found['8 experts']:.3f} bits per byte, {net.num_parameters():,} parameters")
    for experts in (6, 4):
        made = ek.compress(net, "sub_moe", experts / 8, calib=calib)
        found[f"{experts} experts"] = bits(made.model, held)
        print(f"{experts} experts, merged  {found[f'{experts} experts']:.3f} bits per byte, {made.model.num_parameters():,} parameters")
    return found


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--quick", action="store_true")
    main(ap.parse_args().quick)
