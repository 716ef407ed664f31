from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from landscape_ray.analysis.runs import setting
from landscape_ray.reports.sections import cost_text
from landscape_ray.reports.views import (
    asked,
    best_overall,
    bits_per_byte,
    cost,
    domain,
    edge_of_search,
    label,
    open_sweep,
    spread,
    status_counts,
    varied_names,
)
from landscape_ray.text import percent


def changed(run, **fields):
    return dataclasses.replace(run, summary=dataclasses.replace(run.summary, **fields))


def test_best_run_is_the_lowest_final_loss_of_those_that_finished(search):
    finished = {run.run_id: run.summary.final_loss_nats for run in search.runs if run.summary.status == "finished"}
    assert search.best.run_id == min(finished, key=finished.get)
    assert len(search.finished) == 11


def test_a_diverged_run_has_no_loss_even_if_it_was_low_before(search):
    runs = tuple(changed(run, final_loss_nats=0.1) if run.run_id == "t011" else run for run in search.runs)
    sweep = dataclasses.replace(search, runs=runs)
    assert sweep.best.run_id != "t011"
    assert math.isnan(runs[11].loss)


def test_best_of_several_sweeps(search, population):
    sweep, run = best_overall([population, search])
    assert run.loss == min(search.best.loss, population.best.loss)
    assert label([population, search], sweep, run.run_id) == f"{sweep.name}/{run.run_id}"
    assert label([search], search, "t001") == "t001"


def test_bits_per_byte_of_a_byte_model(search):
    run = search.best
    assert bits_per_byte(search, run) == pytest.approx(run.loss / math.log(2))
    tokens = dataclasses.replace(search, meta={**search.meta, "bytes_per_token": 4.0})
    assert bits_per_byte(tokens, run) == pytest.approx(run.loss / math.log(2) / 4)


def test_bits_per_byte_are_unknown_for_another_vocabulary(search):
    run = changed(search.best, num_params_non_embedding=search.best.summary.num_params - 5000 * 64)
    assert math.isnan(bits_per_byte(search, run))
    foreign = changed(search.best, config={})
    assert math.isnan(bits_per_byte(search, foreign))


def test_costs_add_up(search, population):
    both, one, two = cost([search, population]), cost([search]), cost([population])
    for field in ("wall_seconds", "total_seconds", "eval_seconds", "probe_seconds", "flops", "num_tokens"):
        assert getattr(both, field) == pytest.approx(getattr(one, field) + getattr(two, field))
    assert one.training_seconds + one.eval_seconds + one.probe_seconds == pytest.approx(one.total_seconds)
    assert one.probe_share == pytest.approx(sum(run.summary.probe_seconds for run in search.runs) / one.total_seconds)
    stamps = np.concatenate([run.all_steps["time_unix"] for run in search.runs])
    assert one.wall_seconds == pytest.approx(stamps.max() - stamps.min(), rel=0.01)


def test_nothing_costs_nothing():
    assert math.isnan(cost([]).probe_share)


def test_edge_of_search(search):
    finished = search.finished
    assert edge_of_search(finished) == ""
    best = min(run.peak_lr for run in finished)
    lowest = [changed(run, final_loss_nats=0.5) if run.peak_lr == best else run for run in finished]
    assert "lowest that finished" in edge_of_search(lowest)
    assert edge_of_search(finished[:2]) == ""


def test_status_counts_and_spread(search):
    assert status_counts(search.runs) == {"finished": 11, "diverged": 1}
    median, worst = spread(search.finished)
    assert search.best.loss < median < worst
    assert all(math.isnan(value) for value in spread([]))


def test_what_was_asked(search, population):
    told = dict(asked(search))
    assert told["Search"] == "12 trials by tpe, 1 of them given in advance"
    assert "216 k parameters" in told["Model"]
    assert told["Each run"] == "300 updates of 16 sequences"
    assert told["Runs"] == "11 finished, 1 diverged"
    assert told["Seed"] == "7"
    assert "num members 4" in dict(asked(population))["Population"]
    assert varied_names([search]) == ["schedule.name", "schedule.peak_lr", "schedule.cooldown_fraction"]


def test_spec_that_is_not_toml_is_shown_but_not_read(search):
    assert dataclasses.replace(search, spec_text="= not toml").spec == {}


def test_a_fit_that_cannot_be_read_is_a_warning(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "s", steps=50, points=fabricate.SEARCH_POINTS[:2])
    folder.fits_path.mkdir()
    (folder.fits_path / "annealing.json").write_text("{")
    sweep = open_sweep(folder)
    assert sweep.fit is None
    assert any(warning.startswith("fits: ") for warning in sweep.warnings)


def test_warnings_do_not_tell_where_the_folder_is(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "s", steps=50, points=fabricate.SEARCH_POINTS[:2])
    folder.trial("t001").part_path(0).unlink()
    (warning,) = open_sweep(folder).warnings
    assert warning.startswith("trials/t001/records/")


def test_setting_ignores_only_schedule_noise_and_observation(search):
    run = search.runs[0]
    config = run.summary.config
    assert setting(run) == setting(changed(run, config=config | {"seed": 1, "num_steps": 5, "probes": {}}))
    assert setting(run) != setting(changed(run, config=config | {"batch_size": 99}))


def test_cost_counts_what_was_reserved_and_what_tracking_took(search):
    spec = search.spec_text + "\n[resources]\ngpus_per_trial = 0.5\ncpus_per_trial = 2\n"
    runs = tuple(
        dataclasses.replace(run, summary=dataclasses.replace(run.summary, tracking_seconds=1.0)) for run in search.runs
    )
    sweep = dataclasses.replace(search, spec_text=spec, runs=runs, meta={"hardware": {"gpus": ["A100"] * 2}})
    spent = cost([sweep])
    assert spent.gpu_seconds == pytest.approx(0.5 * spent.total_seconds)
    assert spent.cpu_seconds == pytest.approx(2 * spent.total_seconds)
    assert spent.tracking_share == pytest.approx(len(runs) / (spent.total_seconds + len(runs)))
    said = cost_text([sweep])
    assert "GPU-hours reserved on A100" in said
    assert f"({percent(spent.tracking_share)}) in which runs wrote records" in said
    assert "on CPUs" in cost_text([search])
    assert "not recorded" in cost_text([search])


def test_domains_are_told_in_words(search):
    assert "schedule.name one of constant, linear, cosine, wsd" in dict(asked(search))["Varied"]
    assert domain({"monotone_knots": 4, "when": {"schedule.name": "table"}}) == "monotone knots 4"
    assert domain("nonsense") == ""
