"""Measures of two checkpoints against numpy, planted changes, and PEFT 0.21."""

import math
import re

import numpy as np
import pytest
import torch

from eckart.axes.protocols import Site
from eckart.linalg import Factors, svd
from eckart.measures.base import PairView, WeightView
from eckart.measures.intruder import MEASURE as INTRUDER
from eckart.measures.intruder import best_cosines
from eckart.measures.principal_angles import MEASURE as ANGLES
from eckart.measures.relative_change import MEASURE as RELATIVE
from eckart.measures.weight_change import MEASURE as CHANGE
from eckart.spectra.rounding import rounding_edge
from eckart.spectra.subspaces import overlap, principal_angles, singular_alignment

ALL = (INTRUDER, ANGLES, RELATIVE, CHANGE)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(base, other):
    site = Site("layer", tuple(base.shape), ("layer.weight",))
    return PairView(WeightView(site, lambda _: base), WeightView(Site("layer", tuple(other.shape), ("layer.weight",)), lambda _: other))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_cosines_equal_numpy_on_thin_vectors(shape):
    base, change = gaussian(*shape), gaussian(*shape, seed=1)
    tuned = base + 0.7 * change
    u0 = np.linalg.svd(base.numpy(), full_matrices=False)[0]
    u = np.linalg.svd(tuned.numpy(), full_matrices=False)[0]
    expected = np.abs(u.T @ u0).max(1)[:10]
    assert best_cosines(base, tuned).numpy() == pytest.approx(expected, abs=1e-9)
    record = INTRUDER.of(pair(base, tuned))
    assert record.value["count"] == int((expected < 0.5).sum())
    assert record.value["cosines"] == pytest.approx(expected.tolist(), abs=1e-9)


def spread(m, n, seed=0):
    """A weight with well separated singular values, so that its singular vectors stand firm."""
    u = torch.linalg.qr(gaussian(m, min(m, n), seed=seed))[0]
    v = torch.linalg.qr(gaussian(n, min(m, n), seed=seed + 1))[0]
    return (u * torch.logspace(1, -1, min(m, n), dtype=torch.float64)) @ v.T


def test_planted_intruders_are_found_and_counted():
    base = spread(96, 128)
    new = torch.linalg.qr(gaussian(96, 3, seed=5))[0]
    right = torch.linalg.qr(gaussian(128, 3, seed=6))[0]
    for planted in (0, 1, 2, 3):
        tuned = base + 30 * new[:, :planted] @ right[:, :planted].T
        record = INTRUDER.of(pair(base, tuned))
        assert record.value["count"] == planted, "a random direction of 96 has no cosine above 0.5 with any base vector"
    assert record.valid
    assert record.settings["epsilon"] == 0.5


def test_full_rank_perturbation_makes_no_intruders():
    base = spread(96, 128)
    noise = gaussian(96, 128, seed=9)
    low = torch.outer(gaussian(96, seed=10), gaussian(128, seed=11))
    size = 0.05 * base.norm()
    assert INTRUDER.of(pair(base, base + noise * size / noise.norm())).value["count"] == 0
    loud = INTRUDER.of(pair(base, base + low * 12 * size / low.norm()))
    assert loud.value["count"] == 1, "the same energy and more in one direction does"


def test_tall_matrices_say_that_their_counts_differ():
    assert "tall" in INTRUDER.of(pair(spread(60, 20), spread(60, 20) + 0.01)).note
    assert "tall" not in INTRUDER.of(pair(spread(20, 60), spread(20, 60) + 0.01)).note


