"""Forecast stop: a trial goes on as long as it may still win.

A comparison of losses at equal steps favours trials that decay early: the learning rate of the others is still high,
and their loss will fall when it goes down. This rule compares where trials are going. It stops one when the probability
that its final loss, extrapolated along its own schedule (:mod:`landscape_ray.search.extrapolation`), is below the best
final loss so far is small. Until it has seen some trials end it stops nothing but divergence.

Trials that ended are forecast again from what was known of them after as many updates, and by how many standard
deviations these forecasts were off widens the present one: a law that fails here is not trusted here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.search.extrapolation import Coordinates, Forecast, Normal, forecast
from landscape_ray.search.rule import StoppingRule, Verdict

PRIOR_ERRORS = 4
"""The forecast's own standard deviation counts as much as so many errors of ended trials."""


class ForecastStop(StoppingRule):
    """Stop a trial whose forecast is unlikely to beat the best.

    Args:
        min_steps: no verdict before this many updates, >= 1.
        min_finished: nor before this many trials have ended with a loss, >= 2.
        probability: of beating the best final loss so far, below which a trial is stopped; in (0, 0.5].

    Raises:
        UserError: a setting out of range.
    """

    name: ClassVar[str] = "forecast"

    def __init__(self, min_steps: int = 1, min_finished: int = 3, probability: float = 0.05) -> None:
        if min_steps < 1 or min_finished < 2:
            raise UserError(
                f"min_steps must be at least 1 and min_finished at least 2, got {min_steps} and {min_finished}; "
                "the rule learns from trials that ended"
            )
        if not 0 < probability <= 0.5:
            raise UserError(f"probability must be above 0 and at most 0.5, got {probability}; 0.05 is usual")
        self.min_steps, self.min_finished, self.probability = min_steps, min_finished, probability
        self._curves: dict[int, tuple[list[int], list[float]]] = {}
        self._schedules: dict[int, tuple[list[float], int]] = {}
        self._coordinates: dict[int, Coordinates] = {}
        self._finished: dict[int, float] = {}
        self._gains: dict[int, float] = {}
        """What the learning rate's decay took off the loss, of trials that ended."""
        self._past: dict[tuple[int, int], float] = {}
        """Errors of forecasts of ended trials, in standard deviations, by trial and number of updates."""

    def begin(self, trial: int, lr: Sequence[float], warmup_steps: int) -> None:
        """Take note of the trial's schedule."""
        self._schedules[trial] = ([float(value) for value in lr], warmup_steps)
        self._coordinates[trial] = Coordinates.of(lr, warmup_steps)

    def observe(self, trial: int, step: int, loss: float) -> Verdict:
        """Return stop where the trial will hardly beat the best.

        Raises:
            UserError: the trial was not begun.
        """
        if not math.isfinite(loss):
            return "stop"
        if trial not in self._schedules:
            raise UserError(f"trial must have begun before it is observed, got {trial}; call begin with its schedule")
        steps, losses = self._curves.setdefault(trial, ([], []))
        if not steps or step > steps[-1]:
            steps.append(step)
            losses.append(loss)
        if step < self.min_steps or step >= len(self._schedules[trial][0]):
            return "continue"
        chance = self.chance(trial, step)
        return "stop" if chance is not None and chance < self.probability else "continue"

    def end(self, trial: int, loss: float) -> None:
        """Learn from a trial that ended with a loss."""
        if math.isfinite(loss) and trial in self._curves:
            self._finished[trial] = loss
            seen = self._forecast(trial, len(self._schedules[trial][0]), None)
            if seen is not None and self._coordinates[trial].s2[-1] > 0:
                self._gains[trial] = seen.annealing_gain.mean

    def chance(self, trial: int, step: int) -> float | None:
        """Return the probability that the trial beats the best that ended, as seen after `step` updates.

        Returns:
            None while too few trials have ended, or the trial is too young to be forecast.
        """
        if len(self._finished) < self.min_finished:
            return None
        seen = self._forecast(trial, step, self._gain(trial))
        return None if seen is None else seen.probability_below(min(self._finished.values()), self._widened(step))

    def _forecast(self, trial: int, step: int, gain: Normal | None) -> Forecast | None:
        steps, losses = self._curves[trial]
        known = int(np.searchsorted(steps, step, side="right"))
        return forecast(self._coordinates[trial], steps[:known], losses[:known], gain)

    def _gain(self, trial: int) -> Normal | None:
        """Return what the other ended trials say about the gain of annealing; None for fewer than two."""
        found = [gain for other, gain in sorted(self._gains.items()) if other != trial]
        if len(found) < 2:
            return None
        # of the next trial, not of the mean: between-trial spread, larger where few were seen
        spread = float(np.std(found, ddof=1)) * math.sqrt(1 + 1 / len(found))
        return Normal(float(np.mean(found)), max(spread, 0.05 * abs(float(np.mean(found))), 1e-9))

    def _widened(self, step: int) -> float:
        """Return by what factor forecasts made after so many updates were too sure of themselves, at least 1."""
        errors = [error for trial in sorted(self._finished) if (error := self._error(trial, step)) is not None]
        return math.sqrt(max((PRIOR_ERRORS + sum(e**2 for e in errors)) / (PRIOR_ERRORS + len(errors)), 1.0))

    def _error(self, trial: int, step: int) -> float | None:
        """Return the error of a forecast of an ended trial from its first `step` updates, in standard deviations."""
        if step >= len(self._schedules[trial][0]):
            return None
        key = (trial, step)
        if key not in self._past:
            seen = self._forecast(trial, step, self._gain(trial))
            if seen is None:
                return None
            self._past[key] = (self._finished[trial] - seen.mean) / seen.sd
        return self._past[key]

    def state(self) -> dict[str, Any]:
        """Return schedules, curves, final losses and the errors of past forecasts."""
        return {
            "schedules": [[trial, *self._schedules[trial]] for trial in sorted(self._schedules)],
            "curves": [[trial, *self._curves[trial]] for trial in sorted(self._curves)],
            "finished": [[trial, loss] for trial, loss in sorted(self._finished.items())],
            "gains": [[trial, gain] for trial, gain in sorted(self._gains.items())],
            "past": [[*key, error] for key, error in sorted(self._past.items())],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become the rule that `state()` was taken of."""
        self._schedules, self._coordinates = {}, {}
        for trial, lr, warmup_steps in state["schedules"]:
            self.begin(trial, lr, warmup_steps)
        self._curves = {trial: (list(steps), list(losses)) for trial, steps, losses in state["curves"]}
        self._finished = dict(state["finished"])
        self._gains = dict(state["gains"])
        self._past = {(trial, step): error for trial, step, error in state["past"]}
