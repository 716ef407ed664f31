from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from landscape_ray import text


@given(st.floats(-1e300, 1e300), st.integers(2, 6))
def test_number_says_the_value(value, digits):
    written = float(text.number(value, digits).replace("−", "-").replace(",", ""))
    # integers below ten million are written out, so never worse than the digits asked for
    assert written == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=1e-300)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.0, "0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (3599.9, "1 h"), (3661, "1 h 1 min"), (172800, "2 d")],
)
def test_duration(seconds, written):
    assert text.duration(seconds) == written


def test_what_is_missing_is_a_dash():
    written = [
        f(math.nan) for f in (text.number, text.loss, text.lr, text.percent, text.si, text.duration, text.signed)
    ]
    assert written == ["–"] * 7


def test_infinities():
    assert (text.number(math.inf), text.number(-math.inf)) == ("∞", "−∞")


def test_values_of_every_kind():
    assert text.value({"b": 1, "a": [2]}) == '{"a": [2], "b": 1}'
    assert (text.value(12_345), text.value(12), text.value(False)) == ("12,345", "12", "no")
    assert text.listing([]) == "none"
