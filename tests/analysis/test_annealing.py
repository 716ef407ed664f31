from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from landscape_ray.analysis.annealing import (
    SweepFit,
    annealing_curves,
    decay_grid,
    fit_sweep,
    headline_run,
    load_fit,
)
from landscape_ray.errors import UserError
from landscape_ray.tracking.collect import collect, run_columns


def test_import_needs_no_plotting_library():
    code = "import sys, landscape_ray.analysis.annealing; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"plotly", "matplotlib", "torch", "ray", "mlflow"} & set(loaded)


def test_the_group_is_the_runs_of_one_peak(search_folder):
    found = annealing_curves(collect(search_folder))
    (group,) = found.groups
    assert [curve.run_id for curve in group.curves] == ["t000", "t001", "t002", "t003", "t004"]
    assert group.peak_lr == pytest.approx(0.003)
    assert group.num_schedules == 5
    assert set(found.excluded) == {f"t{i:03d}" for i in range(5, 12)}
    assert "diverged" in found.excluded["t011"]
    assert "only 1 schedule at peak LR 0.0011" in found.excluded["t005"]


def test_curves_are_what_was_recorded(search_folder):
    collected = collect(search_folder)
    curve = annealing_curves(collected).groups[0].curves[2]
    assert len(curve.lr) == 300
    assert curve.warmup_steps == 15
    assert curve.step.tolist() == list(range(25, 301, 25))
    assert curve.loss_nats[-1] == next(run for run in collected.runs if run.run_id == "t002").final_loss_nats


def test_training_losses_instead_of_held_out_ones(search_folder):
    """The loss in the row of update s was measured before it: after s - 1 updates."""
    collected = collect(search_folder)
    curve = annealing_curves(collected, loss="train").groups[0].curves[0]
    assert curve.step.tolist() == list(range(16, 300))
    rows = run_columns(collected.records, curve.run_id, "step")
    np.testing.assert_array_equal(curve.loss_nats, rows["loss_nats"][rows["step"] > 16])
    np.testing.assert_array_equal(curve.lr, rows["lr"])


def test_the_training_loss_before_the_first_update_is_left_out(search_folder):
    collected = collect(search_folder)
    for index, run in enumerate(collected.runs):
        schedule = run.config["schedule"] | {"warmup_steps": 0}
        collected.runs[index] = dataclasses.replace(run, config=run.config | {"schedule": schedule})
    (group,) = annealing_curves(collected, loss="train").groups
    assert all(curve.step.tolist() == list(range(1, 300)) for curve in group.curves)


def test_a_run_without_a_training_loss_after_its_warmup_is_left_out(search_folder):
    collected = collect(search_folder)
    config = json.loads(json.dumps(collected.runs[0].config))
    config["schedule"]["warmup_steps"] = 299
    collected.runs[0] = dataclasses.replace(collected.runs[0], config=config)
    assert "t000" not in annealing_curves(collected).excluded
    found = annealing_curves(collected, loss="train")
    assert found.excluded["t000"] == "it has no training loss after its warm-up"


def test_members_of_a_population_are_left_out_with_the_reason(population_folder):
    with pytest.raises(UserError, match=r"needs >= 3 finished runs with equal peak LR .*\[\[search.initial\]\]"):
        annealing_curves(collect(population_folder))


def test_a_copying_member_is_named(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "s", steps=100, points=fabricate.SEARCH_POINTS[:3])
    fabricate.make_population(tmp_path / "p", steps=100)
    search, population = collect(folder), collect(tmp_path / "p")
    for index, run in enumerate(population.runs):
        population.runs[index] = dataclasses.replace(run, config=search.runs[0].config)
    names = {f"t{i:03d}": f"m{i}" for i in range(4)}
    import pyarrow as pa

    rows = population.records
    renamed = pa.array([names[name] for name in rows["run_id"].to_pylist()])
    rows = rows.set_column(rows.column_names.index("run_id"), "run_id", renamed)
    both = dataclasses.replace(
        search,
        records=pa.concat_tables([search.records, rows]),
        runs=[*search.runs, *(dataclasses.replace(run, run_id=names[run.run_id]) for run in population.runs)],
    )
    found = annealing_curves(both)
    assert "population" in found.excluded["m1"]
    assert "population" in found.excluded["m3"]


