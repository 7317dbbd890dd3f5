"""Statistics of a model on calibration text: streamed, mergeable, saved with the fingerprint of what they were measured on."""

from __future__ import annotations

from .collect import Partial as Partial
from .collect import accumulate as accumulate
from .collect import collect as collect
from .collect import fingerprint as fingerprint
from .moments import Moments as Moments
from .result import Stats as Stats
from .result import predict_bytes as predict_bytes
from .tree import Tree as Tree
