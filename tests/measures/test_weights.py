"""Measures of one weight: WeightWatcher's recorded figures on the shipped model, closed forms, and matrices that have no such number."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eckart as ek
from eckart.axes.protocols import Site
from eckart.errors import Refused
from eckart.measures.base import Record, WeightView
from eckart.registry import get_object

NAMES = (
    "alpha", "alpha_hill", "alpha_fixed_finger", "alpha_hat", "alpha_norm", "setol", "farms", "effective_rank", "stable_rank",
    "participation_rank", "numerical_rank", "energy_ranks", "entropy", "norms", "bulk_edge", "compressibility", "spectrum",
)  # fmt: skip


def noise(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def view(weight: torch.Tensor) -> WeightView:
    return WeightView(Site("w", (weight.shape[0], weight.shape[1]), ("w",)), lambda _: weight)


def record(name: str, weight: torch.Tensor) -> Record:
    return get_object(name).of(view(weight))


def of_spectrum(name: str, s: list[float], shape: tuple[int, int] | None = None) -> Record:
    values = torch.tensor(s, dtype=torch.float64)
    measure = get_object(name)
    return measure.record("w", measure.compute(values, shape or (len(s), len(s))))


# weightwatcher 0.7.7, analyze(ERG=True) of these two layers of the shipped model
WEIGHTWATCHER = {
    "model.layers.0.self_attn.k_proj.weight": {
        "alpha": 5.566091584773405, "alpha_weighted": 4.472239676827208, "log_alpha_norm": 4.847674571249656, "log_norm": 2.152628568935406,
        "log_spectral_norm": 0.8034793550759141, "norm": 142.11128581425487, "stable_rank": 22.343397600800948, "entropy": 0.9618189940892349,
        "D": 0.1006206355387198, "xmin": 3.2198667951822784, "sigma": 1.1789597776723486, "num_pl_spikes": 15, "ERG_gap": 40,
        "num_ERG_spikes": 55, "detX_val": 0.9164831687060211, "matrix_rank": 64,
    },
    "model.layers.3.self_attn.o_proj.weight": {
        "alpha": 5.1968790177859745, "alpha_weighted": 7.515380623912482, "log_alpha_norm": 8.47669925198141, "log_norm": 3.204187992918156,
        "log_spectral_norm": 1.4461334578295144, "norm": 1600.2505786852994, "stable_rank": 57.28679624631531, "entropy": 0.8993073624500112,
        "D": 0.13466107550443085, "xmin": 15.876405789245075, "sigma": 0.7419104033239998, "num_pl_spikes": 32, "ERG_gap": 150,
        "num_ERG_spikes": 182, "detX_val": 1.1794752113752631, "matrix_rank": 256,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTWATCHER)
def test_weightwatcher_on_the_shipped_model(name, lm_folder) -> None:
    weight, want = load_file(lm_folder / "model.safetensors")[name], WEIGHTWATCHER[name]
    found = {n: record(n, weight) for n in NAMES}
    alpha, norms, setol = found["alpha"], found["norms"].value, found["setol"].value
    got = {
        "alpha": alpha.value, "sigma": alpha.uncertainty, "D": alpha.settings["distance"], "xmin": alpha.settings["xmin"],
        "num_pl_spikes": alpha.settings["tail"], "alpha_weighted": found["alpha_hat"].value, "log_alpha_norm": found["alpha_norm"].value,
        "log_norm": norms["log_norm"], "log_spectral_norm": norms["log_spectral"], "norm": norms["frobenius"] ** 2,
        "stable_rank": found["stable_rank"].value, "entropy": found["entropy"].value, "ERG_gap": setol["gap"],
        "num_ERG_spikes": setol["count"], "detX_val": setol["lambda_erg"], "matrix_rank": found["numerical_rank"].value,
    }  # fmt: skip
    assert got == {k: pytest.approx(v, rel=1e-10 if k != "entropy" else 1e-7) for k, v in want.items()}  # it adds 1e-10 to each share
    assert setol["delta"] == pytest.approx(want["xmin"] - want["detX_val"])


def test_alpha_hat_is_as_uncertain_as_alpha() -> None:
    s = ((np.arange(300) + 0.5) / 300) ** (-1 / 3.0)  # squares: the quantiles of alpha 2.5, from the largest
    alpha, hat = of_spectrum("alpha", s.tolist()), of_spectrum("alpha_hat", s.tolist())
    assert alpha.valid
    assert alpha.value == pytest.approx(2.5, abs=2 * alpha.uncertainty)
    size = 2 * math.log10(s[0])
    assert (hat.value / alpha.value, hat.uncertainty / alpha.uncertainty) == pytest.approx((size, size))


def test_norms_of_a_matrix() -> None:
    w = noise(30, 20).double()
    found = record("norms", w).value
    assert found["spectral"] == pytest.approx(float(torch.linalg.matrix_norm(w, 2)))
    assert found["frobenius"] == pytest.approx(float(w.norm()))
    assert found["nuclear"] == pytest.approx(float(torch.linalg.matrix_norm(w, "nuc")))


def test_ranks_of_a_low_rank_matrix() -> None:
    w = (noise(150, 7, 1).double() @ noise(7, 200, 2).double()).float()
    assert record("numerical_rank", w).value == 7
    assert 1 <= record("stable_rank", w).value <= record("participation_rank", w).value <= record("effective_rank", w).value <= 7.1
    assert record("numerical_rank", w.bfloat16()).value == 150  # rounding fills it up, as its note says


def test_entropy_is_one_for_equal_values_and_zero_for_rank_one() -> None:
    assert of_spectrum("entropy", [2.0] * 9).value == pytest.approx(1)
    assert of_spectrum("entropy", [2.0, 0.0]).value == 0
    half = of_spectrum("entropy", [1.0, 1.0, 0.0, 0.0])
    assert (half.value, half.settings["nats"]) == (pytest.approx(0.5), pytest.approx(math.log(2)))


@pytest.mark.parametrize("shape", [(60, 60), (40, 120)])
def test_compressibility_is_the_error_of_factors_of_that_size(shape) -> None:
    w = noise(*shape).double()
    found = record("compressibility", w)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    for keep, rank, error in zip((0.8, 0.6, 0.4), found.settings["ranks"], found.value, strict=True):
        assert rank * sum(shape) <= keep * w.numel() < (rank + 1) * sum(shape)
        assert error == pytest.approx(float((w - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm() / w.norm()))


def test_a_spike_in_noise_is_seen() -> None:
    w = noise(200, 300).double() + 80 * torch.outer(torch.ones(200), torch.ones(300)) / math.sqrt(200 * 300)
    found = record("bulk_edge", w)
    assert found.valid
    assert (found.value["outliers"], found.value["detached"]) == (1, 1)
    assert found.value["noise"] == pytest.approx(1, rel=0.02)
    assert found.value["soft_rank"] == pytest.approx((math.sqrt(200) + math.sqrt(300)) ** 2 / (80**2 + 500 + 200 * 300 / 80**2), rel=0.05)


def test_farms_tells_the_aspect_from_the_tail_and_hill_does_not() -> None:
    square, wide = noise(128, 128), noise(128, 1024)
    assert record("farms", wide).value == pytest.approx(record("farms", square).value, abs=0.08)
    assert record("alpha_hill", wide).value > record("alpha_hill", square).value + 2
    assert "not comparable" in record("farms", noise(40, 200)).note
    assert record("farms", square).settings["windows"] == 25


def test_noise_has_no_tail_and_the_records_say_so() -> None:
    for name in ("alpha", "alpha_hat", "alpha_norm", "setol"):
        found = record(name, noise(200, 400))
        assert not found.valid
        assert found.note
    hill = record("alpha_hill", noise(200, 400))
    assert hill.valid  # a score that pruning ranks by
    assert hill.note.startswith("a score of shape, no exponent")


MATRICES = {
    "zero": torch.zeros(30, 40),
    "constant": torch.full((150, 160), 0.3),
    "rank one": torch.outer(noise(150, 1)[:, 0], noise(1, 170)[0]),
    "orthogonal": torch.linalg.qr(noise(140, 140).double())[0].float(),
    "diagonal of ones": torch.eye(25, 60),
    "one row": noise(1, 50),
    "one column": noise(50, 1),
    "one entry": torch.tensor([[2.0]]),
    "two rows": noise(2, 9),
    "nineteen rows": noise(19, 19),
    "half": noise(140, 150).half(),
    "bfloat16": noise(70, 90).bfloat16(),
    "double": noise(140, 150).double(),
    "huge": noise(140, 150) * 1e30,
    "tiny": noise(140, 150) * 1e-30,
    "tiny half": (noise(40, 50) * 1e-6).half(),
    "one giant entry": torch.where(torch.arange(150 * 160).view(150, 160) == 7, 1e20, 1e-20),
    "sparse": noise(200, 150) * (noise(200, 150, 1) > 2.5),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_every_matrix_gives_a_record_or_a_reason(kind) -> None:
    seen = view(MATRICES[kind])
    for name in NAMES:
        found = get_object(name).of(seen)
        assert found.valid or found.note, name
        assert found.valid == (kind != "zero") or name not in ("effective_rank", "stable_rank", "norms"), name
        json.dumps([found.value, found.uncertainty, dict(found.settings)], allow_nan=False)


def test_matrices_without_a_tail_say_why() -> None:
    for kind in ("constant", "rank one", "orthogonal", "diagonal of ones", "one row", "one entry"):
        found = record("alpha", MATRICES[kind])
        assert not found.valid
        assert "two distinct values" in found.note or "Kolmogorov" in found.note or "above" in found.note or "only" in found.note
    assert "one singular value" in record("entropy", MATRICES["one row"]).note
    assert "no pair of factors" in record("compressibility", MATRICES["one row"]).note
    assert "every product is one" in of_spectrum("setol", [1 + 1e-14 * (30 - i) for i in range(30)]).note
    assert "fewer than 20" in record("bulk_edge", MATRICES["nineteen rows"]).note


@pytest.mark.parametrize("name", ["alpha", "alpha_hill", "alpha_fixed_finger", "farms", "entropy", "participation_rank", "compressibility"])
def test_scale_does_not_matter(name) -> None:
    w = noise(150, 200, 3).double() + 3 * torch.outer(torch.arange(150.0), torch.arange(200.0)).double() / 150
    base = np.array(record(name, w).value)
    for scale in (1e-8, 1e8):
        assert np.array(record(name, w * scale).value) == pytest.approx(base, rel=1e-7)


def test_what_cannot_be_read_gets_a_record_from_inspect() -> None:
    net = torch.nn.ModuleDict({k: torch.nn.Linear(40, 30) for k in ("nan", "infinite", "fine")})
    with torch.no_grad():
        net["nan"].weight[3, 4] = float("nan")
        net["infinite"].weight[0, 0] = float("inf")
    found = {(r.module, r.measure): r for r in ek.inspect(net, measures=NAMES).records}
    assert len(found) == 3 * len(NAMES)
    for name in NAMES:
        assert "NaN or Inf" in found["nan", name].note
        assert "NaN or Inf" in found["infinite", name].note
        assert not found["nan", name].valid
    assert found["fine", "stable_rank"].valid


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3, 4, dtype=torch.int8), torch.zeros(0, 4), torch.full((3, 3), float("nan")), torch.full((150, 200), float("inf"))],
)
def test_what_is_no_matrix_of_numbers_is_refused_before_any_number(weight) -> None:
    with pytest.raises(Refused):
        _ = view(weight).spectrum


@pytest.mark.parametrize("shape", [(60, 90), (200, 260)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_spectra_hold_more_digits_than_float32(shape, dtype) -> None:
    w = noise(*shape).to(dtype)
    s = view(w).spectrum
    want = np.linalg.svd(w.double().numpy(), compute_uv=False)
    assert s.dtype == torch.float64
    assert s.numpy() == pytest.approx(want, rel=1e-11)
