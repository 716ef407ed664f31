"""Where an optimizer stops being stable: thresholds on curvature, and how far a run is from them. Arithmetic only.

On a quadratic, an optimizer with step size and preconditioner held fixed diverges as soon as one eigenvalue is above a
threshold. Along real runs the largest eigenvalue often rises to it and stays: the edge of stability.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate

State: TypeAlias = Literal["below", "at the edge", "above"]

EDGE_WIDTH = 0.1
"""Relative distance from the threshold that still counts as at the edge."""

MAX_POINTS = 1000
"""For a slope: longer series are thinned evenly, because every pair of points is looked at."""


def threshold(
    optimizer: str,
    lr: float,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    coupled: bool = False,
) -> float | None:
    """Return the curvature above which the optimizer diverges on a quadratic.

        sgd:                  2 (1 + beta) / lr                        of the sharpness lambda_1(H)
        sgd with nesterov:    2 (1 + beta) / ((1 + 2 beta) lr)         of the sharpness
        adam, adamw:          2 (1 + beta) / ((1 - beta) lr)           of the preconditioned sharpness lambda_1(P^-1 H)
        rmsprop:              2 / lr                                   of the preconditioned sharpness
        schedule_free_adamw:  2 / ((1 - beta) lr)                      of the preconditioned sharpness

    The velocity of sgd is torch's, `v <- beta v + g`, not the mean `beta v + (1 - beta) g` of Adam: with beta = 0.9,
    3.8 / lr against 38 / lr. That of schedule-free AdamW is the limit of an average that no longer moves. The curvature
    is that of the loss without weight decay. Full batches; for minibatches of sgd, see :func:`sgd_curvature`.

    One learning rate for all weights is assumed. Where parameter groups have factors of it (muP), the threshold is one
    of `lambda_1(diag(factor) P^-1 H)`. Weight decay is taken to act on all weights; left out for some of them, the
    threshold lies between the values with and without it.

    Args:
        optimizer: its name, lower case.
        lr: learning rate, >= 0; 0 has the threshold inf, nan has None.
        momentum: beta: of sgd and rmsprop (which must have none), Adam's beta1.
        nesterov: of sgd.
        weight_decay: strength wd, >= 0.
        coupled: wd w is added to the gradient, and takes wd off the threshold; or, for weights that shrink by the
            factor 1 - lr wd in each update, the threshold is (1 - lr wd / 2) times as high. Schedule-free AdamW, which
            adds wd w to the preconditioned gradient, loses wd.

    Returns:
        The threshold; None where there is no closed form: other optimizers (Muon, Lion: their updates are not linear in
        the gradient), Adam or RMSProp with coupled decay, RMSProp with momentum.

    Raises:
        UserError: lr or weight_decay is negative, or momentum is not in [0, 1).

    References:
        Cohen et al., 2021, arXiv:2103.00065 (gradient descent, momentum). Cohen et al., 2022, arXiv:2207.14484
        (adaptive methods). Weight decay and schedule-free: the stability condition of the linear recursion.

    >>> threshold("sgd", 0.1), round(threshold("adamw", 0.1, 0.9), 3), threshold("muon", 0.1, 0.95)
    (20.0, 380.0, None)
    """
    if lr < 0:
        raise UserError(f"lr must be at least 0, got {lr}")
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must be at least 0 and below 1, got {momentum}")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay must be at least 0, got {weight_decay}")
    adaptive = optimizer in ("adam", "adamw", "rmsprop", "schedule_free_adamw")
    linear = optimizer == "sgd" or (adaptive and not (optimizer == "rmsprop" and momentum > 0))
    if math.isnan(lr) or not linear or (adaptive and coupled and weight_decay > 0):
        return None
    if lr == 0:
        return math.inf
    if optimizer == "schedule_free_adamw":
        return 2 / ((1 - momentum) * lr) - weight_decay
    share = 1 - momentum if adaptive else 1 + 2 * momentum if nesterov else 1.0
    highest = 2 * (1 + momentum) / (share * lr)
    return highest - weight_decay if coupled else highest * (1 - lr * weight_decay / 2)


def sgd_curvature(
    trace: float, *, batch_size: int, num_examples: int | None = None, frobenius_norm: float = 0.0
) -> float:
    """Return what must stay below 2 / lr for minibatch SGD without momentum to be stable in the mean square.

        p tr(H) + (1 - p) ||H||_F^2 / tr(H),    p = (n - B) / (B (n - 1)), or 1 / B where n is infinite or unknown

    For one example at a time this is tr(H), so that the condition is lr tr(H) <= 2. At an interpolating minimum of a
    squared error with one output it is a necessary condition, and for B = 1 and per-example gradients of the outputs of
    one length the exact threshold; elsewhere an indicator. The condition of the full batch, lambda_1(H)
    <= 2 / lr, comes on top of it: the larger of the two counts. As the batch grows, the first term falls as 1 / B.

    From the exact criterion, that all of `(1 - p) H x H + p mean(H_i x H_i) - (H x I + I x H) / lr` be negative
    semidefinite (x the Kronecker product, H_i the Hessian of an example, of rank one), by its quadratic form at the
    identity, and `mean tr(H_i)^2 >= tr(H)^2`.

    Args:
        trace: of the Hessian (or the Gauss-Newton matrix, the same at such a minimum) of the mean loss, > 0.
        batch_size: B, examples in an update, >= 1.
        num_examples: n, of which B are drawn without replacement, >= B; None for infinitely many.
        frobenius_norm: of the same matrix, 0 where it is not known: a weaker condition, still necessary.

    Raises:
        UserError: trace is not positive, or sizes that do not fit.

    References:
        Wu, Ma and E, How SGD selects the global minima, NeurIPS 2018. Ma and Ying, 2021, arXiv:2105.13462. Mulayoff and
        Michaeli, Exact mean square linear stability analysis for SGD, 2023, arXiv:2306.07850 (the criterion and p).

    >>> sgd_curvature(20.0, batch_size=1), sgd_curvature(20.0, batch_size=10)
    (20.0, 2.0)
    """
    if not trace > 0:
        raise UserError(f"trace must be positive, got {trace}; give that of the Gauss-Newton matrix")
    if batch_size < 1 or (num_examples is not None and num_examples < batch_size):
        raise UserError(f"batch_size must be at least 1 and at most num_examples, got {batch_size} of {num_examples}")
    share = 1 / batch_size
    if num_examples is not None:
        share = (num_examples - batch_size) / (batch_size * max(num_examples - 1, 1))
    return share * trace + (1 - share) * frobenius_norm**2 / trace


def stability_ratio(estimate: Estimate, threshold: float) -> Estimate:
    """Return curvature over threshold, with its error: 1 is the edge, more is unstable.

    Args:
        estimate: of the curvature that the threshold is one of.
        threshold: > 0.

    Raises:
        UserError: threshold is not positive.

    >>> ratio = stability_ratio(Estimate(value=19.0, standard_error=2.0), 20.0)
    >>> ratio.value, ratio.standard_error
    (0.95, 0.1)
    """
    if not threshold > 0:
        raise UserError(f"threshold must be positive, got {threshold}")
    return Estimate(
        value=estimate.value / threshold,
        standard_error=estimate.standard_error / threshold,
        converged=estimate.converged,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EdgeState:
    """Where a run stands, and where it goes.

    Attributes:
        state: below, at the edge (within 10 %), or above.
        ratio: median of curvature over threshold in the last part of the series.
        slope: median change of the curvature per step, over all of the series (Theil and Sen); nan for one point.
        low, high: of the slope, 95 % where the fluctuations around it are independent.
    """

    state: State
    ratio: float
    slope: float
    low: float
    high: float

    @property
    def sharpening(self) -> bool:
        """Whether the curvature rises beyond doubt: progressive sharpening."""
        return self.low > 0


def edge_state(
    values: Sequence[float],
    thresholds: Sequence[float] | float,
    steps: Sequence[float] | None = None,
    *,
    tail: float = 0.25,
) -> EdgeState:
    """Return whether a run is at the edge of stability, and whether its curvature rises.

    Args:
        values: curvature at each measurement; what is not finite is left out.
        thresholds: at each measurement, or one for all; > 0.
        steps: of the measurements, increasing; None counts them.
        tail: share of the series, at its end, that decides about the state; in (0, 1].

    Raises:
        UserError: no finite value, lengths that differ, a threshold that is not positive, or tail out of range.

    References:
        Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 63, 1968 (slope and interval).

    >>> edge_state([2.0, 6.0, 9.5, 10.4, 9.8, 10.1], 10.0).state
    'at the edge'
    """
    if not 0 < tail <= 1:
        raise UserError(f"tail must be above 0 and at most 1, got {tail}")
    series = np.asarray(values, dtype=np.float64)
    limits = np.full(len(series), thresholds) if isinstance(thresholds, (int, float)) else np.asarray(thresholds)
    times = np.arange(len(series), dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64)
    if not len(series) == len(limits) == len(times):
        raise UserError(
            f"thresholds and steps must be as long as values, got {len(limits)} and {len(times)} for {len(series)}"
        )
    if not np.all(limits > 0):
        raise UserError(f"thresholds must be positive, got {limits.min()}")
    known = np.isfinite(series)
    if not known.any():
        raise UserError("values must hold a finite one, got none; there is nothing to classify")
    series, limits, times = series[known], limits[known], times[known]
    last = math.ceil(tail * len(series))
    ratio = float(np.median(series[-last:] / limits[-last:]))
    state: State = "below" if ratio < 1 - EDGE_WIDTH else "above" if ratio > 1 + EDGE_WIDTH else "at the edge"
    slope, low, high = _slope(times, series)
    return EdgeState(state=state, ratio=ratio, slope=slope, low=low, high=high)


def _slope(times: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the median slope over all pairs of points, and a 95 % interval from the ranks of the slopes."""
    if len(times) > MAX_POINTS:
        kept = np.linspace(0, len(times) - 1, MAX_POINTS).round().astype(np.intp)
        times, values = times[kept], values[kept]
    first, second = np.triu_indices(len(times), k=1)
    apart = times[second] - times[first]
    slopes = np.sort((values[second] - values[first])[apart > 0] / apart[apart > 0])
    if not len(slopes):
        return math.nan, -math.inf, math.inf
    num = len(times)
    half = NormalDist().inv_cdf(0.975) * math.sqrt(num * (num - 1) * (2 * num + 5) / 18) / 2
    below, above = math.floor(len(slopes) / 2 - half) - 1, math.ceil(len(slopes) / 2 + half)
    low = float(slopes[below]) if below >= 0 else -math.inf
    high = float(slopes[above]) if above < len(slopes) else math.inf
    return float(np.median(slopes)), low, high
