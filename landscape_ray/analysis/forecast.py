"""Schedules that were not run, from the law of a sweep: the forecast of one, and the one that it prefers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from landscape_ray.analysis.annealing import SweepFit, curve_of
from landscape_ray.analysis.runs import Run
from landscape_ray.laws import BestSchedule, Prediction, best_schedule, predict_curve
from landscape_ray.schedules import Schedule
from landscape_ray.text import loss, lr


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleForecast:
    """What a law expects of a schedule."""

    schedule: Schedule
    prediction: Prediction
    held_out_errors: tuple[float, ...]
    """Relative errors of the law's forecasts of schedules that it was not fitted to."""
    best_run: str
    """The run of the fit with the lowest final loss, to compare with."""
    best_loss_nats: float
    loss_unit: str = "nats/token"

    @property
    def warnings(self) -> tuple[str, ...]:
        """In what respect the schedule lies outside what was fitted."""
        return self.prediction.warnings

    @property
    def trust(self) -> str:
        """How far off such forecasts were where the truth is known."""
        errors = [abs(error) for error in self.held_out_errors]
        mean, worst = sum(errors) / len(errors), max(errors)
        return f"Schedules held out of this fit were forecast within {mean:.1%} on average, {worst:.1%} at worst."

    @property
    def sentence(self) -> str:
        """The forecast in words."""
        curve, schedule = self.prediction, self.schedule
        value, low, high = (float(ends[-1]) for ends in (curve.loss_nats, curve.low, curve.high))
        return (
            f"{schedule.name} at peak LR {lr(schedule.peak)} for {schedule.num_steps} updates: "
            f"{loss(value)} {self.loss_unit}, {curve.confidence:.0%} interval {loss(low)} to {loss(high)}; "
            f"best run of the fit: {self.best_run} with {loss(self.best_loss_nats)}. {self.trust}"
        )


def forecast_schedule(
    fitted: SweepFit,
    *,
    schedule: str,
    num_steps: int | None = None,
    peak_lr: float | None = None,
    warmup_steps: int | None = None,
    **shape: Any,
) -> ScheduleForecast:
    """Return the loss that a sweep's law expects at the end of a schedule.

    Args:
        fitted: its law.
        schedule: name of the schedule.
        num_steps: updates; None for as many as the fitted runs have.
        peak_lr: None for the peak of the fitted runs; another one is refused, these laws don't compare peaks.
        warmup_steps: None for those of the fitted runs.
        **shape: further fields of `Schedule`.

    Raises:
        UserError: a field out of its range, or another peak.
    """
    planned = Schedule(
        name=schedule,
        peak=fitted.peak_lr if peak_lr is None else peak_lr,
        num_steps=num_steps or fitted.num_steps,
        warmup_steps=fitted.warmup_steps if warmup_steps is None else warmup_steps,
        **shape,
    )
    return ScheduleForecast(
        schedule=planned,
        prediction=predict_curve(fitted.fit, planned.values(), [planned.num_steps], planned.warmup_steps),
        held_out_errors=tuple(one.relative_error for one in fitted.forecasts),
        best_run=fitted.best_run,
        best_loss_nats=fitted.best_loss_nats,
        loss_unit=fitted.loss_unit,
    )


def recommended_schedule(fitted: SweepFit, runs: Sequence[Run], num_steps: int | None = None) -> BestSchedule:
    """Return the schedule whose final loss a sweep's law considers lowest, at the peak of the fitted runs.

    Args:
        fitted: the law.
        runs: those of the sweep; the fitted ones are what it is compared with.
        num_steps: updates; None for as many as the fitted runs have.

    Raises:
        UserError: out of the fitted range, a fit that knows of no decay, or none of the fitted runs is there.
    """
    curves = [curve_of(run, "eval") for run in runs if run.run_id in fitted.run_ids]
    steps = num_steps or fitted.num_steps
    return best_schedule(fitted.fit, curves, steps, warmup_steps=fitted.warmup_steps)
