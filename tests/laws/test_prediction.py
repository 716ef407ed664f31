"""Predictions, their guards, and the validation of a fit on schedules and objectives that it has not seen."""

import dataclasses
import math

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import (
    Curve,
    FitResult,
    fit_annealing,
    leave_one_schedule_out,
    objective_sensitivity,
    predict_annealing,
    table,
)


def names(warnings):
    return {warning.partition(":")[0] for warning in warnings}


@pytest.fixture(scope="module")
def fit(synthetic):
    curves = synthetic.curves("constant", "cosine", "wsd_30", noise=1e-3)
    return fit_annealing(curves, decay=synthetic.decay)


@pytest.fixture(scope="module")
def exact(synthetic):
    return fit_annealing(synthetic.curves("constant", "cosine", "wsd_30"), decay=synthetic.decay, num_bootstrap=0)


@pytest.mark.parametrize("name", ["linear", "wsd_10", "wsd_sqrt"])
def test_noise_free_prediction_of_an_unseen_schedule(synthetic, exact, name):
    lr, step = synthetic.lr(name), np.array([100, 500, 990])
    prediction = predict_annealing(exact, lr, step, synthetic.warmup)
    np.testing.assert_allclose(prediction.loss_nats, synthetic.loss(lr)[step - 1], rtol=1e-8)
    np.testing.assert_array_equal(prediction.step, step)
    assert names(prediction.warnings) == {"no_bootstrap"}


def test_inside_the_fitted_range_nothing_is_warned_about(synthetic, fit):
    prediction = predict_annealing(fit, synthetic.lr("linear"), [500, 980], synthetic.warmup)
    assert prediction.warnings == ()
    assert prediction.confidence == 0.9
    assert (prediction.low < prediction.loss_nats).all()
    assert (prediction.loss_nats < prediction.high).all()


def test_intervals_cover_new_measurements(synthetic, fit):
    lr, step = synthetic.lr("linear"), np.arange(80, 981, 10)
    prediction = predict_annealing(fit, lr, step, synthetic.warmup)
    noise = 1e-3 * np.random.default_rng(5).standard_normal((50, len(step)))
    measured = synthetic.loss(lr)[step - 1] * np.exp(noise)
    inside = ((measured >= prediction.low) & (measured <= prediction.high)).mean()
    assert 0.8 < inside < 0.99


def test_interval_without_samples_is_that_of_the_residuals(synthetic):
    curves = synthetic.curves("constant", "cosine", "wsd_30", noise=1e-3)
    bare = fit_annealing(curves, decay=synthetic.decay, num_bootstrap=0)
    prediction = predict_annealing(bare, synthetic.lr("cosine"), [980], synthetic.warmup)
    assert np.log(prediction.high / prediction.low)[0] == pytest.approx(2 * 1.645e-3, rel=0.25)


def test_prediction_in_pieces_is_the_same(synthetic, fit, monkeypatch):
    arguments = (fit, synthetic.lr("linear"), np.arange(60, 1000), synthetic.warmup)
    whole = predict_annealing(*arguments)
    monkeypatch.setattr("landscape_ray.laws.curves.prediction._CHUNK_ELEMENTS", 20_000)
    pieces = predict_annealing(*arguments)
    np.testing.assert_array_equal(whole.low, pieces.low)
    np.testing.assert_array_equal(whole.high, pieces.high)


def test_prediction_survives_json(synthetic, fit):
    arguments = (synthetic.lr("linear"), [980], synthetic.warmup)
    here = predict_annealing(fit, *arguments)
    there = predict_annealing(FitResult.from_json(fit.to_json()), *arguments)
    assert (here.loss_nats[0], here.low[0], here.high[0]) == (there.loss_nats[0], there.low[0], there.high[0])


def test_another_peak_is_refused_unless_asked_for(synthetic, fit):
    lr = synthetic.lr("cosine", peak=2e-3)
    with pytest.raises(
        UserError, match=r"lr must have the fitted peak 0\.001, got 0\.002; .* allow_extrapolation=True"
    ):
        predict_annealing(fit, lr, [900], synthetic.warmup)
    allowed = predict_annealing(fit, lr, [900], synthetic.warmup, allow_extrapolation=True)
    assert "peak_lr" in names(allowed.warnings)
    assert predict_annealing(fit, 1.005 * synthetic.lr("linear"), [900], synthetic.warmup).warnings == ()


def test_a_long_horizon_is_warned_about(synthetic, fit):
    lr = synthetic.lr("cosine", num_steps=4000)
    assert "horizon" in names(predict_annealing(fit, lr, [3900], synthetic.warmup).warnings)
    assert "horizon" not in names(predict_annealing(fit, lr, [2900], synthetic.warmup).warnings)


def test_more_annealing_than_fitted_is_warned_about(synthetic):
    curves = [synthetic.curve("constant", 1e-3), synthetic.curve("cosine", 1e-3)]
    short = [Curve(c.run_id, c.lr[:500], c.step[:14], c.loss_nats[:14], 50) for c in curves]
    fit = fit_annealing(short, decay=synthetic.decay)
    assert "annealing_area" in names(predict_annealing(fit, synthetic.lr("cosine"), [980], 50).warnings)


def test_steps_at_zero_rate_are_warned_about(synthetic, fit):
    lr = synthetic.lr("linear").copy()
    lr[-100:] = 0.0
    assert "zero_lr" in names(predict_annealing(fit, lr, [1000], synthetic.warmup).warnings)


