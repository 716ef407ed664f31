"""Forecasts of a single curve: exact where the law is, honest about noise, and worth something as a rule."""

import math
from itertools import pairwise

import numpy as np
import pytest

from landscape_ray.schedules import Schedule
from landscape_ray.search import ForecastStop
from landscape_ray.search.extrapolation import ALPHAS, Coordinates, Normal, forecast

NUM_STEPS, EVERY, WARMUP = 300, 10, 10
STEPS = np.arange(EVERY, NUM_STEPS + 1, EVERY)


def made(schedule: Schedule, alpha: float = 0.6, gain: float = 0.25, floor: float = 2.0) -> np.ndarray:
    """Losses at STEPS under the law."""
    c = Coordinates.of(schedule.values(), WARMUP)
    z = c.s2 / c.s2[-1] if c.s2[-1] > 0 else np.zeros_like(c.s2)
    return np.asarray((floor + 1.2 * (c.s1 / c.s1[-1] * 10) ** -alpha - gain * z)[STEPS - 1])


def drawn(generator: np.random.Generator) -> Schedule:
    return Schedule(
        name=str(generator.choice(["wsd", "cosine", "linear"])),
        peak=float(np.exp(generator.uniform(np.log(1e-3), np.log(2e-2)))),
        num_steps=NUM_STEPS,
        warmup_steps=WARMUP,
        cooldown_fraction=float(generator.uniform(0.1, 0.6)),
    )


def noisy(losses: np.ndarray, generator: np.random.Generator, sd: float = 0.01) -> np.ndarray:
    """Losses with errors that are correlated from one evaluation to the next."""
    errors = np.zeros(len(losses))
    for i, draw in enumerate(generator.standard_normal(len(losses))):
        errors[i] = 0.7 * errors[i - 1] + 0.7 * sd * draw if i else sd * draw
    return losses + errors


@pytest.mark.acceptance
@pytest.mark.parametrize("alpha", [ALPHAS[5], ALPHAS[8], ALPHAS[11]])
def test_a_curve_that_obeys_the_law_is_continued_exactly(alpha: float) -> None:
    schedule = Schedule(name="constant", peak=0.01, num_steps=NUM_STEPS, warmup_steps=WARMUP)
    losses = made(schedule, alpha)
    seen = forecast(Coordinates.of(schedule.values(), WARMUP), STEPS[:12].tolist(), losses[:12].tolist())
    assert seen is not None
    assert seen.mean == pytest.approx(losses[-1], abs=2e-3)
    assert abs(seen.mean - losses[-1]) < 3 * seen.sd


@pytest.mark.acceptance
def test_the_gain_of_annealing_comes_from_trials_that_ended() -> None:
    """Before its cooldown a curve says nothing about it: without others the forecast is wide, with them it is right."""
    schedule = Schedule(name="wsd", peak=0.01, num_steps=NUM_STEPS, warmup_steps=WARMUP, cooldown_fraction=0.3)
    coordinates, losses = Coordinates.of(schedule.values(), WARMUP), made(schedule)
    known = np.flatnonzero(STEPS <= 200)
    alone = forecast(coordinates, STEPS[known].tolist(), losses[known].tolist())
    told = forecast(coordinates, STEPS[known].tolist(), losses[known].tolist(), Normal(0.25, 0.02))
    assert alone is not None
    assert told is not None
    assert alone.sd > 5 * told.sd
    assert abs(told.mean - losses[-1]) < 0.02
    assert abs(alone.mean - losses[-1]) < 2 * alone.sd
    whole = forecast(coordinates, STEPS.tolist(), losses.tolist())
    assert whole is not None
    assert whole.annealing_gain.mean == pytest.approx(0.25, abs=0.02)


def test_too_few_points_are_not_forecast() -> None:
    schedule = Schedule(name="constant", peak=0.01, num_steps=NUM_STEPS)
    coordinates = Coordinates.of(schedule.values(), 0)
    assert forecast(coordinates, [], []) is None
    assert forecast(coordinates, [10, 20, 30, 40], [3.0, 2.5, 2.4, 2.3]) is None


def test_probability_is_monotone_and_half_at_the_mean() -> None:
    schedule = Schedule(name="constant", peak=0.01, num_steps=NUM_STEPS)
    losses = noisy(made(schedule), np.random.default_rng(0))[:15].tolist()
    seen = forecast(Coordinates.of(schedule.values(), 0), STEPS[:15].tolist(), losses)
    assert seen is not None
    assert seen.probability_below(seen.mean) == pytest.approx(0.5)
    at = [seen.probability_below(loss) for loss in np.linspace(1, 3, 20)]
    assert all(a <= b for a, b in pairwise(at))
    below = seen.mean - seen.sd
    assert seen.probability_below(below, widened=3.0) > seen.probability_below(below)


@pytest.mark.acceptance
def test_forecast_stop_saves_a_third_at_hardly_any_loss_and_its_intervals_hold() -> None:
    """Law-generated curves with correlated noise: 12 sweeps of 18 trials whose best rate is not known."""
    saved, regrets, covered = [], [], []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        rule = ForecastStop(min_steps=60)
        finals: dict[int, float] = {}
        every: list[float] = []
        used = 0
        for trial in range(18):
            schedule = drawn(generator)
            losses = made(schedule) + 0.15 * math.log(schedule.peak / 6e-3) ** 2
            losses = noisy(losses, generator)
            every.append(float(losses[-1]))
            rule.begin(trial, schedule.values().tolist(), WARMUP)
            for step, loss in zip(STEPS[1::2].tolist(), losses[1::2].tolist(), strict=True):
                verdict = rule.observe(trial, step, loss)
                used += 2 * EVERY
                if step == 160 and trial > 4 and (seen := rule._forecast(trial, step, rule._gain(trial))) is not None:
                    chance = seen.probability_below(float(losses[-1]), rule._widened(step))
                    covered.append(0.05 < chance < 0.95)
                if verdict == "stop":
                    break
            else:
                rule.end(trial, float(losses[-1]))
                finals[trial] = float(losses[-1])
        saved.append(1 - used / (18 * NUM_STEPS))
        regrets.append(min(finals.values()) - min(every))
    assert np.mean(saved) > 0.33
    assert np.mean(regrets) < 0.01
    assert np.mean(covered) > 0.85
