"""The covariance of fitted parameters from the curvature of the objective, and what it says of anything made of them.

    V = H^-1 M H^-1,    H = sum_i w_i psi'(r_i) j_i j_i',    M = sum over runs of g g',

    g = sum of w_i psi(r_i) j_i over the points i of a run

Legend: r residual, psi the slope of the Huber loss, j slope of the prediction (of its logarithm in log space) by the
parameters, w weights. Points of one run may depend on each other in any way: they enter M by their sum.

References:
    Huber 1967, White 1982 (the sandwich); Liang and Zeger 1986 (clusters).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from landscape_ray.laws.core.bootstrap import MIN_RUNS
from landscape_ray.laws.core.fit import Solution

Array: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Covariance:
    """Covariance of the free parameters of a fit.

    Attributes:
        names: the free parameters, those on a bound left out.
        values: (p,) at the optimum.
        matrix: (p, p) sandwich.
        naive: (p, p) as if the curvature alone told: what a likelihood ratio assumes.
        degrees: degrees of freedom of the intervals.
    """

    names: tuple[str, ...]
    values: Array
    matrix: Array
    naive: Array
    degrees: int

    def standard_error(self, name: str) -> float:
        """Return the standard error of a parameter."""
        return float(np.sqrt(self.matrix[self.names.index(name), self.names.index(name)]))

    def interval(
        self, function: Callable[[Mapping[str, float]], float], fixed: Mapping[str, float], confidence: float
    ) -> tuple[float, float, float]:
        """Return value and interval of a function of the parameters by the delta method.

        The slopes are central differences at a thousandth of a standard error.

        Args:
            function: of all parameters by name.
            fixed: those that are not among `names`.
            confidence: level, in (0, 1).
        """
        center = dict(fixed) | dict(zip(self.names, self.values.tolist(), strict=True))
        value = function(center)
        slopes = np.empty(len(self.names))
        for i, name in enumerate(self.names):
            width = 1e-3 * max(self.standard_error(name), 1e-9 * abs(center[name]), 1e-300)
            up, down = (function(center | {name: center[name] + s * width}) for s in (1, -1))
            slopes[i] = (up - down) / (2 * width)
        spread = math.sqrt(max(float(slopes @ self.matrix @ slopes), 0.0))
        reach = float(stats.t.ppf(0.5 + confidence / 2, self.degrees)) * spread
        return value, value - reach, value + reach


def slopes(solution: Solution) -> tuple[tuple[str, ...], Array, Array]:
    """Return the free parameters, their values (p,), and the slopes (n, p) of the prediction, or of its logarithm.

    In natural units. Parameters on a bound are held there.
    """
    bound, separable = solution.bound, solution.separable
    count = len(bound.names)
    coordinates = solution.best[:, count:]
    columns, by_coordinate = bound.raw(coordinates)
    best = {name: float(value[0]) for name, value in solution.natural(solution.best).items()}
    coefficients = np.array([best[name] for name in solution.law.linear_names])
    at_bound = dict(zip((*bound.names, *(p.name for p in bound.inner)), solution.found.at_bound[0], strict=True))
    names, parts = [], []
    for j, name in enumerate(solution.law.linear_names):
        if name in bound.names and not at_bound[name]:
            names.append(name)
            parts.append(columns[0, :, j])
    for i, parameter in enumerate(bound.inner):
        if parameter.name not in bound.fixed and not at_bound[parameter.name]:
            names.append(parameter.name)
            outward = best[parameter.name] if parameter.log else 1.0
            parts.append(by_coordinate[0, :, :, i] @ coefficients / outward)
    matrix = np.stack(parts, axis=1)
    if solution.law.space == "log":
        matrix = matrix / separable.predict(solution.best)[0][:, None]
    return tuple(names), np.array([best[name] for name in names]), matrix


def covariance(solution: Solution) -> Covariance:
    """Return the covariance of the parameters of a solved law.

    With fewer than five runs, their sums tell nothing about a spread, and points count as independent.
    """
    names, values, jacobian = slopes(solution)
    delta = solution.objective.threshold
    residual, weights = solution.residual, solution.weights
    n, p = jacobian.shape
    score = weights * np.clip(residual, -delta, delta)
    # Where few residuals are below the threshold, psi' is a rough estimate of their density at 0: it is taken over the
    # smallest third of them, which for a threshold above these changes nothing.
    width = max(float(np.quantile(np.abs(residual), 1 / 3)), min(delta, float(np.abs(residual).max())), 1e-300)
    curvature = weights * np.where(np.abs(residual) <= width, min(delta / width, 1.0), 0.0)
    scale = np.sqrt((jacobian**2).sum(axis=0))
    scaled = jacobian / scale
    hessian = scaled.T @ (curvature[:, None] * scaled)
    if solution.separable.stiffness is not None:
        hessian = hessian + np.diag(_stiffness(solution, names) / scale**2)
    run = solution.data.run
    num_runs = int(run.max()) + 1
    each = score[:, None] * scaled
    if num_runs >= MIN_RUNS:
        sums = np.zeros((num_runs, p))
        np.add.at(sums, run, each)
        middle = sums.T @ sums * (num_runs / (num_runs - 1)) * ((n - 1) / max(n - p, 1))
        degrees = max(num_runs - (p if num_runs == n else 1), 1)
    else:
        middle = each.T @ each * (n / max(n - p, 1))
        degrees = max(n - p, 1)
    inverse = np.linalg.pinv(hessian, rcond=1e-14, hermitian=True)
    both = np.outer(scale, scale)
    return Covariance(
        names=names,
        values=values,
        matrix=inverse @ middle @ inverse / both,
        naive=inverse / both,
        degrees=degrees,
    )


def _stiffness(solution: Solution, names: tuple[str, ...]) -> Array:
    """Return the curvature (p,) that a penalty adds, in natural units."""
    stiffness = solution.separable.stiffness
    assert stiffness is not None
    best = {name: float(value[0]) for name, value in solution.natural(solution.best).items()}
    by_name = {}
    for parameter, each in zip(solution.bound.inner, stiffness, strict=True):
        by_name[parameter.name] = each / best[parameter.name] ** 2 if parameter.log else each
    return np.array([by_name.get(name, 0.0) for name in names])
