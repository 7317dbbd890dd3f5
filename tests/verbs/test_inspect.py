"""`inspect` against numpy, on a real model and on matrices that have no spectrum; which measures run, and what comes out of it."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eckart as ek
from eckart.errors import Refused, UsageError
from eckart.measures.base import Found, OfPair, OfSpectrum, OfWeight
from eckart.registry import get_object, list_entries
from eckart.report import check
from eckart.spectra import numbers

PLAIN = ["spectrum", "stable_rank", "effective_rank", "energy_ranks"]


def by_key(report) -> dict:
    return {(r.module, r.measure): r for r in report.records}


def test_measures_equal_numpy_on_the_bundled_model(lm_folder) -> None:
    weights = load_file(lm_folder / "model.safetensors")
    found = by_key(ek.inspect(lm_folder, measures=PLAIN, only=["layers.0"]))
    assert len(found) == 7 * 4
    for module in {m for m, _ in found}:
        s = np.linalg.svd(weights[module + ".weight"].double().numpy(), compute_uv=False)
        square = s**2 / (s**2).sum()
        p = s / s.sum()
        assert found[module, "stable_rank"].value == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
        assert found[module, "effective_rank"].value == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        assert found[module, "energy_ranks"].value == [int(np.searchsorted(square.cumsum(), q) + 1) for q in (0.5, 0.9, 0.99)]
        values = found[module, "spectrum"].value
        assert values["spectrum"] == pytest.approx(s[np.array(values["spectrum_at"]) - 1].tolist(), rel=1e-5)


def test_every_default_measure_of_weights_gives_a_record_for_every_matrix(lm_folder) -> None:
    found = by_key(ek.inspect(lm_folder, only=["layers.[03].mlp"]))
    entries = [get_object(e.name) for e in list_entries("measure")]
    names = {m.name for m in entries if m.default and m.reads in ("spectrum", "weight")}
    modules = {f"model.layers.{b}.mlp.{r}_proj" for b in (0, 3) for r in ("up", "gate", "down")}
    assert len(names) > 10
    assert {(m, n) for m in modules for n in names} <= found.keys()
    assert not {m.name for m in entries if m.reads in ("pair", "text", "model")} & {n for _, n in found}
    assert all(r.estimator and (r.valid or r.note) for r in found.values())


def test_matrices_without_a_spectrum_give_records_with_a_reason(tmp_path) -> None:
    net = torch.nn.ModuleDict({k: torch.nn.Linear(24, 20) for k in ("zero", "nan", "fine", "constant", "tall", "f16")})
    net["tall"] = torch.nn.Linear(1, 30)
    net["f16"] = net["f16"].half()
    with torch.no_grad():
        net["zero"].weight.zero_()
        net["nan"].weight[0, 0] = float("nan")
        net["constant"].weight.fill_(0.5)
    made = ek.inspect(net)
    found = by_key(made)
    assert found["zero", "stable_rank"].note == "the matrix is zero"
    measures = {n for _, n in found}
    assert len(measures) > 10
    for name in measures:
        if ("nan", name) in found and get_object(name).reads != "checkpoint":
            assert found["nan", name].note == "1 of 480 values are NaN or Inf"
            assert not found["nan", name].valid
    assert found["fine", "stable_rank"].valid
    assert found["f16", "stable_rank"].value == pytest.approx(_stable(net["f16"].weight), rel=1e-6)
    assert found["constant", "effective_rank"].value == pytest.approx(1)
    assert found["tall", "stable_rank"].value == pytest.approx(1)
    check(made.report)
    states = {x["name"]: x["state"] for x in made.report["layers"]}
    assert states == {"zero": "skipped", "nan": "skipped", "fine": "dense", "constant": "dense", "tall": "dense", "f16": "dense"}
    assert any("1 of 480 values are NaN or Inf: nan" in w for w in made.report["warnings"])
    made.save_html(tmp_path / "report.html")
    made.save_json(tmp_path / "records.json")
    assert len(json.loads((tmp_path / "records.json").read_text())) == len(made.records)


def _stable(weight: torch.Tensor) -> float:
    s = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
    return float((s**2).sum() / s[0] ** 2)


def test_measures_need_their_input() -> None:
    net = torch.nn.Linear(4, 4)
    with pytest.raises(UsageError, match="Did you mean 'stable_rank'"):
        ek.inspect(net, measures=["stable_rnk"])
    with pytest.raises(UsageError, match=r"intruder compares two checkpoints.*--compare OTHER \(other=\.\.\.\)"):
        ek.inspect(net, measures=["intruder"])
    with pytest.raises(UsageError, match=r"mnn measures activations.*--calib FILE \(calib=\.\.\.\)"):
        ek.inspect(net, measures=["mnn"])
    with pytest.raises(UsageError, match=r"fisher_trace runs the model on text.*--calib FILE"):
        ek.inspect(net, measures=["fisher_trace"])
    for nothing in ([], "stable_rank"):
        with pytest.raises(UsageError, match="measures: expected a list of names"):
            ek.inspect(net, measures=nothing)


def test_a_measure_of_ones_own_runs_beside_the_others() -> None:
    mine = OfWeight(
        name="mine", title="Mine", paper="arXiv:0000.00000", estimator="largest entry", compute=lambda v: float(v.weight.max()), unit="cm"
    )
    refused = OfSpectrum(name="refused", title="R", paper="doi:1", estimator="none", compute=_refuse)
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 7))
    made = ek.inspect(net, measures=["stable_rank", mine, mine, refused])
    found = by_key(made)
    assert len(made.records) == 6
    assert found["1", "mine"].value == float(net[1].weight.detach().max())
    assert (found["0", "refused"].valid, found["0", "refused"].note) == (False, "0: too odd")
    assert [(c["key"], c.get("unit")) for c in made.report["columns"]] == [("stable_rank", None), ("mine", "cm")]


def _refuse(s, shape):
    raise Refused("0: too odd")


def test_pairs_are_matched_by_name_and_shape() -> None:
    gap = OfPair(
        name="gap",
        title="G",
        paper="doi:1",
        estimator="distance",
        compute=lambda v: Found(float((v.base.weight - v.other.weight).norm()), uncertainty=0.5),
    )
    base = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(4, 3), "c": torch.nn.Linear(4, 3), "d": torch.nn.Linear(4, 3)}
    )
    other = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(5, 3), "d": torch.nn.Linear(4, 3), "only": torch.nn.Linear(2, 2)}
    )
    with torch.no_grad():
        other["d"].weight[0, 0] = float("inf")
        distance = float((base["a"].weight - other["a"].weight).norm())
    made = ek.inspect(base, other, measures=["spectrum", gap])
    found = by_key(made)
    assert found["a", "gap"].value == pytest.approx(distance)
    assert found["b", "gap"].note == "its shape is 3 x 4, in ModuleDict 3 x 5"
    assert found["c", "gap"].note == "ModuleDict has no matrix of this name"
    assert found["d", "gap"].note == "in ModuleDict: 1 of 12 values are NaN or Inf"
    assert found["d", "spectrum"].valid
    rows = {x["name"]: x for x in made.report["layers"]}
    assert rows["a"]["other"]["spectrum"] == pytest.approx(
        np.linalg.svd(other["a"].weight.detach().double().numpy(), compute_uv=False).tolist(), rel=1e-6
    )
    assert "other" not in rows["c"]
    assert rows["a"]["spread"] == {"gap": 0.5}
    assert any("Only in ModuleDict, hence not compared: only." in w for w in made.report["warnings"])
    with pytest.raises(UsageError, match="has no matrix of the same name"):
        ek.inspect(base, torch.nn.ModuleDict({"z": torch.nn.Linear(4, 3)}))


def test_a_model_and_itself_do_not_differ(lm_folder) -> None:
    made = ek.inspect(lm_folder, lm_folder, measures=["relative_change", "intruder"], only=["layers.1"])
    assert {r.value["frobenius"] for r in made.records if r.measure == "relative_change"} == {0.0}
    assert {r.value["count"] for r in made.records if r.measure == "intruder"} == {0}
    assert "Not one of the compared weights differs." in made.report["verdict"]


def test_numbers_as_a_data_frame(lm_folder) -> None:
    pd = pytest.importorskip("pandas")
    made = ek.inspect(lm_folder, measures=["spectrum", "energy_ranks", "alpha"], only=["layers.0.mlp"])
    frame = made.to_pandas()
    assert list(frame.columns) == ["module", "measure", "part", "value", "uncertainty", "valid", "note", "estimator", "settings"]
    assert frame["value"].dtype == "float64"
    assert len(frame) == 3 * (1 + 3 + 1)
    wide = frame.pivot(index="module", columns=["measure", "part"], values="value")
    assert wide["energy_ranks", "90%"].tolist() == [
        r.value[1] for r in sorted(made.records, key=lambda r: r.module) if r.measure == "energy_ranks"
    ]
    assert frame[frame.measure == "alpha"]["uncertainty"].notna().all()
    assert isinstance(frame, pd.DataFrame)


def test_without_pandas_the_install_command_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        ek.inspect(torch.nn.Linear(2, 2), measures=["stable_rank"]).to_pandas()


def test_files_are_never_replaced_unasked(tmp_path) -> None:
    made = ek.inspect(torch.nn.Linear(2, 2), measures=["stable_rank"])
    made.save_json(tmp_path / "r.json")
    with pytest.raises(Refused, match="exists, and is never replaced unasked"):
        made.save_json(tmp_path / "r.json")
    made.save_json(tmp_path / "r.json", overwrite=True)
    assert json.loads((tmp_path / "r.json").read_text())[0]["measure"] == "stable_rank"


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