def test_the_early_part_is_warned_about(synthetic, fit):
    assert "early" in names(predict_annealing(fit, synthetic.lr("linear"), [20, 900], synthetic.warmup).warnings)


def test_a_decay_unknown_to_the_fit_is_refused_unless_asked_for(synthetic):
    fit = fit_annealing([synthetic.curve("constant", 1e-3)], decay=synthetic.decay)
    assert "weak_fit" in names(predict_annealing(fit, synthetic.lr("constant"), [900], 50).warnings)
    with pytest.raises(UserError, match="lr must not decay, because no fitted run has a loss after a decay"):
        predict_annealing(fit, synthetic.lr("cosine"), [900], 50)
    allowed = predict_annealing(fit, synthetic.lr("cosine"), [900], 50, allow_extrapolation=True)
    assert "C_not_identified" in names(allowed.warnings)


def test_unsound_requests_are_refused(synthetic, fit):
    lr = synthetic.lr("linear")
    with pytest.raises(UserError, match=r"prediction: step must lie in \[1, 1000\]"):
        predict_annealing(fit, lr, [1001])
    with pytest.raises(UserError, match="fit must be of the law 'annealing', got 'other'"):
        predict_annealing(dataclasses.replace(fit, law="other"), lr, [900])
    failed = dataclasses.replace(fit, status="failed", reasons=("no optimum",))
    with pytest.raises(UserError, match="fit must have found an optimum, got status 'failed'"):
        predict_annealing(failed, lr, [900])


def test_forecasts_of_exact_curves_are_exact(synthetic):
    curves = synthetic.curves("constant", "cosine", "wsd_30")
    forecasts = leave_one_schedule_out(curves, decay=synthetic.decay, num_bootstrap=0)
    assert [forecast.run_id for forecast in forecasts] == ["constant", "cosine", "wsd_30"]
    assert all(abs(forecast.relative_error) < 1e-8 for forecast in forecasts)
    assert all(forecast.curve_mae < 1e-7 for forecast in forecasts)
    assert forecasts[1].fitted_on == ("constant", "wsd_30")
    assert forecasts[1].observed_final == curves[1].loss_nats[-1]
    assert str(forecasts[1]).startswith("cosine: observed ")


def test_forecasts_of_noisy_curves_contain_the_observation(synthetic):
    curves = synthetic.curves(*synthetic.names, noise=1e-3)
    forecasts = leave_one_schedule_out(curves, decay=synthetic.decay)
    assert sum(forecast.low <= forecast.observed_final <= forecast.high for forecast in forecasts) >= 4
    assert all(abs(forecast.relative_error) < 5e-3 for forecast in forecasts)


def test_a_schedule_is_left_out_with_its_repeats_and_its_continuations(synthetic):
    curves = [
        synthetic.curve("constant", 1e-3, 0, "constant_a"),
        synthetic.curve("constant", 1e-3, 1, "constant_b"),
        synthetic.curve("constant", 1e-3, 2, "constant_long", num_steps=1500),
        synthetic.curve("cosine", 1e-3, 3, "cosine"),
        synthetic.curve("linear", 1e-3, 4, "linear"),
    ]
    by_name = {f.run_id: f for f in leave_one_schedule_out(curves, decay=synthetic.decay, num_bootstrap=10)}
    assert by_name["constant_a"].fitted_on == by_name["constant_b"].fitted_on == ("cosine", "linear")
    assert by_name["constant_long"].fitted_on == ("constant_a", "constant_b", "cosine", "linear")


def test_leaving_out_needs_a_second_schedule_and_points(synthetic):
    with pytest.raises(UserError, match="curves must hold a second schedule to predict run 'cosine' from"):
        leave_one_schedule_out([synthetic.curve("cosine")])
    empty = Curve("empty", synthetic.lr("linear"), [40], [5.0], synthetic.warmup)
    with pytest.raises(UserError, match="run 'empty' must have losses after the warm-up, got none"):
        leave_one_schedule_out([synthetic.curve("cosine"), synthetic.curve("constant"), empty], num_bootstrap=0)


def test_objective_sensitivity_agrees_where_there_is_no_noise_and_differs_where_there_is(synthetic):
    exact = objective_sensitivity(synthetic.curves("constant", "cosine"), decay=synthetic.decay)
    assert list(exact) == ["huber", "least_absolute", "least_squares"]
    assert np.ptp([row["alpha"] for row in exact.values()]) < 1e-6
    curves = synthetic.curves("constant", "cosine", noise=3e-3)
    noisy = objective_sensitivity(curves, decay=synthetic.decay)
    assert len({row["alpha"] for row in noisy.values()}) == 3
    assert noisy["huber"]["alpha"] == fit_annealing(curves, decay=synthetic.decay).parameters["alpha"]
    squares = fit_annealing(curves, decay=synthetic.decay, huber_delta=math.inf)
    assert noisy["least_squares"]["alpha"] == squares.parameters["alpha"]
    lines = table(noisy).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["L0", "A", "alpha", "C", "decay"]


def test_least_absolute_deviations_pass_through_as_many_points_as_parameters(synthetic):
    curves = synthetic.curves("constant", "cosine", noise=3e-3)
    row = objective_sensitivity(curves, decay=synthetic.decay)["least_absolute"]
    residuals = np.concatenate(
        [np.log(c.loss_nats / synthetic.loss(c.lr, row, synthetic.decay)[c.step - 1]) for c in curves]
    )
    assert (np.abs(residuals) <= 1e-6).sum() >= 4
