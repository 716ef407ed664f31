"""One call fits any law: search, certificate, bootstrap, and a result that says how far it can be trusted."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.bootstrap import Method, resample
from landscape_ray.laws.core.bound import Bound
from landscape_ray.laws.core.certificate import SAME_OPTIMUM, certify, judge
from landscape_ray.laws.core.fitting import Optimum, descend, search
from landscape_ray.laws.core.law import Law, Review
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Data
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.core.separable import SeparableLaw

Array: TypeAlias = NDArray[np.float64]

Penalty: TypeAlias = Mapping[str, tuple[float, float]]


_MANY_POINTS = 2000
_FEW_STARTS = 4
_SEARCHED_POINTS = 500
"""With more points than the first and more starts than the second, a search begins on so many of the points."""


class Solution(NamedTuple):
    """A law at its data and its optimum, for whatever looks closer: bootstrap, profile, validation."""

    law: Law
    data: Data
    grid_values: dict[str, float]
    bound: Bound
    separable: SeparableLaw
    y: Array
    """(n,) what was fitted: the response, or its link."""
    found: Optimum
    """Where all searches ended, the best first."""
    objective: Objective

    @property
    def best(self) -> Array:
        """The fitter's parameters (1, m + k) at the optimum."""
        return self.found.parameters[:1]

    @property
    def residual(self) -> Array:
        """(n,) of the logarithm or raw, at the optimum."""
        prediction = self.separable.predict(self.best)[0]
        return np.asarray(np.log(self.y) - np.log(prediction) if self.law.space == "log" else self.y - prediction)

    @property
    def weights(self) -> Array:
        """(n,) weight of every point."""
        return np.ones_like(self.y) if self.data.weights is None else np.asarray(self.data.weights)

    def refit(self, weights: Array, y: Array | None = None) -> Optimum:
        """Return the optima under other weights (batch, n), or other observations too, from this one."""
        observed = np.broadcast_to(self.y if y is None else y, weights.shape)
        start = np.broadcast_to(self.best, (len(weights), self.best.shape[1]))
        return descend(self.separable, observed, weights, self.objective.threshold, start, near=True)

    def natural(self, parameters: Array) -> dict[str, Array]:
        """Return the fitter's parameters (batch, m + k) by name in natural units."""
        values = self.bound.natural(parameters)
        return values | {name: np.full(len(parameters), value) for name, value in self.grid_values.items()}


def solve(
    law: Law,
    data: Data,
    *,
    objective: Objective | None = None,
    fix: Mapping[str, float] | None = None,
    penalty: Penalty | None = None,
) -> tuple[Solution, dict[str, float]]:
    """Return the optimum of a law on data, and the objective of every combination of grid values.

    Args:
        law: the law.
        data: what it is fitted to.
        objective: what is minimised; default Huber with the threshold 1e-3.
        fix: values of parameters that are given, not fitted.
        penalty: (centre, stiffness) by name of a non-linear parameter: stiffness / 2 * (coordinate - centre)^2 is
            added, the coordinate being the logarithm for a parameter that is searched by it.

    Raises:
        UserError: data that the law cannot be fitted to, too few points, or an unknown or impossible fixed value.
    """
    objective = objective or Objective()
    fix = dict(fix or {})
    for name, value in fix.items():
        parameter = law.parameter(name)
        if not parameter.allows(value):
            bounds = "positive" if parameter.scale else f"in [{parameter.lower:g}, {parameter.upper:g}]"
            raise UserError(f"{name} must be {bounds}, got {value:g}; change it")
    law = law.with_grid({name: value for name, value in fix.items() if name in law.grid_names})
    count = law.num_fitted(fix)
    y = np.asarray(data.response, dtype=np.float64)
    if len(y) <= count:
        raise UserError(
            f"law '{law.name}' fits {count} parameters and needs more points than that, got {len(y)}; add runs, "
            "or fix parameters"
        )
    if law.link is not None:
        y = np.asarray(law.link(y), dtype=np.float64)
        if not np.isfinite(y).all():
            raise UserError(f"{law.response.name} must be in the range of law '{law.name}', got a value outside it")
    axes = [law.parameter(name).values for name in law.grid_names]
    candidates: list[tuple[float, Solution]] = []
    objectives: dict[str, float] = {}
    for values in itertools.product(*axes):
        grid_values = dict(zip(law.grid_names, values, strict=True))
        held = {name: value for name, value in fix.items() if name not in law.grid_names}
        bound = _bind(law, data, grid_values, held)
        separable = bound.separable(penalty)
        if len(y) > _MANY_POINTS and len(separable.starts) > _FEW_STARTS:
            found = _search_on_some(bound, separable, data, y, grid_values, held, penalty, objective.threshold)
        else:
            found = search(separable, y, objective.threshold, _weights_of(data))
        solution = Solution(law, data, grid_values, bound, separable, y, found, objective)
        candidates.append((float(found.objective[0]), solution))
        objectives[", ".join(repr(value) for value in values)] = float(found.objective[0])
    return min(candidates, key=lambda candidate: candidate[0])[1], objectives


