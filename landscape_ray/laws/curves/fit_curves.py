"""Any law of loss curves fitted to runs, by one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import Penalty, fit
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.curves.annealing import ANNEALING, fit_annealing
from landscape_ray.laws.curves.curve import Curve
from landscape_ray.laws.curves.curve_set import CurveSet

LAD_DELTA = 1e-6
"""A Huber threshold so far below any residual of a loss curve that the fit is one of least absolute deviations."""


def fit_curves(
    law: Law,
    curves: Sequence[Curve],
    *,
    decay: float | Sequence[float] | None = None,
    huber_delta: float = 1e-3,
    skip_steps: int = 0,
    late_weight: float = 0.0,
    equal_runs: bool = False,
    count_once: bool = False,
    fix: Mapping[str, float] | None = None,
    penalty: Penalty | None = None,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> FitResult:
    """Return a law of loss curves fitted to runs.

    Args:
        law: one of loss curves.
        curves: the runs.
        decay: of laws that have this parameter, what is tried; see :func:`landscape_ray.laws.fit_annealing`.
        huber_delta: threshold on the log residual, > 0; inf for least squares.
        skip_steps: losses up to this step are not fitted, in addition to those in the warm-up.
        late_weight: points weigh like step ** late_weight: laws of power form are asymptotic, and what they miss in the
            beginning should not bend them later. 0 for equal weights.
        equal_runs: every run weighs the same, however many points it has.
        count_once: points that two runs share, because one branched off the other, count once.
        fix: values of parameters that are given, not fitted.
        penalty: (centre, stiffness) by name of a parameter, see :func:`landscape_ray.laws.core.fit.solve`.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: curves that the law cannot be fitted to, or an option out of range.
    """
    if law is ANNEALING and not (late_weight or equal_runs or count_once or fix or penalty):
        options = {} if decay is None else {"decay": decay}
        return fit_annealing(
            curves,
            huber_delta=huber_delta,
            skip_steps=skip_steps,
            num_bootstrap=num_bootstrap,
            confidence=confidence,
            seed=seed,
            **options,
        )
    if decay is not None:
        if "decay" not in law.grid_names:
            raise UserError(f"decay must be left out for law '{law.name}', which has none, got {decay}; remove it")
        law = law.with_grid({"decay": np.atleast_1d(np.asarray(decay, dtype=np.float64)).tolist()})
    return fit(
        law,
        CurveSet(curves, skip_steps, late_weight=late_weight, equal_runs=equal_runs, count_once=count_once),
        objective=Objective.of("huber", huber_delta),
        fix=fix,
        penalty=penalty,
        num_bootstrap=num_bootstrap,
        confidence=confidence,
        seed=seed,
    )
