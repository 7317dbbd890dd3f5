"""Text in, batches and evaluations out."""

from __future__ import annotations

from . import evaluate as evaluate
from .batches import Batch as Batch
from .batches import batches as batches
from .texts import fingerprint as fingerprint
from .texts import load_texts as load_texts
