"""How much the loss depends on getting the learning rate right.

    sensitivity = mean over the learning rates tried of min(loss, loss_init) - best loss

Legend: loss_init loss at initialisation, which caps what a diverged run counts. In nats per token; it is compared
between models, optimizers or interventions over the same grid of learning rates.

References:
    Wortsman et al. 2023, arXiv 2309.14322.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError

Array: TypeAlias = NDArray[np.float64]

UNEVEN = 1.5
"""Ratio of the widest to the narrowest step between neighbouring rates, by logarithm, from which the grid is uneven."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What a wrong learning rate costs.

    Attributes:
        value: mean excess loss over the grid, in the unit of the loss.
        best_lr: rate with the lowest loss.
        best_loss: that loss.
        range: (lowest, highest) rate tried: the value depends on it.
        share_diverged: share of the rates whose loss was above that at initialisation, or not finite.
        warnings: "name: sentence".
    """

    value: float
    best_lr: float
    best_loss: float
    range: tuple[float, float]
    share_diverged: float
    warnings: tuple[str, ...]


def lr_sensitivity(lr: ArrayLike, loss: ArrayLike, loss_init: float) -> Sensitivity:
    """Return how much the loss depends on the learning rate.

    Args:
        lr: (n,) peak learning rates, evenly spaced by logarithm; of repeated ones (seeds) the mean is taken.
        loss: (n,) final losses; nan or inf for runs that diverged.
        loss_init: loss at initialisation, > 0.

    Raises:
        UserError: shapes differ, fewer than two rates, all of them diverged, or something is not > 0.

    >>> lr_sensitivity([1e-3, 1e-2, 1e-1], [2.5, 2.0, np.nan], 5.0).value
    1.1666666666666667
    """
    rates, losses = np.asarray(lr, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if rates.shape != losses.shape or rates.ndim != 1:
        raise UserError(f"lr and loss must have one shape (n,), got {rates.shape} and {losses.shape}; one value a run")
    if not (np.isfinite(rates).all() and (rates > 0).all()):
        raise UserError("lr must be finite and > 0 in every run, got one that is not; drop it")
    if not (np.isfinite(loss_init) and loss_init > 0):
        raise UserError(f"loss_init must be finite and > 0, got {loss_init}; measure it before the first update")
    tried = np.unique(rates)
    if len(tried) < 2:
        raise UserError(f"lr must have two different values at least, got {len(tried)}; sweep it")
    capped = np.minimum(np.where(np.isfinite(losses), losses, loss_init), loss_init)
    by_rate = np.array([capped[rates == rate].mean() for rate in tried])
    if not (by_rate < loss_init).any():
        raise UserError(f"loss must be below loss_init {loss_init:g} at some learning rate, got none; try lower rates")
    best = int(by_rate.argmin())
    warnings = []
    if best in (0, len(tried) - 1):
        warnings.append(f"edge: the best learning rate is the last one tried, {tried[best]:g}")
    steps = np.diff(np.log(tried))
    if steps.max() > UNEVEN * steps.min():
        warnings.append("uneven: the learning rates are not evenly spaced by logarithm, so some count more than others")
    return Sensitivity(
        value=float((by_rate - by_rate[best]).mean()),
        best_lr=float(tried[best]),
        best_loss=float(by_rate[best]),
        range=(float(tried[0]), float(tried[-1])),
        share_diverged=float((by_rate >= loss_init).mean()),
        warnings=tuple(warnings),
    )
