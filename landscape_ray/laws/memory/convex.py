"""The bound of convex optimisation on the last iterate, which has the shape of loss curves under any schedule.

    Omega_T = R^2 / (2 sum_t eta_t)
              + sum_t eta_t^2 G_t^2 / (2 sum_t eta_t)
              + 1/2 sum_{k<T} eta_k / (sum_{t>k} eta_t) * (sum_{t>=k} eta_t^2 G_t^2) / (sum_{t>=k} eta_t)

Legend: eta_t learning rate of update t = 1 ... T, G_t bound on the norm of its gradient, R distance from the start to
the optimum. For eta = gamma * shape the three terms are T1 / gamma and gamma (T2 + T3): the best factor is
gamma* = sqrt(T1 / (T2 + T3)), and the bound at it Omega* = 2 sqrt(T1 (T2 + T3)).

It compares shapes, and carries a tuned peak from one schedule or horizon to another (R and G cancel in the ratio). As a
law of absolute losses it is weak: that is for comparison only.

References:
    Schaipp, Haegele, Taylor, Simsekli and Bach 2025, arXiv 2501.18965; Defazio et al. 2023, arXiv 2310.07831.

>>> round(convex_bound([1.0, 1.0, 1.0]).noise_history, 9)  # half of 1 + 1/2
0.75
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law, Variable, linear
from landscape_ray.laws.curves.curve import check_schedule
from landscape_ray.laws.curves.curve_set import CurveSet

Array: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConvexBound:
    """The three terms of the bound for a shape at the factor 1.

    Attributes:
        distance: T1 = R^2 / (2 sum eta).
        noise_now: T2 = sum eta^2 G^2 / (2 sum eta).
        noise_history: T3, the double sum.
    """

    distance: float
    noise_now: float
    noise_history: float

    @property
    def value(self) -> float:
        """Omega_T of the shape as it is."""
        return self.distance + self.noise_now + self.noise_history

    @property
    def best_factor(self) -> float:
        """gamma*: the factor of the shape that makes the bound smallest."""
        return math.sqrt(self.distance / (self.noise_now + self.noise_history))

    @property
    def best_value(self) -> float:
        """Omega*: the bound at gamma*."""
        return 2 * math.sqrt(self.distance * (self.noise_now + self.noise_history))


def convex_bound(lr: ArrayLike, grad_norm: ArrayLike = 1.0, distance: float = 1.0) -> ConvexBound:
    """Return the bound at the end of a schedule. O(T).

    Args:
        lr: (T,) learning rate, or its shape. Updates at rate 0 after the last one above it move nothing and are left
            out.
        grad_norm: (T,) or a number: G.
        distance: R, > 0.

    Raises:
        UserError: values out of range.
    """
    rates, _ = check_schedule("convex bound", lr, [1], 0)
    norms = np.asarray(grad_norm, dtype=np.float64)
    if norms.shape not in ((), rates.shape) or not (np.isfinite(norms) & (norms > 0)).all():
        raise UserError(f"grad_norm must be > 0, a number or one for each of {len(rates)} updates, got {norms}")
    if not (math.isfinite(distance) and distance > 0):
        raise UserError(f"distance must be finite and > 0, got {distance}; 1 compares schedules")
    terms = _terms(rates, np.broadcast_to(norms, rates.shape) ** 2)
    return ConvexBound(distance=distance**2 * terms[0], noise_now=terms[1], noise_history=terms[2])


def _terms(lr: Array, squared_norm: Array) -> tuple[float, float, float]:
    last = np.flatnonzero(lr)[-1] + 1
    lr, energy = lr[:last], lr[:last] ** 2 * squared_norm[:last]
    rest, rest_energy = np.cumsum(lr[::-1])[::-1], np.cumsum(energy[::-1])[::-1]
    history = 0.5 * float(np.sum(lr[:-1] / rest[1:] * rest_energy[:-1] / rest[:-1]))
    return 0.5 / rest[0], 0.5 * rest_energy[0] / rest[0], history


def transfer_peak(peak_lr: float, tuned: ArrayLike, planned: ArrayLike) -> float:
    """Return the peak for a planned schedule from the one that was best for another: peak * gamma*' / gamma*.

    Args:
        peak_lr: the best peak of the tuned schedule.
        tuned: (T,) its learning rate, at any scale; the largest counts as 1.
        planned: (T',) the other one.

    Raises:
        UserError: values out of range.

    >>> round(transfer_peak(1e-3, np.ones(100), np.ones(400)) / 1e-3, 3)  # about sqrt(100 / 400), less by a logarithm
    0.452
    """
    if not (math.isfinite(peak_lr) and peak_lr > 0):
        raise UserError(f"peak_lr must be finite and > 0, got {peak_lr}; give the best one of the tuned schedule")
    factors = []
    for lr in (tuned, planned):
        rates = np.asarray(lr, dtype=np.float64)
        factors.append(convex_bound(rates / rates.max() if rates.size and rates.max() > 0 else rates).best_factor)
    return peak_lr * factors[1] / factors[0]


def _prepare(data: CurveSet, grid_values: Mapping[str, float]) -> dict[str, Array]:
    del grid_values
    rows = [_terms(curve.lr[:step], np.ones(step)) for curve, steps in data.fitted for step in steps]
    distance, now, history = np.array(rows).T
    return {"distance": distance, "noise": now + history}


CONVEX = Law(
    name="convex",
    of="curves",
    title="loss curve by the bound of convex optimisation; for comparison, not for forecasts",
    formula="L = L0 + A / (2 sum eta) + B (noise terms of the bound)",
    reference="Schaipp et al. 2025, arXiv 2501.18965",
    variables=(Variable("eta", "", "learning rate of all updates so far"),),
    parameters=(
        linear("L0", "loss at the optimum"),
        linear("A", "squared distance to the optimum"),
        linear("B", "squared norm of the gradient"),
    ),
    columns=lambda x, p: (1.0, x["distance"], x["noise"]),
    slopes=lambda x, p: ({}, {}, {}),
    prepare=_prepare,
    assumptions=("the loss is convex and its gradients bounded, which that of a network is not",),
)
