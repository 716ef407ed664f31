"""Predictions of the annealing law, and the guards around where it is known to mislead."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from landscape_ray.errors import UserError
from landscape_ray.laws.core.predict import NOISE_LEVELS, check_usable
from landscape_ray.laws.core.result import FitResult, Prediction
from landscape_ray.laws.curves.annealing import ANNEALING, NAMES, annealing_loss
from landscape_ray.laws.curves.curve import annealing_area, check_schedule, count_warmup_at_peak
from landscape_ray.laws.curves.curve_set import PEAK_TOLERANCE

Array: TypeAlias = NDArray[np.float64]

HORIZON_FACTOR = 3.0
"""A horizon more than this many times the fitted one is predicted with a warning."""

AREA_FACTOR = 1.5
"""An annealing area more than this many times the largest fitted one is predicted with a warning."""

_CHUNK_ELEMENTS = 4_000_000


def predict_annealing(
    fit: FitResult,
    lr: ArrayLike,
    step: ArrayLike,
    warmup_steps: int = 0,
    *,
    allow_extrapolation: bool = False,
) -> Prediction:
    """Return the losses that a fitted annealing law expects of a schedule, with intervals.

    The interval is that of one measured loss: it mixes the bootstrap samples of the parameters with the residuals of
    the fit. How wrong the law is on schedules unlike the fitted ones is part of it only where that was measured, by
    :func:`landscape_ray.laws.calibrate`: then the misfit, times Student's t for as many errors as it was measured on,
    is added in quadrature.

    Args:
        fit: result of :func:`fit_annealing`.
        lr: (S,) learning rate of every update.
        step: (k,) completed updates at which to predict, increasing, 1 <= step <= S.
        warmup_steps: updates of warm-up, counted with the peak learning rate.
        allow_extrapolation: predict also where the law is known to be wrong (another peak) or silent (a decay, when no
            fitted run had one); the prediction then carries a warning instead.

    Raises:
        UserError: not an annealing fit, a failed fit, an unsound schedule, or one that needs `allow_extrapolation`.
    """
    check_usable(ANNEALING, fit)
    rates, steps = check_schedule("prediction", lr, step, warmup_steps)
    schedule = count_warmup_at_peak(rates, warmup_steps)
    s1 = np.cumsum(schedule)[steps - 1]
    s2 = annealing_area(schedule, fit.parameters["decay"])[steps - 1]
    warnings = _guard(fit, schedule, steps, s2, warmup_steps, allow_extrapolation)
    best = np.array([fit.parameters[name] for name in NAMES])
    tail = (1 - fit.confidence) / 2
    noise = np.exp(np.interp(NOISE_LEVELS, np.linspace(0, 1, 41), fit.residuals["quantiles"]))
    draws = fit.samples if len(fit.samples) else best[None]
    low, high = np.empty(len(steps)), np.empty(len(steps))
    chunk = max(1, _CHUNK_ELEMENTS // (len(draws) * len(noise)))
    for i in range(0, len(steps), chunk):
        part = slice(i, i + chunk)
        curve = annealing_loss(draws, s1[part, None], s2[part, None])
        mixed = (curve[:, :, None] * noise).reshape(len(curve), -1)
        low[part], high[part] = np.quantile(mixed, [tail, 1 - tail], axis=1)
    loss = annealing_loss(best, s1, s2)
    if fit.misfit is not None:
        reach = stdtrit(fit.num_misfits, 1 - tail) * fit.misfit * loss
        low, high = (
            loss - np.hypot(np.maximum(loss - low, 0.0), reach),
            loss + np.hypot(np.maximum(high - loss, 0.0), reach),
        )
    return Prediction(step=steps, loss_nats=loss, low=low, high=high, confidence=fit.confidence, warnings=warnings)


def _guard(
    fit: FitResult, schedule: Array, steps: NDArray[np.int64], s2: Array, warmup_steps: int, allow_extrapolation: bool
) -> tuple[str, ...]:
    """Return warnings about a schedule outside the fitted range.

    Raises:
        UserError: outside where the law holds, and extrapolation is not allowed.
    """
    data, peak, warnings = fit.data, float(schedule.max()), []
    if fit.status == "weak":
        warnings.append(f"weak_fit: {'; '.join(fit.reasons)}")
    if not len(fit.samples):
        warnings.append("no_bootstrap: the interval holds residual noise only, not the uncertainty of the parameters")
    if abs(peak / data["peak_lr"] - 1) > PEAK_TOLERANCE:
        if not allow_extrapolation:
            raise UserError(
                f"lr must have the fitted peak {data['peak_lr']:g}, got {peak:g}; the law favours higher peaks without "
                "end: fit runs of this peak, or pass allow_extrapolation=True"
            )
        warnings.append(f"peak_lr: peak {peak:g} was not fitted (fitted {data['peak_lr']:g})")
    if not data["C_identified"] and (s2 != 0).any():
        if not allow_extrapolation:
            raise UserError(
                "lr must not decay, because no fitted run has a loss after a decay and C is not identified; fit a run "
                "with a decay, or pass allow_extrapolation=True"
            )
        warnings.append("C_not_identified: the effect of the decay is left out")
    horizon, start = int(steps[-1]), data["s1_range"][0]
    if horizon > HORIZON_FACTOR * data["horizon"]:
        warnings.append(f"horizon: {horizon} updates are {horizon / data['horizon']:.1f} times the fitted horizon")
    largest = max(data["s2_range"][1], 0.0)
    if data["C_identified"] and s2.max() > AREA_FACTOR * largest:
        warnings.append(f"annealing_area: S2 reaches {s2.max():.3g}, the largest fitted is {largest:.3g}")
    if steps[0] <= warmup_steps or np.cumsum(schedule)[steps[0] - 1] < (1 - PEAK_TOLERANCE) * start:
        warnings.append("early: steps in the warm-up or before the first fitted loss are predicted")
    num_idle = int((schedule[:horizon] <= 1e-9 * peak).sum())
    if num_idle > 1:
        warnings.append(f"zero_lr: the law credits {num_idle} updates at zero learning rate with progress")
    return tuple(warnings)
