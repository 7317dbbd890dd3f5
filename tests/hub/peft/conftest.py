"""What the tests of the PEFT host share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def shake() -> Callable[..., Any]:
    """shake(model, seed=0) -> the model, its trained parameters moved."""

    def run(model: Any, seed: int = 0, size: float = 0.05) -> Any:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(size * torch.randn(p.shape, generator=g))
        return model

    return run


@pytest.fixture(scope="session")
def logits(ids: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """Logits of a model in evaluation mode, without gradients."""

    def run(model: Any) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(input_ids=ids)[0]

    return run
