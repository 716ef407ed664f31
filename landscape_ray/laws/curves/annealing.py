"""The momentum annealing law: the whole loss curve of a run from its learning-rate schedule.

    L(s) = L0 + A S1(s)^-alpha - C S2(s)

Legend: L loss (nats per token) after s updates; S1 sum of the learning rate; S2 annealing area, how much the learning
rate has been lowered, felt with a delay set by lambda (`decay`, see `annealing_area`); L0, A, alpha, C fitted. In S1
and S2 the warm-up counts with the peak learning rate.

What the law is not: under it, a higher peak learning rate, a longer horizon or zero-rate steps at the end always look
better. It compares schedules of one peak inside the fitted range; :mod:`landscape_ray.laws.curves.prediction` says when
it is asked for more.

References:
    Tissue, Wang and Wang 2024, arXiv 2408.11029.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import Law, Review, Variable, grid, linear, nonlinear
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.curves.curve import Curve
from landscape_ray.laws.curves.curve_set import CurveSet

Array: TypeAlias = NDArray[np.float64]

_NUM_STARTS = 24


def prepare_areas(data: CurveSet, grid_values: Mapping[str, float]) -> dict[str, Array]:
    """Return S1 and S2 at the points."""
    curves = [curve for curve, _ in data.fitted]
    return {
        "S1": data.at_points([curve.s1() for curve in curves]),
        "S2": data.at_points([curve.s2(grid_values["decay"]) for curve in curves]),
    }


def review_areas(data: CurveSet, x: Mapping[str, Array], parameters: Mapping[str, float]) -> Review:
    """Return what the areas say of a fit: whether any loss comes after a decay, and the fitted ranges."""
    del parameters
    identified = bool((x["S2"] != 0).any())
    reasons = (*(("one_schedule",) if data.one_schedule else ()), *(() if identified else ("C_not_identified",)))
    unknown = "C_not_identified: no fitted loss comes after a decay, so C is a convention (0), not a result"
    return Review(
        warnings=() if identified else (unknown,),
        reasons=reasons,
        unidentified=() if identified else ("C",),
        data={
            "s1_range": [float(x["S1"].min()), float(x["S1"].max())],
            "s2_range": [float(x["S2"].min()), float(x["S2"].max())],
            "decay_identified": identified,
        },
    )


ANNEALING = Law(
    name="annealing",
    of="curves",
    title="loss curve by the learning-rate schedule, momentum form",
    formula="L(s) = L0 + A S1(s)^-alpha - C S2(s)",
    reference="Tissue, Wang and Wang 2024, arXiv 2408.11029",
    variables=(Variable("S1", "", "sum of the learning rate"), Variable("S2", "", "annealing area", positive=False)),
    parameters=(
        linear("L0", "loss that no training removes"),
        linear("A", "factor of the forward area"),
        nonlinear("alpha", "exponent of the forward area", 0.01, 5.0, starts=_NUM_STARTS),
        linear("C", "gain by annealing"),
        grid("decay", "how long annealing takes to be felt", (0.999,)),
    ),
    columns=lambda x, p: (1.0, np.exp(-p["alpha"] * np.log(x["S1"])), -x["S2"]),
    slopes=lambda x, p: ({}, {"alpha": -np.log(x["S1"]) * np.exp(-p["alpha"] * np.log(x["S1"]))}, {}),
    prepare=prepare_areas,
    review=review_areas,
    assumptions=(
        "all runs share one peak learning rate, model, data and batch",
        "the warm-up counts with the peak learning rate",
    ),
)


def fit_annealing(
    curves: Sequence[Curve],
    *,
    decay: float | Sequence[float] = 0.999,
    huber_delta: float = 1e-3,
    skip_steps: int = 0,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> FitResult:
    """Return the momentum annealing law fitted to loss curves of runs that share one peak learning rate.

    Minimises sum huber(log loss - log L) over L0, A, C >= 0 and alpha in [0.01, 5] from 24 starts. Intervals come from
    a bootstrap of runs (5 or more) or of residual blocks within runs (fewer), never of single points, and are for the
    chosen `decay`.

    Args:
        curves: at least one; two schedules or more are needed for a certified fit, one of them with a decay.
        decay: lambda in [0, 1), about 1 - 1 / (updates that the loss takes to respond to a lower rate); .99 to .999
            for runs of 10k updates and more, less for short ones. Of several values, the one with the smallest
            objective is kept, which counts as one more parameter.
        huber_delta: threshold on the log residual, > 0; inf for least squares.
        skip_steps: losses up to this step are not fitted, in addition to those in the warm-up: the law describes the
            course after the initial transient.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Returns:
        The fit with its intervals, certificate, status and warnings.

    Raises:
        UserError: no curves, two of one name, different peaks, too few points, or an option out of range.
    """
    decays = sorted({float(value) for value in np.atleast_1d(np.asarray(decay, dtype=np.float64))})
    if not decays or not all(0 <= value < 1 for value in decays):
        raise UserError(f"decay must hold values in [0, 1), got {decays}; .9 to .999 is usual")
    return fit(
        ANNEALING.with_grid({"decay": decays}),
        CurveSet(curves, skip_steps),
        objective=Objective.of("huber", huber_delta),
        num_bootstrap=num_bootstrap,
        confidence=confidence,
        seed=seed,
    )
