"""Whether a fit is an optimum, and whether the data determine it: what is recorded, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from landscape_ray.laws.core.fitting import Optimum
from landscape_ray.laws.core.result import Status

SAME_OPTIMUM = 1e-6
"""Starts whose objectives differ by less than this, relative, have found the same optimum."""

MIN_AGREEMENT = 0.5
"""Smallest share of the starts that have to find the best optimum."""

MAX_RELATIVE_GRADIENT = 1e-4
"""Largest d objective / d log parameter, over the objective, at an optimum."""

MAX_CONDITION = 1e4
"""Largest condition number of the scaled Jacobian of parameters that the data tell apart."""

MIN_POINTS_PER_PARAMETER = 3
MAX_RELATIVE_WIDTH = 1.0
"""Largest width of an interval over the value of its parameter."""


def certify(found: Optimum, names: Sequence[str], num_points: int, num_parameters: int) -> dict[str, Any]:
    """Return the record of how an optimum was found.

    Args:
        found: where all starts ended, the best first.
        names: of the parameters of `found`.
        num_points: points fitted.
        num_parameters: parameters fitted, those chosen from a grid included.
    """
    best = found.objective[0]
    return {
        "num_starts": len(found.objective),
        "agree_share": float((found.objective <= best * (1 + SAME_OPTIMUM) + 1e-24).mean()),
        "gradient_norm": float(np.abs(found.gradient[0]).max()),
        "condition_number": float(found.condition[0]),
        "bounds_hit": [name for name, hit in zip(names, found.at_bound[0], strict=True) if hit],
        "num_parameters": num_parameters,
        "points_per_parameter": num_points / num_parameters,
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
    }


def judge(
    parameters: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    objective: float,
    certificate: Mapping[str, Any],
    identified: Sequence[str],
) -> tuple[Status, tuple[str, ...]]:
    """Return the status of a fit and the reasons why it is not certified.

    Args:
        parameters: fitted values.
        intervals: of the parameters, if there are any.
        objective: value at the optimum.
        certificate: result of :func:`certify`.
        identified: parameters that the data say something about; the others are not judged.
    """
    if not certificate["gradient_norm"] <= MAX_RELATIVE_GRADIENT * objective + 1e-12:  # nan fails too
        return "failed", (f"the search did not reach an optimum (gradient norm {certificate['gradient_norm']:.1e})",)
    reasons = []
    if certificate["agree_share"] < MIN_AGREEMENT:
        reasons.append(f"only {certificate['agree_share']:.0%} of the starts agree on the optimum")
    if certificate["condition_number"] > MAX_CONDITION:
        reasons.append(f"the parameters are nearly collinear (condition number {certificate['condition_number']:.1e})")
    at_bound = [name for name in certificate["bounds_hit"] if name in identified]
    if at_bound:
        reasons.append(f"at a bound: {', '.join(at_bound)}")
    if certificate["points_per_parameter"] < MIN_POINTS_PER_PARAMETER:
        reasons.append(f"{certificate['points_per_parameter']:.1f} points per parameter, fewer than 3")
    wide = [n for n, (low, high) in intervals.items() if high - low > MAX_RELATIVE_WIDTH * abs(parameters[n])]
    if wide:
        reasons.append(f"intervals wider than the value: {', '.join(wide)}")
    return ("weak" if reasons else "certified"), tuple(reasons)
