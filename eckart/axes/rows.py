"""Rows of an embedding table that train alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import Refused, UsageError
from .base import AdapterChoice, Choice
from .branch import Material
from .draw import Draw
from .protocols import Bundle, Cost

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.action import Action
    from ..nn.branch import Branch as Module


@dataclass(frozen=True)
class Rows(AdapterChoice):
    """The rows of a few tokens, beginning with what the source gives for them; every other row keeps its bits. The rank counts tokens.

    Args:
        tokens: their ids; none are the last `rank` rows of the table, where `resize_token_embeddings` puts new tokens.
    """

    kind: ClassVar[str] = "rows"
    takes: ClassVar[frozenset[str]] = frozenset({"rows"})
    uses_source: ClassVar[bool] = True
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"penalty.orth", "refresh.refactor", "refresh.allocate", "gradient.project", "roles.protect"}
    )

    tokens: tuple[int, ...] = ()

    @property
    def identity(self) -> bool:
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        return ("rows", "base")

    def width(self, rank: int, full: int) -> int:
        return rank

    def cost(self, bundle: Bundle) -> Cost:
        width, _ = bundle.shape
        full = min(bundle.shape)
        return Cost(dense=width * full + 1, per_rank=width, full=full)

    def trainable(self, shape: tuple[int, int], rank: int, roles: Mapping[str, Choice], bias: bool) -> int:
        return rank * shape[0] if self._trains(roles) else 0

    def _trains(self, roles: Mapping[str, Choice]) -> bool:
        return "rows" not in roles or roles["rows"].kind == "train"

    def module(
        self, action: Action, rank: int, roles: Mapping[str, Choice], *, asked: int, alpha: float, dropout: float = 0.0, bias: bool = True
    ) -> Module:
        from ..nn.rows import TokenRows

        tokens = self.tokens or tuple(range(action.into - rank, action.into))
        if len(tokens) != rank:
            raise UsageError(f"form.tokens: {len(tokens)} ids, and a rank of {rank}, which counts them. Give rank={len(tokens)}.")
        embedding: Any = action
        return TokenRows(embedding, tokens, self._trains(roles))

    def begin(self, made: Material, empty: Module, draw: Draw) -> dict[str, Tensor]:
        module: Any = empty
        assert made.source is not None
        assert made.weight is not None
        if len(made.source) < module.rank or made.source.shape[1] != module.action.out:
            raise Refused(
                f"{module.rank} rows of width {module.action.out} are wanted, and the source gives {tuple(made.source.shape)}. "
                "Calibration phrases need at least as many tokens as there are rows (rank), and the model's states the width of its embeddings."
            )
        factor = getattr(module.action, "scale_by", None)
        rows = made.source[: module.rank] if factor is None else made.source[: module.rank] / factor
        return {"rows": rows, "initial_rows": rows, "base_rows": made.weight[:, module.tokens.to(made.weight.device)].T.float()}
