"""The annealing law on published curves: the authors' own numbers, and forecasts of schedules that were not fitted."""

import time

import numpy as np
import pytest

from landscape_ray.laws import fit_annealing, leave_one_schedule_out, predict_annealing

pytestmark = pytest.mark.data


@pytest.mark.acceptance
def test_the_authors_fit_is_reproduced_in_under_a_second(tissue_curves):
    fit_annealing(tissue_curves, num_bootstrap=0)
    started = time.perf_counter()
    fit = fit_annealing(tissue_curves, decay=0.999)
    seconds = time.perf_counter() - started
    assert fit.parameters["L0"] == pytest.approx(2.62780, rel=1e-5)
    assert fit.parameters["A"] == pytest.approx(0.42966, rel=3e-5)
    assert fit.parameters["C"] == pytest.approx(0.41077, rel=3e-5)
    assert fit.parameters["alpha"] == pytest.approx(0.54985, rel=3e-5)
    assert fit.objective["value"] == pytest.approx(1.62925e-5, rel=1e-5)
    assert fit.residuals["r2"] == pytest.approx(0.999634, abs=1e-6)
    assert fit.status == "certified"
    assert seconds < 1.0


@pytest.mark.acceptance
@pytest.mark.parametrize(("size", "expected"), [("25M", 0.00212), ("100M", 0.00186), ("400M", 0.00228)])
def test_three_curves_predict_six_others(multi_power_curves, size, expected):
    """Mean relative error over the six test schedules, as published for this law within 2e-4."""
    curves = multi_power_curves(size)
    train = [curves.pop(name) for name in ("cosine_24000", "constant_24000", "wsdcon_9")]
    fit = fit_annealing(train, decay=0.999, num_bootstrap=50)
    assert fit.status == "certified"
    errors = []
    for curve in curves.values():
        prediction = predict_annealing(fit, curve.lr, curve.step, curve.warmup_steps)
        errors.append(np.abs(prediction.loss_nats / curve.loss_nats - 1).mean())
    assert len(errors) == 6
    assert np.mean(errors) == pytest.approx(expected, abs=2e-4)


def test_forecasts_of_left_out_schedules(multi_power_curves):
    forecasts = leave_one_schedule_out(list(multi_power_curves("100M").values()), decay=0.999, num_bootstrap=20)
    assert len(forecasts) == 9
    assert max(abs(forecast.relative_error) for forecast in forecasts) < 0.015
    assert np.mean([abs(forecast.relative_error) for forecast in forecasts]) < 0.005
