"""The multi-power law: what every change of the learning rate does to the loss, and how fast.

    L(t) = L0 + A S(t)^-alpha - B sum_k (eta_{k-1} - eta_k) G_k(t)
    G_k(t) = 1 - (1 + C (eta_k / eta_max)^-gamma S_k(t) / eta_max)^-beta

Legend: L loss (nats per token) after t updates; eta_k learning rate of update k, eta_max the peak; S(t) its sum, the
warm-up counted as it was; S_k(t) its sum since update k, that included; L0, A, alpha, B, C, beta, gamma fitted.

The sum runs over the changes after the warm-up, as the paper writes it. The authors' program counts the rises of the
warm-up too, which moves L0 by about B times the peak, and bends the curves of constant rate where beta is small: that
is the law of a curve whose `warmup_steps` is 0, and what their published parameters are for. Rates in G count in units
of the peak, so that 1 / C is a number of updates whatever the peak: the paper's C is C eta_max^(gamma - 1).

Three curves do not determine (B, C, beta, gamma): very different values fit them alike and predict other schedules
differently. :func:`landscape_ray.laws.memory.regularised.fit_multi_power` is the fit to use.

References:
    Luo, Wen, Hu, Sun, Liu, Sun, Lyu and Chen 2025, arXiv 2503.12811.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.laws.core.law import Law, Review, Variable, linear, nonlinear
from landscape_ray.laws.curves.curve import Curve
from landscape_ray.laws.curves.curve_set import CurveSet
from landscape_ray.laws.memory.lumps import Lumps, lump

Array: TypeAlias = NDArray[np.float64]

_LOWEST = 1e-60
"""A rate of zero counts as this many times the peak: its power must stay finite."""


def changes(lr: Array, warmup_steps: int, step: NDArray[np.int64]) -> Lumps:
    """Return the changes of the rate before each of the points: drop, log of the new rate, and area since.

    The latter two are in units of the peak.

    Args:
        lr: (S,) learning rate.
        warmup_steps: updates whose rises do not count.
        step: (k,) completed updates.
    """
    drop = -np.diff(lr, prepend=lr[0])
    if warmup_steps:
        drop[: warmup_steps + 1] = 0.0
    peak = lr.max()
    log_rate = np.log(np.maximum(lr / peak, _LOWEST))
    area = np.cumsum(lr) / peak
    return lump(drop, log_rate, np.append(0.0, area[:-1]), step, area[step - 1])


def prepare_changes(data: CurveSet, grid_values: Mapping[str, float]) -> dict[str, Any]:
    """Return log S and the changes at the points."""
    del grid_values
    return {
        "log_S": np.log(data.at_points([np.cumsum(curve.lr) for curve, _ in data.fitted])),
        "drops": Lumps.join([_kept_changes(curve, step) for curve, step in data.fitted]),
    }


def _kept_changes(curve: Curve, step: NDArray[np.int64]) -> Lumps:
    key = ("changes", step.tobytes())
    if key not in curve.memo:
        curve.memo[key] = changes(curve.lr, curve.warmup_steps, step)
    found: Lumps = curve.memo[key]
    return found


def _columns(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Any, ...]:
    drops = x["drops"]
    grown = np.log1p(p["C"] * np.exp(-p["gamma"] * drops.q) * drops.age)
    return 1.0, np.exp(-p["alpha"] * x["log_S"]), -drops.sum(1 - np.exp(-p["beta"] * grown))


def _slopes(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    drops = x["drops"]
    reach = p["C"] * np.exp(-p["gamma"] * drops.q) * drops.age
    grown = np.log1p(reach)
    left = np.exp(-p["beta"] * grown)
    by_reach = p["beta"] * left * (reach / (1 + reach))  # d G / d log x
    return (
        {},
        {"alpha": -x["log_S"] * np.exp(-p["alpha"] * x["log_S"])},
        {
            "C": -drops.sum(by_reach) / p["C"],
            "beta": -drops.sum(left * grown),
            "gamma": drops.sum(by_reach * drops.q),
        },
    )


def _review(data: CurveSet, x: Mapping[str, Any], parameters: Mapping[str, float]) -> Review:
    del parameters
    decays = any((np.diff(curve.lr[: step[-1]]) < 0).any() for curve, step in data.fitted)
    missing = ("B", "C", "beta", "gamma")
    warning = "B_not_identified: no fitted loss comes after a decay, so what a decay does is a convention, not a result"
    reasons = (*(("one_schedule",) if data.one_schedule else ()), *(() if decays else ("B_not_identified",)))
    area = np.exp(x["log_S"])
    return Review(
        warnings=() if decays else (warning,),
        reasons=reasons,
        unidentified=() if decays else missing,
        data={"s1_range": [float(area.min()), float(area.max())], "decay_identified": decays},
    )


MULTI_POWER = Law(
    name="multi_power",
    of="curves",
    title="loss curve by the learning-rate schedule, multi-power form",
    formula="L(t) = L0 + A S(t)^-alpha - B sum_k (eta_{k-1} - eta_k) (1 - (1 + C r_k^-gamma S_k(t) / eta_max)^-beta)",
    reference="Luo et al. 2025, arXiv 2503.12811",
    variables=(
        Variable("S", "", "sum of the learning rate"),
        Variable("r_k", "", "rates of all updates so far over the peak"),
    ),
    parameters=(
        linear("L0", "loss that no training at the peak removes"),
        linear("A", "factor of the forward area"),
        nonlinear("alpha", "exponent of the forward area", 0.01, 5.0, starts=(0.3, 0.6)),
        linear("B", "gain by annealing"),
        nonlinear("C", "how fast annealing is felt, per update at the peak", 1e-5, 10.0, log=True, starts=(0.01, 0.1)),
        nonlinear("beta", "exponent of the time since a change", 0.02, 5.0, log=True, starts=(0.3, 1.0)),
        nonlinear("gamma", "exponent of the rate after a change", 0.0, 1.5, starts=(0.3, 0.8)),
    ),
    columns=_columns,
    slopes=_slopes,
    prepare=prepare_changes,
    review=_review,
    assumptions=("all runs share one peak learning rate, model, data and batch",),
)
