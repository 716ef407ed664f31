"""What every stopping rule keeps, and what each of them promises."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.schedules import Schedule
from landscape_ray.search import STOPPING, Asha, ForecastStop, MedianStop, StoppingRule, rungs_of

NUM_STEPS, EVERY = 90, 10
STEPS = range(EVERY, NUM_STEPS + 1, EVERY)

RULES: dict[str, Callable[[], StoppingRule]] = {
    "asha": lambda: Asha(rungs_of(10, NUM_STEPS, 3), 3),
    "median": lambda: MedianStop(min_steps=20, min_trials=3),
    "forecast": lambda: ForecastStop(min_steps=50, min_finished=2),
}

LR = Schedule(name="wsd", peak=0.01, num_steps=NUM_STEPS, warmup_steps=5, cooldown_fraction=0.3).values().tolist()


def curve(quality: float, seed: int = 0) -> list[float]:
    """Losses at STEPS that fall towards 1 + quality, noisily, and never cross those of another quality."""
    noise = 1e-3 * np.random.default_rng(seed).standard_normal(len(STEPS))
    return [1 + quality + 0.5 * (s / NUM_STEPS) ** -0.5 + e for s, e in zip(STEPS, noise, strict=True)]


def play(rule: StoppingRule, curves: dict[int, list[float]], seed: int, log: list[Any] | None = None) -> dict[int, str]:
    """Feed trials to a rule, one at a time in random turns, promoting whenever it may; return what became of them."""
    generator = np.random.default_rng(seed)
    done = dict.fromkeys(curves, 0)
    running, waiting, paused = [], list(curves), set()
    fate: dict[int, str] = {}
    for _ in range(100_000):
        while len(running) < 3 and (waiting or paused):
            chosen = next((trial for trial in rule.promotable() if trial in paused), None)
            if chosen is not None:
                rule.promote(chosen)
                paused.discard(chosen)
            elif waiting:
                chosen = waiting.pop(0)
                rule.begin(chosen, LR, 5)
            else:
                break
            running.append(chosen)
        if not running:
            break
        trial = running.pop(int(generator.integers(len(running))))
        step, loss = STEPS[done[trial]], curves[trial][done[trial]]
        done[trial] += 1
        if not math.isfinite(loss) or step == NUM_STEPS:
            rule.end(trial, loss)
            fate[trial] = "finished" if math.isfinite(loss) else "diverged"
            verdict = fate[trial]
        else:
            verdict = rule.observe(trial, step, loss)
            if verdict == "continue":
                running.append(trial)
            elif verdict == "pause":
                paused.add(trial)
            else:
                fate[trial] = "stopped"
        if log is not None:
            log.append((trial, step, loss, verdict))
    fate |= dict.fromkeys(paused, "stopped")
    return fate


def some(number: int, seed: int) -> dict[int, list[float]]:
    qualities = np.random.default_rng(seed).permutation(number) / number
    return {trial: curve(float(quality), trial) for trial, quality in enumerate(qualities)}


def test_every_rule_is_in_the_suite() -> None:
    assert set(RULES) == set(STOPPING)
    for name, make in RULES.items():
        assert type(make()) is STOPPING[name]


@pytest.mark.acceptance
@pytest.mark.parametrize("name", sorted(RULES))
class TestContract:
    def test_the_best_is_never_taken_off_and_the_worst_mostly_is(self, name: str) -> None:
        for seed in range(5):
            curves = some(18, seed)
            fate = play(RULES[name](), curves, seed)
            best = min(curves, key=lambda trial: curves[trial][-1])
            assert fate[best] == "finished"
            worst = sorted(curves, key=lambda trial: -curves[trial][-1])[:6]
            assert sum(fate[trial] == "stopped" for trial in worst) >= 2
            assert set(fate) == set(curves)

    def test_the_same_observations_give_the_same_verdicts(self, name: str) -> None:
        logs: list[list[Any]] = [[], []]
        for log in logs:
            play(RULES[name](), some(10, 3), 4, log)
        assert logs[0] == logs[1]

    def test_what_diverges_is_stopped(self, name: str) -> None:
        rule = RULES[name]()
        rule.begin(0, LR, 5)
        assert rule.observe(0, 10, math.nan) == "stop"
        assert 0 not in rule.promotable()

    @pytest.mark.parametrize("cut", [1, 9, 25, 40])
    def test_a_restored_rule_goes_on_as_if_nothing_had_been(self, name: str, cut: int) -> None:
        """State goes through JSON in the middle; and a rule that observes the rows again is the same."""
        log: list[Any] = []
        curves = some(9, 1) | {9: [2.0, math.nan, *[1.0] * 7]}
        play(RULES[name](), curves, 2, log)
        whole, restored, replayed = RULES[name](), RULES[name](), RULES[name]()
        for rule in (whole, replayed):
            for trial in curves:
                rule.begin(trial, LR, 5)

        def feed(rule: StoppingRule, rows: list[Any]) -> list[Any]:
            verdicts = []
            for trial, step, loss, _ in rows:
                if not math.isfinite(loss) or step == NUM_STEPS:
                    rule.end(trial, loss)
                else:
                    verdicts.append(rule.observe(trial, step, loss))
            return verdicts

        feed(whole, log[:cut])
        feed(replayed, log[:cut])
        restored.restore(json.loads(json.dumps(whole.state())))
        assert restored.state() == whole.state() == replayed.state()
        expected = feed(whole, log[cut:])
        assert feed(restored, log[cut:]) == expected
        assert feed(replayed, log[cut:]) == expected

    def test_a_repeated_observation_changes_nothing(self, name: str) -> None:
        rule = RULES[name]()
        for trial in range(6):
            rule.begin(trial, LR, 5)
            for step, loss in zip(STEPS[:4], curve(trial / 6), strict=False):
                verdict = rule.observe(trial, step, loss)
                before = rule.state()
                assert rule.observe(trial, step, loss) == verdict
                assert rule.state() == before

    def test_only_paused_trials_can_be_promoted(self, name: str) -> None:
        with pytest.raises(UserError, match="to be promoted, got 3"):
            RULES[name]().promote(3)


def twin(rung: dict[int, float], promoted: set[int], eta: int) -> list[int]:
    """Who may go on from a rung, written as the paper says it."""
    best = sorted(rung, key=lambda trial: (rung[trial], trial))[: len(rung) // eta]
    return [trial for trial in best if trial not in promoted]


@pytest.mark.acceptance
@given(
    arrivals=st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=40),
    eta=st.integers(2, 5),
)
@settings(max_examples=60, deadline=None)
def test_promotions_are_those_of_the_paper(arrivals: list[float], eta: int) -> None:
    """Whoever is in the best 1/eta of a rung when a worker is free goes on, on arrival or later; nobody else does."""
    rule = Asha([10], eta)
    rung: dict[int, float] = {}
    promoted: set[int] = set()
    for trial, loss in enumerate(arrivals):
        verdict = rule.observe(trial, 10, loss)
        rung[trial] = loss
        expected = trial in twin(rung, promoted, eta)
        assert verdict == ("continue" if expected else "pause")
        if expected:
            promoted.add(trial)
        assert rule.promotable() == twin(rung, promoted, eta)
        if trial % 3 == 2 and rule.promotable():
            chosen = rule.promotable()[0]
            rule.promote(chosen)
            promoted.add(chosen)


def test_higher_rungs_come_first() -> None:
    rule = Asha([10, 20], 2)
    for trial in range(4):
        rule.observe(trial, 10, float(trial))
    for trial in rule.promotable():
        rule.promote(trial)
        rule.observe(trial, 20, float(trial))
    for trial in (4, 5, 6, 7):
        rule.observe(trial, 10, 5.0 + trial)
    above = [trial for trial in rule.promotable() if trial < 2]
    assert rule.promotable()[: len(above)] == above


def test_a_diverged_trial_counts_as_the_worst_of_the_rung_it_was_bound_for() -> None:
    rule = Asha([10, 20], 3)
    assert rule.observe(0, 10, 1.0) == "pause"
    rule.end(1, math.nan)
    rule.end(2, math.nan)
    assert rule.promotable() == [0]
    rule.promote(0)
    rule.end(0, math.nan)
    assert rule.promotable() == []
    assert [len(rung) for rung in rule.state()["rungs"]] == [3, 1]


def test_a_rung_that_was_missed_is_made_up_for() -> None:
    """A worker that died after its commit reports the next evaluation only."""
    rule = Asha([10, 30], 2)
    assert rule.observe(0, 20, 1.0) == "pause"
    assert rule.observe(1, 10, 2.0) == "pause"
    assert rule.promotable() == [0]
    rule.promote(0)
    assert rule.observe(0, 30, 0.9) == "pause"


@pytest.mark.acceptance
def test_the_median_is_that_of_the_others_at_the_same_step() -> None:
    rule = MedianStop(min_steps=1, min_trials=3)
    for trial, losses in enumerate(([3.0, 2.0], [3.0, 1.0], [3.0, 4.0])):
        for step, loss in zip((10, 20), losses, strict=True):
            rule.observe(trial, step, loss)
    assert rule.observe(3, 10, 2.9) == "continue"
    assert rule.observe(3, 20, 2.1) == "stop"  # best so far of the others: 2, 1, 3
    assert rule.observe(4, 20, 2.0) == "continue"
    rule.end(5, math.nan)
    rule.end(6, math.nan)
    assert rule.observe(7, 20, 2.05) == "continue"  # two that diverged count as worse


def test_the_median_waits_for_enough_others() -> None:
    rule = MedianStop(min_steps=20, min_trials=2)
    for trial in range(3):
        rule.observe(trial, 10, 1.0)
    assert rule.observe(3, 10, 9.0) == "continue"
    assert rule.observe(3, 20, 9.0) == "continue"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Asha([], 3), "rungs must be increasing steps >= 1"),
        (lambda: Asha([10, 10], 3), "rungs must be increasing steps >= 1"),
        (lambda: Asha([10], 1), "reduction_factor must be at least 2, got 1"),
        (lambda: Asha([10]).restore({"rungs": [], "ended": []}), "state must be of a rule with 1 rungs, got 0"),
        (lambda: MedianStop(min_trials=0), "min_steps and min_trials must be at least 1, got 1 and 0"),
        (lambda: ForecastStop(min_finished=1), "min_finished at least 2, got 1 and 1"),
        (lambda: ForecastStop(probability=0.6), "probability must be above 0 and at most 0.5, got 0.6"),
        (lambda: ForecastStop().observe(0, 10, 1.0), "trial must have begun before it is observed, got 0"),
        (lambda: ForecastStop().begin(0, [-1.0], 0), "lr must hold finite rates >= 0"),
    ],
)
def test_what_does_not_fit_is_said(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
