"""What the report says to do with a result, and the figure of what mattered."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from landscape_ray.analysis.importance import MIN_RUNS, importances
from landscape_ray.reports.importance_figure import importance
from landscape_ray.reports.recommendation import recommend, recommendation
from landscape_ray.text import percent


def with_summaries(sweep, **fields):
    """Return the sweep with other fields in every summary; a function is asked with the run."""
    runs = []
    for run in sweep.runs:
        own = {name: value(run) if callable(value) else value for name, value in fields.items()}
        runs.append(dataclasses.replace(run, summary=dataclasses.replace(run.summary, **own)))
    return dataclasses.replace(sweep, runs=tuple(runs))


def test_the_best_run_is_recommended_with_its_values(search):
    found = recommend([search])
    assert search.best.run_id in found.use
    table = tomllib.loads(found.toml)["train"]["schedule"]
    assert table == {name.removeprefix("schedule."): value for name, value in search.best.summary.varied.items()}


def test_a_populations_winner_is_recommended_with_the_schedule_that_it_went_through(population):
    table = tomllib.loads(recommend([population]).toml)["train"]["schedule"]
    assert (table["name"], table["peak_lr"]) == ("table", 0.004)
    assert table["points"][-1] == [1.0, pytest.approx(0.00155 / 0.004, rel=1e-4)]


def test_one_run_each_is_no_proof(search):
    second = search.finished[1]
    (first, *_) = recommend([search]).caution
    assert f"{second.run_id}, is {second.loss - search.best.loss:.4f} behind" in first
    assert "other seeds" in first


def test_diverged_runs_narrow_the_search(search):
    gone = next(run for run in search.runs if run.summary.status == "diverged")
    assert gone.peak_lr > max(run.peak_lr for run in search.finished)
    assert any("diverged: an upper end of the search near 0.0145" in one for one in recommend([search]).further)


def test_laws_choice_comes_with_its_gain_and_its_toml(search):
    sentence, toml = recommend([search]).schedule
    assert "Its gain over the best fitted schedule" in sentence
    assert tomllib.loads(toml)["train"]["schedule"]["peak_lr"] == pytest.approx(0.003)


def test_a_law_that_failed_recommends_nothing(search):
    failed = dataclasses.replace(search.fit, fit=dataclasses.replace(search.fit.fit, status="failed"))
    assert recommend([dataclasses.replace(search, fit=failed)]).schedule == ("", "")
    unseen = dataclasses.replace(search.fit, run_ids=())
    sentence, toml = recommend([dataclasses.replace(search, fit=unseen)]).schedule
    assert "recommends no schedule: curves must hold the fitted runs" in sentence
    assert toml == ""


def test_without_a_law_fit_is_suggested_and_an_unfinished_sweep_is_resumed(search):
    assert any("landscape-ray fit search" in one for one in recommend([dataclasses.replace(search, fit=None)]).further)
    cut = with_summaries(search, status=lambda run: "pending" if run.run_id == "t003" else run.summary.status)
    assert any("landscape-ray resume search" in one for one in recommend([cut]).further)


def test_nothing_can_be_recommended_before_a_run_has_finished(search):
    nothing = dataclasses.replace(search, runs=(), fit=None)
    assert 'class="empty"' in recommendation([nothing])
    assert "no run has committed" in recommend([nothing])


def test_page_shows_all_of_it_escaped(search):
    odd = with_summaries(search, varied={"schedule.name": '<b>"x"</b>'})
    shown = recommendation([odd])
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown


def test_importances_are_drawn_beside_chance(search):
    figure = importance(search, "importance")
    found = importances(search.runs)
    assert figure.panels[0].y.categories == tuple(one.name for one in found)
    for one in found:
        assert (f"{one.name} explains {percent(one.share)}" in figure.takeaway) == one.found
    bars = [one for one in figure.panels[0].series if one.role == "bar"]
    assert sorted(row for one in bars for row in one.y) == [0, 1, 2]
    (chance,) = (one for one in figure.panels[0].series if one.role == "points")
    assert len(chance.x) == 3


def test_importance_needs_runs(search):
    few = dataclasses.replace(search, runs=search.runs[: MIN_RUNS - 1])
    assert f"{MIN_RUNS} runs" in importance(few, "importance")
