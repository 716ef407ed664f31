"""The figures of the studies of stability say what was measured, and show it."""

from __future__ import annotations

import numpy as np
import pytest

from landscape_ray.reports.stability import formula_of
from landscape_ray.reports.stability_studies import edge_figure, sgd_figure, width_figure
from landscape_ray.reports.static import render


def edge(curvature, threshold, *, state, ratio, num_steps=400):
    steps = np.linspace(0, num_steps, len(curvature))
    losses = 1 / (1 + np.arange(num_steps, dtype=float))
    losses[num_steps // 2 :: 4] *= 1.5  # rises at every fourth of the late updates
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=float), steps.shape)
    return edge_figure(
        "gradient-descent",
        probe="sharpness",
        formula="2/LR",
        steps=steps,
        curvature=curvature,
        thresholds=thresholds,
        losses=losses,
        ratio=ratio,
        state=state,
    )


def test_the_edge_says_where_the_curvature_is_and_against_which_limit():
    figure = edge([10.0, 30.0, 41.0, 39.0, 40.5], 40.0, state="at the edge", ratio=1.0125)
    assert "sharpness λ hovers at 101 % of the limit 2/LR = 40" in figure.takeaway
    assert "the loss rises in 25 % of these updates" in figure.takeaway
    above, below = figure.panels
    assert [item.role for item in above.series] == ["line", "points", "line"]
    assert above.series[-1].name == "2/LR = 40"
    assert above.y.limits is not None
    assert above.y.limits[0] == 0.0  # it starts far below, and is seen to
    assert above.y.limits[1] > 41.0
    assert below.y.scale == "log"
    assert figure.x.limits == (0.0, 408.0)
    assert render(figure)[1:4] == b"PNG"


def test_what_stays_close_to_the_limit_is_not_squeezed():
    limits = edge([36.0, 38.0, 41.0], 40.0, state="at the edge", ratio=1.0).panels[0].y.limits
    assert limits is not None
    assert limits[0] > 30.0


def test_a_limit_that_moves_is_not_a_number():
    figure = edge([10.0, 12.0, 14.0], [40.0, 60.0, 80.0], state="below", ratio=0.2)
    assert "stays at 20 % of the limit 2/LR of the same step" in figure.takeaway


def test_many_measurements_have_no_marks():
    figure = edge(np.full(100, 5.0), 40.0, state="below", ratio=0.125)
    assert [item.role for item in figure.panels[0].series] == ["line", "line"]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"name": "sgd", "momentum": 0.0}, "2/LR"),
        ({"name": "sgd", "momentum": 0.9}, "(2 + 2β)/LR"),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, "(2 + 2β)/((1 + 2β) LR)"),
        ({"name": "adamw"}, "(2 + 2β₁)/((1 − β₁) LR)"),
        ({"name": "muon"}, None),
    ],
)
def test_formulas_are_those_of_the_optimizers(optimizer, expected):
    assert formula_of(optimizer) == expected


def test_the_bound_of_sgd_is_where_weights_begin_to_grow():
    lrs = np.array([1.9, 2.0, 2.1])
    figure = sgd_figure(
        lrs,
        [0.1, 1.0, 10.0],
        [0.01, 0.1, 1.0],
        [0.1, 1.0, 10.0],
        trace=1.0,
        sharpness=0.1,
        measured_threshold=2.0,
        num_steps=300,
    )
    assert "Weights grow above LR · tr(H) = 2.00: the bound is 2. Gradient descent would be stable up to 20." in (
        figure.takeaway
    )
    assert render(figure)[1:4] == b"PNG"


def test_widths_that_coincide_are_told_from_those_that_do_not():
    steps = [0, 10, 20]
    alike = np.array([[10.0, 20.0, 30.0], [11.0, 21.0, np.nan]])
    apart = np.array([[10.0, 20.0, 30.0], [20.0, 40.0, 60.0]])
    figure = width_figure({"standard": ((64, 128), steps, apart, 1.0), "mup": ((64, 128), steps, alike, 0.07)})
    assert figure.takeaway == (
        "Standard: sharpness changes with width (width to the power +1.00); "
        "muP: sharpness coincides over widths (width to the power +0.07)."
    )
    assert figure.panels[0].y.limits == figure.panels[1].y.limits  # to be compared
    assert [item.name for item in figure.legend] == ["width 64", "width 128"]
    assert render(figure)[1:4] == b"PNG"
