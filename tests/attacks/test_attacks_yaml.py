"""Hostile recipes: refused as a wrong call, in a few words, before anything is built."""

from __future__ import annotations

import tracemalloc

import pytest
from hostile import RECIPES

from eckart.axes.border import from_yaml, to_yaml
from eckart.errors import UsageError
from eckart.store import _yaml


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    text, message = RECIPES[name]
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message) as caught:
            from_yaml(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
    assert peak < 30 << 20


def test_a_recipe_is_read_as_bytes_too() -> None:
    recipe = from_yaml("name: x\nverb: compress\ntitle: ünïcode\nbudget: {rank: 8}\n")
    assert from_yaml("name: x\nverb: compress\ntitle: ünïcode\nbudget: {rank: 8}\n".encode()) == recipe
    assert from_yaml(to_yaml(recipe)) == recipe


def test_plain_values_are_what_yaml_says() -> None:
    text = "a: 1\nb: -2.5\nc: true\nd: null\ne: text\nf: [1, {g: h}]\ni: '1'\nj: 2024-01-01\n"
    assert _yaml.parse(text, "x") == {
        "a": 1, "b": -2.5, "c": True, "d": None, "e": "text", "f": [1, {"g": "h"}], "i": "1", "j": "2024-01-01",
    }  # fmt: skip
