"""The path of the hidden state through the blocks of a model, and the blocks at which it turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site, Stat
from ..errors import Refused, UsageError

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .host import Host


@dataclass(frozen=True, eq=False)
class WithPath:
    """Statistics, and the turns of the path beside them.

    Args:
        turns: names of blocks, the sharpest turn first.
        blocks: how many the path goes through.
        inner: other statistics, or None.
    """

    turns: tuple[str, ...]
    blocks: int
    inner: Any = None

    @property
    def sites(self) -> Mapping[str, str]:
        """Input ids by layer, of the other statistics."""
        return getattr(self.inner, "sites", {})

    def get(self, stat: Stat, site: Site) -> Any:
        """(turns, number of blocks) for the path; what else was measured otherwise."""
        if stat.kind == "path":
            return self.turns, self.blocks
        if self.inner is None:
            raise Refused(f"{site.name}: {stat.kind} was not measured.")
        return self.inner.get(stat, site)


def measure_path(host: Host, sites: Sequence[Site], how: Calibration, inner: Any = None) -> WithPath:
    """Blocks in the order in which Ramer-Douglas-Peucker keeps them: of the mean state per layer, as the measure `rdp` takes it.

    Args:
        host: the model and its tokenizer.
        sites: the layers of the run.
        how: with the text.
        inner: other statistics, to be given on.

    Raises:
        UsageError: a model without repeated blocks, with several lists of them, or fewer than two.
        Refused: hidden states that are not finite.
    """
    from ..axes.target import Turns
    from ..measures.base import TextView
    from ..measures.rdp import MEASURE
    from ..runners.observe import observe
    from .calibrate import is_tensors, rows_of
    from .host import is_causal

    blocks = tuple(host.catalogue.blocks)
    homes = {b.rpartition(".")[0] for b in blocks}
    if len(homes) != 1 or len(blocks) < 2:
        found = f"{len(homes)} lists of blocks" if len(homes) > 1 else f"{len(blocks)} repeated blocks"
        raise UsageError(
            f"target.{Turns.kind}: the path of the hidden state wants one list of at least two repeated blocks, and this model has {found}. "
            "Name layers instead (target)."
        )
    model = host.live()
    rows = rows_of(host, how)
    count = 0 if is_tensors(how.texts) else sum(len(b.input_ids) for b in rows)
    view = TextView(host.catalogue, sites, host.reader.config, is_causal(model), count, how.seed)
    record = next(r for r in observe(model, rows, view, [MEASURE]) if r.module == homes.copy().pop())
    if record.value is None:
        raise Refused(f"{record.module}: {record.note}. Check the calibration data and the weights (eckart inspect).")
    value: Any = record.value
    turns = [int(k) for k in value["order"] if float(value["reach"][int(k)]) > 0]
    return WithPath(tuple(blocks[k] for k in turns), len(blocks), inner)
