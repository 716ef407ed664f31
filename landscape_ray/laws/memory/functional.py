"""The functional scaling law: signal learnt in intrinsic time, plus the noise that is not yet forgotten.

Of the laws here it is the only one that weighs the learning rate against the batch size.

    L = L0 + A t^-s + B sum_i (eta_i^2 / b_i) K(t - t_i),    K(u) = (1 + c u)^-delta

Legend: L loss (nats per token); eta_i learning rate of update i, b_i its batch size; t the sum of the learning rate so
far (intrinsic time), t_i that after update i; K how much of a noise is left after the time u; L0, A, s, B, c, delta
fitted. eta_i^2 / b_i is the noise eta / b of the stochastic differential equation over the time eta that an update
lasts. Under the theory s and delta follow from the spectrum of the task (delta = 2 - 1 / capacity exponent); here both
are fitted, and the part of the noise that falls with the loss itself is left out.

References:
    Li, Chen, Huang, Wang and Wu 2025, arXiv 2509.19189.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.laws.core.law import Law, Review, Variable, linear, nonlinear
from landscape_ray.laws.curves.curve_set import CurveSet
from landscape_ray.laws.memory.lumps import Lumps, lump

Array: TypeAlias = NDArray[np.float64]


def noises(lr: Array, batch_size: Array, step: NDArray[np.int64]) -> Lumps:
    """Return the noises before each of the points: eta^2 / b, and the intrinsic time since.

    Args:
        lr: (S,) learning rate.
        batch_size: (S,) of every update.
        step: (k,) completed updates.
    """
    time = np.cumsum(lr)
    return lump(lr**2 / batch_size, np.zeros(len(lr)), time, step, time[step - 1])


def _prepare(data: CurveSet, grid_values: Mapping[str, float]) -> dict[str, Any]:
    del grid_values
    parts = []
    for curve, step in data.fitted:
        batch = np.ones(len(curve.lr)) if curve.batch_size is None else curve.batch_size
        parts.append(noises(curve.lr, batch, step))
    return {
        "log_t": np.log(data.at_points([np.cumsum(curve.lr) for curve, _ in data.fitted])),
        "noises": Lumps.join(parts),
    }


def _columns(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Any, ...]:
    left = np.exp(-p["delta"] * np.log1p(p["c"] * x["noises"].age))
    return 1.0, np.exp(-p["s"] * x["log_t"]), x["noises"].sum(left)


def _slopes(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    reach = p["c"] * x["noises"].age
    grown = np.log1p(reach)
    left = np.exp(-p["delta"] * grown)
    return (
        {},
        {"s": -x["log_t"] * np.exp(-p["s"] * x["log_t"])},
        {
            "c": -x["noises"].sum(p["delta"] * left * reach / (1 + reach)) / p["c"],
            "delta": -x["noises"].sum(left * grown),
        },
    )


def _review(data: CurveSet, x: Mapping[str, Any], parameters: Mapping[str, float]) -> Review:
    del x, parameters
    noise = [
        curve.lr[: step[-1]] / (1.0 if curve.batch_size is None else curve.batch_size[: step[-1]])
        for curve, step in data.fitted
    ]
    after = [ratio[curve.warmup_steps :] for ratio, (curve, _) in zip(noise, data.fitted, strict=True)]
    varies = max(float(r.max()) for r in after) > 1.01 * min(float(r.min()) for r in after)
    warning = "noise_not_identified: eta / b never changes in the fitted runs, so what noise costs cannot be told"
    return Review(
        warnings=() if varies else (warning,),
        reasons=() if varies else ("noise_not_identified",),
        unidentified=() if varies else ("B", "c", "delta"),
        data={"decay_identified": varies},
    )


FUNCTIONAL = Law(
    name="functional",
    of="curves",
    title="loss curve by the schedules of learning rate and batch size, functional form",
    formula="L = L0 + A t^-s + B sum_i (eta_i^2 / b_i) (1 + c (t - t_i))^-delta",
    reference="Li et al. 2025, arXiv 2509.19189",
    variables=(
        Variable("eta", "", "learning rate of all updates so far"),
        Variable("b", "", "batch size of all updates so far"),
    ),
    parameters=(
        linear("L0", "loss that neither training nor a small rate removes"),
        linear("A", "factor of the signal that is left"),
        nonlinear("s", "exponent of the intrinsic time", 0.01, 5.0, starts=(0.3, 0.7)),
        linear("B", "factor of the noise"),
        nonlinear("c", "how fast a noise is forgotten", 1e-2, 1e6, log=True, starts=(10.0, 1e3)),
        nonlinear("delta", "exponent of forgetting", 0.05, 5.0, log=True, starts=(0.4, 1.2)),
    ),
    columns=_columns,
    slopes=_slopes,
    prepare=_prepare,
    review=_review,
    assumptions=("all runs share one model and one stream of data", "momentum and other settings are the same"),
)
