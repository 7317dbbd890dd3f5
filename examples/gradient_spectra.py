"""Two sets of training texts by the spectra of their gradients: the protocol of arXiv:2504.10766 with groups of equal length.

    python examples/gradient_spectra.py

A pair is a prompt and a response. Only the response enters the loss; prompt and response are tokenised apart, so that its first token is
certain. Pairs whose responses differ by more than a tenth in length are left out, because nuclear norms follow the length. The paper
expects better data to have a lower nuclear norm and a higher effective rank.

Here the two sets are held-out Python sources for the bundled model, and the same sources with the lines of the response shuffled. For
instructions against reasoning, give two lists of your own pairs to `compare`.
"""

import math
import random
from collections.abc import Sequence

import torch

import eckart as ek
from eckart.data import Batch, load_texts
from eckart.measures.base import ModelView
from eckart.registry import get_object
from eckart.verbs.host import open_host

Pair = tuple[str, str]


def encode(pair: Pair, tokenizer, longest: int) -> Batch:
    """Token ids of prompt and response, with weight 0 on the prompt."""
    prompt = tokenizer(pair[0])["input_ids"]
    response = tokenizer(pair[1], add_special_tokens=False)["input_ids"]
    ids = (prompt + response)[:longest]
    weights = [0.0] * min(len(prompt), longest) + [1.0] * (len(ids) - min(len(prompt), longest))
    return Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), torch.tensor([weights]))


def compare(model, one: Sequence[Pair], two: Sequence[Pair], longest: int = 256) -> dict[str, dict[str, float]]:
    """For each number: its mean in both sets, and their difference in standard errors."""
    host = open_host(model)
    tokenizer, live = host.tokenizer(), host.live()
    batches = [[encode(p, tokenizer, longest) for p in pairs] for pairs in (one, two)]
    lengths = [[float(b.weights.sum()) for b in side] for side in batches]
    keep = [i for i, (a, b) in enumerate(zip(*lengths, strict=True)) if min(a, b) > 0 and abs(a - b) <= 0.1 * max(a, b)]
    if len(keep) < 2:
        raise SystemExit(f"{len(keep)} of {len(lengths[0])} pairs have responses of nearly equal length; at least 2 are needed.")
    sites = [s for s in host.catalogue.sites if s.kind == "linear"]
    found = []
    for side in batches:
        view = ModelView(live, host.catalogue, sites, [side[i] for i in keep], host.reader.config, causal=True)
        found.append(next(r for r in get_object("grad_spectra").compute(view) if r.module == ""))
    out = {}
    for name in ("nuclear_norm", "effective_rank", "loss", "tokens"):
        a, b = (r.value[name] for r in found)
        error = math.hypot(*(r.uncertainty[name] or 0.0 for r in found))
        out[name] = {"one": a, "two": b, "errors": (a - b) / error if error else math.nan}
    return out


def main(pairs: int = 16, lines: int = 12) -> dict[str, dict[str, float]]:
    model = ek.demo_model()
    shuffle = random.Random(0).shuffle
    ordered: list[Pair] = []
    shuffled: list[Pair] = []
    for text in load_texts(model / "heldout.jsonl")[:pairs]:
        rows = text.split("\n")
        prompt, response = "\n".join(rows[:lines]) + "\n", rows[lines : 2 * lines]
        mixed = list(response)
        shuffle(mixed)
        ordered.append((prompt, "\n".join(response)))
        shuffled.append((prompt, "\n".join(mixed)))
    found = compare(model, ordered, shuffled)
    print(f"{'':16}{'in order':>12}{'shuffled':>12}{'difference / error':>20}")
    for name, row in found.items():
        print(f"{name:16}{row['one']:12.4f}{row['two']:12.4f}{row['errors']:20.1f}")
    return found


if __name__ == "__main__":
    main()