def test_another_setting_is_another_group(search_folder):
    collected = collect(search_folder)
    for index in (0, 1, 2):
        config = json.loads(json.dumps(collected.runs[index].config))
        config["model"]["depth"] = 6
        collected.runs[index] = dataclasses.replace(collected.runs[index], config=config)
    found = annealing_curves(collected)
    assert [[curve.run_id for curve in group.curves] for group in found.groups] == [["t000", "t001", "t002"]]


def test_seeds_and_probes_do_not_split_a_group(search_folder):
    collected = collect(search_folder)
    config = collected.runs[0].config | {"seed": 99, "probes": {}}
    collected.runs[0] = dataclasses.replace(collected.runs[0], config=config)
    assert len(annealing_curves(collected).groups[0].curves) == 5


def test_repeats_of_one_schedule_are_not_further_schedules(fabricate, tmp_path):
    points = [("constant", 0.003, 0.2), ("constant", 0.003, 0.2), ("cosine", 0.003, 0.2)]
    folder = fabricate.make_search(tmp_path / "s", steps=100, points=points)
    with pytest.raises(UserError, match=r"got 3 runs at 0\.003"):
        annealing_curves(collect(folder))


def test_a_run_with_missing_updates_is_left_out(search_folder):
    import pyarrow.compute as pc

    collected = collect(search_folder)
    rows = collected.records
    hole = pc.and_(
        pc.equal(rows["run_id"], "t001"), pc.and_(pc.equal(rows["kind"], "step"), pc.equal(rows["step"], 40))
    )
    found = annealing_curves(dataclasses.replace(collected, records=rows.filter(pc.invert(hole))))
    assert found.excluded["t001"] == "its step rows do not cover every update"


def test_headline_is_the_cosine_whatever_its_error(search_folder, fit):
    group = annealing_curves(collect(search_folder)).groups[0]
    assert headline_run(group) == "t002" == fit.headline
    others = dataclasses.replace(group, shapes=dict.fromkeys(group.shapes, "custom"))
    # linear and cosine fall from the first update after the warm-up, linear has the first name
    assert headline_run(others) == "t001"


@pytest.mark.acceptance
def test_a_sweep_of_known_law_is_forecast(fit):
    """The fabricated losses obey the law with noise of 0.004 nats: every forecast has to be that good."""
    assert len(fit.forecasts) == 5
    assert all(abs(one.relative_error) < 0.01 for one in fit.forecasts)
    assert all(one.run_id not in one.fitted_on for one in fit.forecasts)
    assert sum(one.low <= one.observed_final <= one.high for one in fit.forecasts) >= 4


def test_saved_and_loaded_fit_is_the_same(search_folder, fit):
    again = load_fit(search_folder.path)
    assert again.to_json() == fit.to_json() == (search_folder.fits_path / "annealing.json").read_text()
    np.testing.assert_array_equal(
        again.headline_forecast.prediction.loss_nats, fit.headline_forecast.prediction.loss_nats
    )


def test_fit_without_saving_leaves_no_file(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "s", steps=200, points=fabricate.SEARCH_POINTS[:5])
    result = fit_sweep(folder.path, decays=[0.9, 0.95], num_bootstrap=0, skip_steps=30, save=False)
    assert load_fit(folder) is None
    assert result.decays == (0.9, 0.95)
    assert result.fit.data["skip_steps"] == 30


def test_default_skips_a_tenth_and_keeps_the_memory_inside_the_run(fit):
    assert fit.fit.data["skip_steps"] == 30
    assert fit.decays == decay_grid(300) == (0.9, 0.95, 0.98, 0.99, 0.995)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "annealing", "fit": 3}'])
def test_a_damaged_fit_is_a_sentence(content):
    with pytest.raises(UserError, match=r"fit must be the JSON text of a"):
        SweepFit.from_json(content)


def test_evaluations_only_before_the_end_of_warmup(search_folder):
    collected = collect(search_folder)
    config = json.loads(json.dumps(collected.runs[0].config))
    config["schedule"]["warmup_steps"] = 300
    collected.runs[0] = dataclasses.replace(collected.runs[0], config=config)
    assert annealing_curves(collected).excluded["t000"] == "it has no held-out loss after its warm-up"
