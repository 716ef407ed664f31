"""How large a model, trained on how many tokens, for a budget of compute: from any law of loss over N and D.

    minimise L(N, C / (k N)) over N

Legend: N parameters, D tokens, C = k N D training FLOPs (k = 6 unless measured), L loss.

Every bootstrap sample of the law makes its own choice; the intervals are theirs. Regret is what the one choice that is
recommended costs in the worlds of the samples, compared with the choice that would have been best there: the decision's
own measure of how much the uncertainty matters. It is usually far smaller than the width of the intervals suggests,
because the minimum is flat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.predict import FLAG_FACTOR, REFUSE_FACTOR, check_usable, predict_points, samples_of
from landscape_ray.laws.core.result import FitResult

Array: TypeAlias = NDArray[np.float64]

_NUM_SIZES = 241
_SPAN = 1e3
"""Sizes from this factor below to this factor above the fitted ones are searched."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, samples: Array, confidence: float) -> Quantity:
        """Return a value with the central interval of its samples (s,)."""
        tail = (1 - confidence) / 2
        return cls(value, float(np.quantile(samples, tail)), float(np.quantile(samples, 1 - tail)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """What to train for a budget.

    Attributes:
        flops: the budget C.
        num_params: N.
        num_tokens: D.
        loss: expected of the trained model; its interval is that of the law's value.
        measured: (low, high) in which the measured loss is expected.
        exponent: by which N grows with C at this budget: d log N / d log C.
        regret: expected excess loss by the law's uncertainty, over samples; its interval is that of the samples.
        confidence: level of the intervals.
        warnings: in what respect the choice lies outside what was fitted.
    """

    flops: float
    num_params: Quantity
    num_tokens: Quantity
    loss: Quantity
    measured: tuple[float, float]
    exponent: Quantity
    regret: Quantity
    confidence: float
    warnings: tuple[str, ...]


def allocate(
    law: Law,
    fit: FitResult,
    *,
    flops: float | None = None,
    tokens: float | None = None,
    flops_per_param_token: float = 6.0,
    allow_extrapolation: bool = False,
) -> Allocation:
    """Return the size and number of tokens with the lowest loss for a budget.

    Args:
        law: a law with the variables N and D.
        fit: its fit.
        flops: budget of training FLOPs; or
        tokens: tokens that there are: then the compute is found whose best use they are.
        flops_per_param_token: k; 6 counts a multiply and an add, forward and backward, of every parameter.
        allow_extrapolation: recommend also at more than 100 times the fitted range.

    Raises:
        UserError: a law of other variables, a failed fit, no budget or two, one that is not positive, or a choice far
            outside the fitted range.

    >>> import numpy as np
    >>> from landscape_ray.laws import Points, fit
    >>> from landscape_ray.laws.scaling.chinchilla import CHINCHILLA
    >>> N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e8, 1e11, 6)))
    >>> found = fit(CHINCHILLA, Points({"N": N, "D": D}, 1.7 + 400 * N**-0.34 + 400 * D**-0.34), num_bootstrap=0)
    >>> best = allocate(CHINCHILLA, found, flops=6e19)
    >>> round(best.num_params.value / 1e9, 4), round(best.num_tokens.value / 1e9, 4), round(best.exponent.value, 4)
    (3.1623, 3.1623, 0.5)
    """
    check_usable(law, fit)
    names = {variable.name for variable in law.variables}
    if names != {"N", "D"}:
        raise UserError(f"law must have the variables N and D to allocate a budget, got {', '.join(sorted(names))}")
    if (flops is None) == (tokens is None):
        raise UserError("budget must be one of flops and tokens, got both or neither; give one")
    budget = float(flops if flops is not None else tokens)  # type: ignore[arg-type]  # one of them is there
    if not (np.isfinite(budget) and budget > 0):
        raise UserError(f"{'flops' if flops is not None else 'tokens'} must be positive and finite, got {budget:g}")
    k = flops_per_param_token
    best = {name: np.array([[value]]) for name, value in fit.parameters.items()}
    compute = _compute_for_tokens(law, fit, best, budget, k) if flops is None else budget
    size = float(best_size(law, fit, best, compute, k)[0])
    data = compute / (k * size)
    samples = samples_of(fit)
    sizes = best_size(law, fit, samples, compute, k)
    exponents = _exponent(law, fit, samples, compute, k)
    expected = predict_points(law, fit, {"N": size, "D": data}, allow_extrapolation=True)
    mine, theirs = (
        np.ravel(np.asarray(law.predict({"N": n, "D": compute / (k * n)}, samples)))
        for n in (np.array([[size]]), sizes[:, None])
    )
    regret = np.maximum(mine - theirs, 0.0)
    level = fit.confidence
    return Allocation(
        flops=compute,
        num_params=Quantity.of(size, sizes, level),
        num_tokens=Quantity.of(data, compute / (k * sizes), level),
        loss=Quantity(float(expected.value[0]), float(expected.low[0]), float(expected.high[0])),
        measured=(float(expected.measured_low[0]), float(expected.measured_high[0])),
        exponent=Quantity.of(float(_exponent(law, fit, best, compute, k)[0]), exponents, level),
        regret=Quantity.of(float(regret.mean()), regret, level),
        confidence=level,
        warnings=_warnings(fit, {"N": size, "D": data}, expected.warnings, allow_extrapolation),
    )


def best_size(law: Law, fit: FitResult, parameters: Mapping[str, Array], compute: float, k: float) -> Array:
    """Return the best N (s,) for every sample: on a grid of log N, then by the parabola through three points, twice."""
    low, high = fit.data["ranges"]["N"]
    centre = np.full((len(next(iter(parameters.values()))), 1), 0.5 * np.log(low * high))
    half = 0.5 * np.log(high / low) + np.log(_SPAN)
    for _ in range(3):
        grid = centre + half * np.linspace(-1, 1, _NUM_SIZES)
        size = np.exp(grid)
        loss = np.asarray(law.predict({"N": size, "D": compute / (k * size)}, parameters))
        at = np.clip(np.argmin(np.broadcast_to(loss, grid.shape), axis=1), 1, _NUM_SIZES - 2)
        rows = np.arange(len(grid))
        left, middle, right = (loss[rows, at + shift] for shift in (-1, 0, 1))
        bend = left - 2 * middle + right
        step = grid[0, 1] - grid[0, 0]
        shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
        centre = (grid[rows, at] + step * np.clip(shift, -1, 1))[:, None]
        half = 8 * step
    return np.asarray(np.exp(centre[:, 0]))


def _exponent(law: Law, fit: FitResult, parameters: Mapping[str, Array], compute: float, k: float) -> Array:
    """Return d log N / d log C (s,), over a factor of 1.21 in C."""
    more, less = (best_size(law, fit, parameters, compute * factor, k) for factor in (1.1, 1 / 1.1))
    return np.asarray(np.log(more / less) / np.log(1.1**2))


def _compute_for_tokens(law: Law, fit: FitResult, best: Mapping[str, Array], tokens: float, k: float) -> float:
    """Return C whose best allocation has this many tokens, by bisection in log C."""
    sizes = fit.data["ranges"]["N"]
    low, high = np.log(k * tokens * sizes[0] / _SPAN), np.log(k * tokens * sizes[1] * _SPAN)
    for _ in range(60):
        middle = 0.5 * (low + high)
        compute = float(np.exp(middle))
        if compute / (k * float(best_size(law, fit, best, compute, k)[0])) < tokens:
            low = middle
        else:
            high = middle
    return float(np.exp(0.5 * (low + high)))


def _warnings(
    fit: FitResult, chosen: Mapping[str, float], known: tuple[str, ...], allow_extrapolation: bool
) -> tuple[str, ...]:
    """Return what to know before the choice is followed; raise where it is far outside the fitted range."""
    found: list[Any] = [warning for warning in known if not warning.startswith("extrapolation")]
    for name, value in chosen.items():
        low, high = fit.data["ranges"][name]
        factor = max(value / high, low / value)
        if factor > REFUSE_FACTOR and not allow_extrapolation:
            raise UserError(
                f"{name} must be within {REFUSE_FACTOR:g} times the fitted range [{low:.4g}, {high:.4g}] to be "
                f"recommended, got {value:.4g}; fit larger runs, or allow the extrapolation"
            )
        if factor > 1:
            sentence = f"{name} = {value:.4g} is {factor:.1f} times outside its fitted range"
            found.append(f"extrapolation: {sentence}{'; expect more error' if factor > FLAG_FACTOR else ''}")
    return tuple(found)
