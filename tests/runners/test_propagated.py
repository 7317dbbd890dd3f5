"""Inputs that pass through what is already compressed, against a float64 model that is changed block by block and run with hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eckart as ek
from eckart.axes.protocols import Stat
from eckart.errors import UsageError
from eckart.hub.load import load
from eckart.runners import blocks
from tests.runners.chains import LAYERS, VOCAB, make, opened, rows

AHEAD = Stat("moments", inputs="propagated")
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def grams(model: Any, given: list[Any], names: list[str]) -> dict[str, np.ndarray]:
    """Sum of x x^T over all tokens but padding, by hooks on a float64 model."""
    out: dict[str, np.ndarray] = {}
    mask: Any = None

    def hook(name: str) -> Callable[..., None]:
        def see(_module: Any, args: Any) -> None:
            x = args[0][mask.bool()].numpy()
            out[name] = out.get(name, 0) + x.T @ x

        return see

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    with torch.no_grad():
        for batch in given:
            mask = batch.attention_mask if batch.attention_mask is not None else torch.ones_like(batch.input_ids)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    return out


def close(a: Any, b: Any, tolerance: float) -> bool:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) <= tolerance * float(np.abs(np.asarray(b)).max())


def change(block: Any) -> None:
    """What the test does to a block: a scale, a cut of ranks, and another layer in the place of one."""
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(0.5)
        u, s, vh = torch.linalg.svd(block.mlp.down_proj.weight.double(), full_matrices=False)
        block.mlp.down_proj.weight.copy_((u[:, :3] * s[:3]) @ vh[:3])
        new = torch.nn.Linear(block.mlp.up_proj.in_features, block.mlp.up_proj.out_features, dtype=block.mlp.up_proj.weight.dtype)
        new.weight.copy_(-block.mlp.up_proj.weight)
        new.bias.fill_(0.25)
        block.mlp.up_proj = new


@pytest.mark.parametrize(("kind", "spans"), [("llama", []), ("mistral", []), ("llama", [range(1, 3)]), ("llama", [range(2)])])
def test_each_block_sees_what_the_changed_ones_return(kind, spans, tmp_path) -> None:
    given = rows()
    host, sites, chain = opened(make(kind, tmp_path), given)
    plain: Any = copy.deepcopy(host.live()).double()
    seen: list[int] = []
    for step in blocks.sweep(chain, given, {AHEAD, Stat("moments")}, sites, model_id="x", memory=1 << 13, folder=tmp_path, spans=spans):
        assert step.stats is not None
        assert step.model is not None
        span = next((r for r in spans if step.block in r), range(step.block, step.block + 1))
        names = [f"model.layers.{n}.{part}" for n in span for part in PARTS]
        want, first = grams(plain, given, names), grams(host.live(), given, names)
        for site in (s for s in step.sites if s.name in names):
            assert close(step.stats.get(AHEAD, site).gram, want[site.name], 1e-5), site.name
            assert close(step.stats.get(Stat("moments"), site).gram, first[site.name], 1e-5), site.name
        if step.block > span.stop - span.start:
            assert not close(want[names[0]], first[names[0]], 1e-2), "the change is felt"
        for n in span:
            change(plain.model.layers[n])
            change(step.model.get_submodule(f"model.layers.{n}"))
        seen.append(step.block)
    assert seen == [b for b in range(LAYERS) if not any(b in r and b != r.stop - 1 for r in spans)]
    assert isinstance(chain.model.get_submodule("model.layers.0.mlp.up_proj"), torch.nn.Linear)
    assert chain.model.get_submodule("model.layers.0.mlp.up_proj").bias is None, "the model is as it was"
    assert all(p.is_meta for p in chain.model.parameters())


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCAB, (24,), generator=g).tolist() for _ in range(24)]


def compressed(folder: Path, out: Path, recipe: str, *settings: str, keep: float = 0.5) -> tuple[Any, dict[str, int], Any]:
    """The result in float64, its ranks, and what `compress` returned."""
    made = ek.compress(folder, recipe, keep, calib=texts(), out=out, form="dense", settings=settings, max_length=24)
    return load(str(out)).double(), {j.name: j.rank for j in made.plan.jobs if j.rank is not None}, made


def original_batches() -> list[Any]:
    from eckart.data import batches

    return list(batches(texts(), None, max_length=24, batch_size=8))


def stepwise(folder: Path, result: Any, span_of: Callable[[int], range]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(W, W', Gram) of the matrices, the Gram behind those blocks of the result that come before the span."""
    plain: Any = load(str(folder)).double()
    source: Any = copy.deepcopy(plain)
    out = {}
    for span in sorted({span_of(n) for n in range(LAYERS)}, key=lambda r: r.start):
        names = [f"model.layers.{n}.{part}" for n in span for part in PARTS]
        for name, gram in grams(plain, original_batches(), names).items():
            out[name] = (source.get_submodule(name).weight.detach().numpy(), result.get_submodule(name).weight.detach().numpy(), gram)
        for n in span:
            plain.model.layers[n] = result.model.layers[n]
    return out


