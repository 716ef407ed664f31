from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from landscape_ray.reports.figures import (
    NUM_SEQUENTIAL,
    Axis,
    Figure,
    Panel,
    extent,
    log_ticks,
    palette,
    sequential,
    series,
    thin,
    visible,
)
from landscape_ray.reports.static import _characters, _wrapped

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(code: str) -> np.ndarray:
    channels = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(code: str) -> float:
    return float(linear(code) @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("eyes", DEFICIENCIES)
def test_categorical_colours_differ_for_all_eyes(theme, eyes):
    colors = palette(theme)
    seen = [lab(DEFICIENCIES[eyes] @ linear(colors[f"c{i}"])) for i in range(6)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme):
    colors = palette(theme)
    assert all(contrast(colors[f"c{i}"], colors["ground"]) >= 3 for i in range(6))
    assert contrast(colors["muted"], colors["ground"]) >= 3
    assert contrast(colors["text"], colors["ground"]) >= 7
    assert contrast(colors["faint"], colors["ground"]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_sequential_scale_recedes_from_best_to_worst(theme):
    colors = palette(theme)
    shades = [contrast(colors[f"seq:{i}"], colors["ground"]) for i in range(NUM_SEQUENTIAL)]
    assert all(a > b for a, b in itertools.pairwise(shades))
    assert shades[-1] > 1.5


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-20, 20))
def test_sequential_names_are_in_the_palette(best, worst, value):
    assert sequential(value, best, worst) in palette("light")


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=900).map(np.array),
    st.integers(20, 200),
)
def test_thin_keeps_ends_and_extremes(y, max_points):
    x = np.arange(len(y))
    kept_x, kept_y = thin(x, y, max_points)
    assert (kept_x[0], kept_x[-1]) == (0, len(y) - 1)
    assert (kept_y.min(), kept_y.max()) == (y.min(), y.max())
    assert (np.diff(kept_x) > 0).all()
    np.testing.assert_array_equal(kept_y, y[kept_x.astype(int)])
    assert len(kept_x) <= max(max_points + 8, 20)


def test_thin_keeps_a_jump_where_it_is():
    y = np.where(np.arange(50_000) < 31_234, 0.004, 0.001)
    x, _ = thin(np.arange(50_000), y, 100)
    assert {31_233.0, 31_234.0} <= set(x)


def test_thin_survives_missing_values():
    x, y = thin(np.arange(1000), np.full(1000, np.nan), 50)
    assert len(x) == len(y) <= 60


@given(st.floats(1e-12, 1e12), st.floats(1.0, 1e9))
def test_log_ticks_are_inside_and_few(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert all(low * 0.998 <= tick <= low * ratio * 1.002 for tick in ticks)
    assert len(ticks) <= 16
    assert ratio < 3.2 or len(ticks) >= 2


def test_log_ticks_of_nothing():
    assert log_ticks(0.0, 1.0) == ()


def test_extent_ignores_what_a_log_axis_cannot_show():
    drawn = series("line", [0.0, 1.0, 10.0], [0.0, 2.0, np.nan])
    panel = Panel(y=Axis(label="y", scale="log"), series=(drawn,))
    figure = Figure(key="k", title="t", takeaway="s", x=Axis(label="x", scale="log"), panels=(panel,))
    assert extent(figure) == (1.0, 10.0)
    assert extent(figure, panel) == (2.0, 2.0)


def test_visible_range_holds_the_data_on_any_axis():
    assert visible(Axis(label="x", limits=(1, 2)), (5, 6)) == (1, 2)
    low, high = visible(Axis(label="x", scale="log"), (3.0, 3.0))
    assert low < 3.0 < high
    low, high = visible(Axis(label="x"), (3.0, 3.0))
    assert low < 3.0 < high


def test_legend_has_each_name_once_and_prefers_lines_to_bands():
    band = series("band", [0, 1], [1, 1], low=[0, 0], high=[2, 2], name="a")
    line = series("line", [0, 1], [1, 1], name="a")
    other = series("line", [0, 1], [1, 1], name="b", color="c1")
    panel = Panel(y=Axis(label="y"), series=(band, line, other, series("line", [0], [0])))
    figure = Figure(key="k", title="t", takeaway="s", x=Axis(label="x"), panels=(panel, panel))
    assert figure.legend == (line, other)


def test_formulas_and_intervals_stay_on_one_line() -> None:
    ahead = "x" * 92
    assert _wrapped(f"{ahead} of (2 + 2β)/LR = 76").split("\n") == [f"{ahead} of", "(2 + 2β)/LR = 76"]
    assert _wrapped(f"{ahead} τ (+0.44 to +0.79).").split("\n") == [f"{ahead} τ", "(+0.44 to +0.79)."]
    long = "(" + " ".join(["word"] * 40) + ")"
    assert max(len(line) for line in _wrapped(long).split("\n")) <= 100
    assert _wrapped(f"{ahead} off by 1.7 % at").split("\n") == [f"{ahead} off by", "1.7 % at"]


def test_long_names_at_the_axis_leave_less_room_for_the_takeaway() -> None:
    def widest(name: str) -> int:
        panel = Panel(y=Axis(label="", categories=(name, "b")), series=(series("points", [1, 2], [0, 1]),))
        figure = Figure(key="k", title="t", takeaway="word " * 60, x=Axis(label="x"), panels=(panel,))
        return _characters(figure)

    assert widest("a") == 100
    assert widest("blocks.0.attention.qkv, 12,288") == 88
    assert widest("x" * 200) == 40
