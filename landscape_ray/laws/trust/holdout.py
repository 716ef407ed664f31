"""Fits that have not seen something: a run, a size, the largest models, the longest runs.

All are the same law under weights of 0 and 1, polished from the optimum of all data and, where the share of starts that
agree is in doubt, searched anew; so that hundreds take a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import fit, solve
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.predict import predict_points

Array: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Rollout:
    """A forecast of points beyond those that were fitted.

    Attributes:
        variable: along which was extrapolated.
        factor: largest held-out value over the largest fitted one.
        relative_error: (k,) (predicted - observed) / observed.
        inside: (k,) whether the observation lies in the interval of a measurement.
        confidence: level of that interval.
        num_fitted: points that were fitted.
        status: of the fit.
    """

    variable: str
    factor: float
    relative_error: Array
    inside: NDArray[np.bool_]
    confidence: float
    num_fitted: int
    status: str

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error."""
        return float(np.abs(self.relative_error).mean())

    def __str__(self) -> str:
        return (
            f"{self.variable} up to {self.factor:.1f} times the fitted range: error {self.mean_error:.2%} on average, "
            f"{float(np.abs(self.relative_error).max()):.2%} at worst; {int(self.inside.sum())} of {len(self.inside)} "
            f"inside their {self.confidence:.0%} interval"
        )


def rollout(law: Law, points: Points, variable: str, above: float, **options: Any) -> Rollout:
    """Return how well a fit to the points up to a value of a variable forecasts those above it.

    Args:
        law: the law.
        points: the table.
        variable: name of a variable.
        above: the points with larger values are held out.
        **options: passed to :func:`landscape_ray.laws.core.fit.fit`.

    Raises:
        UserError: nothing is held out, or too little is left.
    """
    values = np.asarray(points.variables[variable]) if variable in points.variables else None
    if values is None:
        raise UserError(f"variable must be one of {', '.join(points.variables)}, got '{variable}'; choose one")
    held = values > above
    if not held.any() or held.all():
        raise UserError(
            f"above must divide the values of {variable} in [{values.min():.4g}, {values.max():.4g}], got {above:.4g}"
        )
    fitted = fit(law, points.take(~held), **options)
    rest = points.take(held)
    if fitted.status == "failed":
        raise UserError(f"the fit to {variable} <= {above:.4g} failed ({fitted.reasons[0]}); hold less out")
    found = predict_points(law, fitted, rest.variables, allow_extrapolation=True)
    observed = np.asarray(rest.response)
    return Rollout(
        variable=variable,
        factor=float(values.max() / values[~held].max()),
        relative_error=(found.value - observed) / observed,
        inside=(found.measured_low <= observed) & (observed <= found.measured_high),
        confidence=fitted.confidence,
        num_fitted=int((~held).sum()),
        status=fitted.status,
    )


def rollouts(law: Law, points: Points, share: float = 0.25, **options: Any) -> list[Rollout]:
    """Return a rollout along every variable that has at least four values: the largest quarter of them held out."""
    found = []
    for variable in law.variables:
        distinct = np.unique(np.asarray(points.variables[variable.name]))
        if len(distinct) < 4 or not variable.positive:
            continue
        above = float(distinct[-1 - max(1, round(share * len(distinct)))])
        try:
            found.append(rollout(law, points, variable.name, above, **options))
        except UserError:  # what is left may not be enough for the law: then there is no such rollout
            continue
    return found


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Stability:
    """What every fit without one group says.

    Attributes:
        groups: names of what was left out.
        parameters: (g,) values by parameter.
        best: values of the fit to everything.
        errors: (n,) relative error of each point by the fit without its group: out of sample.
        decision: (g,) a decision under every fit, if one was asked for.
    """

    groups: tuple[str, ...]
    parameters: dict[str, Array]
    best: dict[str, float]
    errors: Array
    decision: Array | None = None

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error out of sample."""
        return float(np.abs(self.errors).mean())

    def most_influential(self, name: str) -> tuple[str, float]:
        """Return the group without which a parameter moves most, and by how much."""
        moved = self.parameters[name] - self.best[name]
        index = int(np.argmax(np.abs(moved)))
        return self.groups[index], float(moved[index])


def leave_groups_out(
    law: Law,
    data: Any,
    groups: ArrayLike | None = None,
    *,
    decision: Callable[[Mapping[str, float]], float] | None = None,
    **options: Any,
) -> Stability:
    """Return the fits without each group of points, as one batch.

    Args:
        law: the law.
        data: points or curves.
        groups: (n,) group of every point, such as its model size; None for its run.
        decision: of all parameters by name: what is decided with them.
        **options: objective, fix and penalty of :func:`landscape_ray.laws.core.fit.solve`.

    Raises:
        UserError: fewer than two groups.
    """
    solution, _ = solve(law, data, **options)
    if groups is None:
        number, labels = np.asarray(data.run), list(data.run_ids)
    else:
        distinct, number = np.unique(np.asarray(groups), return_inverse=True)
        labels = [f"{value:g}" if isinstance(value, float) else str(value) for value in distinct.tolist()]
    if len(labels) < 2:
        raise UserError(f"groups must be at least two, got {len(labels)}; add runs")
    weights = (number[None] != np.arange(len(labels))[:, None]) * solution.weights
    found = solution.refit(weights)
    values = solution.natural(found.parameters)
    prediction = solution.separable.predict(found.parameters)[number, np.arange(len(number))]
    if solution.law.unlink is not None:
        prediction = np.asarray(solution.law.unlink(prediction))
    response = np.asarray(data.response)
    return Stability(
        groups=tuple(labels),
        parameters=values,
        best={name: float(value[0]) for name, value in solution.natural(solution.best).items()},
        errors=(prediction - response) / response,
        decision=None if decision is None else _decisions(decision, values, len(labels)),
    )


def _decisions(decision: Callable[[Mapping[str, float]], float], values: Mapping[str, Array], count: int) -> Array:
    return np.array([decision({name: float(column[i]) for name, column in values.items()}) for i in range(count)])


def sizes_of(points: Points, names: Sequence[str] = ("N",)) -> Array | None:
    """Return the group of equal size of every point (n,), None where the table has no size.

    Sizes within 5 % of the next smaller one are one group: figures are read off, and heads are counted or not.

    >>> sizes_of(Points({"N": [1e6, 1.02e6, 4e6]}, [3.0, 3.0, 2.5])).tolist()
    [1000000.0, 1000000.0, 4000000.0]
    """
    for name in names:
        if name in points.variables:
            values = np.asarray(points.variables[name])
            distinct = np.unique(values)
            first = np.concatenate([[True], distinct[1:] > 1.05 * distinct[:-1]])
            representative = distinct[first][np.cumsum(first) - 1]
            return np.asarray(representative[np.searchsorted(distinct, values)])
    return None