def projected(w: np.ndarray, gram: np.ndarray, rank: int) -> np.ndarray:
    """The best W' in the norm of W G^1/2, in closed form."""
    vectors = np.linalg.eigh(w @ gram @ w.T)[1][:, -rank:]
    return vectors @ vectors.T @ w


def single(n: int) -> range:
    return range(n, n + 1)


def test_compress_cuts_on_what_the_cut_blocks_return(tmp_path) -> None:
    folder = make("mistral", tmp_path / "model")
    result, ranks, made = compressed(folder, tmp_path / "ahead", "svd_llm", "metric.inputs=propagated")
    found = stepwise(folder, result, single)
    other = stepwise(folder, load(str(folder)).double(), single)  # inputs of the original
    for name, (w, new, gram) in found.items():
        assert close(new, projected(w, gram, ranks[name]), 1e-3), name
        if ".2." in name:
            assert not close(new, projected(w, other[name][2], ranks[name]), 1e-2), "inputs of the original would give something else"
    assert any("inputs pass through what is already compressed" in n["text"] for n in made.report["notes"])
    again = compressed(folder, tmp_path / "again", "svd_llm", "metric.inputs=propagated")[0]
    assert all(torch.equal(a, b) for a, b in zip(result.parameters(), again.parameters(), strict=True))


def test_ranks_by_spectra_come_from_the_original_and_the_cut_from_what_comes_through(tmp_path) -> None:
    folder = make("mistral", tmp_path / "model")
    spectra = ("allocate.kind=water_fill",)
    ranks = compressed(folder, tmp_path / "plain", "svd_llm", *spectra)[1]
    result, mine, made = compressed(folder, tmp_path / "ahead", "svd_llm", *spectra, "metric.inputs=propagated")
    assert mine == ranks
    assert len(set(ranks.values())) > 2, "they were decided by spectra"
    for name, (w, new, gram) in stepwise(folder, result, single).items():
        if name in ranks:
            assert close(new, projected(w, gram, ranks[name]), 1e-3), name
    assert "bases" not in made.plan.memory, "those of the first wave are of no use"


@pytest.mark.parametrize("recipe", ["svd_llm", "basis_sharing"])
def test_refits_are_least_squares_on_what_comes_through(recipe, tmp_path) -> None:
    folder = make("mistral", tmp_path / "model")
    kind = ["refine.kind=least_squares", "refine.bias=never"] if recipe == "svd_llm" else []
    result, ranks, made = compressed(folder, tmp_path / "out", recipe, *kind, "refine.inputs=propagated")
    pairs = {0: range(2), 1: range(2), 2: range(2, 3)}
    alone = 0
    for name, (w, new, gram) in stepwise(folder, result, single if recipe == "svd_llm" else pairs.__getitem__).items():
        rank = ranks.get(name) or next(
            r for n, r in ranks.items() if "{" in n and name.rpartition(".")[2] in n and f"{name.split('.')[2]}" in n
        )
        rows_of = np.linalg.svd(new)[2][: min(rank, *w.shape)]
        rest = (w - new) @ gram @ rows_of.T  # the normal equations of `up`
        assert np.abs(rest).max() <= 1e-4 * np.abs(w @ gram @ rows_of.T).max(), name
        alone += name in ranks
    assert alone < len(PARTS) * LAYERS or recipe == "svd_llm"
    assert made.report["notes"]


def test_what_cannot_be_propagated_says_why(tmp_path) -> None:
    folder = make("llama", tmp_path / "model")
    call: dict[str, Any] = {"calib": texts(), "settings": ("metric.inputs=propagated",)}
    with pytest.raises(UsageError, match="in memory already"):
        ek.compress(load(str(folder)), "svd_llm", 0.5, **call)
    with pytest.raises(UsageError, match="--calibrate whole cannot"):
        ek.compress(folder, "svd_llm", 0.5, calibrate="whole", **call)
    with pytest.raises(UsageError, match="Leave --stats out"):
        ek.compress(folder, "svd_llm", 0.5, stats=tmp_path / "kept.safetensors", **call)
    with pytest.raises(UsageError, match="Leave --engine out"):
        ek.compress(folder, "svd_llm", 0.5, engine="ray", out=tmp_path / "out", **call)
    given = ek.compress(folder, "svd_llm", 0.5, calib=texts()).stats
    with pytest.raises(UsageError, match="statistics of an earlier run hold none"):
        ek.compress(folder, "svd_llm", 0.5, stats=given, **call)
    with pytest.raises(UsageError, match="2 stacks of blocks"):
        ek.compress(make("t5", tmp_path / "t5"), "svd_llm", 0.5, **call)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "t5"]
