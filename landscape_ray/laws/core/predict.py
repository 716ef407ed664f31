"""What a fitted law expects at points, with intervals, and the guard around the range that was fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.result import FitResult, PointPrediction

Array: TypeAlias = NDArray[np.float64]

FLAG_FACTOR = 10.0
"""A variable this many times outside its fitted range is predicted with a warning ..."""

REFUSE_FACTOR = 100.0
"""... and this many times only if asked for."""

NOISE_LEVELS = (np.arange(41) + 0.5) / 41


def samples_of(fit: FitResult) -> dict[str, Array]:
    """Return the bootstrap samples of every parameter, arrays (num_samples, 1); the optimum where there are none."""
    if not len(fit.samples):
        return {name: np.array([[value]]) for name, value in fit.parameters.items()}
    drawn = {name: fit.samples[:, i, None] for i, name in enumerate(fit.sample_names)}
    return {name: drawn.get(name, np.array([[value]])) for name, value in fit.parameters.items()}


def predict_points(
    law: Law,
    fit: FitResult,
    variables: Mapping[str, ArrayLike],
    *,
    allow_extrapolation: bool = False,
) -> PointPrediction:
    """Return what a fitted law expects, with intervals of its value and of a measurement.

    Args:
        law: the law that was fitted.
        fit: its fit.
        variables: by name, arrays (k,) or numbers.
        allow_extrapolation: predict also at more than 100 times the fitted range, with a warning.

    Raises:
        UserError: a fit of another law or a failed one, a missing variable, or a point far outside.
    """
    check_usable(law, fit)
    x = {name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in variables.items()}
    missing = [v.name for v in law.variables if v.name not in x]
    if missing:
        raise UserError(f"variables must hold those of law '{law.name}', missing: {', '.join(missing)}; give them")
    for variable in law.variables:
        values = x[variable.name]
        if (
            not np.isfinite(values).all()
            or (variable.positive and not (values > 0).all())
            or not (values < variable.below).all()
        ):
            above = " and > 0" if variable.positive else ""
            below = f" and < {variable.below:g}" if np.isfinite(variable.below) else ""
            raise UserError(f"{variable.name} must be finite{above}{below}, got {values}; change it")
    warnings = [f"weak_fit: {'; '.join(fit.reasons)}"] if fit.status == "weak" else []
    if not len(fit.samples):
        warnings.append("no_bootstrap: the intervals leave out the uncertainty of the parameters")
    warnings += range_warnings(law, fit, x, allow_extrapolation)
    if law.guard is not None:
        warnings += law.guard(fit, x, allow_extrapolation)
    x = {name: np.broadcast_to(v, np.broadcast_shapes(*(a.shape for a in x.values()))) for name, v in x.items()}
    tail = (1 - fit.confidence) / 2
    term = law.term(x, samples_of(fit))
    noise = np.interp(NOISE_LEVELS, np.linspace(0, 1, 41), fit.residuals["quantiles"])
    curves = term[:, :, None]
    mixed = curves * np.exp(noise) if law.space == "log" else curves + noise
    levels = [tail, 1 - tail]
    low, high = np.quantile(term, levels, axis=0)
    flat = mixed.transpose(1, 0, 2).reshape(term.shape[1], -1)
    measured_low, measured_high = np.quantile(flat, levels, axis=1)
    back = law.unlink if law.unlink is not None else lambda values: values
    ends = [np.asarray(back(v)) for v in (low, high, measured_low, measured_high)]
    value = law.predict(x, fit.parameters) + np.zeros(term.shape[1])
    if fit.misfit is not None:  # how wrong the law was on what it had not seen
        reach = stdtrit(fit.num_misfits, 1 - tail) * fit.misfit * np.abs(value)
        sides = (-1, 1, -1, 1)
        widths = [np.hypot(np.maximum(s * (e - value), 0.0), reach) for s, e in zip(sides, ends, strict=True)]
        ends = [value + s * width for s, width in zip(sides, widths, strict=True)]
    return PointPrediction(
        value=value,
        low=ends[0],
        high=ends[1],
        measured_low=ends[2],
        measured_high=ends[3],
        confidence=fit.confidence,
        warnings=tuple(warnings),
    )


def check_usable(law: Law, fit: FitResult) -> None:
    """Raise if a fit is not one of this law, or failed.

    Raises:
        UserError: says which.
    """
    if fit.law != law.name:
        raise UserError(f"fit must be of the law '{law.name}', got '{fit.law}'; predict with that law")
    if fit.status == "failed":
        raise UserError(f"fit must have found an optimum, got status 'failed' ({fit.reasons[0]}); fit other runs")


def range_warnings(law: Law, fit: FitResult, x: Mapping[str, Array], allow_extrapolation: bool) -> list[str]:
    """Return warnings for values more than 10 times outside the fitted range.

    Raises:
        UserError: more than 100 times outside, unless that is allowed.
    """
    warnings = []
    for variable in law.variables:
        if variable.name not in fit.data.get("ranges", {}) or not variable.positive:
            continue
        low, high = fit.data["ranges"][variable.name]
        values = x[variable.name]
        factor = float(max((values / high).max(), (low / values).max()))
        if factor > REFUSE_FACTOR and not allow_extrapolation:
            raise UserError(
                f"{variable.name} must lie within {REFUSE_FACTOR:g} times the fitted range [{low:.4g}, {high:.4g}], "
                f"got {values[np.argmax(np.maximum(values / high, low / values))]:.4g}; fit larger runs, or allow the "
                "extrapolation"
            )
        if factor > FLAG_FACTOR:
            warnings.append(f"extrapolation: {variable.name} is {factor:.0f} times outside its fitted range")
    return warnings
