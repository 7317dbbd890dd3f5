"""On a CUDA device: the core against float64 on the host, and each verb against itself on the CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import eckart as ek
import eckart.linalg as el
from eckart.data import evaluate
from eckart.linalg.psd import Weight
from eckart.linalg.weighted import solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
G = torch.Generator().manual_seed(0)


def spectra() -> dict[str, torch.Tensor]:
    """Matrices (192, 384) of spectra that algorithms stumble over."""
    k = 192
    u = torch.linalg.qr(torch.randn(192, k, generator=G, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(384, k, generator=G, dtype=torch.float64))[0]
    i = torch.arange(1, k + 1, dtype=torch.float64)
    found = {
        "power": 1 / i, "flat": torch.ones(k, dtype=torch.float64), "clustered": torch.where(i <= 20, 5.0, 1.0).double(), "tiny tail": 1e-12 ** (i / k),
        "rank 5": (i <= 5).double(),
    }  # fmt: skip
    return {n: ((u * s) @ v.T).float() for n, s in found.items()} | {
        "one row": torch.randn(1, 384, generator=G),
        "zero": torch.zeros(192, 384),
    }


@pytest.mark.parametrize("method", ["auto", "full", "gram", "krylov", "subspace"])
@pytest.mark.parametrize("name", list(spectra()))
def test_svd_is_as_good_as_its_certificate_says(name, method) -> None:
    A = spectra()[name]
    rank = min(16, *A.shape)
    found = el.svd(A.cuda(), rank, tol=1e-6, method=method)
    assert found.U.device.type == found.Vh.device.type == "cuda"
    wide = A.double()
    s = torch.linalg.svdvals(wide)
    best = float(s[rank:].square().sum()) ** 0.5
    approx = (found.U.double() * found.S.double()) @ found.Vh.double()
    error = float(torch.linalg.norm(wide - approx.cpu()))
    assert error <= best * (1 + (1e-2 if method == "subspace" else 2e-6)) + 1e-6 * float(s[0])
    assert float(found.certificate.error) == pytest.approx(error, rel=1e-3, abs=2e-6 * float(s[0]) + 1e-12)


@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_a_metric_on_the_host_goes_to_the_matrix(sides) -> None:
    W = torch.randn(48, 64, generator=G)
    x, g = torch.randn(300, 64, generator=G), torch.randn(200, 48, generator=G)
    metric = (Weight(g.T @ g) if sides != "in" else None, Weight(x.T @ x) if sides != "out" else None)
    there, here = (solve(w, *metric, rank=9) for w in (W.cuda(), W))
    assert torch.allclose((there.left @ there.right).cpu(), here.left @ here.right, atol=1e-6)


@pytest.mark.parametrize("recipe", ["svd", "svd_llm", "two_sided", "basis_sharing", "modegpt"])
def test_compress_folder(recipe, lm_folder, calib, heldout, tmp_path) -> None:
    """The same model as on the CPU but for rounding, and the same bytes twice."""
    here, there = (ek.compress(lm_folder, recipe, 0.6, calib=calib, max_length=128, out=tmp_path / d, device=d) for d in ("cpu", "cuda"))
    again = ek.compress(lm_folder, recipe, 0.6, calib=calib, max_length=128, out=tmp_path / "again", device="cuda")
    assert there.plan.device == "cuda"
    assert there.plan.after == pytest.approx(here.plan.after, rel=0.01)  # ranks follow from spectra, which are rounded otherwise
    weights = [json.loads((m.path / "eckart.json").read_text()) for m in (there, again)]
    assert weights[0] == weights[1]
    tokenizer = ek.load_tokenizer(lm_folder)
    bits = [evaluate.causal(ek.load(m.path), tokenizer, heldout)["bits_per_byte"] for m in (here, there)]
    assert bits[1] == pytest.approx(bits[0], rel=5e-3)


@torch.no_grad()
def test_compress_module(lm_folder, calib) -> None:
    """A model on the GPU stays there, and gives what the folder gives."""
    model = ek.load(lm_folder, device="cuda")
    tokenizer = ek.load_tokenizer(lm_folder)
    made = ek.compress(model, "svd_llm", 0.6, calib=calib, tokenizer=tokenizer, max_length=128).model
    assert {p.device.type for p in made.parameters()} == {"cuda"}
    other = ek.compress(lm_folder, "svd_llm", 0.6, calib=calib, max_length=128).model
    ids = torch.arange(3, 40)[None]
    a, b = made(input_ids=ids.cuda()).logits.float().cpu(), other(input_ids=ids).logits.float()
    assert float((a - b).norm() / b.norm()) < 0.05  # both compute in bfloat16


@torch.no_grad()
def test_integers(lm_folder, tmp_path) -> None:
    pytest.importorskip("torchao")
    made = ek.compress(lm_folder, "svd", 0.8, out=tmp_path / "out", quantise="int8", device="cuda")
    ids = torch.arange(3, 40)[None]
    small = ek.load(made.path)
    here = small(input_ids=ids).logits.float()
    there = small.cuda()(input_ids=ids.cuda()).logits.float().cpu()
    assert float((here - there).norm() / here.norm()) < 0.05


def test_inspect(lm_folder) -> None:
    here, there = (ek.inspect(lm_folder, measures=["alpha", "stable_rank", "norms", "effective_rank"], device=d) for d in ("cpu", "cuda"))
    count = 0
    for a, b in zip(here.records, there.records, strict=True):
        assert (a.module, a.measure) == (b.module, b.measure)
        one, two = (r.value if isinstance(r.value, dict) else {"": r.value} for r in (a, b))
        for key, value in one.items():
            if isinstance(value, float):
                assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-9), (a.module, a.measure, key)
                count += 1
    assert count > 50


@pytest.mark.parametrize("recipe", ["lora", "pissa", "lora_xs", "soma"])
def test_adapt_starts_and_learns(recipe) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 16)).cuda()
    before = copy.deepcopy(net)
    model = ek.adapt(net, recipe, rank=4)
    x = torch.randn(128, 48, generator=G).cuda()
    with torch.no_grad():
        assert torch.allclose(model(x), before(x), atol=1e-3)
    y = torch.randn(128, 16, generator=G).cuda()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
