"""Where the runs happen: in memory where that is possible, since there are thousands of syncs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faultlib import make_source


@pytest.fixture
def place() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="eckart-test-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def source(place: Path) -> Path:
    return make_source(place / "source")
