"""Where two fitted laws meet: the size, data or compute from which the second is better than the first.

    roots of log L1(x) - log L2(x) along one variable, the others held

The difference is bracketed on a grid in log x and bisected, at the optima and at all bootstrap samples at once.

References:
    Efron and Tibshirani 1993 (intervals of functions of estimates by the bootstrap).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.predict import check_usable, range_warnings, samples_of
from landscape_ray.laws.core.propagate import Interval, interval
from landscape_ray.laws.core.result import FitResult

Array: TypeAlias = NDArray[np.float64]

_GRID = 257
_BISECTIONS = 60


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Crossover:
    """Where two laws meet between two ends.

    Attributes:
        variable: along which.
        at: (r,) where they meet at the optima, in rising order, none, one or several; the interval of each is over the
            samples' roots that are nearer to it than to another.
        better_before: which law is lower below the first meeting, 1 or 2; everywhere if they do not meet; 0 if they
            are the same.
        num_roots: share of samples by their number of roots.
        warnings: each "name: sentence".
    """

    variable: str
    at: Interval
    better_before: int
    num_roots: Mapping[int, float]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        if not len(self.at.value):
            return f"the laws do not meet; law {self.better_before} is lower throughout"
        return f"the laws meet at {self.variable} = {self.at}; before, law {self.better_before} is lower"


def crossover(
    first: tuple[Law, FitResult],
    second: tuple[Law, FitResult],
    variable: str,
    between: tuple[float, float],
    *,
    held: Mapping[str, float] | None = None,
    allow_extrapolation: bool = False,
) -> Crossover:
    """Return where two fitted laws meet along a variable.

    Args:
        first: a law and its fit.
        second: another, of the same response.
        variable: along which; both laws have it.
        between: (low, high) where to look, 0 < low < high.
        held: values of the other variables.
        allow_extrapolation: look also at more than 100 times outside what was fitted.

    Raises:
        UserError: fits of other laws or failed ones, different responses, a variable that is missing or not held, ends
            out of order, or ends far outside what was fitted.

    >>> from landscape_ray.laws.core.fit import fit
    >>> from landscape_ray.laws.core.points import Points
    >>> from landscape_ray.laws.scaling.power import power_law
    >>> law, x = power_law(), np.geomspace(1e2, 1e6, 9)
    >>> slow, fast = (fit(law, Points({"x": x}, a * x**-b), num_bootstrap=5) for a, b in ((1, 0.1), (10, 0.3)))
    >>> meeting = crossover((law, slow), (law, fast), "x", (1e2, 1e7))
    >>> round(float(meeting.at.value[0])), meeting.better_before
    (100000, 1)
    """
    laws, fits = (first[0], second[0]), (first[1], second[1])
    for law, fit in zip(laws, fits, strict=True):
        check_usable(law, fit)
    if laws[0].response.name != laws[1].response.name:
        raise UserError(
            f"laws must predict the same, got {laws[0].response.name} and {laws[1].response.name}; compare like with "
            "like"
        )
    low, high = between
    if not 0 < low < high < np.inf:
        raise UserError(f"between must be (low, high) with 0 < low < high, got {between}; change the ends")
    held = dict(held or {})
    for law in laws:
        names = [v.name for v in law.variables]
        missing = [name for name in names if name != variable and name not in held]
        if variable not in names or missing:
            raise UserError(
                f"law '{law.name}' must have the variable '{variable}' and all others held, it has "
                f"{', '.join(names)}, held: {', '.join(held) or 'none'}; give them"
            )
    warnings = []
    for law, fit in zip(laws, fits, strict=True):
        ends = {name: np.array([value]) for name, value in held.items()} | {variable: np.array([low, high])}
        warnings += [f"{w} (law '{law.name}')" for w in range_warnings(law, fit, ends, allow_extrapolation)]
        warnings += [f"weak_fit: {law.name}: {'; '.join(fit.reasons)}"] if fit.status == "weak" else []
    best = [{name: np.array([[value]]) for name, value in fit.parameters.items()} for fit in fits]
    roots, sign = _roots(laws, best, variable, between, held)
    count = max(len(fit.samples) for fit in fits)
    # The fits are independent: any pairing of their samples will do.
    drawn = [{name: np.resize(v, (max(count, 1), 1)) for name, v in samples_of(fit).items()} for fit in fits]
    sampled, _ = _roots(laws, drawn, variable, between, held) if count else ([], np.empty(0))
    if sign[0] == 0:
        warnings.append("identical: the laws agree everywhere between the ends")
    found = roots[0]
    samples = np.full((len(sampled), len(found)), np.nan)
    for row, values in enumerate(sampled):
        for value in values:
            if len(found):
                samples[row, np.argmin(np.abs(np.log(value / found)))] = value
    numbers = np.array([len(values) for values in sampled], dtype=np.int64)
    shares = {int(k): float((numbers == k).mean()) for k in np.unique(numbers)}
    if shares.get(len(found), 1.0) < 0.9:
        text = ", ".join(f"{share:.0%} have {k}" for k, share in shares.items())
        warnings.append(f"crossing_uncertain: {len(found)} meetings at the optimum, but of the samples {text}")
    return Crossover(
        variable=variable,
        at=interval(found, samples, fits[0].confidence) if len(found) else _nothing(fits[0].confidence),
        better_before={-1: 1, 0: 0, 1: 2}[int(sign[0])],
        num_roots=shares,
        warnings=tuple(warnings),
    )


def _nothing(confidence: float) -> Interval:
    none = np.empty(0)
    return Interval(value=none, low=none, high=none, confidence=confidence, samples=np.empty((0, 0)))


def _roots(
    laws: tuple[Law, Law],
    parameters: list[dict[str, Array]],
    variable: str,
    between: tuple[float, float],
    held: Mapping[str, float],
) -> tuple[list[Array], Array]:
    """Return the roots of every row in rising order, and the sign (batch,) of the difference at the low end."""

    def difference(log_x: Array, p: list[dict[str, Any]]) -> Array:
        x = {variable: np.exp(log_x)} | dict(held)
        return np.asarray(laws[0].predict(x, p[0]) - laws[1].predict(x, p[1]))

    grid = np.linspace(np.log(between[0]), np.log(between[1]), _GRID)
    value = difference(grid[None], parameters)
    sign = np.sign(value)
    # A meeting on a grid point counts with the cell before it, once.
    row, cell = np.nonzero((sign[:, :-1] * sign[:, 1:] < 0) | ((sign[:, 1:] == 0) & (sign[:, :-1] != 0)))
    low, high = grid[cell][:, None], grid[cell + 1][:, None]
    local = [{name: v[row] for name, v in p.items()} for p in parameters]
    left = sign[row, cell][:, None]
    for _ in range(_BISECTIONS if len(row) else 0):
        middle = (low + high) / 2
        same = np.sign(difference(middle, local)) == left
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    at = np.exp((low + high) / 2)[:, 0]
    first = np.argmax(sign != 0, axis=1)
    return [at[row == k] for k in range(len(value))], sign[np.arange(len(sign)), first]
