"""Plain torch modules that run factored weights. They know of no recipe, file or host library."""

from .embedding import LowRankEmbedding
from .low_rank import LowRankLinear

__all__ = ["LowRankEmbedding", "LowRankLinear"]
