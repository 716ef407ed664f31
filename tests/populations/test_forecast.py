import math
import statistics
from typing import Any

import numpy as np
import pytest

from landscape_ray.domains import Domain
from landscape_ray.populations import STRATEGIES, Observation, Point
from landscape_ray.populations.simulation import LawCurves, NoisyQuadratic, Simulator
from landscape_ray.populations.strategies import Forecast
from landscape_ray.populations.strategies.forecast import MIN_MISSES, Miss
from landscape_ray.populations.strategies.forecasting import MAX_ROWS, Forecaster
from landscape_ray.schedules import Schedule

NUM_STEPS = 2000
CONSTANT = Schedule(name="constant", peak=1.0, num_steps=NUM_STEPS)
WSD = Schedule(name="wsd", peak=1.0, num_steps=NUM_STEPS, cooldown_fraction=0.2)


def forecaster() -> Forecaster:
    return Forecaster(1e-4, 1e-1, NUM_STEPS)


def test_following_a_schedule_is_advancing_step_by_step() -> None:
    law = forecaster()
    rates = 0.02 * WSD.values()[1500:]
    state = law.fresh()
    law.advance(state, 0.02, 1500)
    end = law.follow(state, rates)
    for rate in rates:
        law.advance(state, float(rate), 1)
    assert end.step == state.step == NUM_STEPS
    assert np.allclose(end.progress, state.progress, rtol=1e-12)
    assert np.allclose(end.noise, state.noise, rtol=1e-9, atol=1e-12)


def test_at_one_rate_the_noise_tends_to_the_rate_and_progress_is_its_sum() -> None:
    law = forecaster()
    state = law.fresh()
    law.advance(state, 0.01, 10**6)
    assert np.allclose(state.noise, 0.01, rtol=1e-3)
    assert state.progress[-1] == pytest.approx(0.01 * 10**6)  # no limit
    assert (np.diff(state.progress) > 0).all()


def learned(law: Forecaster, loss: Any, rates: list[float]) -> None:
    """Let lineages at constant rates, each lowered half way, report losses of a law."""
    for rate in rates:
        state = law.fresh()
        for step in range(50, NUM_STEPS + 1, 50):
            lr = rate if step <= 1000 else rate / 4
            probe = state.copy()
            law.advance(probe, lr, 50)
            law.learn(state, [Point(step, loss(probe), lr)])


def test_a_law_of_the_family_is_recovered() -> None:
    law = forecaster()

    def loss(state: Any) -> float:
        return float(2.0 + 1.5 * (state.progress[4] / 5.0) ** -0.5 + 30 * state.noise[1] + 8 * state.noise[3])

    learned(law, loss, [0.002, 0.005, 0.01, 0.02])
    fit = law.fit()
    assert fit is not None
    assert fit.rmse < 1e-6
    assert fit.limit == 4
    assert fit.alpha == 0.5
    assert fit.coefficients[0] == pytest.approx(2.0, abs=1e-4)
    state = law.fresh()
    law.advance(state, 0.03, 700)
    assert float(fit.loss(state.progress, state.noise)) == pytest.approx(loss(state), rel=1e-4)


def test_too_few_evaluations_are_not_fitted_and_many_are_forgotten() -> None:
    law = forecaster()
    state = law.fresh()
    law.learn(state, [Point(10 * k, 3.0 / k, 0.01) for k in range(1, 20)])
    assert law.fit() is None
    law.learn(state, [Point(190 + k, 1.0, 0.01) for k in range(1, MAX_ROWS + 50)])
    assert len(law.rows) == MAX_ROWS


def started(**options: Any) -> Forecast:
    strategy = Forecast(
        {"lr": Domain(log_uniform=[1e-4, 1e-1])},
        num_members=4,
        num_steps=NUM_STEPS,
        interval_steps=100,
        schedule=WSD,
        lr_name="lr",
        initial=[{"lr": lr} for lr in (1e-3, 2e-3, 4e-3, 8e-3)],
        resample_probability=0.0,
        **options,
    )
    strategy.start()
    return strategy


def second_round(
    losses: list[float], averaged: list[float], *, first: float | list[float] = 9.0, known: bool = False
) -> dict[int, int | None]:
    """Return whom the members copy at their second meeting, where no law has been fitted yet."""
    strategy = started()
    before = first if isinstance(first, list) else [first] * 4
    decisions = []
    for step, row, means in ((100, before, before if known else [math.nan] * 4), (200, losses, averaged)):
        for number, (loss, mean) in enumerate(zip(row, means, strict=True)):
            points = (Point(step, loss, float(strategy.members[number].values["lr"]), mean),)
            decisions = strategy.observe(Observation(number, points))
        assert step == 200 or all(d.donor is None for d in decisions)  # nobody has come down by anything yet
    return {d.member: d.donor for d in decisions}


NOBODY = {0: None, 1: None, 2: None, 3: None}


def test_without_a_law_only_a_donor_at_a_rate_as_high_replaces() -> None:
    unknown = [math.nan] * 4
    assert second_round([1.0, 2.0, 3.0, 4.0], unknown) == NOBODY  # low rates look good
    assert second_round([4.0, 3.0, 2.0, 1.0], unknown) == NOBODY | {0: 3}


def test_without_a_law_nobody_is_replaced_who_comes_down_faster() -> None:
    unknown = [math.nan] * 4
    assert second_round([4.0, 3.0, 2.0, 1.0], unknown, first=[9.0, 9.0, 9.0, 5.0]) == NOBODY
    assert second_round([4.0, 3.0, 2.0, 1.0], unknown, first=[7.0, 9.0, 9.0, 5.0]) == NOBODY | {0: 3}
    assert second_round([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], first=[9.0, 9.0, 9.0, 5.0], known=True) == NOBODY


