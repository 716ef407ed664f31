"""Profile likelihood: how much worse the best fit gets when one parameter is held at another value.

    interval = {v : 2 (objective(v) - objective(best)) * a <= chi2_1(confidence)},    a = naive variance / sandwich

The factor makes the statistic a chi-squared one for any objective and for runs whose points depend on each other.
Unlike an interval from a standard error, a profile is as lopsided as the data are, and open where they set no limit.

References:
    Venzon and Moolgavkar 1988; Kent 1982 (the factor).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from landscape_ray.errors import UserError
from landscape_ray.laws.core.bound import Bound
from landscape_ray.laws.core.fit import Solution
from landscape_ray.laws.core.fitting import polish
from landscape_ray.laws.trust.covariance import covariance

Array: TypeAlias = NDArray[np.float64]

_MAX_WIDENINGS = 40


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Profile:
    """The profile of one parameter.

    Attributes:
        name: the parameter.
        best: its value at the optimum.
        low: lower end of the interval; -inf (0 for what cannot be negative) where nothing limits it.
        high: upper end; inf where nothing limits it.
        confidence: level.
        values: (k,) where the profile was computed, increasing.
        statistic: (k,) scaled rise of the objective there, to compare with chi-squared of one degree of freedom.
    """

    name: str
    best: float
    low: float
    high: float
    confidence: float
    values: Array
    statistic: Array

    @property
    def open(self) -> bool:
        """Whether the data leave an end of the interval open."""
        return not (math.isfinite(self.low) and math.isfinite(self.high))


def profile(solution: Solution, name: str, confidence: float = 0.9) -> Profile:
    """Return the profile of a parameter and its interval.

    Args:
        solution: a solved law, see :func:`landscape_ray.laws.core.fit.solve`.
        name: a linear or non-linear parameter that was fitted.
        confidence: level of the interval, in (0, 1).

    Raises:
        UserError: the parameter was not fitted, or ended on a bound.
    """
    spread = covariance(solution)
    if name not in spread.names:
        raise UserError(
            f"profile must be of a fitted parameter off its bounds, got '{name}'; there: {', '.join(spread.names)}"
        )
    index = spread.names.index(name)
    best, error = float(spread.values[index]), spread.standard_error(name)
    factor = spread.naive[index, index] / spread.matrix[index, index] if spread.matrix[index, index] > 0 else 1.0
    limit = float(stats.chi2.ppf(confidence, 1))
    parameter = solution.law.parameter(name)
    seen: dict[float, float] = {best: 0.0}
    lowest = float(solution.found.objective[0])

    def statistic(value: float) -> float:
        if value not in seen:
            seen[value] = max(2 * (_held(solution, name, value) - lowest) * factor, 0.0)
        return seen[value]

    step = max(error, 1e-6 * abs(best), 1e-12)
    ends = []
    for sign, wall in ((-1, parameter.lower), (1, parameter.upper)):
        inside, reach, end = best, step, None
        for _ in range(_MAX_WIDENINGS):
            outside = best + sign * reach
            if sign * (outside - wall) >= 0:
                outside = wall
            if statistic(outside) > limit:
                end = float(optimize.brentq(lambda v: statistic(float(v)) - limit, inside, outside, rtol=1e-4))
                break
            inside, reach = outside, 1.6 * reach
            if outside == wall:
                break
        ends.append(end if end is not None else (0.0 if sign < 0 and parameter.lower == 0 else sign * math.inf))
    values = np.array(sorted(seen))
    return Profile(
        name=name,
        best=best,
        low=ends[0],
        high=ends[1],
        confidence=confidence,
        values=values,
        statistic=np.array([seen[value] for value in values.tolist()]),
    )


def _held(solution: Solution, name: str, value: float) -> float:
    """Return the objective when one parameter is held: the others polished from the optimum."""
    old = solution.bound
    bound = Bound(solution.law, old.x, old.num_points, {**old.held, **old.fixed, name: value})
    separable = dataclasses.replace(
        bound.separable(), centre=solution.separable.centre, stiffness=solution.separable.stiffness
    )
    coordinates = solution.best[:, len(old.names) :]
    coordinates = np.clip(coordinates, separable.lower, separable.upper)
    weights, y = solution.weights[None], solution.y[None]
    start = np.concatenate([separable.project(coordinates, y, weights), coordinates], axis=1)
    return float(polish(separable, y, weights, solution.objective.threshold, start).objective[0])
