"""Quality of adapters: the bundled language model of Python learns C++ headers, with every recipe under one protocol.

    python -m bench.adapt                            # everything; about an hour on one quiet core
    python -m bench.adapt --quick --no-write         # two recipes, few steps
    python -m bench.adapt --recipes lora pissa --seeds 0 1 2 --steps 80
    python -m bench.adapt --table                    # write the page from the runs that are there

The new domain is `torch/include/c10/{core,util}/*.h`, the same wherever torch has the pinned version: files are dealt to training, choice of the
learning rate and scoring by the hash of their names. All recipes get the same rows in the same order, steps and schedule. The learning rate is
chosen on the first seed, from one grid for all, by the loss on the text for choosing; the other seeds keep it.
Forgetting is what the model loses on its own held-out text. Each run is appended to the result file at once; a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import eckart as ek
from bench import adapt_page
from bench.machine import describe
from eckart.axes import Recipe
from eckart.data import evaluate, load_texts
from eckart.errors import EckartError, Refused
from eckart.hub.peft.train import Protocol, Texts, entry, load_base, run
from eckart.measures.intruder import EPSILON, TOP, best_cosines
from eckart.registry import get_recipe

RESULTS = Path(__file__).parent / "results"
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RANK = 8
# ranks that bring the trained numbers near those of LoRA at rank 8; None is the recipe's own budget, where a rank means something else
RANKS: Mapping[str, float | None] = {
    "lora_xs": 64, "lora_sb": 64, "inttune": 64, "loldu": 64, "rdp_lora": 24, "clip_svd": None, "salt": None, "svfit": None, "full": None, "lisa": None,
    "osf": None,
}  # fmt: skip
PUBLISHED = (
    "lora", "full", "pissa", "sorsa", "corda", "corda:kpm", "eva", "kasa", "soma", "lora_xs", "svfit", "lisa", "osf", "lora_pro", "effort", "adalora", "allora",
    "ba_lora", "clip_svd", "flora", "householder", "inttune", "kind", "loldu", "lora_sb", "nlora", "orthoreg", "rdp_lora", "salt", "slora", "soka",
)  # fmt: skip
OLD_CALIBRATION = ("corda:kpm", "effort in corda's metric")  # they measure what is to be kept, the others what is to be learnt
BYTES = {"train": 90_000, "choose": 12_000, "score": 20_000, "old": 20_000, "calib": 16_000}
PIECE = 2_000  # characters of a text at most


def _corda_sorsa() -> Recipe:
    sorsa = get_recipe("sorsa")
    return sorsa.with_(metric=get_recipe("corda").metric, budget=ek.Budget(rank=RANK))


def _effort_corda() -> Recipe:
    return get_recipe("effort").with_(metric=get_recipe("corda").metric, budget=ek.Budget(rank=RANK))


def _corda_even() -> Recipe:
    corda = entry("corda", RANK)
    return corda.with_(form=replace(corda.form, balance="even"))


HYBRIDS: Mapping[str, Callable[[], Recipe]] = {
    "sorsa in corda's metric": _corda_sorsa,
    "pissa with lora_pro's gradient": lambda: entry("pissa+lora_pro", RANK),
    "eva with kasa's penalties": lambda: entry("eva+kasa", RANK),
    "effort in corda's metric": _effort_corda,
    "corda with factors of equal norm": _corda_even,
}


def _flora_small() -> Recipe:
    flora = entry("flora", RANK)
    return flora.with_(train={**flora.train, "alpha": 0.05})


def _with_penalty(weight: float) -> Recipe:
    found = entry("orthoreg", RANK)
    return found.with_(penalty=tuple(replace(p, weight=weight) for p in found.penalty))


def _with_refresh(name: str, **changes: Any) -> Recipe:
    found = entry(name, RANKS.get(name, RANK))
    return found.with_(refresh=tuple(replace(p, **changes) for p in found.refresh))


# row -> (recipe, why): one setting is another than the paper's, to see whether it is what decides
PROBES: Mapping[str, tuple[Callable[[], Recipe], str]] = {
    "flora, alpha 0.05": (
        _flora_small, "at the paper's scale (4) and draw, a rate that suits the core leaves the factors where they were drawn; a smaller scale lets both learn."
    ),
    "orthoreg, weight 0.01": (
        lambda: _with_penalty(0.01), "at the README's weight (1) the gradient is mostly the penalty's, which wants singular values of one in every update."
    ),
    "lisa, blocks every 4 steps": (
        lambda: _with_refresh("lisa", every=4), "the paper's 20 steps make two draws in this run, so that a seed trains four blocks at most."
    ),
    "adalora, nothing cut": (lambda: _with_refresh("adalora", keep=1.0), "whether the spread is that of the cuts."),
}  # fmt: skip


ROWS = (*PUBLISHED, *HYBRIDS, *PROBES)


@dataclass(frozen=True)
class World:
    """Texts and the model as it is, with its scores and singular vectors."""

    model: Any
    tokenizer: Any
    train: list[str]
    choose: list[str]
    score: list[str]
    old: list[str]
    calib: Mapping[str, list[str]]
    files: Mapping[str, list[str]]
    before: Mapping[str, float]


def pieces(texts: Sequence[str], size: int) -> list[str]:
    """Texts cut into pieces, until `size` bytes are there; a text with fewer than 200 characters left is left out."""
    out: list[str] = []
    held = 0
    for text in texts:
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE]
            if len(piece) < 200:
                continue
            if held + len(piece.encode()) > size:
                return out
            out.append(piece)
            held += len(piece.encode())
    return out


def headers() -> dict[str, list[tuple[str, str]]]:
    """The headers by what they serve: [(name, text)], in the order of the hashes of their names."""
    import torch

    root = Path(torch.__file__).parent / "include"
    found = [p for folder in ("core", "util") for p in sorted((root / "c10" / folder).glob("*.h"))]
    if not found:
        raise SystemExit(f"{root / 'c10'}: no headers. This torch was built without them.")
    ordered = sorted((hashlib.sha256(str(p.relative_to(root)).encode()).hexdigest(), p) for p in found)
    out: dict[str, list[tuple[str, str]]] = {"train": [], "choose": [], "score": []}
    for digest, path in ordered:
        share = int(digest[-2:], 16) / 256
        out["train" if share < 0.7 else "choose" if share < 0.8 else "score"].append(
            (str(path.relative_to(root)), path.read_text(encoding="utf-8"))
        )
    return out


def world() -> World:
    """Everything that all runs share."""
    path = ek.demo_model()
    model, tokenizer = load_base(path, "cpu")
    dealt = headers()
    texts = {k: pieces([t for _, t in v], BYTES[k]) for k, v in dealt.items()}
    old = pieces([str(t) for t in load_texts(path / "heldout.jsonl")], BYTES["old"])
    calib = {
        "new": pieces(texts["train"], BYTES["calib"]),
        "old": pieces([str(t) for t in load_texts(path / "calibration.jsonl")], BYTES["calib"]),
    }
    before = {k: bits(model, tokenizer, t) for k, t in {"choose": texts["choose"], "score": texts["score"], "old": old}.items()}
    files = {k: [n for n, _ in v] for k, v in dealt.items()}
    return World(model, tokenizer, texts["train"], texts["choose"], texts["score"], old, calib, files, before)


def bits(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Bits per byte."""
    return evaluate.causal(model, tokenizer, list(texts))["bits_per_byte"]


