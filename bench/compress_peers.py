"""Published closed forms beside ours on the layers of a real model: layer loss at equal ranks, and time. Part of `bench/compress.py`.

SVD-LLM's whitening, ASVD's scaling and Basis Sharing's common basis are written here as their papers (and, for the first two, their released code)
compute them: Cholesky of the second moment, full SVD, inverse. Moments are taken by hooks of this file, in float64. Loss is
||X (W - W')^T||^2 over ||X W^T||^2, summed over matrices, in float64. `float32` is the precision of the released code (Cholesky in float64, SVD in
float32); `float64` is the closed form itself. Our time is that of the factorisations (spectra and cut) of the same run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import eckart as ek
from eckart.data import batches
from eckart.nn.surgery import low_rank_layers, shared_groups

PEERS = ("svd_llm", "asvd", "basis_sharing")


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


def whitened(weight: Tensor, gram: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """SVD-LLM: SVD(W S) S^-1 with G = S S^T."""
    s = root(gram)
    u, sigma, vh = torch.linalg.svd((weight @ s).to(dtype), full_matrices=False)
    down = vh[:rank] @ torch.linalg.inv(s).to(dtype)
    return (u[:, :rank] * sigma[:rank]) @ down


def scaled(weight: Tensor, size: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """ASVD: SVD(W D) D^-1 with D = mean |x|^0.5."""
    d = size.sqrt() + 1e-6
    u, sigma, vh = torch.linalg.svd((weight * d).to(dtype), full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ (vh[:rank] / d.to(dtype))


def common(weights: Sequence[Tensor], grams: Sequence[Tensor], rank: int, refit: bool, dtype: torch.dtype) -> list[Tensor]:
    """Basis Sharing: SVD(S^T [W_1^T ... W_L^T]) with S S^T the sum of the moments; coefficients refitted to each layer's own moment on request."""
    s = root(torch.stack(list(grams)).sum(0))
    u, sigma, vh = torch.linalg.svd((s.T @ torch.cat([w.T for w in weights], dim=1)).to(dtype), full_matrices=False)
    basis = torch.linalg.solve_triangular(s.T.to(dtype), u[:, :rank] * sigma[:rank], upper=True)
    out = []
    for at, (w, gram) in enumerate(zip(weights, grams, strict=True)):
        rows = len(w)
        coeff = vh[:rank, at * rows : (at + 1) * rows]
        if refit:
            g = gram.to(dtype)
            coeff = torch.linalg.solve(basis.T @ g @ basis, basis.T @ g @ w.T.to(dtype))
        out.append((basis @ coeff).T)
    return out


def loss(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    gap = weight - other.double()
    return torch.einsum("ij,jk,ik->", gap, gram, gap).item()


def compare(path: Any, tokenizer: Any, texts: Sequence[str], max_length: int, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each peer and size."""
    model = ek.load(path, dtype="float32")
    weights: dict[str, Tensor] = {}
    taken: Mapping[str, tuple[Tensor, Tensor]] = {}
    rows = []
    for peer in PEERS:
        stats = None
        for keep in ratios:
            made = ek.compress(model, peer, keep, calib=list(texts), tokenizer=tokenizer, stats=stats, max_length=max_length, batch_size=16)
            stats = made.stats
            ours = low_rank_layers(made.model)
            if not taken:
                causal = hasattr(model, "lm_head")
                taken = moments(model, tokenizer, texts, list(ours), max_length, causal)
                weights = {n: dict(model.named_modules())[n].weight.detach().double() for n in ours}
            row: dict[str, Any] = {"peer": peer, "keep": keep, "matrices": len(ours)}
            total = sum(loss(weights[n], torch.zeros_like(weights[n]), taken[n][0]) for n in ours)
            row["ours"] = sum(loss(weights[n], layer.dense_weight().double(), taken[n][0]) for n, layer in ours.items()) / total
            row["seconds"] = sum(made.report["timings"].get(k, 0.0) for k in ("spectra", "cut"))
            for dtype in (torch.float64, torch.float32):
                word = str(dtype).removeprefix("torch.")
                began = time.perf_counter()
                theirs = rival(peer, ours, made.model, weights, taken, keep, dtype)
                row[f"seconds {word}"] = time.perf_counter() - began
                row[word] = sum(loss(weights[n], w, taken[n][0]) for n, w in theirs.items()) / total
            rows.append(row)
            print({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def rival(peer: str, ours: Any, small: Any, weights: Any, taken: Any, keep: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The peer's matrices at our ranks."""
    if peer == "asvd":
        return {n: scaled(weights[n], taken[n][1], layer.rank, dtype) for n, layer in ours.items()}
    out: dict[str, Tensor] = {}
    if peer == "basis_sharing":
        for group in shared_groups(small):
            names = group["modules"]
            if group["side"] == "in":
                found = common([weights[n] for n in names], [taken[n][0] for n in names], ours[names[0]].rank, keep <= 0.6, dtype)
                out |= dict(zip(names, found, strict=True))
    return out | {n: whitened(weights[n], taken[n][0], layer.rank, dtype) for n, layer in ours.items() if n not in out}


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "| closed form | keep | loss, ours | float64 | float32 | seconds, ours | float64 | float32 |\n|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {r['peer']} | {r['keep']:g} | {r['ours']:.5f} | {r['float64']:.5f} | {r['float32']:.5f} | {r['seconds']:.2f} | "
        f"{r['seconds float64']:.2f} | {r['seconds float32']:.2f} |\n"
        for r in rows
    )
