"""The cost model: deterministic, sane in its proportions, and obeyed."""

from __future__ import annotations

import itertools
import json
import math
from importlib.resources import files

import pytest
import torch

from eckart.errors import UsageError
from eckart.linalg import choose, svd
from eckart.linalg.choose import block_width, rates
from tests.linalg.spectra import matrix, spectrum


@pytest.mark.parametrize(
    ("call", "method"),
    [
        ((64, 64, 8), "full"), ((100, 5000, 8), "full"), ((1024, 4096, 16), "krylov"), ((1024, 4096, 128), "krylov"),
        ((4096, 1024, 16), "krylov"), ((1024, 4096, 800), "gram"), ((1024, 4096, None), "gram"), ((1024, 1024, None), "gram"),
        ((11008, 4096, 64), "krylov"),
    ],
)  # fmt: skip
def test_the_choice_follows_the_measurements(call, method):
    assert choose(*call).method == method


def test_tolerance_and_certificate_count():
    assert choose(1024, 4096, 16, tol=0).method == "gram"
    assert choose(1024, 4096, 128, tol=0.05).method in ("subspace", "krylov")
    assert choose(1024, 4096, 16, certify="optimum").method == "gram"
    assert choose(1024, 4096, 16, certify="spectral").seconds > choose(1024, 4096, 16).seconds
    assert choose(512, 2048, None, dtype="float64").method == "full"


def test_every_size_has_a_finite_prediction():
    for m, n in itertools.product((1, 2, 63, 129, 384, 4096, 30000), repeat=2):
        for r in {1, max(1, min(m, n) // 3), min(m, n)}:
            for dtype, device in itertools.product(("float32", "float64"), ("cpu", "cuda", "mps")):
                c = choose(m, n, r, dtype=dtype, device=device)
                assert math.isfinite(c.seconds)
                assert c.seconds > 0
                assert c.flops > 0


def test_predictions_grow_with_the_matrix():
    sizes = [512, 1024, 2048, 4096]
    for r in (8, 64):
        seconds = [choose(s, 2 * s, r).seconds for s in sizes]
        assert seconds == sorted(seconds)


def test_blocks_are_never_of_2_to_8_columns():
    assert {block_width(r, 5000) for r in range(1, 2000)} == {16, 32, 64}
    assert block_width(4, 7) == 7


@pytest.mark.parametrize("method", ["full", "gram", "krylov", "subspace"])
def test_a_forced_method_is_used(method):
    A = matrix(spectrum("power", 150), 150, 200)
    assert svd(A, 5, method=method).certificate.method == method


def test_a_flat_spectrum_falls_back_to_the_gram():
    A = matrix(spectrum("identity", 400), 400, 500)
    f = svd(A, 9)
    assert choose(400, 500, 9).method == "krylov"
    assert f.certificate.method == "gram"
    assert f.certificate.gap_kind == "bound"


def test_the_shipped_rates_are_complete():
    table = json.loads(files("eckart.linalg").joinpath("thresholds.json").read_text())
    entries = {k: v for k, v in table.items() if k != "about"}
    assert set(entries) == {f"{d}/{t}" for d in ("cpu", "cuda") for t in ("float32", "float64")}
    for name, entry in entries.items():
        assert entry["provenance"]
        assert entry["measured"] or "ot measured" in entry["provenance"]
        assert rates(*name.split("/")).measured is entry["measured"]


def test_bad_calls():
    for bad in ({"m": 0, "n": 3, "rank": 1}, {"m": 5, "n": 3, "rank": 4}, {"m": 5, "n": 3, "rank": 0}):
        with pytest.raises(UsageError):
            choose(**bad)
    with pytest.raises(UsageError, match="spectral"):
        choose(5, 5, 1, certify="spectrum")


def test_an_unknown_device_takes_the_rates_of_the_cpu():
    assert choose(1000, 1000, 10, device="mps") == choose(1000, 1000, 10, device="cpu")
    assert torch.finfo(torch.float32).bits == 32
