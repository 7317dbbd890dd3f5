from __future__ import annotations

import pytest
import torch

from eckart.data import batches
from tests.stats.stats_models import VOCAB, make


@pytest.fixture(scope="session")
def ids() -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in (9, 4, 1, 12, 7, 7, 2, 5)]


@pytest.fixture(scope="session")
def padded(ids):
    return batches(ids, None, batch_size=3)


@pytest.fixture(params=["llama", "gpt2", "bert", "albert"])
def model(request):
    return make(request.param)
