"""Published closed forms beside ours on the layers of a real model: layer loss at equal ranks, and time. Part of `bench/compress.py`.

SVD-LLM's whitening, ASVD's scaling and Basis Sharing's common basis are written here as their papers (and, for the first two, their released code)
compute them: Cholesky of the second moment, full SVD, inverse. Moments are taken by hooks of this file, in float64. Loss is
||X (W - W')^T||^2 over ||X W^T||^2, summed over matrices, in float64. `float32` is the precision of the released code (Cholesky in float64, SVD in
float32); `float64` is the closed form itself.

Seconds are of the same work on both sides, the best of `REPEATS` runs in turn: from a layer's weight as stored and the sums of its moments to both
factors, balanced, in the type of the model. Ours hold the whole spectrum for the report, a certificate and checks beside that; `run` is what
`compress` takes after its statistics, with the copy of the model and its new layers. Basis Sharing refits its coefficients from 40% removed on, ours always.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import eckart as ek
from eckart.axes.form import balance
from eckart.data import batches
from eckart.nn.surgery import low_rank_layers, shared_groups
from eckart.registry import get_recipe
from eckart.runners.jobs import Context

PEERS = ("svd_llm", "asvd", "basis_sharing")
REPEATS = 3


def moments(model: Any, tokenizer: Any, texts: Sequence[str], names: Sequence[str], max_length: int, causal: bool) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """{layer: (sum of x x^T, mean |x|)} of the inputs of linear layers, padding left out, in float64."""
    found: dict[str, list[Any]] = {}
    mask = torch.ones(0)
    hooks = []

    def watch(name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])[mask].double()
            gram, size, count = found.get(name, (0, 0, 0))
            found[name] = [gram + x.T @ x, size + x.abs().sum(0), count + len(x)]

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_pre_hook(watch(n)) for n in names]
    with torch.no_grad():
        for batch in batches(texts, tokenizer, max_length=max_length, batch_size=16, split_long=causal):
            mask = batch.attention_mask.reshape(-1).bool()
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for hook in hooks:
        hook.remove()
    return {n: (gram, size / count) for n, (gram, size, count) in found.items()}


def root(gram: Tensor) -> Tensor:
    """Cholesky factor, with the jitter of the released code where the moment is not positive definite."""
    low, info = torch.linalg.cholesky_ex(gram)
    if info:
        least = torch.linalg.eigvalsh(gram)[0]
        low = torch.linalg.cholesky(gram + (1e-6 - least) * torch.eye(len(gram), dtype=gram.dtype))
    return low


Pair = tuple[Tensor, Tensor]


def whitened(weight: Tensor, gram: Tensor, rank: int, dtype: torch.dtype) -> Pair:
    """SVD-LLM: SVD(W S) S^-1 with G = S S^T."""
    s = root(gram)
    u, sigma, vh = torch.linalg.svd((weight.double() @ s).to(dtype), full_matrices=False)
    return u[:, :rank] * sigma[:rank], vh[:rank] @ torch.linalg.inv(s).to(dtype)


def scaled(weight: Tensor, size: Tensor, rank: int, dtype: torch.dtype) -> Pair:
    """ASVD: SVD(W D) D^-1 with D = mean |x|^0.5."""
    d = size.sqrt() + 1e-6
    u, sigma, vh = torch.linalg.svd((weight.double() * d).to(dtype), full_matrices=False)
    return u[:, :rank] * sigma[:rank], vh[:rank] / d.to(dtype)


def common(weights: Sequence[Tensor], grams: Sequence[Tensor], rank: int, refit: bool, dtype: torch.dtype) -> list[Pair]:
    """Basis Sharing: SVD(S^T [W_1^T ... W_L^T]) with S S^T the sum of the moments; coefficients refitted to each layer's own moment on request."""
    s = root(torch.stack(list(grams)).sum(0))
    work = [w.double() for w in weights]
    u, sigma, vh = torch.linalg.svd((s.T @ torch.cat([w.T for w in work], dim=1)).to(dtype), full_matrices=False)
    basis = torch.linalg.solve_triangular(s.T.to(dtype), u[:, :rank] * sigma[:rank], upper=True)
    out = []
    for at, (w, gram) in enumerate(zip(work, grams, strict=True)):
        rows = len(w)
        coeff = vh[:rank, at * rows : (at + 1) * rows]
        if refit:
            g = gram.to(dtype)
            coeff = torch.linalg.solve(basis.T @ g @ basis, basis.T @ g @ w.T.to(dtype))
        out.append((coeff.T, basis.T))
    return out


