"""How far a fit can be trusted: schedules it has not seen, and objectives it was not fitted with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from scipy.special import ndtri

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.result import FitResult, Forecast
from landscape_ray.laws.curves.annealing import ANNEALING
from landscape_ray.laws.curves.curve import Curve, follows
from landscape_ray.laws.curves.fit_curves import LAD_DELTA, fit_curves
from landscape_ray.laws.curves.prediction import predict_curve

Fitter: TypeAlias = Callable[..., FitResult]
"""Fits a law to curves: called with the curves and options, `num_bootstrap` among them."""


def calibrate(fit: FitResult, forecasts: Sequence[Forecast]) -> FitResult:
    """Return the fit with the misfit that forecasts of unseen schedules showed, which widens its predictions.

    misfit = sqrt(mean(relative_error^2 - expected_error^2)), about zero: a law that is wrong to one side is wrong. What
    the fits expected, noise and their parameters' uncertainty, is in the intervals already; it is taken off, so that it
    does not count twice.

    Args:
        fit: a fit to the same kind of curves.
        forecasts: of schedules that their fits had not seen, at least two.

    Raises:
        UserError: fewer than two forecasts.
    """
    if len(forecasts) < 2:
        raise UserError(f"forecasts must be at least two, got {len(forecasts)}; fit runs of more schedules")
    errors = np.array([forecast.relative_error for forecast in forecasts])
    expected = np.array([forecast.expected_error for forecast in forecasts])
    misfit = float(np.sqrt(max(np.mean(errors**2 - expected**2), 0.0)))
    return dataclasses.replace(fit, misfit=misfit, num_misfits=len(errors))


def leave_one_schedule_out(
    curves: Sequence[Curve],
    *,
    law: Law = ANNEALING,
    fitter: Fitter | None = None,
    calibrated: bool = False,
    **options: Any,
) -> list[Forecast]:
    """Return a forecast of every curve by a fit to the curves that have not seen its schedule.

    Left out with a curve are all curves that made its whole schedule: repeats with another seed, and runs that went on
    from its end.

    Args:
        curves: runs with one peak learning rate and at least two schedules.
        law: which law.
        fitter: how it is fitted; None for :func:`landscape_ray.laws.fit_curves`.
        calibrated: measure the misfit of every fit, by leaving schedules out of its own curves in turn, and let the
            intervals hold it: n (n - 1) further fits. The forecast of a curve still sees nothing of the curve. Where
            fewer than three schedules are left, nothing can be measured, and the interval stays as it is.
        **options: passed to the fitter.

    Returns:
        One forecast a curve, in the order given.

    Raises:
        UserError: a curve has no other schedule to be predicted from.
    """
    fitter = fitter or partial(fit_curves, law)
    fits: dict[tuple[int, ...], FitResult] = {}
    forecasts = []
    for curve in curves:
        seen = tuple(number for number, other in enumerate(curves) if not follows(other, curve))
        if not seen:
            raise UserError(
                f"curves must hold a second schedule to predict run '{curve.run_id}' from, got one; add a run with "
                "another schedule"
            )
        if seen not in fits:
            known = [curves[number] for number in seen]
            fits[seen] = fitter(known, **options)
            if calibrated and all(sum(not follows(b, a) for b in known) >= 2 for a in known):
                quick = {**options, "num_bootstrap": 0}
                inner = leave_one_schedule_out(known, law=law, fitter=fitter, **quick)
                fits[seen] = calibrate(fits[seen], inner)
        forecasts.append(_forecast(law, fits[seen], curve, options.get("skip_steps", 0)))
    return forecasts


def _forecast(law: Law, fit: FitResult, curve: Curve, skip_steps: int) -> Forecast:
    kept = curve.step > max(curve.warmup_steps, skip_steps)
    if not kept.any():
        raise UserError(
            f"run '{curve.run_id}' must have losses after the warm-up, got none; drop the run or lower skip_steps"
        )
    # A decay that the fit knows nothing about is part of the answer here: the forecast carries the warning.
    predict = partial(
        predict_curve,
        lr=curve.lr,
        warmup_steps=curve.warmup_steps,
        batch_size=curve.batch_size,
        num_params=curve.num_params,
        law=law,
        allow_extrapolation=True,
    )
    prediction = predict(fit, step=curve.step[kept])
    own = predict(dataclasses.replace(fit, misfit=None), step=curve.step[kept][-1:])
    width = float(np.log(own.high[0]) - np.log(own.low[0])) / 2
    observed = curve.loss_nats[kept]
    final, expected = float(observed[-1]), float(prediction.loss_nats[-1])
    return Forecast(
        run_id=curve.run_id,
        observed_final=final,
        predicted_final=expected,
        low=float(prediction.low[-1]),
        high=float(prediction.high[-1]),
        relative_error=(expected - final) / final,
        curve_mae=float(np.abs(prediction.loss_nats - observed).mean()),
        fitted_on=tuple(fit.data["runs"]),
        status=fit.status,
        prediction=prediction,
        expected_error=width / float(ndtri(0.5 + fit.confidence / 2)),
    )


def objective_sensitivity(
    curves: Sequence[Curve], *, law: Law = ANNEALING, fitter: Fitter | None = None, **options: Any
) -> dict[str, dict[str, float]]:
    """Return the parameters under other objectives: Huber as asked, least absolute deviations, least squares.

    All on the log loss. How far the rows differ is how much of the result is a choice; print with
    :func:`landscape_ray.laws.table`.

    Args:
        curves: the runs.
        law: which law.
        fitter: how it is fitted; None for :func:`landscape_ray.laws.fit_curves`.
        **options: passed to the fitter; `num_bootstrap` is 0 here.

    Returns:
        Parameters by name for each of "huber", "least_absolute" and "least_squares".
    """
    fitter = fitter or partial(fit_curves, law)
    asked = options.pop("huber_delta", 1e-3)
    options["num_bootstrap"] = 0
    objectives = {"huber": asked, "least_absolute": LAD_DELTA, "least_squares": math.inf}
    rows = {}
    for name, delta in objectives.items():
        rows[name] = dict(fitter(curves, huber_delta=delta, **options).parameters)
    return rows
