"""Laws against each other on the same data: AICc, and paired errors on runs that the fits have not seen.

A law with more parameters always describes the fitted points better. AICc charges for them; errors out of sample need
no such theory, and are paired: both laws forecast the same run.

References:
    Hurvich and Tsai 1989 (AICc).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.trust.holdout import leave_groups_out

Array: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One law in a comparison.

    Attributes:
        law: its name.
        num_parameters: fitted.
        aicc: of the least-squares fit; only differences mean anything.
        mean_error: mean absolute relative error on runs left out, one run at a time.
        difference: mean over runs of this law's absolute error minus that of the first in the list.
        standard_error: of the difference, over runs.
        wins: runs on which this law errs less than the first.
        num_runs: runs compared.
    """

    law: str
    num_parameters: int
    aicc: float
    mean_error: float
    difference: float
    standard_error: float
    wins: int
    num_runs: int


def compare(laws: Sequence[Law], data: Any, *, objective: Objective | None = None) -> list[Candidate]:
    """Return candidates, the best out of sample first; differences and wins are against that one.

    Args:
        laws: two or more of the same response and space.
        data: points or curves that all of them can be fitted to.
        objective: of the fits out of sample; AICc needs a likelihood and always takes least squares.

    Raises:
        UserError: fewer than two laws, or laws of different responses or spaces.
    """
    if len(laws) < 2:
        raise UserError(f"laws must be at least two to compare, got {len(laws)}; add a candidate")
    if len({(law.response.name, law.space) for law in laws}) > 1:
        raise UserError("laws must predict the same response with the same residuals; compare their held-out errors")
    run = np.asarray(data.run)
    num_runs = int(run.max()) + 1
    by_run: dict[str, Array] = {}
    for law in laws:
        errors = np.abs(leave_groups_out(law, data, objective=objective).errors)
        by_run[law.name] = np.bincount(run, errors, num_runs) / np.bincount(run, minlength=num_runs)
    order = sorted(laws, key=lambda law: float(by_run[law.name].mean()))
    first = by_run[order[0].name]
    found = []
    for law in order:
        each = by_run[law.name]
        apart = each - first
        found.append(
            Candidate(
                law=law.name,
                num_parameters=law.num_fitted(),
                aicc=_aicc(law, data),
                mean_error=float(each.mean()),
                difference=float(apart.mean()),
                standard_error=float(apart.std(ddof=1) / math.sqrt(num_runs)) if num_runs > 1 else math.nan,
                wins=int((apart < 0).sum()),
                num_runs=num_runs,
            )
        )
    return found


def _aicc(law: Law, data: Any) -> float:
    """Return n log(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1), k with the variance; inf where n is too small."""
    solution, _ = solve(law, data, objective=Objective("least_squares"))
    n, k = len(solution.y), law.num_fitted() + 1
    if n - k - 1 <= 0:
        return math.inf
    rss = max(float((solution.residual**2).sum()), 1e-300)
    return n * math.log(rss / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def objective_table(law: Law, data: Any, *, delta: float = 1e-3, **options: Any) -> dict[str, dict[str, float]]:
    """Return the parameters under each objective: how far the rows differ is how much of a result is a choice.

    Args:
        law: the law.
        data: points or curves.
        delta: threshold of huber.
        **options: fix and penalty of :func:`landscape_ray.laws.core.fit.solve`.
    """
    rows: dict[str, dict[str, float]] = {}
    for objective in (Objective("huber", delta), Objective("least_absolute"), Objective("least_squares")):
        solution, _ = solve(law, data, objective=objective, **options)
        values = solution.natural(solution.best)
        rows[objective.name] = {p.name: float(values[p.name][0]) for p in law.parameters}
    return rows


def residual_trends(law: Law, points: Any, residual: Array) -> Mapping[str, tuple[float, float]]:
    """Return slope and t of the residuals over the logarithm of every variable, points of a run counted as one.

    A law that fits has none; |t| > 2 says that its form bends another way than the data.

    Args:
        law: the law.
        points: a table.
        residual: (n,) of the fit.
    """
    run = np.asarray(points.run)
    num_runs = int(run.max()) + 1
    found = {}
    columns = {
        v.name: np.log(np.asarray(points.variables[v.name]))
        for v in law.variables
        if v.positive and v.name in points.variables
    }
    if "N" in columns and "D" in columns:
        columns["D/N"] = columns["D"] - columns["N"]
    for name, column in columns.items():
        x = column - column.mean()
        if not (x**2).sum() > 0:
            continue
        slope = float(x @ residual / (x @ x))
        score = np.bincount(run, x * (residual - residual.mean() - slope * x), num_runs)
        error = math.sqrt(float((score**2).sum()) * num_runs / max(num_runs - 1, 1)) / float(x @ x)
        found[name] = (slope, slope / error if error > 0 else 0.0)
    return found


def seed_noise(law: Law, points: Any) -> tuple[float, int] | None:
    """Return the relative spread between points that agree in every variable, and how many repeat another one.

    None where no point is repeated: the floor under any law's error is then not known.
    """
    table = np.column_stack([np.asarray(points.variables[v.name]) for v in law.variables])
    _, group = np.unique(table, axis=0, return_inverse=True)
    group = group.reshape(-1)
    log = np.log(np.asarray(points.response))
    count = np.bincount(group)
    mean = np.bincount(group, log) / count
    degrees = int((count - 1).sum())
    if not degrees:
        return None
    return math.sqrt(float(((log - mean[group]) ** 2).sum()) / degrees), degrees