def _bind(law: Law, data: Data, grid_values: Mapping[str, float], held: Mapping[str, float]) -> Bound:
    x = law.prepare(data, grid_values) if law.prepare else {k: np.asarray(v) for k, v in data.variables.items()}  # type: ignore[attr-defined]
    return Bound(law, x, len(np.asarray(data.response)), held)


def _weights_of(data: Data) -> Array | None:
    return None if data.weights is None else np.asarray(data.weights)


def _search_on_some(
    bound: Bound,
    separable: SeparableLaw,
    data: Data,
    y: Array,
    grid_values: Mapping[str, float],
    held: Mapping[str, float],
    penalty: Penalty | None,
    threshold: float,
) -> Optimum:
    """Return where searches from all starts ended, as :func:`search` does, for data of many points.

    All starts are searched on some of the points. Those that end at one place there go on from it together, on all of
    the points: what is found is an optimum of all points, and a start counts where it arrived.
    """
    law = bound.law
    some = data.thinned(_SEARCHED_POINTS)
    some_y = np.asarray(some.response, dtype=np.float64)
    if law.link is not None:
        some_y = np.asarray(law.link(some_y), dtype=np.float64)
    few = _bind(law, some, grid_values, held)
    each = np.ones(len(some_y)) if some.weights is None else np.asarray(some.weights)
    # Weighted up, so that a penalty keeps its proportion to the misfit.
    ends = search(few.separable(penalty), some_y, threshold, each * (len(y) / len(some_y)))
    ends = ends.rows(np.isfinite(ends.objective))
    group = np.zeros(len(ends.objective), dtype=np.int64)
    group[1:] = np.cumsum(np.diff(ends.objective) > SAME_OPTIMUM * ends.objective[:-1])
    first = np.searchsorted(group, np.arange(group[-1] + 1))
    natural = few.natural(ends.parameters[first])
    exponents = bound.coordinates({p.name: natural[p.name] for p in bound.inner})
    exponents = np.clip(exponents, separable.lower, separable.upper)
    observed, weight = (
        np.broadcast_to(a, (len(first), len(y))) for a in (y, np.ones_like(y) if data.weights is None else data.weights)
    )
    start = np.concatenate([separable.project(exponents, observed, weight), exponents], axis=1)
    found = descend(separable, observed, weight, threshold, start).rows(group)
    return found.rows(np.argsort(found.objective, kind="stable"))


