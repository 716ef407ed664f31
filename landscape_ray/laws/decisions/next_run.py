"""Which run to make next: the one that narrows the interval of a decision most, within what it may cost.

    after = V - V j j' V / (s^2 + j' V j),    gain = g' (V - after) g

Legend: V covariance of the parameters, j slope of the (log) prediction at the candidate, s residual noise of one run,
g slope of the decision by the parameters. Nothing but the law is needed to know this before the run is made; that the
law holds there is taken for granted.

References:
    Fedorov 1972, Chaloner and Verdinelli 1995 (c-optimal designs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import Solution
from landscape_ray.laws.trust.covariance import Covariance, covariance

Array: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A run that could be made.

    Attributes:
        variables: its variables by name.
        cost: as given.
        width_ratio: width of the decision's interval afterwards over that of today, in (0, 1].
    """

    variables: dict[str, float]
    cost: float
    width_ratio: float


def next_runs(
    solution: Solution,
    decision: Callable[[Mapping[str, float]], float],
    candidates: Mapping[str, ArrayLike],
    cost: ArrayLike,
    budgets: Sequence[float],
) -> list[Proposal]:
    """Return for each budget the run within it that narrows the decision most; a budget without a run has none.

    Args:
        solution: a solved law of points.
        decision: of all parameters by name: what is to be known better, such as the log of the best size.
        candidates: variables (k,) of the runs that could be made.
        cost: (k,) of each, > 0, in any unit.
        budgets: of one run, in the unit of the costs.

    Raises:
        UserError: costs that are not positive, or a decision that does not depend on the parameters.
    """
    law = solution.law
    spread = covariance(solution)
    x = {name: np.asarray(values, dtype=np.float64) for name, values in candidates.items()}
    costs = np.asarray(cost, dtype=np.float64)
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise UserError(f"cost must be positive and finite, got {costs}; leave free candidates out")
    values = {name: float(value[0]) for name, value in solution.natural(solution.best).items()}
    toward = _slopes(decision, spread, values)
    variance = float(toward @ spread.matrix @ toward)
    if not variance > 0:
        raise UserError("decision must depend on a fitted parameter, got one that does not; choose another")

    def response(parameters: Mapping[str, float]) -> Array:
        predicted = np.broadcast_to(law.term(x, parameters), costs.shape)
        return np.asarray(np.log(predicted) if law.space == "log" else predicted)

    rows = np.stack([_slope(response, name, spread, values) for name in spread.names], axis=1)
    noise = float(np.median(np.abs(solution.residual)) / 0.6745) ** 2
    moved = rows @ spread.matrix
    gain = (moved @ toward) ** 2 / (noise + np.einsum("kp,kp->k", moved, rows)) / variance
    gain = np.clip(gain, 0.0, 1.0)
    found: dict[int, Proposal] = {}
    for budget in budgets:
        within = np.flatnonzero(costs <= budget)
        if len(within):
            i = int(within[np.argmax(gain[within])])
            variables = {name: float(column[i]) for name, column in x.items()}
            found[i] = Proposal(variables=variables, cost=float(costs[i]), width_ratio=float(np.sqrt(1 - gain[i])))
    return list(found.values())


def _slope(
    function: Callable[[Mapping[str, float]], Array], name: str, spread: Covariance, values: Mapping[str, float]
) -> Array:
    """Return the slope by one parameter: a central difference over a hundredth of its standard error."""
    width = 1e-2 * max(spread.standard_error(name), 1e-7 * abs(values[name]))
    up, down = (function({**values, name: values[name] + sign * width}) for sign in (1, -1))
    return np.asarray((up - down) / (2 * width))


def _slopes(decision: Callable[[Mapping[str, float]], float], spread: Covariance, values: Mapping[str, float]) -> Array:
    def as_array(parameters: Mapping[str, float]) -> Array:
        return np.asarray(decision(parameters), dtype=np.float64)

    return np.array([float(_slope(as_array, name, spread, values)) for name in spread.names])


def grid_of(ranges: Mapping[str, Sequence[float]], num: int = 9) -> dict[str, Array]:
    """Return a geometric grid over ranges as columns (num^k,) by name, candidates to choose from.

    >>> {name: values.tolist() for name, values in grid_of({"N": [1, 4], "D": [10, 10]}, 2).items()}
    {'N': [1.0, 1.0, 4.0, 4.0], 'D': [10.0, 10.0, 10.0, 10.0]}
    """
    axes = [np.geomspace(low, high, num) for low, high in ranges.values()]
    return {name: axis.ravel() for name, axis in zip(ranges, np.meshgrid(*axes, indexing="ij"), strict=True)}
