"""A sum whose rounding does not depend on how the work was split: a fixed dyadic tree over numbered leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..errors import UsageError

V = TypeVar("V")


@dataclass(frozen=True)
class Tree(Generic[V]):
    """Partial sums over leaves 0, 1, 2, ...: the node (level, index) covers the leaves [index 2^level, (index + 1) 2^level).

    Two siblings are combined, left before right, as soon as both are present, so a set of leaves has one value whatever the order and
    the split in which they came, bit for bit. At most log2(leaves) nodes are held after a run of consecutive leaves. `None` is the value
    of a leaf that had nothing to add; it is exactly neutral. It is not an associative sum of unnumbered values.

    Args:
        combine: (left, right) -> sum; must not change its arguments.
        nodes: the nodes held, disjoint.

    Example:
        >>> plus = lambda a, b: a + b
        >>> one = Tree(plus).add(0, 0.1).add(1, 0.2).add(2, 0.3)
        >>> two = Tree(plus).add(2, 0.3).merge(Tree(plus).add(1, 0.2)).merge(Tree(plus).add(0, 0.1))
        >>> one.finish(3) == two.finish(3)
        True
    """

    combine: Callable[[V, V], V]
    nodes: Mapping[tuple[int, int], V | None] = field(default_factory=dict)

    def add(self, leaf: int, value: V | None) -> Tree[V]:
        """This tree with one more leaf.

        Raises:
            UsageError: the leaf is negative or already summed.
        """
        if leaf < 0:
            raise UsageError(f"leaf {leaf}: expected an index from 0.")
        return self._with({(0, leaf): value})

    def merge(self, other: Tree[V]) -> Tree[V]:
        """The sum of two trees over disjoint leaves.

        Raises:
            UsageError: they share a leaf.
        """
        return self._with(other.nodes)

    def finish(self, count: int) -> V | None:
        """The sum over the leaves 0 ... count - 1, which must be exactly those held; None when none had anything to add.

        Raises:
            UsageError: a leaf is missing, or there are more.
        """
        at, total = 0, None
        for (level, index), value in sorted(self.nodes.items(), key=lambda n: n[0][1] << n[0][0]):
            if index << level != at:
                raise UsageError(f"leaf {at} is missing: the parts cover less than the whole of {count} leaves.")
            at += 1 << level
            total = self._join(total, value)
        if at != count:
            raise UsageError(f"expected {count} leaves, found {at}.")
        return total

    def _join(self, left: V | None, right: V | None) -> V | None:
        return right if left is None else left if right is None else self.combine(left, right)

    def _with(self, more: Mapping[tuple[int, int], V | None]) -> Tree[V]:
        nodes = dict(self.nodes)
        for (level, index), value in more.items():
            self._refuse_overlap(nodes, level, index)
            while (level, index ^ 1) in nodes:
                other = nodes.pop((level, index ^ 1))
                value = self._join(value, other) if index % 2 == 0 else self._join(other, value)
                level, index = level + 1, index // 2
            nodes[level, index] = value
        return Tree(self.combine, nodes)

    @staticmethod
    def _refuse_overlap(nodes: Mapping[tuple[int, int], V | None], level: int, index: int) -> None:
        first, last = index << level, (index + 1) << level
        for a, i in nodes:
            if i << a < last and first < (i + 1) << a:
                raise UsageError(f"leaves {first} to {last - 1}: some are already in the sum. Parts that are merged must not share a leaf.")
