"""What to train for a budget, from a saved fit over N and D, and which run would make the answer surer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from landscape_ray.analysis.scaling import ScalingFit
from landscape_ray.errors import UserError
from landscape_ray.laws import Objective, Points
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.decisions import Allocation, Proposal, allocate, next_runs
from landscape_ray.laws.decisions.allocation import best_size
from landscape_ray.laws.decisions.next_run import grid_of

SHARES = (0.001, 0.01, 0.1)
"""Shares of the budget that the run to make next may cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to do with a budget.

    Attributes:
        allocation: size and tokens, with intervals and regret.
        flops_per_param_token: FLOPs of an update by parameter and token, as the fitted runs had them.
        seconds: how long it takes, None where the speed is not known.
        next_runs: the run that would narrow the interval of the size most within each of :data:`SHARES`.
    """

    allocation: Allocation
    flops_per_param_token: float
    seconds: float | None
    next_runs: tuple[Proposal, ...]


def recommend_size(
    found: ScalingFit,
    *,
    flops: float | None = None,
    seconds: float | None = None,
    flops_per_second: float | None = None,
    tokens: float | None = None,
    allow_extrapolation: bool = False,
) -> Recommendation:
    """Return what to train for a budget of compute, of time, or of data.

    Args:
        found: a fit of a law over N and D.
        flops: budget of training FLOPs; or
        seconds: budget of time; or
        tokens: tokens that there are.
        flops_per_second: training speed; None for the median of the fitted runs.
        allow_extrapolation: recommend also at more than 100 times the fitted range.

    Raises:
        UserError: no budget or several, time without a known speed, or see
            :func:`landscape_ray.laws.decisions.allocation.allocate`.
    """
    given = [name for name, value in (("flops", flops), ("hours", seconds), ("tokens", tokens)) if value is not None]
    if len(given) != 1:
        raise UserError(f"budget must be one of --flops, --hours and --tokens, got {' and '.join(given) or 'none'}")
    columns = {name: np.array(values) for name, values in found.points.items()}
    k = float(np.median(columns["C"] / (columns["N"] * columns["D"]))) if {"C", "N", "D"} <= columns.keys() else 6.0
    speed = flops_per_second
    if speed is None and {"C", "seconds"} <= columns.keys() and (columns["seconds"] > 0).all():
        speed = float(np.median(columns["C"] / columns["seconds"]))
    if seconds is not None:
        if speed is None:
            raise UserError("--hours needs --flops-per-second: the fitted runs do not tell how fast they were")
        flops = seconds * speed
    allocation = allocate(
        found.law,
        found.fit,
        flops=flops,
        tokens=tokens,
        flops_per_param_token=k,
        allow_extrapolation=allow_extrapolation,
    )
    return Recommendation(
        allocation=allocation,
        flops_per_param_token=k,
        seconds=allocation.flops / speed if speed else None,
        next_runs=tuple(_next(found, columns, allocation, k)),
    )


def _next(found: ScalingFit, columns: Mapping[str, Any], allocation: Allocation, k: float) -> list[Proposal]:
    """Return the best next runs, up to ten times the fitted range in N and D."""
    law, objective = found.law, found.fit.objective
    rest = {name: values for name, values in columns.items() if name != law.response.name}
    points = Points(rest, columns[law.response.name], found.run_ids)
    chosen = Objective.of(objective["name"], objective["huber_delta"] or math.inf)
    solution, _ = solve(law, points, objective=chosen, fix=found.fit.fixed)
    ranges = {n: (low, 10 * high) for n in ("N", "D") for low, high in [found.fit.data["ranges"][n]]}
    candidates = grid_of(ranges, 13)
    cost = k * candidates["N"] * candidates["D"]

    def log_size(parameters: Mapping[str, float]) -> float:
        one = {name: np.array([[value]]) for name, value in parameters.items()}
        return float(np.log(best_size(law, found.fit, one, allocation.flops, k)[0]))

    return next_runs(solution, log_size, candidates, cost, [share * allocation.flops for share in SHARES])
