"""What `fit`, `predict` and `list` print, on the fabricated sweep of these tests."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console, RenderableType

from landscape_ray.analysis.annealing import SweepFit, load_fit
from landscape_ray.analysis.forecast import forecast_schedule
from landscape_ray.errors import UserError
from landscape_ray.laws import predict_annealing
from landscape_ray.reports.terminal import fit_tables, sweep_table
from landscape_ray.schedules import Schedule
from landscape_ray.tracking.folder import SweepFolder


def printed(what: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=160, color_system=None).print(what)
    return out.getvalue()


@pytest.fixture
def fitted(search_folder: SweepFolder) -> SweepFit:
    found = load_fit(search_folder)
    assert found is not None
    return found


def test_the_fit_is_printed_with_every_forecast(fitted: SweepFit) -> None:
    text = printed(fit_tables("mine", fitted))
    assert f"annealing law of mine: {fitted.fit.status}" in text
    for name in fitted.fit.parameters:
        assert f"\n{name} " in text
    for one in fitted.forecasts:
        (line,) = (row for row in text.splitlines() if row.startswith(one.run_id))
        assert f"{one.observed_final:.4f}" in line
        assert f"{one.predicted_final:.4f}" in line
        assert f"{one.relative_error:+.2%}" in line
    assert all(run_id in text for run_id in fitted.excluded)


def test_a_forecast_is_the_laws_and_says_how_far_to_trust_it(search_folder: SweepFolder, fitted: SweepFit) -> None:
    forecast = forecast_schedule(fitted, schedule="wsd", cooldown_fraction=0.4)
    summary = search_folder.trial(fitted.run_ids[0]).summary()
    assert summary is not None
    steps, warmup = summary.config["num_steps"], summary.config["schedule"]["warmup_steps"]
    plan = Schedule(name="wsd", peak=fitted.peak_lr, num_steps=steps, warmup_steps=warmup, cooldown_fraction=0.4)
    expected = predict_annealing(fitted.fit, plan.values(), [steps], warmup)
    assert forecast.schedule == plan
    assert f"{expected.loss_nats[-1]:.4f} nats/token" in forecast.sentence
    assert f"{expected.low[-1]:.4f} to {expected.high[-1]:.4f}" in forecast.sentence
    worst = max(abs(one.relative_error) for one in fitted.forecasts)
    assert f"{worst:.1%} at worst" in forecast.sentence


def test_another_peak_or_an_impossible_shape_is_refused(fitted: SweepFit) -> None:
    with pytest.raises(UserError, match="peak"):
        forecast_schedule(fitted, schedule="wsd", peak_lr=fitted.peak_lr * 2)
    with pytest.raises(UserError, match="known"):
        forecast_schedule(fitted, schedule="wsdd")
    with pytest.raises(UserError, match="cooldown_fraction"):
        forecast_schedule(fitted, schedule="wsd", cooldown_fraction=1.5)


def test_a_saved_fit_needs_its_runs_no_more(fitted: SweepFit) -> None:
    alone = SweepFit.from_json(fitted.to_json())
    assert forecast_schedule(alone, schedule="wsd").sentence == forecast_schedule(fitted, schedule="wsd").sentence


def row_of(folder: SweepFolder, *others: SweepFolder) -> str:
    text = printed(sweep_table([folder, *others]))
    (line,) = (row for row in text.splitlines() if row.startswith(folder.path.name))
    return line


def test_the_list_shows_how_far_each_sweep_is(search_folder: SweepFolder) -> None:
    line = row_of(search_folder)
    assert "finished" in line
    assert "12/12" in line  # sweep.json says no number of trials: those that were started


def test_an_unfinished_sweep_counts_against_what_was_planned(fabricate: ModuleType, tmp_path: Path) -> None:
    folder = fabricate.make_search(tmp_path / "half", steps=50, points=fabricate.SEARCH_POINTS[:3], sharp=False)
    best = folder.trial("t001").summary()
    for trial_id, loss_nats in (("t000", best.final_loss_nats + 1), ("t002", best.final_loss_nats - 1)):
        trial = folder.trial(trial_id)
        trial.commit(dataclasses.replace(trial.summary(), final_loss_nats=loss_nats), trial.num_parts())
    folder.trial("t002").set_status("pending", "interrupted at step 50")
    folder.update_meta(num_trials=8, status="interrupted")
    line = row_of(folder)
    assert "interrupted" in line
    assert "2/8" in line
    assert line.endswith(f"{best.final_loss_nats:.4f}")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trials/t001/trial.json", "{"),
        ("trials/t001/trial.json", '{"num_parts": 1, "summary": {"run_id": "t001", "status": "finished"}}'),
        ("sweep.json", "[]"),
        ("sweep.json", json.dumps({"format_version": 1, "created_unix": "today"})),
        ("sweep.json", json.dumps({"format_version": 1, "num_trials": None})),
    ],
)
def test_a_damaged_sweep_does_not_hide_the_others(
    fabricate: ModuleType, search_folder: SweepFolder, tmp_path: Path, file: str, content: str
) -> None:
    folder = fabricate.make_search(tmp_path / "broken", steps=50, points=fabricate.SEARCH_POINTS[:2], sharp=False)
    assert "damaged" not in row_of(folder)
    (folder.path / file).write_text(content)
    assert row_of(folder, search_folder).split() == ["broken", "–", "damaged", "–", "–"]
    assert "12/12" in row_of(search_folder, folder)