def recipe_of(name: str) -> Recipe:
    """What one row of the table trains."""
    if name in HYBRIDS:
        return HYBRIDS[name]()
    if name in PROBES:
        return PROBES[name][0]()
    return entry(name, RANKS.get(name.partition(":")[0], RANK))


def train(name: str, seed: int, rate: float, steps: int, at: World) -> tuple[dict[str, Any], Any]:
    """(record, adapted model) of one run; a run that leaves the finite numbers has no loss and no model."""
    protocol = Protocol(steps=steps, batch_size=4, length=64, lr=rate, weight_decay=0.0, warmup=0.1, seed=seed, device="cpu")
    calib = at.calib["old" if name in OLD_CALIBRATION else "new"]
    recipe = recipe_of(name)
    record: dict[str, Any] = {"recipe": name, "seed": seed, "rate": rate, "steps": steps}
    try:
        before = {"bits_per_byte": at.before["choose"], "perplexity": math.nan, "tokens": 0, "bos": True, "context": 0, "unpredicted": 0}
        done = run(
            copy.deepcopy(at.model), at.tokenizer, recipe, Texts(at.train, at.choose, "choice"), protocol, before=before,
            calib=calib if recipe.needs() else None,
        )  # fmt: skip
    except (Refused, ValueError) as error:
        return record | {"choose": None, "error": str(error)}, None
    record |= {
        "choose": done.rows[0]["after"],
        "trained": done.trained,
        "initialise": done.seconds["initialisation"],
        "train": done.seconds["training"],
    }
    return record, done.model


def score(record: dict[str, Any], model: Any, at: World) -> dict[str, Any]:
    """The record with bits on the text for scoring and on the old domain, and what became of the singular vectors."""
    record = record | {"score": bits(model, at.tokenizer, at.score), "old": bits(model, at.tokenizer, at.old)}
    try:
        merged = model.merge_and_unload()
    except (EckartError, ValueError, NotImplementedError) as error:
        return record | {"intruders": None, "looked": 0, "unmerged": str(error)}
    count = looked = 0
    base = dict(at.model.named_parameters())
    for key, weight in merged.named_parameters():
        if weight.ndim == 2 and key in base and "embed" not in key and "lm_head" not in key:
            cosines = best_cosines(base[key].detach(), weight.detach(), min(TOP, *weight.shape))
            count, looked = count + int((cosines < EPSILON).sum()), looked + len(cosines)
    return record | {"intruders": count, "looked": looked}


