"""Which matrices a model has: tensor names, modules, blocks and shared inputs as plain values."""

from __future__ import annotations

from .catalogue import Catalogue
from .headers import from_headers
from .live import from_model

__all__ = ["Catalogue", "from_headers", "from_model"]