def test_averaged_weights_settle_it_where_they_are_known() -> None:
    assert second_round([1.0, 2.0, 3.0, 4.0], [1.5, 1.4, 1.3, 0.9], known=True) == NOBODY | {1: 3}
    # a lagging average is not believed
    assert second_round([1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 9.0, 9.0], known=True) == NOBODY | {3: 0}


def test_errors_are_what_members_miss_by_differently_and_grow_with_the_distance() -> None:
    def misses(lead: int, spread: float, alike: float = 0.0) -> list[Miss]:
        return [Miss(0, lead, alike + spread / 1.4826 * k) for k in (-2, -1, 0, 1, 2)]

    strategy = started()
    assert strategy.error(100) == math.inf
    strategy._misses = misses(100, 0.1, alike=7)
    assert strategy.error(100) == math.inf  # from one distance nobody knows what grows
    strategy._misses += misses(200, 0.1, alike=-3)
    assert strategy.error(200) == strategy.error(2000) == pytest.approx(math.sqrt(2) * 0.1)  # noise only
    strategy._misses = misses(100, 0.1) + misses(200, 0.2)
    growth = (0.2**2 - 0.1**2) / (200**2 - 100**2)
    assert strategy.error(1000) == pytest.approx(math.sqrt(2 * (0.1**2 + growth * 1000**2)))
    strategy._misses += misses(1000, 0.3)
    assert strategy.error(1000) == pytest.approx(  # by what was seen so far ahead
        math.sqrt(2 * (0.1**2 + (0.3**2 - 0.1**2) / (1000**2 - 100**2) * 1000**2))
    )
    strategy._misses = misses(100, 0.1)[: MIN_MISSES - 1] + misses(200, 0.2)
    assert strategy.error(200) == math.inf


def test_the_law_is_trusted_once_its_forecasts_have_been_checked() -> None:
    strategy = started(synchronous=True)
    trusted = []
    for observation, decisions in Simulator(LawCurves(WSD, error=0.0), started(), seed=0).run():
        assert observation.points
        if decisions:
            trusted.append(strategy.trusted)
    assert not any(trusted)  # this one has seen nothing
    run = started()
    history = [run.trusted for _, d in Simulator(LawCurves(WSD, error=0.0), run, seed=0).run() if d]
    assert history[0] is False
    assert any(history)
    assert math.isfinite(run.forecast(0))
    assert run.forecast(0, lr=0.0001) == pytest.approx(run.forecast(0))  # at the horizon nothing is left to change


def test_a_forecast_before_any_fit_is_unknown() -> None:
    assert math.isnan(started().forecast(0))


def test_more_certainty_replaces_less() -> None:
    def exploits(certainty: float) -> int:
        strategy = started(certainty=certainty)
        simulator = Simulator(LawCurves(WSD), strategy, seed=0)
        return sum(d.donor is not None for _, decisions in simulator.run() for d in decisions)

    assert exploits(0.0) > exploits(3.0)


def ends(problem: Any, domain: Domain, name: str, schedule: Schedule, seed: int) -> float:
    options = {"schedule": schedule, "lr_name": "lr"} if name == "forecast" else {}
    strategy = STRATEGIES[name](
        {"lr": domain}, num_members=8, num_steps=NUM_STEPS, interval_steps=100, seed=seed, **options
    )
    Simulator(problem(schedule), strategy, seed=seed).finish()
    return strategy.members[strategy.best()].loss


def shares_closed(problem: Any, domain: Domain, num_seeds: int) -> tuple[float, list[float]]:
    """Return the greedy gap of truncation, and for each seed the share of it that forecasts close."""
    known = problem(CONSTANT)
    best = min(
        known.expected(lr * Schedule(name="wsd", peak=1.0, num_steps=NUM_STEPS, cooldown_fraction=share).values())
        for lr in np.geomspace(*domain.bounds, 17)
        for share in (0.2, 0.4, 0.6, 1.0)
    )
    greedy = [ends(problem, domain, "truncation", CONSTANT, seed) for seed in range(num_seeds)]
    ours = [ends(problem, domain, "forecast", WSD, seed) for seed in range(num_seeds)]
    return statistics.median(greedy) - best, [(g - o) / (g - best) for g, o in zip(greedy, ours, strict=True)]


LAW_DOMAIN = Domain(log_uniform=[1e-4, 1e-1])


@pytest.mark.acceptance
def test_forecasts_close_most_of_the_greedy_gap_on_law_curves() -> None:
    gap, shares = shares_closed(LawCurves, LAW_DOMAIN, 3)
    assert gap > 0.1
    assert statistics.median(shares) >= 0.5


@pytest.mark.acceptance
@pytest.mark.slow
def test_forecasts_close_half_of_the_greedy_gap_in_twenty_paired_seeds() -> None:
    def noisy(schedule: Schedule) -> NoisyQuadratic:
        return NoisyQuadratic(schedule, noise=1.0, num_dimensions=1000)

    for problem, domain, least in ((LawCurves, LAW_DOMAIN, 0.1), (noisy, Domain(log_uniform=[1e-3, 1.9]), 0.05)):
        gap, shares = shares_closed(problem, domain, 20)
        assert gap > least
        assert statistics.median(shares) >= 0.5
        assert sum(share > 0 for share in shares) >= 18