def choose(
    name: str, seed: int, steps: int, grid: Sequence[float], at: World, done: list[dict[str, Any]], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Train at every rate of the grid, and score the one with the lowest loss on the text for choosing, while it is in memory.

    Every rate: under a strong penalty the loss has a second minimum, at which a walk from the middle of the grid would stop.
    """
    best: tuple[float, dict[str, Any], Any] = (math.inf, {}, None)
    for rate in grid:
        known = find(done, name, seed, rate, steps)
        record, model = (known, None) if known is not None else train(name, seed, rate, steps, at)
        if known is None:
            keep(record)
        if record["choose"] is not None and record["choose"] < best[0]:
            best = record["choose"], record, model
    value, record, model = best
    if not math.isfinite(value):
        raise SystemExit(f"{name}: no rate of the grid gives a finite loss.")
    if "score" not in record:
        if model is None:
            record, model = train(name, seed, record["rate"], steps, at)
        keep(score(record, model, at))


def find(done: Sequence[Mapping[str, Any]], name: str, seed: int, rate: float, steps: int) -> Any:
    """The fullest record of a run, or None."""
    same = [r for r in done if (r["recipe"], r["seed"], r["rate"], r["steps"]) == (name, seed, rate, steps)]
    return max(same, key=len, default=None)


def facts_of(at: World, steps: int) -> dict[str, Any]:
    """What the page says of the runs."""
    sizes = {
        k: sum(len(t.encode()) for t in texts)
        for k, texts in {"train": at.train, "choose": at.choose, "score": at.score, "old": at.old}.items()
    }
    words = (
        f"The bundled model, {steps} steps of 4 rows of up to 64 tokens, AdamW without decay, cosine schedule, all linear layers of the blocks, rank {RANK} where "
        f"the method has one. New domain: headers of torch {version('torch').partition('+')[0]} (c10/core, c10/util), {sizes['train']:,} bytes to train on, {sizes['choose']:,} to "
        f"choose the rate, {sizes['score']:,} to score, from different files: {at.before['score']:.4f} bits per byte before. Old domain: {sizes['old']:,} bytes of the "
        f"model's held-out text, {at.before['old']:.4f} before; positive change is forgetting. Grid of rates: {', '.join(f'{r:g}' for r in GRID)}; chosen on one seed. "
        f"Intruders: of the {TOP} leading left singular vectors of each merged weight, those with |cosine| below {EPSILON} to all of the base's."
    )
    return {
        "machine": describe("peft"),
        "words": words,
        "before": dict(at.before),
        "files": dict(at.files),
        "bytes": sizes,
        "grid": list(GRID),
    }


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(ROWS), help="rows of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first chooses the rate")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--grid", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--quick", action="store_true", help="lora and pissa, six steps, one seed, two rates")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--no-write", action="store_true", help="keep no runs and print the page")
    given = parser.parse_args()
    if given.quick:
        given.recipes, given.seeds, given.steps, given.grid = ["lora", "pissa"], [0], 6, [3e-3, 1e-2]
    unknown = [n for n in given.recipes if n not in ROWS]
    if unknown:
        parser.error(f"--recipes: no row is called {unknown[0]!r}. Rows: {', '.join(ROWS)}.")
    target = RESULTS / "adapt.json"
    kept = json.loads(target.read_text()) if target.exists() and not given.no_write else {"facts": {}, "runs": []}
    done: list[dict[str, Any]] = kept["runs"]
    if not given.table:
        at = world()
        facts = facts_of(at, given.steps)

        def keep(record: dict[str, Any]) -> None:
            done.append(record)
            if not given.no_write:
                _write(target, {"facts": facts, "runs": done})

        for position, seed in enumerate(given.seeds):
            for name in given.recipes:
                began = time.perf_counter()
                if position == 0:
                    choose(name, seed, given.steps, sorted(given.grid), at, done, keep)
                else:
                    scored = [
                        r
                        for r in done
                        if r["recipe"] == name and r["seed"] == given.seeds[0] and r["steps"] == given.steps and "score" in r
                    ]
                    rate = min(scored, key=lambda r: r["choose"])["rate"]
                    known = find(done, name, seed, rate, given.steps)
                    if known is None or ("score" not in known and known["choose"] is not None):
                        record, model = train(name, seed, rate, given.steps, at)
                        keep(score(record, model, at) if model is not None else record)
                last = next((r for r in reversed(done) if (r["recipe"], r["seed"]) == (name, seed) and "score" in r), {})
                print(
                    f"{name}, seed {seed}: {last.get('score', math.nan):.4f} at {last.get('rate')}, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
        kept = {"facts": facts, "runs": done}
    page = adapt_page.page(kept["runs"], kept["facts"], given.steps, (*PUBLISHED, *HYBRIDS), {n: why for n, (_, why) in PROBES.items()})
    if given.no_write:
        print(page)
    else:
        (RESULTS / "adapt.md").write_text(page, encoding="utf-8")


def _write(target: Path, value: Any) -> None:
    part = target.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(target)


if __name__ == "__main__":
    main()