def loss(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    gap = weight.double() - other.double()
    return torch.einsum("ij,jk,ik->", gap, gram, gap).item()


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Seconds in `Context.look` and `Context.cut`, which take a weight and moments and return what is stored."""
    spent = [0.0]
    kept = {name: getattr(Context, name) for name in ("look", "cut")}
    depth = [0]

    def timed(call: Any) -> Any:
        def run(*args: Any) -> Any:
            began, depth[0] = time.perf_counter(), depth[0] + 1
            try:
                return call(*args)
            finally:
                depth[0] -= 1
                spent[0] += 0 if depth[0] else time.perf_counter() - began

        return run

    try:
        for name, call in kept.items():
            setattr(Context, name, timed(call))
        yield spent
    finally:
        for name, call in kept.items():
            setattr(Context, name, call)


def compare(path: Any, tokenizer: Any, texts: Sequence[str], max_length: int, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each peer and size."""
    model = ek.load(path, dtype="float32")
    weights: dict[str, Tensor] = {}
    taken: Mapping[str, tuple[Tensor, Tensor]] = {}
    stats: dict[Any, Any] = {}
    rows = []
    for peer in PEERS:
        needs = get_recipe(peer).needs()
        for keep in ratios:
            row: dict[str, Any] = {"peer": peer, "keep": keep}
            theirs: dict[str, dict[str, Pair]] = {}
            for _ in range(REPEATS):
                with stopwatch() as spent:
                    made = ek.compress(
                        model,
                        peer,
                        keep,
                        calib=list(texts),
                        tokenizer=tokenizer,
                        stats=stats.get(needs),
                        max_length=max_length,
                        batch_size=16,
                    )
                stats[needs] = made.stats
                ours = low_rank_layers(made.model)
                if not taken:
                    taken = moments(model, tokenizer, texts, list(ours), max_length, hasattr(model, "lm_head"))
                    weights = {n: dict(model.named_modules())[n].weight.detach() for n in ours}
                _least(row, "seconds", spent[0])
                _least(row, "run", sum(made.report["timings"].get(k, 0.0) for k in ("spectra", "cut")))
                for dtype in (torch.float64, torch.float32):
                    word = str(dtype).removeprefix("torch.")
                    began = time.perf_counter()
                    theirs[word] = rival(peer, ours, made.model, weights, taken, keep, dtype)
                    _least(row, f"seconds {word}", time.perf_counter() - began)
            row["matrices"] = len(ours)
            total = sum(loss(weights[n], torch.zeros_like(weights[n]), taken[n][0]) for n in ours)
            row["ours"] = sum(loss(weights[n], layer.dense_weight(), taken[n][0]) for n, layer in ours.items()) / total
            for word, pairs in theirs.items():
                row[word] = sum(loss(weights[n], up @ down, taken[n][0]) for n, (up, down) in pairs.items()) / total
            rows.append(row)
            print({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def _least(row: dict[str, Any], key: str, seconds: float) -> None:
    row[key] = min(row.get(key, seconds), seconds)


def rival(peer: str, ours: Any, small: Any, weights: Any, taken: Any, keep: float, dtype: torch.dtype) -> dict[str, Pair]:
    """The peer's factors at our ranks, balanced, in the type of the weights."""
    found: dict[str, Pair] = {}
    if peer == "basis_sharing":
        for group in shared_groups(small):
            names = group["modules"]
            if group["side"] == "in":
                pairs = common([weights[n] for n in names], [taken[n][0] for n in names], ours[names[0]].rank, keep <= 0.6, dtype)
                found |= dict(zip(names, pairs, strict=True))
    for n, layer in ours.items():
        if peer == "asvd":
            found[n] = scaled(weights[n], taken[n][1], layer.rank, dtype)
        elif n not in found:
            found[n] = whitened(weights[n], taken[n][0], layer.rank, dtype)
    out: dict[str, Pair] = {}
    for n, pair in found.items():
        up, down = balance(*pair, "even") if peer != "basis_sharing" else pair
        out[n] = (up.to(weights[n].dtype), down.to(weights[n].dtype))
    return out


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "| closed form | keep | loss, ours | float64 | float32 | seconds, ours | float64 | float32 | run, ours |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {r['peer']} | {r['keep']:g} | {r['ours']:.5f} | {r['float64']:.5f} | {r['float32']:.5f} | {r['seconds']:.2f} | "
        f"{r['seconds float64']:.2f} | {r['seconds float32']:.2f} | {r['run']:.2f} |\n"
        for r in rows
    )
