from __future__ import annotations

import dataclasses
import math

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.figure import Figure as Canvas

from landscape_ray.reports import charts, insight
from landscape_ray.reports.figures import Axis, Figure, Panel, palette, series
from landscape_ray.reports.interactive import legend, specification
from landscape_ray.reports.page import figures
from landscape_ray.reports.static import DPI, WIDTH_INCHES, _draw, height_inches, render


def named(figure, name, panel=0):
    return [one for one in figure.panels[panel].series if one.name == name]


def painted(value, colors):
    """What the page's script does: names to colours."""
    if isinstance(value, str) and value.startswith("@"):
        code = colors[value[1:].split("/")[0]]
        return code if "/" not in value else f"rgba({int(code[1:3], 16)},0,0,0.2)"
    if isinstance(value, dict):
        return {key: painted(item, colors) for key, item in value.items()}
    return [painted(item, colors) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def drawn(search, population) -> list[Figure]:
    return figures([search, population])


def test_every_chapter_has_its_figure(drawn):
    curves = ["loss-curves", "generalisation"]
    keys = [*curves, "schedules", "lineage-1", "search-result", "importance", "sharpness", "forecast", "time-spent"]
    assert [figure.key for figure in drawn] == keys


def test_figures_have_labels_units_and_a_sentence(drawn):
    for figure in drawn:
        assert figure.title
        assert figure.takeaway.endswith(".")
        assert figure.x.label
        assert all(panel.y.label or panel.y.categories for panel in figure.panels)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_plotly_accepts_every_figure(drawn, theme):
    colors = palette(theme)
    for figure in drawn:
        go.Figure(painted(specification(figure), colors))  # raises on anything that plotly does not know


def test_specification_holds_the_data_and_no_colours(drawn):
    curves = specification(drawn[0])
    assert "#" not in str(curves)
    figure = drawn[0]
    best = next(one for one in figure.panels[0].series if one.name.startswith("best of search"))
    trace = next(one for one in curves["data"] if one["name"].startswith("best of search"))
    np.testing.assert_allclose(trace["y"], best.y, rtol=1e-6)


def test_what_is_not_finite_becomes_null():
    run = charts.series("line", [0, 1, 2], [1.0, math.nan, math.inf], hover="x")
    figure = Figure(
        key="k",
        title="t",
        takeaway="s.",
        x=charts.STEP,
        panels=(charts.Panel(y=charts.Axis(label="y"), series=(run,)),),
    )
    assert specification(figure)["data"][0]["y"] == [1, None, None]


def test_hover_text_is_escaped(drawn):
    hostile = charts.series("points", [1], [1], hover=("<b>%{y}</b>",), name="<i>")
    panel = charts.Panel(y=charts.Axis(label="<y>"), series=(hostile,))
    figure = Figure(key="k", title="t", takeaway="s.", x=charts.STEP, panels=(panel,))
    assert "<b>" not in str(specification(figure))
    assert "<y>" not in str(specification(figure))
    assert legend(figure)[0]["name"] == "<i>"  # the page escapes the legend itself


def test_best_and_diverged_stand_out(search):
    figure = charts.loss_curves([search])
    (best,) = named(figure, f"best: {search.best.run_id}")
    assert best.weight == "main"
    assert best.y[-1] == search.best.loss
    cross = next(one for one in named(figure, "diverged") if one.role == "points")
    assert cross.x.tolist() == [50]
    assert "1 run diverged" in figure.takeaway


def test_loss_axis_is_cut_where_runs_start_and_the_note_says_so(search):
    figure = charts.loss_curves([search])
    low, high = figure.panels[0].y.limits
    assert low < search.best.loss < high < search.best.evals["loss_nats"][0]
    assert "cut" in figure.note


def test_schedules_are_coloured_by_loss(search):
    figure = charts.schedules([search])
    (best,) = named(figure, f"best: {search.best.run_id}")
    assert best.color == "seq:0"
    assert figure.colorbar.best == search.best.loss
    np.testing.assert_array_equal(best.y, charts.thin(search.best.steps["step"], search.best.steps["lr"])[1])


def test_search_result_has_every_finished_run_once(search):
    figure = charts.search_result([search])
    points = [one for one in figure.panels[0].series if one.role == "points" and not one.name.startswith("diverged")]
    assert sorted(np.concatenate([one.x for one in points])) == sorted(run.peak_lr for run in search.finished)
    assert len({one.symbol for one in points}) == len({one.color for one in points}) == 4


def test_outlier_is_drawn_at_the_edge_with_its_loss(search):
    run = search.finished[-1]
    far = dataclasses.replace(run, summary=dataclasses.replace(run.summary, final_loss_nats=9.5))
    runs = tuple(far if one is run else one for one in search.runs)
    figure = charts.search_result([dataclasses.replace(search, runs=runs)])
    assert max(one.y.max() for one in figure.panels[0].series) < 4
    assert any("9.5000" in text for one in figure.panels[0].series for text in one.hover)
    assert "upper edge" in figure.note


def test_yardstick_of_adam_is_two_over_the_rate(search):
    figure = insight.sharpness([search])
    limit = next(one for one in named(figure, "2/LR of the same run") if one.x[-1] == 300)
    best = search.best.steps
    lr = dict(zip(best["step"].tolist(), best["lr"].tolist(), strict=True))
    np.testing.assert_allclose(limit.y, [2 / lr[step] for step in limit.x])
    assert "(for AdamW only a yardstick)" in figure.takeaway
    assert "For AdamW 2/LR, the limit of plain gradient descent, is only a yardstick" in figure.note
    assert "[train.probes.preconditioned_sharpness]" in figure.note


def test_ratio_is_sharpness_times_rate_over_two(search):
    figure = insight.sharpness([search])
    name = f"{search.best.run_id} (peak LR {charts.text.lr(search.best.peak_lr)})"
    (upper,), (lower,) = named(figure, name), named(figure, name, panel=1)
    rates = np.concatenate([search.best.steps["lr"][:1], search.best.steps["lr"]])[upper.x.astype(int)]
    np.testing.assert_allclose(lower.y, upper.y * rates / 2)
    np.testing.assert_allclose(upper.high - upper.y, search.best.probe("sharpness")["standard_error"])


def test_forecast_figure_shows_what_was_saved(search, fit):
    figure = insight.forecast(search)
    one = fit.headline_forecast
    (line,) = [item for item in named(figure, "forecast") if item.role == "line"]
    np.testing.assert_array_equal(line.y, one.prediction.loss_nats)
    assert line.y[-1] == one.predicted_final
    measured = next(item for item in figure.panels[0].series if item.name.startswith("measured"))
    assert measured.y[-1] == one.observed_final
    residual = next(item for item in figure.panels[1].series if item.role == "points")
    assert residual.y[-1] == pytest.approx(one.observed_final - one.predicted_final)
    assert (measured.x >= one.prediction.step[0]).all()


def test_missing_data_is_a_reason_with_a_remedy(search, population):
    nothing = dataclasses.replace(search, runs=(), fit=None)
    assert "no run has committed" in charts.loss_curves([nothing])
    assert "[search]" in charts.schedules([nothing])
    assert "no run has committed" in charts.search_result([nothing])
    assert "[train.probes.sharpness]" in insight.sharpness([population])
    assert "landscape-ray fit" in insight.forecast(nothing)
    assert "No running time" in insight.time_spent([nothing])


def test_fit_of_a_run_that_is_gone(search):
    left = tuple(run for run in search.runs if run.run_id != "t002")
    assert "not among the runs" in insight.forecast(dataclasses.replace(search, runs=left))


def test_png_has_the_expected_size_and_is_the_same_twice(drawn):
    for figure in drawn:
        image = render(figure)
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        size = int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")
        assert size == pytest.approx((WIDTH_INCHES * DPI, height_inches(figure) * DPI), abs=1)
        assert len(image) > 10_000
    assert render(drawn[0]) == render(drawn[0])


def test_svg_is_the_same_twice_and_themes_differ(drawn):
    assert render(drawn[0], "svg") == render(drawn[0], "svg")
    assert render(drawn[0]) != render(drawn[0], theme="dark")


def test_dollar_signs_are_not_mathematics(drawn):
    assert render(dataclasses.replace(drawn[-1], title="a $ b $ c $\\frac{$"))


def with_losses(sweep, change, **summary):
    """Return the sweep with other held-out and training losses, and other fields in the summaries of its runs."""
    runs = []
    for run in sweep.runs:
        steps, evals = ({**rows, "loss_nats": change(rows["loss_nats"])} for rows in (run.steps, run.evals))
        runs.append(
            dataclasses.replace(run, steps=steps, evals=evals, summary=dataclasses.replace(run.summary, **summary))
        )
    return dataclasses.replace(sweep, runs=tuple(runs))


@pytest.mark.parametrize("change", [lambda x: x - 10, lambda x: 0 * x], ids=["negative", "zero"])
def test_losses_need_not_be_positive(search, change):
    figure = charts.generalisation([with_losses(search, change)])
    assert figure.panels[0].y.scale == "linear"
    render(figure)


def test_losses_of_different_kinds_have_no_winner(search):
    other = with_losses(search, lambda x: x, loss_unit="squared error")
    text = charts.generalisation([search, other])
    assert text == "The losses are of different kinds (nats/token, squared error), so no run is the best of all."
    assert "no run is the best" in charts.loss_curves([search, other]).takeaway


def test_accuracy_has_a_panel_where_it_was_measured(search):
    runs = []
    for run in search.runs:
        accuracy = np.linspace(0, 1, len(run.evals["step"]))
        runs.append(dataclasses.replace(run, evals={**run.evals, "accuracy": accuracy}))
    figure = charts.generalisation([dataclasses.replace(search, runs=tuple(runs))])
    assert len(figure.panels) == 2
    assert "100 % predicted right" in figure.takeaway
    assert len(charts.generalisation([search]).panels) == 1


def test_bars_of_a_series_that_leaves_rows_out_begin_where_the_others_end():
    axis = Axis(label="", categories=("a", "b"))
    bars = (
        series("bar", [0.5], [0.0], color="c0"),
        series("bar", [0.25], [1.0], color="c1"),
        series("bar", [0.1], [0.0], color="c2"),
    )
    figure = Figure(key="k", title="t", takeaway="s.", x=Axis(label="x"), panels=(Panel(y=axis, series=bars),))
    canvas = Canvas()
    (ax,) = [canvas.subplots()]
    for one in bars:
        _draw(ax, one, palette("light"))
    drawn = [(patch.get_x(), patch.get_width()) for patch in ax.patches]
    np.testing.assert_allclose(drawn, [(0, 0.5), (0, 0.25), (0.5, 0.1)])
    assert render(figure)[:4] == b"\x89PNG"