def test_same_counts_as_peft():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, (m, n) in enumerate([(48, 64), (64, 48), (56, 56), (48, 64)]):
                linear = torch.nn.Linear(n, m, bias=False)
                linear.weight.data = spread(m, n, seed=3 * i).float()
                self.add_module(f"l{i}", linear)

        def forward(self, x):
            return x

    net = Net()
    base = {name: p.detach().clone() for name, p in net.named_parameters()}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["l0", "l1", "l2", "l3"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(net, config)
    told: list[str] = []
    tuned = {}
    for i, strength in enumerate((4.0, 1.5, 8.0, 0.0)):
        layer = model.base_model.model.get_submodule(f"l{i}")
        layer.lora_B["default"].weight.data = strength * gaussian(*layer.lora_B["default"].weight.shape, seed=20 + i).float()
        layer.lora_A["default"].weight.data = 0.3 * gaussian(*layer.lora_A["default"].weight.shape, seed=30 + i).float()
        tuned[f"l{i}.weight"] = base[f"l{i}.weight"] + layer.get_delta_weight("default").detach()
    reduce_intruder_dimension(model, logging_sink=told.append)
    theirs = [0 if "No intruders" in line else int(re.search(r"Intruders: (\d+)", line)[1]) for line in told if "ntruders" in line]
    ours = [INTRUDER.of(pair(base[k], tuned[k])).value["count"] for k in base]
    assert ours == theirs
    assert len(theirs) == 4
    assert max(theirs) >= 3
    assert min(theirs) == 0


def test_peft_lambda_one_removes_nothing():
    """Its docstring says the higher the value the more is subtracted; the code subtracts 1 - lambda."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    net = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    net[0].weight.data = spread(48, 64).float()
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data = 9 * gaussian(48, 2, seed=4).float()
    layer.lora_A["default"].weight.data = gaussian(2, 64, seed=7).float()
    change = layer.get_delta_weight("default").detach().clone()
    reduce_intruder_dimension(model, mitigation_lambda=1.0, new_adapter_name="one", logging_sink=None)
    assert torch.allclose(layer.get_delta_weight("one"), change, atol=1e-3)
    reduce_intruder_dimension(model, mitigation_lambda=0.0, new_adapter_name="zero", logging_sink=None)
    assert layer.get_delta_weight("zero").norm() < 0.9 * change.norm()


def test_principal_angles_equal_scipy_and_known_ones():
    from scipy.linalg import subspace_angles

    U, V = (torch.linalg.qr(gaussian(30, r, seed=r))[0] for r in (4, 6))
    expected = np.sort(subspace_angles(U.numpy(), V.numpy()))
    assert principal_angles(U, V).numpy() == pytest.approx(expected, abs=1e-10)
    assert overlap(U, V) == pytest.approx(float((np.cos(expected) ** 2).mean()), abs=1e-12)
    tiny = 1e-9
    e = torch.eye(3, dtype=torch.float64)
    turned = torch.stack([math.cos(tiny) * e[0] + math.sin(tiny) * e[1]]).T
    assert float(principal_angles(e[:, :1], turned)[0]) == pytest.approx(tiny, rel=1e-6), "an arccos alone loses angles below 1e-8"


def test_principal_angles_of_a_rotated_weight():
    base = spread(40, 30)
    u, s, _ = torch.linalg.svd(base, full_matrices=False)
    angle = 0.3
    plane = torch.eye(40, dtype=torch.float64)
    w = torch.linalg.qr(torch.cat([u[:, :1], gaussian(40, 39, seed=2)], 1))[0]
    plane = (
        w
        @ torch.block_diag(
            torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double(), torch.eye(38).double()
        )
        @ w.T
    )
    record = ANGLES.of(pair(base, plane @ base))
    rank = record.settings["rank"]
    squares = s.square()
    assert rank == int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
    from scipy.linalg import subspace_angles

    expected = np.degrees(subspace_angles(u[:, :rank].numpy(), (plane @ u[:, :rank]).numpy()))
    assert record.value["out_largest"] == pytest.approx(expected.max(), abs=1e-6)
    assert record.value["in_largest"] == pytest.approx(0, abs=1e-5), "the input side did not turn"
    assert record.value["in_overlap"] == pytest.approx(1)


def test_change_of_low_rank_is_seen_through_the_rounding_of_its_storage():
    base = gaussian(128, 96).to(torch.bfloat16)
    update = 0.02 * gaussian(128, 4, seed=1) @ gaussian(4, 96, seed=2)
    exact = CHANGE.of(pair(base.double(), base.double() + update))
    assert exact.value["above_rounding"] == 4
    assert exact.value["spectrum"][:3] == pytest.approx(np.linalg.svd(update.numpy(), compute_uv=False)[:3].tolist(), rel=1e-9)
    assert CHANGE.of(pair(base.float(), base.float() + update.float())).value["above_rounding"] == 4
    stored = CHANGE.of(pair(base, (base.double() + update).to(torch.bfloat16)))
    assert stored.value["above_rounding"] == 4
    assert stored.value["effective_rank"] > 2 * exact.value["effective_rank"], "rounding has full rank"
    finer = gaussian(128, 96)
    noise = CHANGE.of(pair(finer, finer.to(torch.bfloat16)))
    assert noise.value["above_rounding"] == 0, "nothing but rounding changed"


def test_rounding_edge_holds_for_real_rounding():
    w = gaussian(200, 300)
    for dtype in (torch.bfloat16, torch.float16):
        error = w.to(dtype).double() - w
        top = np.linalg.svd(error.numpy(), compute_uv=False)[0]
        assert rounding_edge(w.to(dtype)) == pytest.approx(top, rel=0.05)
    assert rounding_edge(torch.zeros(3, 4)) == 0


def test_relative_change_equals_numpy():
    a, b = gaussian(7, 9), gaussian(7, 9, seed=1)
    b[:, :3] = a[:, :3]
    value = RELATIVE.of(pair(a, b)).value
    x, y = a.numpy(), b.numpy()
    assert value["frobenius"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert value["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert value["norm_ratio"] == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x))
    assert value["entries"] == pytest.approx(6 / 9)


def test_no_change():
    w = spread(12, 20)
    same = {m.name: m.of(pair(w, w.clone())) for m in ALL}
    assert same["intruder"].value["count"] == 0
    assert same["intruder"].value["subspace_angle"] == pytest.approx(0, abs=1e-5)
    assert same["relative_change"].value["frobenius"] == 0
    assert same["relative_change"].note.startswith("the weight did not change")
    assert not same["weight_change"].valid
    assert same["weight_change"].note == "the weight did not change"
    assert same["principal_angles"].value["out_largest"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("measure", ALL, ids=lambda m: m.name)
def test_degenerate_pairs_give_records_with_reasons(measure):
    w = gaussian(5, 8)
    for base, other in ((torch.zeros(5, 8).double(), w), (gaussian(5, 8), gaussian(6, 8))):
        record = measure.of(pair(base, other))
        assert record.valid or record.note, record
    assert measure.of(pair(gaussian(5, 8), gaussian(6, 8))).note == "the shapes differ: (5, 8) and (6, 8)"
    for shape in ((1, 9), (9, 1), (1, 1)):
        record = measure.of(pair(gaussian(*shape), gaussian(*shape, seed=1)))
        assert record.valid, record
    half = measure.of(pair(w.to(torch.bfloat16), (w + 0.5 * gaussian(5, 8, seed=3)).to(torch.bfloat16)))
    assert half.valid
    rank_one = torch.outer(gaussian(5), gaussian(8))
    assert measure.of(pair(rank_one, 2 * rank_one)).valid


def test_zero_on_one_side_has_a_reason():
    w, zero = gaussian(5, 8), torch.zeros(5, 8).double()
    assert "base weight is zero" in INTRUDER.of(pair(zero, w)).note
    assert "fine-tuned weight is zero" in INTRUDER.of(pair(w, zero)).note
    assert "other weight is zero" in ANGLES.of(pair(w, zero)).note
    assert "base weight is zero" in RELATIVE.of(pair(zero, w)).note
    assert RELATIVE.of(pair(w, zero)).value["frobenius"] == pytest.approx(1)


def test_singular_alignment_against_the_double_sum():
    a, b = gaussian(9, 7), gaussian(9, 7, seed=1)
    (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(x.numpy(), full_matrices=False) for x in (a, b))
    k, l = int((sa > 0.3 * sa[0]).sum()), int((sb > 0.3 * sb[0]).sum())
    total = sum((ua[:, i] @ ub[:, j]) * (va[i] @ vb[j]) for i in range(k) for j in range(l))
    assert singular_alignment(svd(a), svd(b), 0.3) == pytest.approx(total / math.sqrt(k * l), abs=1e-10)
    p, q = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (9, 7))
    fa, fp = svd(a), svd(a[p][:, q])
    back = Factors(fp.U[p.argsort()], fp.S, fp.Vh[:, q.argsort()])
    assert torch.allclose(fa.S, fp.S), "permutations keep singular values"
    assert singular_alignment(fa, back, 0.1) == pytest.approx(1)
