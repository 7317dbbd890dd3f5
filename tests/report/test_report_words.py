"""Numbers, scales, ticks and escaping against values worked out by hand, numpy and the html module."""

from __future__ import annotations

import doctest
import html
import importlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.report import markup, svg, words


@pytest.mark.parametrize("name", ["check", "links", "markup", "words", "svg", "html", "card"])
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"eckart.report.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0, "0"), (7, "7"), (-1234, "−1,234"), (0.5, "0.5000"), (0.012345, "0.01235"), (12.345678, "12.35"), (1234.5, "1,234"),
     (2048.0, "2,048"), (1e-7, "1.00e−7"), (3.2e9, "3,200,000,000"), (1.5e12 + 0.5, "1.50e12"), (None, "–"), (-0.25, "−0.2500")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (999_949, "1.0 M"), (147_456, "147 k"), (22_713_216, "22.7 M"), (None, "–")],
)
def test_large(value: int | None, text: str) -> None:
    assert words.large(value) == text


def test_sizes_are_decimal() -> None:
    assert [words.size(v) for v in (0, 12, 90_888_945, 5 * 10**12)] == ["0 B", "12 B", "90.9 MB", "5.0 TB"]


def test_signs() -> None:
    assert words.signed(0.5) == "+0.500"
    assert words.signed(-0.5) == "−0.500"
    assert words.several(1, "matrix", "matrices") == "1 matrix"
    assert words.several(2048, "layer") == "2,048 layers"


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e6))
@settings(max_examples=60, deadline=None)
def test_ticks_are_round_and_inside(low: float, ratio: float) -> None:
    high = low * ratio
    for ticks in (svg.steps(low, high), svg.decades(low, high)):
        assert all(low * (1 - 1e-6) <= t <= high * (1 + 1e-6) for t in ticks)
        assert ticks == sorted(set(ticks))
        for t in ticks:
            if ratio > 10:
                mantissa = t / 10 ** math.floor(math.log10(t) + 1e-9)
                assert abs(mantissa * 100 - round(mantissa * 100)) < 1e-4
    if ratio >= 100:
        assert 2 <= len(svg.decades(low, high)) <= 8


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-4, 1e4))
@settings(max_examples=60, deadline=None)
def test_scales_agree_with_numpy(a: float, b: float, value: float) -> None:
    low, high = min(a, b), max(a, b) * 1.5
    expected = float(np.interp(value, [low, high], [10.0, 110.0]))
    assert svg.Scale(low, high, 10, 110)(value) == pytest.approx(expected, abs=1e-6)
    expected = float(np.interp(np.log(value), np.log([low, high]), [200.0, 0.0]))
    assert svg.Scale(low, high, 200, 0, log=True)(value) == pytest.approx(expected, abs=1e-6)


def test_nice() -> None:
    assert [svg.nice(v) for v in (0.07, 0.1, 0.11, 3, 5, 7, 1.0)] == [0.1, 0.1, 0.2, 5, 5, 10, 1]


def test_bucket_ends() -> None:
    assert [svg.bucket(s) for s in (-1, 0, 0.5, 1, 2)] == [0, 0, 8, 15, 15]


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_text_comes_back_as_it_went_in(text: str) -> None:
    made = markup.tag("p", {"title": text}, text)
    made.encode("utf-8")
    inner = made.partition(">")[2].removesuffix("</p>")
    assert "<" not in inner
    assert html.unescape(inner) == markup.visible(text)
    assert html.unescape(made.split('"')[1]) == markup.visible(text)


def test_what_a_reader_cannot_see_is_shown() -> None:
    assert markup.visible("a\u202eb\x00c\ud800d\r\ne") == "a\ufffdb\ufffdc\ufffdd\ne"


def test_markup_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="expected text or elements"):
        markup.tag("p", None, object())


def test_attributes() -> None:
    assert markup.tag("a", {"x": None, "y": False, "z": True, "w": 1.25, "v": 'q"<'}) == '<a z w="1.2" v="q&quot;&lt;"></a>'
