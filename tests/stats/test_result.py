"""Merging, saving and loading statistics: bit for bit, and never of something else."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from eckart.axes.protocols import Stat
from eckart.data import batches
from eckart.errors import Refused, UsageError
from eckart.stats import Stats, accumulate, collect, fingerprint, predict_bytes
from tests.stats.stats_models import linears, make

NEEDS = frozenset(
    {
        Stat("moments"),
        Stat("moments", at="out", via="backward"),
        Stat("absmean"),
        Stat("fisher", at="weight", via="backward"),
        Stat("fisher", at="weight", via="backward", opts=("per_batch",)),
    }
)


@pytest.fixture(scope="module")
def model():
    return make("llama").float()


@pytest.fixture(scope="module")
def sites(model):
    return [s for s in linears(model) if "layers.1" in s.name]


@pytest.fixture(scope="module")
def one_each(ids):
    return batches(ids, None, batch_size=1)


@pytest.fixture(scope="module")
def whole(model, sites, one_each):
    return collect(model, one_each, NEEDS, sites)


@pytest.fixture(scope="module")
def single(model, sites, one_each):
    """A part per batch, measured on its own."""
    return [accumulate(model, [b], NEEDS, sites, start=i) for i, b in enumerate(one_each)]


def raw(stats, tmp):
    stats.save(tmp / "s")
    return (tmp / "s").read_bytes()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_merging_equals_one_pass_bit_for_bit(data, whole, single, tmp_path_factory):
    parts = [single[i] for i in data.draw(st.permutations(range(len(single))))]
    while len(parts) > 1:
        b = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        at = data.draw(st.integers(0, len(parts) - 1))
        parts[at] = parts[at].merge(b)
    tmp = tmp_path_factory.mktemp("m")
    assert raw(parts[0].finish(), tmp) == raw(whole, tmp)


@pytest.mark.parametrize("cut", range(1, 8))
def test_contiguous_halves(cut, model, sites, one_each, whole, tmp_path):
    halves = [accumulate(model, one_each[:cut], NEEDS, sites), accumulate(model, iter(one_each[cut:]), NEEDS, sites, start=cut)]
    assert raw(halves[1].merge(halves[0]).finish(), tmp_path) == raw(whole, tmp_path)


def test_what_cannot_be_merged(model, sites, one_each, single):
    with pytest.raises(UsageError, match="already in the sum"):
        single[0].merge(single[0])
    with pytest.raises(UsageError, match="batch 1 is missing"):
        single[0].merge(single[2]).finish()
    for other in (
        accumulate(model, one_each[1:2], NEEDS, sites, start=1, seed=1),
        accumulate(model, one_each[1:2], NEEDS, sites[1:], start=1),
        accumulate(model, one_each[1:2], NEEDS, sites, start=1, model_id="x"),
    ):
        with pytest.raises(UsageError, match="cannot be merged"):
            single[0].merge(other)


def test_round_trip(whole, sites, tmp_path):
    whole.save(tmp_path / "a.safetensors")
    again = Stats.load(tmp_path / "a.safetensors", whole.fingerprint)
    assert again.fingerprint == whole.fingerprint
    for stat in NEEDS:
        for site in sites:
            a, b = whole.get(stat, site), again.get(stat, site)
            if stat.kind == "moments":
                assert (a.count, a.total.tolist(), a.gram.tolist()) == (b.count, b.total.tolist(), b.gram.tolist())
            else:
                assert torch.equal(a, b)
    assert raw(again, tmp_path) == raw(whole, tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.name.endswith(".part")] == []


def test_sizes_are_predicted(whole, sites, tmp_path):
    assert whole.nbytes == predict_bytes(NEEDS, sites)
    by_hand = sum(8 * (s.shape[0] ** 2 + s.shape[0] + 1) for s in sites)  # gradients, by site
    by_hand += sum(8 * (n * n + n + 1) + 8 * (n + 1) for n in {s.reads: s.shape[1] for s in sites}.values())  # Gram and absmean, by input
    by_hand += sum(2 * 8 * (s.shape[1] + 1) for s in sites)  # Fisher, twice
    assert whole.nbytes == by_hand
    assert 0 < len(raw(whole, tmp_path)) - by_hand < 20_000
    assert predict_bytes(NEEDS, sites, leaves=1000) == 11 * by_hand


def test_the_fingerprint_is_known_beforehand_and_names_what_differs(model, sites, one_each, whole, tmp_path):
    path = tmp_path / "s.safetensors"
    whole.save(path)
    assert fingerprint(model, one_each, NEEDS, sites) == whole.fingerprint
    other = make("llama").float()
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    wrong = {
        "another model": fingerprint(other, one_each, NEEDS, sites),
        "other calibration data": fingerprint(model, one_each[::-1], NEEDS, sites),
        "other statistics, layers or seed": fingerprint(model, one_each, NEEDS, sites[1:]),
    }
    for reason, mark in wrong.items():
        with pytest.raises(Refused, match=f"measured on {reason}"):
            Stats.load(path, mark)
    for mark in (
        fingerprint(model, one_each, NEEDS, sites, seed=1),
        fingerprint(model, one_each, NEEDS, sites, probes=2),
        fingerprint(model, one_each, NEEDS, sites, probe="random_projection"),
        fingerprint(model, one_each, NEEDS - {Stat("moments")}, sites),
        fingerprint(model, one_each, NEEDS, [dataclasses.replace(s, reads=s.name) for s in sites]),
    ):
        with pytest.raises(Refused, match="other statistics"):
            Stats.load(path, mark)
    assert fingerprint(model, one_each, NEEDS, sites, model_id="sha256 of files = x").startswith("model=")
    assert len(fingerprint(model, one_each, NEEDS, sites, model_id="a b=c").split()) == 3


def test_what_is_missing(whole, sites, model):
    with pytest.raises(Refused, match=r"layers\.1\.self_attn\.q_proj: moments at 'out' via forward was not measured"):
        whole.get(Stat("moments", at="out"), sites[0])
    other = next(s for s in linears(model) if "layers.0" in s.name)
    assert not whole.has(Stat("moments"), other)
    with pytest.raises(Refused, match="nothing was measured"):
        whole.count(other)


@pytest.mark.parametrize("damage", ["missing", "text", "foreign", "truncated", "nan", "shape", "format", "f32", "gone"])
def test_damaged_files_are_refused(damage, whole, tmp_path):
    path = tmp_path / "s.safetensors"
    whole.save(path)
    meta = {"format": 1, "fingerprint": "model=a data=b needs=c", "auto": "task_loss", "sites": {}}
    good = {"moments|in|forward|||a|count": torch.tensor(3.0).double(), "moments|in|forward|||a|total": torch.ones(2).double()}
    good["moments|in|forward|||a|gram"] = torch.eye(2).double()
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("not a safetensors file")
    elif damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        change = {
            "nan": {"moments|in|forward|||a|gram": torch.full((2, 2), torch.nan).double()},
            "shape": {"moments|in|forward|||a|gram": torch.eye(3).double()},
            "f32": {"moments|in|forward|||a|gram": torch.eye(2)},
        }.get(damage, {})
        if damage == "format":
            meta["format"] = 99
        tensors = good | change
        if damage == "gone":
            del tensors["moments|in|forward|||a|gram"]
        save_file(tensors, path, metadata={"eckart.stats": json.dumps(meta)})
    with pytest.raises(Refused, match=r"s\.safetensors"):
        Stats.load(path)
    save_file(good, path, metadata={"eckart.stats": json.dumps(meta | {"format": 1})})
    assert len(Stats.load(path).values) == 1