def fit(
    law: Law,
    data: Data,
    *,
    objective: Objective | None = None,
    fix: Mapping[str, float] | None = None,
    penalty: Penalty | None = None,
    num_bootstrap: int = 200,
    resampling: Method = "auto",
    confidence: float = 0.9,
    seed: int = 0,
    draws: Array | None = None,
) -> FitResult:
    """Return a law fitted to data, with intervals, certificate, status and warnings.

    Args:
        law: the law.
        data: what it is fitted to.
        objective: see :func:`solve`.
        fix: see :func:`solve`.
        penalty: see :func:`solve`.
        num_bootstrap: number of bootstrap samples, 0 for none. They resample runs, never single points of a run.
        resampling: how, see :func:`landscape_ray.laws.core.bootstrap.resample`.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.
        draws: (num_bootstrap, n) of the response, where what is fitted are estimates with an uncertainty of their own;
            every bootstrap sample then takes one of them too. None for measured values.

    Raises:
        UserError: see :func:`solve`; or an option out of range.

    >>> from landscape_ray.laws.core.law import Variable, linear, nonlinear
    >>> from landscape_ray.laws.core.points import Points
    >>> power = Law(
    ...     name="power",
    ...     formula="L = E + A N^-alpha",
    ...     variables=(Variable("N"),),
    ...     parameters=(linear("E"), linear("A"), nonlinear("alpha", "exponent", 0.01, 3)),
    ...     columns=lambda x, p: (1.0, x["N"] ** -p["alpha"]),
    ... )
    >>> size = np.geomspace(1e6, 1e10, 9)
    >>> found = fit(power, Points({"N": size}, 1.7 + 400 * size**-0.34), num_bootstrap=0)
    >>> {name: round(value, 6) for name, value in found.parameters.items()}
    {'E': 1.7, 'A': 400.0, 'alpha': 0.34}
    """
    started = time.perf_counter()
    check_options(num_bootstrap, confidence)
    warnings = list(data.check(law))
    solution, objectives = solve(law, data, objective=objective, fix=fix, penalty=penalty)
    law = solution.law
    fix = dict(fix or {})
    count = law.num_fitted(fix)
    names = law.fitted_names
    best = {name: float(value[0]) for name, value in solution.natural(solution.best).items()}
    value = float(solution.found.objective[0])
    review = law.review(data, solution.bound.x, best) if law.review else Review()
    samples, terms, bootstrap = _bootstrap(solution, count, num_bootstrap, resampling, seed, draws)
    identified = [name for name in names if name not in review.unidentified and name not in fix]
    tail = (1 - confidence) / 2
    intervals = {
        name: (float(np.quantile(samples[:, i], tail)), float(np.quantile(samples[:, i], 1 - tail)))
        for i, name in enumerate(names)
        if name in identified and len(samples)
    }
    # A factor trades off with its exponent over orders of magnitude: it is judged by the size of its term in the middle
    # of the data, which is what the fitter's coefficient is.
    judged = {
        name: (float(np.quantile(terms[:, i], tail)), float(np.quantile(terms[:, i], 1 - tail)))
        for i, name in enumerate(solution.bound.names)
        if name in identified and len(samples)
    }
    sizes = {name: float(solution.best[0, i]) for i, name in enumerate(solution.bound.names)}
    fitter_names = (*solution.bound.names, *law.nonlinear_names)
    certificate = certify(solution.found, fitter_names, len(solution.y), count) | {
        "bootstrap": bootstrap,
        "seconds": time.perf_counter() - started,
    }
    if law.grid_names:
        certificate[f"{'_'.join(law.grid_names)}_objectives"] = objectives
        warnings += _grid_warnings(solution)
    warnings += review.warnings
    # Of a parameter that may as well be negative, a width relative to its value says nothing.
    signed = {p.name for p in law.parameters if p.lower < 0 < p.upper}
    widths = {name: ends for name, ends in (intervals | judged).items() if name not in signed}
    status, reasons = judge(best | sizes, widths, value, certificate, identified)
    reasons += review.reasons
    status = "weak" if reasons and status == "certified" else status
    derived, derived_intervals = _derived(law, best, dict(zip(names, samples.T, strict=True)), tail)
    chosen = solution.objective
    return FitResult(
        law=law.name,
        parameters={p.name: best[p.name] for p in law.parameters},
        intervals=intervals,
        confidence=confidence,
        objective={
            "name": chosen.name,
            "of": f"{_scale(law)}{law.response.name}",
            "reduction": "sum",
            "huber_delta": chosen.delta if chosen.name == "huber" else None,
            "value": chosen.value(value),
            "unit": law.response.unit,
        },
        status=status,
        reasons=reasons,
        warnings=tuple(warnings),
        certificate=certificate,
        residuals=_residual_summary(solution, best, count),
        data={**data.summary(), **review.data},
        sample_names=names,
        samples=samples,
        fixed=fix,
        penalty=dict(penalty or {}),
        derived=derived,
        derived_intervals=derived_intervals,
    )


