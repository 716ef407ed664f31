"""Predictions of the laws of loss curves, and the guards around where these laws are known to mislead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.predict import NOISE_LEVELS, check_usable, samples_of
from landscape_ray.laws.core.result import FitResult, Prediction
from landscape_ray.laws.curves.annealing import ANNEALING
from landscape_ray.laws.curves.curve import Curve, check_schedule
from landscape_ray.laws.curves.curve_set import PEAK_TOLERANCE, CurveSet

Array: TypeAlias = NDArray[np.float64]

HORIZON_FACTOR = 3.0
"""A horizon more than this many times the fitted one is predicted with a warning."""

AREA_FACTOR = 1.5
"""An annealing area more than this many times the largest fitted one is predicted with a warning."""

_CHUNK_ELEMENTS = 4_000_000
_ROWS = 16
"""Samples evaluated at once: laws that remember every update have some hundred terms a point."""

_FIELDS = {"N": "num_params", "b": "batch_size"}
_DECAY_PARAMETER = {"annealing": "C", "annealing_sized": "C", "multi_power": "B"}


def predict_annealing(
    fit: FitResult,
    lr: ArrayLike,
    step: ArrayLike,
    warmup_steps: int = 0,
    *,
    allow_extrapolation: bool = False,
) -> Prediction:
    """Return the losses that a fitted momentum annealing law expects; see :func:`predict_curve`."""
    return predict_curve(fit, lr, step, warmup_steps, law=ANNEALING, allow_extrapolation=allow_extrapolation)


def predict_curve(
    fit: FitResult,
    lr: ArrayLike,
    step: ArrayLike,
    warmup_steps: int = 0,
    *,
    batch_size: ArrayLike | None = None,
    num_params: float | None = None,
    law: Law | None = None,
    allow_extrapolation: bool = False,
) -> Prediction:
    """Return the losses that a fitted law of loss curves expects of a schedule, with intervals.

    The interval is that of one measured loss: it mixes the bootstrap samples of the parameters with the residuals of
    the fit. How wrong the law is on schedules unlike the fitted ones is part of it only where that was measured, by
    :func:`landscape_ray.laws.calibrate`: then the misfit, times Student's t for as many errors as it was measured on,
    is added in quadrature.

    Args:
        fit: of any law of loss curves.
        lr: (S,) learning rate of every update.
        step: (k,) completed updates at which to predict, increasing, 1 <= step <= S.
        warmup_steps: updates of warm-up.
        batch_size: (S,) or a number, for laws that ask for it.
        num_params: of the model, for laws that ask for it.
        law: the one that was fitted; None for the one of the fit's name in `LAWS`.
        allow_extrapolation: predict also where the law is known to be wrong (another peak) or silent (a decay, when no
            fitted run had one); the prediction then carries a warning instead.

    Raises:
        UserError: a fit of another law, a failed fit, an unsound schedule, or one that needs `allow_extrapolation`.
    """
    if law is None:
        law = law_of(fit)
    check_usable(law, fit)
    if law.prepare is None:
        raise UserError(f"law '{law.name}' must be one of loss curves, got one of points; use predict_points")
    rates, steps = check_schedule("prediction", lr, step, warmup_steps)
    query = Curve("prediction", rates, steps, np.ones(len(steps)), warmup_steps, batch_size, num_params)  # type: ignore[arg-type]
    warnings = _guard(law, fit, query, allow_extrapolation)
    tail = (1 - fit.confidence) / 2
    noise = np.exp(np.interp(NOISE_LEVELS, np.linspace(0, 1, 41), fit.residuals["quantiles"]))
    low, high, loss = np.empty(len(steps)), np.empty(len(steps)), np.empty(len(steps))
    for part, x in _parts(law, fit, query, len(noise)):
        loss[part] = law.predict(x, fit.parameters)
        curve = _samples(law, fit, x)
        mixed = (curve.T[:, :, None] * noise).reshape(curve.shape[1], -1)
        low[part], high[part] = np.quantile(mixed, [tail, 1 - tail], axis=1)
    if fit.misfit is not None:
        reach = stdtrit(fit.num_misfits, 1 - tail) * fit.misfit * loss
        low, high = (
            loss - np.hypot(np.maximum(loss - low, 0.0), reach),
            loss + np.hypot(np.maximum(high - loss, 0.0), reach),
        )
    return Prediction(step=steps, loss_nats=loss, low=low, high=high, confidence=fit.confidence, warnings=warnings)


def final_losses(law: Law, fit: FitResult, curves: Sequence[Curve]) -> tuple[Array, Array]:
    """Return the law's loss after the last point of each curve (n,), and that of every bootstrap sample (draws, n).

    Args:
        law: that was fitted.
        fit: its fit.
        curves: their losses are not looked at.
    """
    ends = [dataclasses.replace(c, step=c.step[-1:], loss_nats=np.ones(1)) for c in curves]
    x = _prepared(law, fit, ends)
    return np.broadcast_to(law.predict(x, fit.parameters), len(ends)).copy(), _samples(law, fit, x)


def law_of(fit: FitResult) -> Law:
    """Return the listed law of a fit.

    Raises:
        UserError: the fit is of no listed law.
    """
    from landscape_ray.laws import LAWS  # the registry imports this module

    if fit.law not in LAWS:
        raise UserError(f"law must be given for a fit of '{fit.law}', which is not a listed law; pass law=")
    return LAWS[fit.law]


def _prepared(law: Law, fit: FitResult, curves: Sequence[Curve]) -> Any:
    named = [dataclasses.replace(curve, run_id=str(number)) for number, curve in enumerate(curves)]
    data = CurveSet(named, with_warmup=True)
    return law.prepare(data, {name: fit.parameters[name] for name in law.grid_names})  # type: ignore[misc]  # checked


def _parts(law: Law, fit: FitResult, query: Curve, num_levels: int) -> Iterator[tuple[slice, Any]]:
    """Yield slices of the points, short enough for all samples to be kept, and what the law makes of each."""
    chunk = max(1, _CHUNK_ELEMENTS // (max(len(fit.samples), 1) * num_levels))
    for i in range(0, len(query.step), chunk):
        part = slice(i, i + chunk)
        piece = dataclasses.replace(query, step=query.step[part], loss_nats=query.loss_nats[part])
        yield part, _prepared(law, fit, [piece])


def _samples(law: Law, fit: FitResult, x: Any) -> Array:
    """Return the law (draws, n) at the parameters of every bootstrap sample; at the optimum where there are none."""
    values = samples_of(fit)
    count = max(len(fit.samples), 1)
    rows = []
    for i in range(0, count, _ROWS):
        some = {name: value[i : i + _ROWS] if len(value) == count else value for name, value in values.items()}
        rows.append(law.predict(x, some))
    return np.concatenate(rows)


def _guard(law: Law, fit: FitResult, query: Curve, allow_extrapolation: bool) -> tuple[str, ...]:
    """Return warnings about a schedule outside the fitted range.

    Raises:
        UserError: outside where the law holds, and extrapolation is not allowed.
    """
    data, peak, warnings = fit.data, query.peak_lr, []
    schedule, steps = query.schedule(), query.step
    horizon = int(steps[-1])
    asked = {variable.name for variable in law.variables}
    for name, value in (("N", query.num_params), ("b", query.batch_size)):
        if name in asked and value is None:
            raise UserError(f"{_FIELDS[name]} must be given for law '{law.name}', got none; pass {_FIELDS[name]}=")
    if fit.status == "weak":
        warnings.append(f"weak_fit: {'; '.join(fit.reasons)}")
    if not len(fit.samples):
        warnings.append("no_bootstrap: the interval holds residual noise only, not the uncertainty of the parameters")
    if abs(peak / data["peak_lr"] - 1) > PEAK_TOLERANCE:
        if "eta" in asked:
            low, high = data["peak_range"]
            if not low * (1 - PEAK_TOLERANCE) <= peak <= high * (1 + PEAK_TOLERANCE):
                warnings.append(f"peak_lr: peak {peak:g} was not fitted (fitted {low:g} to {high:g})")
        elif not allow_extrapolation:
            raise UserError(
                f"lr must have the fitted peak {data['peak_lr']:g}, got {peak:g}; the law favours higher peaks without "
                "end: fit runs of this peak, or pass allow_extrapolation=True"
            )
        else:
            warnings.append(f"peak_lr: peak {peak:g} was not fitted (fitted {data['peak_lr']:g})")
    decays = bool((np.diff(schedule[:horizon]) < 0).any())
    if not data.get("decay_identified", True) and decays:
        if not allow_extrapolation:
            raise UserError(
                "lr must not decay, because no fitted run has a loss after a decay and "
                f"{_DECAY_PARAMETER.get(law.name, 'its effect')} is not identified; fit a run with a decay, or pass "
                "allow_extrapolation=True"
            )
        name = _DECAY_PARAMETER.get(law.name, "decay")
        warnings.append(f"{name}_not_identified: the effect of the decay is left out")
    if horizon > HORIZON_FACTOR * data["horizon"]:
        warnings.append(f"horizon: {horizon} updates are {horizon / data['horizon']:.1f} times the fitted horizon")
    if "s2_range" in data and data["decay_identified"]:
        largest = max(data["s2_range"][1], 0.0)
        reached = query.s2(fit.parameters["decay"])[steps - 1].max()
        if reached > AREA_FACTOR * largest:
            warnings.append(f"annealing_area: S2 reaches {reached:.3g}, the largest fitted is {largest:.3g}")
    start = data["area_range"][0]
    if steps[0] <= query.warmup_steps or np.cumsum(schedule)[steps[0] - 1] < (1 - PEAK_TOLERANCE) * start:
        warnings.append("early: steps in the warm-up or before the first fitted loss are predicted")
    num_idle = int((schedule[:horizon] <= 1e-9 * peak).sum())
    if num_idle > 1:
        warnings.append(f"zero_lr: the law credits {num_idle} updates at zero learning rate with progress")
    if law.guard is not None:
        warnings += law.guard(fit, query, allow_extrapolation)
    return tuple(warnings)
