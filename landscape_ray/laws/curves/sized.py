"""The momentum annealing law across model sizes.

    L(s, N) = L0 + A S1(s)^-alpha + B N^-beta - C N^gamma S2(s)

Legend: as in :mod:`landscape_ray.laws.curves.annealing`; N parameters of the model. Larger models gain more by
annealing (gamma > 0). All sizes share one peak learning rate; where each has its own, fit them one by one.

References:
    Tissue, Wang and Wang 2024, arXiv 2408.11029.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.laws.core.law import Law, Review, Variable, grid, linear, nonlinear
from landscape_ray.laws.curves.annealing import prepare_areas, review_areas
from landscape_ray.laws.curves.curve_set import CurveSet

Array: TypeAlias = NDArray[np.float64]


def _prepare(data: CurveSet, grid_values: Mapping[str, float]) -> dict[str, Array]:
    sizes = [np.full(len(curve.lr), curve.num_params, dtype=np.float64) for curve, _ in data.fitted]
    return {**prepare_areas(data, grid_values), "N": data.at_points(sizes)}


def _columns(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Any, ...]:
    size = np.log(x["N"])
    return 1.0, np.exp(-p["alpha"] * np.log(x["S1"])), np.exp(-p["beta"] * size), -np.exp(p["gamma"] * size) * x["S2"]


def _slopes(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    _, forward, model, annealing = _columns(x, p)
    size = np.log(x["N"])
    return {}, {"alpha": -np.log(x["S1"]) * forward}, {"beta": -size * model}, {"gamma": size * annealing}


def _review(data: CurveSet, x: Mapping[str, Array], parameters: Mapping[str, float]) -> Review:
    found = review_areas(data, x, parameters)
    sizes = np.unique(x["N"])
    reasons, warnings = list(found.reasons), list(found.warnings)
    if len(sizes) < 3:
        reasons.append("few_sizes")
        warnings.append(f"few_sizes: {len(sizes)} model sizes do not determine L0, B and beta; run a third")
    unidentified = (*found.unidentified, *(("gamma",) if "C" in found.unidentified or len(sizes) < 2 else ()))
    unidentified += ("B", "beta", "L0") if len(sizes) < 3 else ()
    return Review(
        warnings=tuple(warnings),
        reasons=tuple(reasons),
        unidentified=unidentified,
        data={**found.data, "sizes": sizes.tolist()},
    )


ANNEALING_SIZED = Law(
    name="annealing_sized",
    of="curves",
    title="loss curve by the learning-rate schedule and the model size, momentum form",
    formula="L(s, N) = L0 + A S1(s)^-alpha + B N^-beta - C N^gamma S2(s)",
    reference="Tissue, Wang and Wang 2024, arXiv 2408.11029",
    variables=(
        Variable("S1", "", "sum of the learning rate"),
        Variable("S2", "", "annealing area", positive=False),
        Variable("N", "parameters", "model size", min_distinct=3),
    ),
    parameters=(
        linear("L0", "loss that neither training nor size removes"),
        linear("A", "factor of the forward area"),
        nonlinear("alpha", "exponent of the forward area", 0.01, 5.0, starts=(0.3, 0.7)),
        linear("B", "factor of the size"),
        nonlinear("beta", "exponent of the size", 0.01, 3.0, starts=(0.1, 0.4)),
        linear("C", "gain by annealing"),
        nonlinear("gamma", "exponent of the size in the gain by annealing", -1.0, 2.0, starts=(0.0, 0.3)),
        grid("decay", "how long annealing takes to be felt", (0.999,)),
    ),
    columns=_columns,
    slopes=_slopes,
    prepare=_prepare,
    review=_review,
    assumptions=(
        "all runs share one peak learning rate, data and batch",
        "the warm-up counts with the peak learning rate",
        "N is counted alike in all runs",
    ),
)
