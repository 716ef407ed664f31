"""Intervals that hold how wrong the law is on schedules it has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from landscape_ray.errors import UserError
from landscape_ray.laws import (
    Curve,
    FitResult,
    annealing_area,
    calibrate,
    fit_annealing,
    leave_one_schedule_out,
    predict_annealing,
)
from landscape_ray.schedules import Schedule

STEPS, PEAK = 400, 0.01
SHAPES = (("constant", 0.0), ("linear", 0.0), ("cosine", 0.0), ("wsd", 0.2), ("wsd", 0.6))
MEASURED = np.arange(40, STEPS + 1, 20)


def curves(seed: int, misfit: float) -> list[Curve]:
    """Losses of the law, times an error of each run's own that grows along the run, times noise."""
    generator = np.random.default_rng(seed)
    made = []
    for number, (name, fraction) in enumerate(SHAPES):
        lr = Schedule(name=name, peak=PEAK, num_steps=STEPS, cooldown_fraction=fraction).values()
        law = 1.5 + 0.9 * np.cumsum(lr) ** -0.4 - 2.0 * annealing_area(lr, 0.95)
        own = 1 + misfit * generator.standard_normal() * np.arange(1, STEPS + 1) / STEPS
        noise = np.exp(0.001 * generator.standard_normal(STEPS))
        made.append(Curve(f"r{number}", lr, MEASURED, (law * own * noise)[MEASURED - 1]))
    return made


def inside(calibrated: bool) -> float:
    forecasts = [
        one
        for seed in range(6)
        for one in leave_one_schedule_out(curves(seed, 0.01), calibrated=calibrated, decay=0.95, num_bootstrap=50)
    ]
    return float(np.mean([one.low <= one.observed_final <= one.high for one in forecasts]))


@pytest.mark.acceptance
@pytest.mark.slow
def test_intervals_that_ignore_the_misfit_are_too_narrow_and_calibrated_ones_are_not() -> None:
    assert inside(calibrated=False) < 0.75
    assert inside(calibrated=True) >= 0.8


def test_the_misfit_is_the_root_mean_square_of_the_errors_and_widens_by_students_t() -> None:
    runs = curves(0, 0.01)
    fit = fit_annealing(runs, decay=0.95, num_bootstrap=50)
    forecasts = leave_one_schedule_out(runs, decay=0.95, num_bootstrap=0)
    wide = calibrate(fit, forecasts)
    squares = [one.relative_error**2 - one.expected_error**2 for one in forecasts]
    assert wide.misfit == pytest.approx(np.sqrt(np.mean(squares)))
    assert wide.num_misfits == 5
    before, after = (predict_annealing(f, runs[2].lr, [200, 400]) for f in (fit, wide))
    assert after.loss_nats.tolist() == before.loss_nats.tolist()
    reach = stats.t.ppf(0.95, 5) * wide.misfit * after.loss_nats
    np.testing.assert_allclose(after.high - after.loss_nats, np.hypot(before.high - before.loss_nats, reach), rtol=1e-9)
    np.testing.assert_allclose(after.loss_nats - after.low, np.hypot(before.loss_nats - before.low, reach), rtol=1e-9)
    assert FitResult.from_json(wide.to_json()) == wide


def test_what_a_fit_expects_itself_does_not_count_twice() -> None:
    """Without a misfit there is nothing to add: errors of the size that noise and parameters explain."""
    forecasts = leave_one_schedule_out(curves(1, 0.0), decay=0.95, num_bootstrap=50)
    for one in forecasts:
        width = np.log(one.high / one.low) / 2
        assert one.expected_error == pytest.approx(width / stats.norm.ppf(0.95), rel=1e-12)
    fit = calibrate(fit_annealing(curves(1, 0.0), decay=0.95, num_bootstrap=0), forecasts)
    assert fit.misfit < 0.5 * np.sqrt(np.mean([one.relative_error**2 for one in forecasts]))
    assert fit.num_misfits == 5


def test_the_forecast_of_a_run_sees_nothing_of_it() -> None:
    runs = curves(0, 0.01)
    other = [*runs[:4], Curve("r4", runs[4].lr, runs[4].step, runs[4].loss_nats * 1.3)]
    first, second = (leave_one_schedule_out(c, calibrated=True, decay=0.95, num_bootstrap=20)[4] for c in (runs, other))
    assert (first.low, first.predicted_final, first.high) == (second.low, second.predicted_final, second.high)


def test_where_nothing_can_be_measured_the_interval_stays() -> None:
    few = curves(0, 0.01)[:3]  # two are left: leaving out one of them leaves one
    plain, asked = (leave_one_schedule_out(few, calibrated=c, decay=0.95, num_bootstrap=20) for c in (False, True))
    assert [one.high for one in plain] == [one.high for one in asked]


def test_one_error_is_too_few() -> None:
    runs = curves(0, 0.01)
    fit = fit_annealing(runs, decay=0.95, num_bootstrap=0)
    with pytest.raises(UserError, match="forecasts must be at least two, got 1"):
        calibrate(fit, leave_one_schedule_out(runs, decay=0.95, num_bootstrap=0)[:1])


@pytest.mark.acceptance
@pytest.mark.data
@pytest.mark.slow
def test_coverage_on_published_curves(published_data: Path) -> None:
    """27 runs of three sizes, each forecast from the eight others of its size; nominal 90 %."""
    hits = []
    for size in ("25M", "100M", "400M"):
        runs = []
        for path in sorted((published_data / "multi_power_law" / size).glob("*.csv")):
            table = np.genfromtxt(path, delimiter=",", names=True)
            lr = np.interp(np.arange(int(table["step"][-1])), table["step"], table["lr"])
            lr[:2160] = 3e-4 * (np.arange(2160) + 1) / 2160
            kept = table["step"] > 2160
            runs.append(Curve(path.stem, lr, table["step"][kept].astype(int), table["loss"][kept], 2160))
        forecasts = leave_one_schedule_out(runs, calibrated=True, decay=0.999, num_bootstrap=50)
        hits += [one.low <= one.observed_final <= one.high for one in forecasts]
    print(f"coverage {np.mean(hits):.3f}")
    assert len(hits) == 27
    assert 0.8 <= np.mean(hits) <= 0.98
