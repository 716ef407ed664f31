"""The chapter on probes: what is drawn, what is counted, and what is said where there is nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from types import ModuleType

import numpy as np
import pytest

from landscape_ray import text
from landscape_ray.reports import insight
from landscape_ray.reports.figures import Figure, Series
from landscape_ray.reports.page import figures, render_page
from landscape_ray.reports.probe_section import MAX_PANELS, probe_tables, probes
from landscape_ray.reports.static import render
from landscape_ray.reports.views import Sweep

HOSTILE = "<img src=x onerror=alert(1)>"
FOUR = {
    "trace": lambda step: 100 + step,
    "trace/frobenius": lambda step: 10 + step / 10,
    "gradient_noise_scale": lambda step: 10.0 ** (1 + step / 100),
    "coherence": lambda step: np.where(step > 0, -step / 10, np.nan),
}


@pytest.fixture(scope="module")
def watched(search: Sweep, fabricate: ModuleType) -> Sweep:
    found: Sweep = fabricate.probed(search, FOUR)
    return found


@pytest.fixture(scope="module")
def figure(watched: Sweep) -> Figure:
    found = probes([watched])
    assert isinstance(found, Figure)
    return found


def of(figure: Figure, panel: int, role: str) -> list[Series]:
    return [one for one in figure.panels[panel].series if one.role == role]


def cells(html: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in html.split("<tr>")[1:]]


@pytest.mark.acceptance
def test_a_panel_for_each_main_value_in_the_colours_of_the_sharpness(figure: Figure, watched: Sweep) -> None:
    assert [panel.y.label for panel in figure.panels] == ["trace", "gradient_noise_scale", "coherence"]
    sharp = insight.sharpness([watched])
    assert isinstance(sharp, Figure)
    colors = {one.name: one.color for one in sharp.panels[0].series if one.name.startswith("t") and one.hover}
    assert {one.name: one.color for one in of(figure, 0, "line")} == colors
    (best,) = (one for one in of(figure, 0, "line") if one.color == "c0")
    assert best.x.tolist() == list(range(0, 301, 50))
    assert best.y.tolist() == [100 + step for step in range(0, 301, 50)]


def test_bands_are_the_errors(figure: Figure) -> None:
    for line, band in zip(of(figure, 0, "line"), of(figure, 0, "band"), strict=True):
        assert band.low is not None
        assert band.high is not None
        np.testing.assert_allclose(band.high - line.y, 0.1 * line.y)
        np.testing.assert_allclose(line.y - band.low, 0.1 * line.y)
        assert (band.name, band.color) == (line.name, line.color)


def test_without_errors_there_are_no_bands(search: Sweep, fabricate: ModuleType) -> None:
    figure = probes([fabricate.probed(search, {"distance": lambda step: step}, error=0.0)])
    assert isinstance(figure, Figure)
    assert not of(figure, 0, "band")
    assert figure.panels[0].y.limits is not None
    assert figure.panels[0].y.limits[0] == 0  # a distance is not drawn below zero


def test_axes_hold_the_values_and_wide_bands_are_cut(search: Sweep, fabricate: ModuleType) -> None:
    scales = {}
    for error in (0.0, 0.5, 50.0):
        for name, values in FOUR.items():
            figure = probes([fabricate.probed(search, {"other": values}, error=error)])
            assert isinstance(figure, Figure)
            (panel,) = figure.panels
            assert panel.y.limits is not None
            low, high = panel.y.limits
            known = np.concatenate([one.y for one in of(figure, 0, "line")])
            assert low <= known.min() < known.max() <= high
            spread = np.log(known) if panel.y.scale == "log" else known
            ends = np.log([low, high]) if panel.y.scale == "log" else np.array([low, high])
            assert np.ptp(ends) < 2.6 * np.ptp(spread)
            scales[name] = panel.y.scale
            assert all(one.low is None or (one.low > 0).all() for one in panel.series if panel.y.scale == "log")
    assert scales == {
        "trace": "linear", "trace/frobenius": "linear", "gradient_noise_scale": "log", "coherence": "linear"
    }  # fmt: skip


def test_a_budget_that_delays_the_first_measurement_does_not_move_the_axis(
    search: Sweep, fabricate: ModuleType
) -> None:
    late = {"trace": lambda step: np.where(step >= 150, 1.0 + step, np.nan)}
    figure = probes([fabricate.probed(search, late)])
    assert isinstance(figure, Figure)
    assert figure.x.limits == (0.0, pytest.approx(306.0))
    assert of(figure, 0, "line")[0].x[0] == 150


def test_the_sentence_tells_first_and_last(figure: Figure, watched: Sweep) -> None:
    assert watched.best is not None
    assert figure.takeaway == (
        f"From first to last in {watched.best.run_id}: trace 100 → 400, gradient_noise_scale 10 → 10,000, "
        "coherence −5 → −30."
    )


def test_more_than_six_are_drawn_in_part_and_the_note_says_so(search: Sweep, fabricate: ModuleType) -> None:
    many = {f"long_name_of_a_probe_{k}": lambda step: 1.0 + step for k in range(8)}
    sweep = fabricate.probed(search, many)
    figure = probes([sweep])
    assert isinstance(figure, Figure)
    assert len(figure.panels) == MAX_PANELS
    assert figure.note.endswith("in the table: long_name_of_a_probe_6 and long_name_of_a_probe_7.")
    assert '<td class="text">long_name_of_a_probe_7</td>' in probe_tables([sweep])
    assert render(figure)[:4] == b"\x89PNG"


def test_small_panels_lie_apart_in_their_order(search: Sweep, fabricate: ModuleType) -> None:
    many = {f"long_name_of_a_probe_{k}": lambda step: 10.0 ** (step / 30) for k in range(5)}
    page = render_page([fabricate.probed(search, many)])
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert found is not None
    figure = json.loads(found[1])["figures"]["probes"]
    axes = [figure["layout"][f"yaxis{k}"] for k in ("", 2, 3, 4, 5)]
    bounds = [bound for axis in axes for bound in reversed(axis["domain"])]
    assert bounds == sorted(set(bounds), reverse=True)
    assert (bounds[0], bounds[-1]) == (1, 0)
    for axis, (low, high) in zip(axes, (axis["domain"] for axis in axes), strict=True):
        assert high - low == pytest.approx(axes[0]["domain"][1] - axes[0]["domain"][0], abs=1e-5)
        assert (high - low) * figure["height"] > 130
        assert "<br>" in axis["title"]["text"]
        assert 3 <= len(axis["tickvals"]) == len(axis["ticktext"]) <= 5


def test_the_table_counts_what_a_probe_cost(watched: Sweep) -> None:
    shown = probe_tables([watched])
    main, parts = shown.split("<details>")
    rows = {row[0]: row[1:] for row in cells(main) if row}
    assert list(rows) == ["sharpness", "trace", "gradient_noise_scale", "coherence"]
    assert rows["trace"] == ["100", "400 ± 40", "7", "14", "3.5 s"]
    assert rows["coherence"] == ["−5", "−30 ± 3", "6", "14", "3.5 s"]  # what failed was paid for, too
    assert [row for row in cells(parts) if row] == [["trace/frobenius", "10", "40 ± 4"]]
    assert watched.best is not None
    assert f"Probes of {watched.best.run_id}, the best run" in shown


def test_share_and_budget(watched: Sweep, fabricate: ModuleType) -> None:
    spent, total, evals = (
        sum(getattr(run.summary, name) for run in watched.runs)
        for name in ("probe_seconds", "elapsed_seconds", "eval_seconds")
    )
    said = probe_tables([watched])
    assert f"probes took {100 * spent / total:.2g} % of the time.</p>" in said
    said = probe_tables([fabricate.configured(watched, probes={"budget": 0.05})])
    of_training = text.percent(spent / (total - evals - spent))
    assert f"which is {of_training} of the training time; probes.budget allows 5 % of that." in said


def test_without_another_probe_a_sentence_says_how_to_add_one(search: Sweep, population: Sweep) -> None:
    assert probe_tables([search]) == ""
    said = probes([search])
    assert isinstance(said, str)
    assert re.match(r"No probe ran beside sharpness, which took [\d.]+ % of the time; a table such as \[train", said)
    assert probes([population]) == (
        "No probe ran; a table such as [train.probes.gradient_noise_scale] in the sweep file adds one."
    )
    assert "probes" not in [one.key for one in figures([search, population])]


def test_runs_without_sharpness_are_drawn_too(population: Sweep, fabricate: ModuleType) -> None:
    figure = probes([fabricate.probed(population, {"trace": lambda step: 5.0 + step})])
    assert isinstance(figure, Figure)
    assert of(figure, 0, "line")


def test_a_run_that_copied_weights_has_one_value_at_each_step(population: Sweep, fabricate: ModuleType) -> None:
    first = fabricate.probed(population, {"trace": lambda step: 5.0 + step})
    again = fabricate.probed(first, {"trace": lambda step: 7.0 + step})
    found = insight.measured(again.runs[0], "trace")
    assert found.step.tolist() == list(range(0, 301, 50))
    assert found.value.tolist() == [7.0 + step for step in range(0, 301, 50)]


def test_one_measurement_is_a_point(search: Sweep, fabricate: ModuleType) -> None:
    figure = probes([fabricate.probed(search, {"trace": lambda step: np.where(step == 0, 3.0, np.nan)})])
    assert isinstance(figure, Figure)
    assert of(figure, 0, "points")
    assert "trace 3." in figure.takeaway
    assert render(figure)[:4] == b"\x89PNG"


def test_two_sweeps_of_which_one_was_watched(watched: Sweep, population: Sweep) -> None:
    named = dataclasses.replace(watched, name="watched")
    figure = probes([population, named])
    assert isinstance(figure, Figure)
    assert "in watched/" in figure.takeaway
    assert "Probes of watched/" in probe_tables([population, named])


@pytest.mark.acceptance
def test_names_of_probes_stay_text(search: Sweep, fabricate: ModuleType) -> None:
    values = {f"{HOSTILE}{k}": (lambda step: 1.0 + step) for k in range(4)} | {f"trace/{HOSTILE}": lambda step: step}
    page = render_page([fabricate.probed(search, values)])
    assert "<img" not in page.split("<script type")[0]
    assert "&lt;img src=x onerror=alert(1)&gt;0" in page


def test_equal_sweeps_give_equal_text(search: Sweep, fabricate: ModuleType) -> None:
    one, two = (render_page([fabricate.probed(search, FOUR)]) for _ in range(2))
    assert one == two
    assert 'id="figure-probes"' in one
