"""The schedule that a law considers best: inside its range, no worse than those fitted, and one that training runs."""

import dataclasses
import tomllib

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import best_schedule, fit_annealing, fit_curves, predict_annealing
from landscape_ray.laws.curves.best_schedule import table_rates
from landscape_ray.laws.memory.convex import CONVEX
from landscape_ray.training.config import ScheduleConfig


@pytest.fixture(scope="module")
def curves(synthetic):
    return synthetic.curves("constant", "cosine", "wsd_30", noise=5e-4)


@pytest.fixture(scope="module")
def fit(synthetic, curves):
    return fit_annealing(curves, decay=synthetic.decay, num_bootstrap=50)


@pytest.fixture(scope="module")
def best(synthetic, curves, fit):
    return {
        family: best_schedule(fit, curves, 1000, warmup_steps=synthetic.warmup, family=family)
        for family in ("wsd", "free")
    }


@pytest.mark.acceptance
@pytest.mark.parametrize("family", ["wsd", "free"])
def test_training_runs_the_rates_that_the_law_was_asked_about(best, family):
    found = best[family]
    table = tomllib.loads(found.toml())["train"]["schedule"]
    schedule = ScheduleConfig(**table).build(found.num_steps)
    np.testing.assert_array_equal(schedule.values(), found.rates())


@pytest.mark.acceptance
@pytest.mark.parametrize("family", ["wsd", "free"])
def test_it_stays_inside_and_is_no_worse_than_any_fitted_schedule(synthetic, curves, fit, best, family):
    found, rates = best[family], best[family].rates()
    warm = rates[synthetic.warmup :]
    np.testing.assert_allclose(rates[: synthetic.warmup], synthetic.lr("cosine")[: synthetic.warmup], rtol=1e-9)
    assert rates.max() == pytest.approx(synthetic.peak)
    assert (np.diff(warm) <= 1e-18).all()
    assert warm.min() >= (fit.data["lowest_ratio"] - 1e-9) * synthetic.peak
    assert found.points[-1][1] >= fit.data["lowest_ratio"] - 1e-12
    for curve in curves:
        known = predict_annealing(fit, curve.lr, [980], synthetic.warmup).loss_nats[0]
        assert found.prediction.loss_nats[0] < known + 1e-9
    assert found.gain_nats >= 0
    assert found.gain_low <= found.gain_nats + 1e-6
    assert found.gain_high >= found.gain_nats - 1e-2
    assert found.compared_with in {"constant", "cosine", "wsd_30"}
    assert not any(warning.partition(":")[0] in ("annealing_area", "zero_lr") for warning in found.warnings)


def test_free_corners_are_no_worse_than_a_cooldown(best):
    assert best["free"].prediction.loss_nats[0] <= best["wsd"].prediction.loss_nats[0] + 1e-12


def test_any_law_can_be_asked(synthetic):
    curves = synthetic.curves("constant", "cosine", "wsd_30")
    fit = fit_curves(CONVEX, curves, num_bootstrap=0)
    found = best_schedule(fit, curves, 500, final_ratio=0.1)
    assert found.points[-1] == (1.0, pytest.approx(0.1, abs=0.21))
    assert len(found.rates()) == 500


def test_a_table_is_straight_between_its_corners():
    rates = table_rates(((0.0, 0.5), (0.5, 1.0), (1.0, 0.0)), 2.0, 4)
    assert rates.tolist() == [1.0, 1.5, 2.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 3000}, r"num_steps must be at most 3 times the fitted 980, got 3000; fit longer runs"),
        ({"warmup_steps": 999}, r"warmup_steps must be in \[0, 998\], got 999"),
        ({"family": "cubic"}, "family must be wsd or free, got 'cubic'"),
        ({"final_ratio": 0.0}, r"final_ratio must be in \[0\.07\d*, 1\], the lowest that was fitted, got 0; fit a run"),
        ({"curves": []}, "curves must hold the fitted runs, got none"),
    ],
)
def test_what_lies_outside_is_refused(curves, fit, change, message):
    asked = {"curves": curves, "num_steps": 1000, **change}
    with pytest.raises(UserError, match=message):
        best_schedule(fit, asked.pop("curves"), asked.pop("num_steps"), **asked)


def test_without_a_decay_there_is_nothing_to_choose(synthetic):
    curves = [synthetic.curve("constant", 1e-3)]
    fit = fit_annealing(curves, decay=synthetic.decay, num_bootstrap=0)
    with pytest.raises(UserError, match="fit must have seen a decay, got runs without one"):
        best_schedule(fit, curves, 1000)


def test_where_no_schedule_is_inside_it_says_so(curves, fit):
    narrow = dataclasses.replace(fit, data={**fit.data, "s2_range": [0.0, -1.0]})
    with pytest.raises(UserError, match="num_steps must leave a schedule inside the fitted range, got none"):
        best_schedule(narrow, curves, 1000, warmup_steps=50)
