"""`inspect` against numpy, on a real model and on matrices that have no spectrum."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eckart as ek
from eckart.errors import UsageError
from eckart.spectra import numbers


def test_measures_equal_numpy_on_the_bundled_model(lm_folder) -> None:
    weights = load_file(lm_folder / "model.safetensors")
    found = {(r.module, r.measure): r for r in ek.inspect(lm_folder, only=["layers.0"]).records}
    assert len(found) == 7 * 4
    for module in {m for m, _ in found}:
        s = np.linalg.svd(weights[module + ".weight"].double().numpy(), compute_uv=False)
        square = s**2 / (s**2).sum()
        p = s / s.sum()
        assert found[module, "stable_rank"].value == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-5)
        assert found[module, "effective_rank"].value == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
        assert found[module, "energy_ranks"].value == [int(np.searchsorted(square.cumsum(), q) + 1) for q in (0.5, 0.9, 0.99)]
        values = found[module, "spectrum"].value
        assert values["spectrum"] == pytest.approx(s[np.array(values["spectrum_at"]) - 1].tolist(), rel=1e-4)


def test_matrices_without_a_spectrum_give_records_with_a_reason(tmp_path) -> None:
    net = torch.nn.ModuleDict({k: torch.nn.Linear(6, 4) for k in ("zero", "nan", "fine")})
    with torch.no_grad():
        net["zero"].weight.zero_()
        net["nan"].weight[0, 0] = float("nan")
    made = ek.inspect(net)
    by = {(r.module, r.measure): r for r in made.records}
    assert by["zero", "stable_rank"].note == "the matrix is zero"
    assert by["nan", "stable_rank"].note == "1 values are NaN or Inf"
    assert not by["nan", "stable_rank"].valid
    assert by["fine", "stable_rank"].valid
    made.save_html(tmp_path / "report.html")
    made.save_json(tmp_path / "records.json")
    assert len(json.loads((tmp_path / "records.json").read_text())) == 12


def test_unknown_measures_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'stable_rank'"):
        ek.inspect(torch.nn.Linear(2, 2), ["stable_rnk"])


@pytest.mark.parametrize("values", [[1.0], [3.0, 0.0], [2.0, 2.0, 2.0]])
def test_numbers_on_known_spectra(values) -> None:
    s = torch.tensor(values)
    rank = sum(v > 0 for v in values)
    assert numbers.numerical_rank(s, (5, 5)) == rank
    assert numbers.effective_rank(s) == pytest.approx(rank)
    assert numbers.stable_rank(s) == pytest.approx(rank)
    assert numbers.participation_rank(s) == pytest.approx(rank)


def test_thinned_spectra_keep_both_ends() -> None:
    thin = numbers.thin(torch.linspace(5, 1, 1000))
    assert len(thin["spectrum"]) <= numbers.POINTS
    assert (thin["spectrum_at"][0], thin["spectrum_at"][-1]) == (1, 1000)
    assert numbers.thin(torch.tensor([2.0])) == {"spectrum": [2.0], "spectrum_at": [1]}