def _derived(
    law: Law, best: Mapping[str, float], samples: Mapping[str, Array], tail: float
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the law's derived numbers and their intervals; what is not finite is left out."""
    if law.derived is None:
        return {}, {}
    with np.errstate(all="ignore"):
        values = {name: float(value) for name, value in law.derived(best).items()}
        given = {name: best[name] for name in best if name not in samples}
        drawn = law.derived({**given, **samples}) if len(next(iter(samples.values()))) else {}
        ends = {name: np.quantile(np.asarray(value), [tail, 1 - tail]) for name, value in drawn.items()}
    return (
        {name: value for name, value in values.items() if np.isfinite(value)},
        {name: (float(low), float(high)) for name, (low, high) in ends.items() if np.isfinite([low, high]).all()},
    )


def check_options(num_bootstrap: int, confidence: float) -> None:
    """Raise for options out of range.

    Raises:
        UserError: names the option.
    """
    if num_bootstrap < 0:
        raise UserError(f"num_bootstrap must be >= 0, got {num_bootstrap}; 0 switches the intervals off")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be in (0, 1), got {confidence}; .9 is usual")


def _grid_warnings(solution: Solution) -> list[str]:
    warnings = []
    for name, chosen in solution.grid_values.items():
        values = solution.law.parameter(name).values
        if len(values) > 1:
            warnings.append(
                f"{name}_selected: {name} was chosen by the objective; the intervals are for the chosen value"
            )
            if chosen in (min(values), max(values)):
                warnings.append(
                    f"{name}_at_edge: the chosen {name} {chosen:g} is at the edge of the grid; widen the grid"
                )
    return warnings


def _bootstrap(
    solution: Solution, count: int, num_bootstrap: int, resampling: Method, seed: int, draws: Array | None
) -> tuple[Array, Array, dict[str, Any]]:
    """Return parameters (num_bootstrap, p) of the samples, polished from the optimum, those of the fitter, and how."""
    names = solution.law.fitted_names
    if not num_bootstrap or not np.isfinite(solution.found.objective[0]):
        return np.empty((0, len(names))), np.empty((0, solution.best.shape[1])), {"method": "none"}
    log = solution.law.space == "log"
    weights, y, method = resample(
        solution.y, solution.residual, solution.data.run, count, num_bootstrap, seed, method=resampling, log=log
    )
    if draws is not None:
        if draws.shape != y.shape:
            raise UserError(f"draws must have shape {y.shape}, got {draws.shape}; one row a bootstrap sample")
        drawn = draws if solution.law.link is None else np.asarray(solution.law.link(draws))
        moved = y * drawn / solution.y if log else y + drawn - solution.y
        y, method = np.asarray(moved), method | {"draws": True}
    if log and not (y > 0).all():
        raise UserError("the bootstrap must draw positive observations, got some <= 0; use least squares in raw space")
    found = solution.refit(weights * solution.weights, y)
    values = solution.natural(found.parameters)
    samples = np.stack([values[name] for name in names], axis=1)
    return samples, found.parameters, {**method, "num_samples": num_bootstrap, "seed": seed}


def _residual_summary(solution: Solution, best: Mapping[str, float], count: int) -> dict[str, Any]:
    response = np.asarray(solution.data.response, dtype=np.float64)
    prediction = np.broadcast_to(solution.law.predict(solution.bound.x, best), response.shape)
    error = response - prediction
    spread = float(((response - response.mean()) ** 2).sum())
    inflation = math.sqrt(len(response) / (len(response) - count))
    return {
        "rmse": float(np.sqrt((error**2).mean())),
        "max_abs": float(np.abs(error).max()),
        "r2": 1.0 - float((error**2).sum()) / spread if spread > 0 else 0.0,
        "quantiles": (inflation * np.quantile(solution.residual, np.linspace(0, 1, 41))).tolist(),
    }


def _scale(law: Law) -> str:
    """Return on what scale of the response residuals are taken, in words."""
    link = "" if law.link is None else "log " if law.link is np.log else "link of "
    return ("log " if law.space == "log" else "") + link
