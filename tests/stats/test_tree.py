"""The tree: one value per set of leaves, whatever the order and the split."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.errors import UsageError
from eckart.stats import Tree


def plus(a, b):
    return a + b


FLOATS = st.floats(-1e9, 1e9).map(lambda v: v / 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), FLOATS), min_size=1, max_size=33), st.data())
def test_any_order_and_any_split_give_the_same_bits(values, data):
    whole = Tree(plus)
    for i, v in enumerate(values):
        whole = whole.add(i, v)
    owners = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    order = data.draw(st.permutations(range(len(values))))
    parts = [Tree(plus) for _ in range(4)]
    for i in order:
        parts[owners[i]] = parts[owners[i]].add(i, values[i])
    merged = Tree(plus)
    for k in data.draw(st.permutations(range(4))):
        merged = merged.merge(parts[k])
    expected, found = whole.finish(len(values)), merged.finish(len(values))
    assert expected == found  # exact
    known = [v for v in values if v is not None]
    if known:
        assert found == pytest.approx(math.fsum(known), abs=1e-5 * max(1, max(map(abs, known))) * 1e-6)
    else:
        assert found is None


def test_the_order_matters_without_a_tree():
    """What the tree is for: plain running sums of the same leaves do differ."""
    values = [0.1, 0.2, 0.3]
    assert sum(values) != sum(reversed(values))


def brackets(values):
    """Written out by hand: pairs, pairs of pairs, and the rest from the left."""
    (a, b, c, d, e, f, g) = values
    return f"((({a}+{b})+({c}+{d}))+({e}+{f}))+{g}"


def test_the_tree_itself():
    tree = Tree(lambda x, y: f"({x}+{y})")
    for i in (3, 0, 6, 5, 1, 4, 2):
        tree = tree.add(i, "abcdefg"[i])
    assert tree.finish(7) == f"({brackets('abcdefg')})"
    assert set(tree.nodes) == {(2, 0), (1, 2), (0, 6)}


def test_few_nodes_are_held():
    tree = Tree(plus)
    for i in range(1000):
        tree = tree.add(i, 1.0)
        assert len(tree.nodes) == (i + 1).bit_count()


def test_trees_are_values():
    one = Tree(plus).add(0, 1.0)
    one.add(1, 2.0)
    assert dict(one.nodes) == {(0, 0): 1.0}


def test_refusals():
    tree = Tree(plus).add(0, 1.0).add(1, 2.0).add(4, 1.0)
    with pytest.raises(UsageError, match="already in the sum"):
        tree.add(1, 3.0)
    with pytest.raises(UsageError, match=r"leaves 4 to 5.*already"):
        tree.merge(Tree(plus).add(4, 1.0).add(5, 1.0))
    with pytest.raises(UsageError, match="already in the sum"):
        Tree(plus).add(0, 1.0).merge(Tree(plus, {(2, 0): 1.0}))
    with pytest.raises(UsageError, match="leaf 2 is missing"):
        tree.finish(5)
    with pytest.raises(UsageError, match="expected 3 leaves, found 2"):
        Tree(plus).add(0, 1.0).add(1, 2.0).finish(3)
    with pytest.raises(UsageError, match="index from 0"):
        tree.add(-1, 0.0)
    assert Tree(plus).finish(0) is None
