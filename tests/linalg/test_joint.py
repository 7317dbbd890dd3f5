"""Predictors of a common basis against float64 SVDs of the concatenated blocks: bounds hold, and the estimate is tight where blocks share."""

import numpy as np
import pytest
import torch

from eckart.errors import Refused
from eckart.linalg.joint import kept_energy, start

PREDICTORS = ("norm", "residuals", "truncated")


def truth(blocks, rank):
    return float((np.linalg.svd(np.concatenate([b.double().numpy() for b in blocks], axis=1), compute_uv=False)[:rank] ** 2).sum())


def family(kind: str, seed: int):
    g = torch.Generator().manual_seed(seed)
    sizes = [5, 12, 3, 20, 7]
    if kind == "random":
        return [torch.randn(24, n, generator=g) for n in sizes]
    if kind == "dominant":
        return [torch.randn(24, n, generator=g) * (50 if i == 0 else 1) for i, n in enumerate(sizes)]
    if kind == "shared":
        basis = torch.linalg.qr(torch.randn(24, 4, generator=g))[0]
        return [basis @ torch.randn(4, n, generator=g) + 0.05 * torch.randn(24, n, generator=g) for n in sizes]
    if kind == "rank one":
        return [torch.outer(torch.ones(24), torch.randn(n, generator=g)) for n in sizes]
    if kind == "disjoint":
        return [torch.eye(24)[:, at : at + n] * (i + 1) for i, (at, n) in enumerate([(0, 5), (5, 7), (12, 3), (15, 9)])]
    return [torch.zeros(24, n) for n in sizes]


def predicted(predictor, blocks, rank):
    state = start(predictor, rank, blocks[0])
    for block in blocks[1:]:
        state = state.add(block)
    return state


@pytest.mark.parametrize("kind", ["random", "dominant", "shared", "rank one", "disjoint", "zero"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 4, 8, 24])
def test_no_predictor_claims_more_than_there_is(kind, seed, rank) -> None:
    blocks = family(kind, seed)
    true = truth(blocks, rank)
    total = sum(float(b.double().square().sum()) for b in blocks)
    kept = {p: predicted(p, blocks, rank) for p in PREDICTORS}
    for state in kept.values():
        assert state.total == pytest.approx(total)
        assert state.kept <= true * (1 + 1e-9) + 1e-9
        assert state.error == pytest.approx(max(0, 1 - state.kept / total) ** 0.5 if total else 0.0, abs=1e-6)
    if rank < 5:  # with room for a second block the norm bound joins blocks exactly, which residuals do not
        assert kept["norm"].kept <= kept["residuals"].kept * (1 + 1e-9) + 1e-9


def test_the_estimate_is_tight_exactly_where_the_proven_bounds_are_loose() -> None:
    blocks = family("shared", 0)
    true = truth(blocks, 4)
    assert predicted("truncated", blocks, 4).kept == pytest.approx(true, rel=1e-3)
    assert predicted("residuals", blocks, 4).kept < 0.7 * true


def test_one_dominant_block_makes_all_of_them_tight() -> None:
    blocks = family("dominant", 1)
    for predictor in PREDICTORS:
        assert predicted(predictor, blocks, 5).kept == pytest.approx(truth(blocks, 5), rel=2e-2)


def test_a_first_block_with_more_columns_than_the_rank_is_not_taken_whole() -> None:
    """The published bound claims its whole norm there: .506 of the energy of two random 64x64 blocks at r = 8, where .288 is true."""
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randn(64, 64, generator=g) for _ in range(2)]
    state = predicted("norm", blocks, 8)
    assert state.kept == pytest.approx(float((np.linalg.svd(blocks[0].numpy(), compute_uv=False)[:8] ** 2).sum()), rel=1e-5)
    assert state.kept <= truth(blocks, 8) < float(blocks[0].square().sum())


@pytest.mark.parametrize("predictor", ["residuals", "truncated"])
def test_one_block_is_a_truncated_svd(predictor) -> None:
    (block,) = family("random", 2)[3:4]
    assert start(predictor, 6, block).kept == pytest.approx(truth([block], 6), rel=1e-9)


def test_norm_keeps_blocks_exactly_while_they_fit() -> None:
    blocks = family("random", 3)
    state = start("norm", 8, blocks[0]).add(blocks[2])
    assert state.kept == pytest.approx(float(blocks[0].double().square().sum() + blocks[2].double().square().sum()))
    assert state.add(blocks[4]).kept == pytest.approx(state.kept)


def test_half_precision_and_single_columns() -> None:
    blocks = [torch.randn(16, 1, generator=torch.Generator().manual_seed(i)).half() for i in range(6)]
    for predictor in PREDICTORS:
        assert predicted(predictor, blocks, 6).kept <= truth(blocks, 6) * (1 + 1e-6)


def test_joint_energy_from_the_sum_of_grams() -> None:
    blocks = family("random", 4)
    assert kept_energy(blocks, 6) == pytest.approx(truth(blocks, 6), rel=1e-10)
    with pytest.raises(Refused, match="equal rows"):
        kept_energy([torch.ones(3, 2), torch.ones(4, 2)], 1)
