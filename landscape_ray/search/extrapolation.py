"""One loss curve, extrapolated to the end of its schedule, with an uncertainty that grows as it should.

    L(s) = L0 + A x(s)^-alpha - C z(s)

Legend: L held-out loss after s updates; x sum of the learning rate up to s, relative to its value at the last
observation, warm-up counted at the peak; z annealing area (how far the learning rate has been lowered, see
`landscape_ray.laws.annealing_area`), relative to its value at the end of the run; L0, A, C and alpha unknown.

For each alpha of a grid the rest is Bayesian linear regression: flat in L0 and A, normal in C, which a curve says
nothing about before its cooldown; what C is comes from trials that have ended. The forecast averages over alpha by
likelihood. Residuals of neighbouring evaluations are correlated (the model drifts slowly): with lag-one correlation r,
n of them count as n (1 - r) / (1 + r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws import annealing_area

Array: TypeAlias = NDArray[np.float64]

ALPHAS = np.geomspace(0.05, 2.0, 16)
"""Exponents that are averaged over."""

MIN_POINTS = 5
"""Evaluations after the transient below which nothing is forecast."""

TRANSIENT = 0.15
"""Share of the updates made so far that is left out at the beginning: the law does not hold there."""

DELAY_FRACTION = 0.02
"""Updates after which the loss has responded to a lower learning rate, as a share of the run."""


class Normal(NamedTuple):
    """A mean and a standard deviation."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Forecast:
    """The loss at the end of a run as a Student distribution, and what the curve says about C."""

    mean: float
    sd: float
    """Scale of the Student distribution: of one evaluation at the end, its noise included."""
    freedom: float
    """Degrees of freedom."""
    annealing_gain: Normal
    """C: by how much the loss falls through the whole decay of the learning rate."""

    def probability_below(self, loss: float, widened: float = 1.0) -> float:
        """Return the probability that the final loss is below `loss`, with the scale multiplied by `widened`."""
        from scipy.special import stdtr  # here, because it takes longer to import than the rest of the package

        return float(stdtr(self.freedom, (loss - self.mean) / (self.sd * widened)))


class Coordinates(NamedTuple):
    """The schedule as the law sees it: one entry an update."""

    s1: Array
    s2: Array

    @classmethod
    def of(cls, lr: Sequence[float] | Array, warmup_steps: int) -> Coordinates:
        """Return the coordinates of a schedule.

        Raises:
            UserError: a learning rate that is negative or not finite, or none that is positive.
        """
        counted = np.asarray(lr, dtype=np.float64).copy()
        if not len(counted) or not np.isfinite(counted).all() or counted.min() < 0 or counted.max() <= 0:
            raise UserError("lr must hold finite rates >= 0, one of them positive; give that of every update")
        counted[:warmup_steps] = counted.max()
        decay = 1.0 - 1.0 / max(DELAY_FRACTION * len(counted), 1.0)
        return cls(np.cumsum(counted), annealing_area(counted, decay))


def forecast(
    coordinates: Coordinates, steps: Sequence[int], losses: Sequence[float], gain: Normal | None = None
) -> Forecast | None:
    """Return the forecast of the loss at the end of the run; None while too little is known.

    Args:
        coordinates: of the whole schedule, S updates.
        steps: of the evaluations, increasing, <= S.
        losses: finite.
        gain: what ended trials say about C. Without it, C may be anything up to what the curve has fallen so far.
    """
    step = np.asarray(steps, dtype=np.intp)
    y = np.asarray(losses, dtype=np.float64)
    kept = step > max(TRANSIENT * (step[-1] if len(step) else 0), 0)
    step, y = step[kept], y[kept]
    if len(step) < MIN_POINTS:
        return None
    last = step[-1] - 1
    x = coordinates.s1 / coordinates.s1[last]
    whole = coordinates.s2[-1]
    z = coordinates.s2 / whole if whole > 0 else np.zeros_like(coordinates.s2)
    prior = gain or Normal(0.0, max(float(y.max() - y.min()), 1e-12))
    return _averaged(x[step - 1], z[step - 1], y, float(x[-1]), float(z[-1]), prior)


def _averaged(x: Array, z: Array, y: Array, x_end: float, z_end: float, prior: Normal) -> Forecast:
    """Return the average over alpha of the forecasts of the linear model."""
    num = len(y)
    fits = [_linear(np.stack([np.ones_like(x), x**-alpha, -z], axis=1), y, prior) for alpha in ALPHAS]
    squares = np.array([fit.squares for fit in fits])
    best = fits[int(squares.argmin())]
    r = _correlation(best.residual)
    effective = max(num * (1 - r) / (1 + r), 1.0)
    freedom = max(effective - 3.0, 1.0)
    variance = max(float(squares.min()) / num * effective / freedom, (1e-9 * float(np.abs(y).max())) ** 2)
    weights = np.exp(-(squares - squares.min()) / (2 * variance) * effective / num)
    weights /= weights.sum()
    means, variances, gains, gain_variances = [], [], [], []
    for fit, alpha in zip(fits, ALPHAS, strict=True):
        # the covariance of correlated points is that of fewer of them; the prior of C counts in full
        precision = fit.gram * (effective / num) / variance
        precision[2, 2] += prior.sd**-2
        precision[np.diag_indices(3)] += 1e-9 * np.diag(precision) + 1e-300
        covariance = np.linalg.inv(precision)
        at_end = np.array([1.0, x_end**-alpha, -z_end])
        means.append(float(at_end @ fit.parameters))
        variances.append(float(at_end @ covariance @ at_end))
        gains.append(float(fit.parameters[2]))
        gain_variances.append(float(covariance[2, 2]))
    mean, gain = float(weights @ means), float(weights @ gains)
    between = float(weights @ (np.array(means) - mean) ** 2)
    gain_sd = math.sqrt(float(weights @ gain_variances) + float(weights @ (np.array(gains) - gain) ** 2))
    sd = math.sqrt(max(float(weights @ variances) + between + variance, 1e-300))
    return Forecast(mean=mean, sd=sd, freedom=freedom, annealing_gain=Normal(gain, gain_sd))


class _Fit(NamedTuple):
    parameters: Array
    gram: Array
    residual: Array
    squares: float


def _linear(columns: Array, y: Array, prior: Normal) -> _Fit:
    """Return the most probable (L0, A, C), with A and C held to be at least 0: a loss does not rise towards the end."""
    noise = max(float(np.std(np.diff(y))) / math.sqrt(2), 1e-9 * float(np.abs(y).max()))
    gram = columns.T @ columns
    weight = (noise / prior.sd) ** 2
    free = [0, 1, 2]
    parameters = np.zeros(3)
    while True:
        matrix = gram[np.ix_(free, free)].copy()
        right = columns[:, free].T @ y
        if 2 in free:
            matrix[free.index(2), free.index(2)] += weight
            right[free.index(2)] += weight * prior.mean
        matrix[np.diag_indices(len(free))] += 1e-12 * np.trace(gram)
        parameters = np.zeros(3)
        parameters[free] = np.linalg.solve(matrix, right)
        negative = [k for k in free if k > 0 and parameters[k] < 0]
        if not negative:
            break
        free.remove(min(negative, key=lambda k: parameters[k]))
    residual = y - columns @ parameters
    return _Fit(parameters, gram, residual, float(residual @ residual))


def _correlation(residual: Array) -> float:
    """Return the lag-one correlation of residuals, in [0, 0.9]."""
    power = float(residual @ residual)
    return min(max(float(residual[1:] @ residual[:-1]) / power, 0.0), 0.9) if power > 0 else 0.0
