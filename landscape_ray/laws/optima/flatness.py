"""How flat the optimum of learning rate and batch is: what a choice costs, and what may be chosen for hardly anything.

    excess = L(N, D, lr, B) / L(N, D, lr*, B*) - 1

Legend: N parameters, D training tokens, lr peak learning rate, B batch in the unit of D, L final loss; a star: where
the loss is lowest. The surface was fitted to runs within `window` of the best of their group, and says nothing beyond:
an excess is followed from the optimum outward, and where it passes the window it is only known to be more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.predict import samples_of
from landscape_ray.laws.optima.step_law import StepLaw
from landscape_ray.laws.optima.surface import best_point, centre, rise, valley

Array: TypeAlias = NDArray[np.float64]

WITHIN = 1e-3
"""What counts as hardly anything: a tenth of a per cent of the loss."""

_NUM_STEPS = 401


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """What a learning rate and a batch cost, relative to the lowest loss at their N and D.

    Attributes:
        value: mean over the bootstrap.
        low: of its interval.
        high: of its interval.
        beyond: the choice is worse than the runs that were fitted: `value` is what it costs at least.
        warnings: "name: sentence".
    """

    value: float
    low: float
    high: float
    beyond: bool
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatRegion:
    """The choices that cost less than a share of the loss.

    Attributes:
        within: that share.
        lr: (low, high) at the best batch.
        batch: (low, high), each with the learning rate that is best for it; None where the batch was not swept.
        lr_at_batch: those learning rates.
        open_ends: of "lr low", "lr high", "batch low" and "batch high", those where the loss had not risen so far at
            the end of what was tried: the end is that of the runs.
    """

    within: float
    lr: tuple[float, float]
    batch: tuple[float, float] | None
    lr_at_batch: tuple[float, float] | None
    open_ends: tuple[str, ...]


def excess(
    law: StepLaw, N: float, D: float, lr: float, batch: float | None = None, *, allow_extrapolation: bool = False
) -> Excess:
    """Return what a choice of learning rate and batch costs.

    Args:
        law: the fitted law.
        N: parameters, counted as in the sweep.
        D: training tokens.
        lr: peak learning rate.
        batch: in the unit of D; None for the best one.
        allow_extrapolation: as in :meth:`StepLaw.recommend`.

    Raises:
        UserError: a number that is not finite and > 0, a batch where none was swept, or see :meth:`StepLaw.recommend`.

    >>> from landscape_ray.laws import Sweep, fit_step_law
    >>> rates = np.geomspace(1e-4, 1e-1, 13)
    >>> sweep = Sweep(rates, 2 * np.exp(0.001 * np.log(rates / 3e-3) ** 2))
    >>> cost = excess(fit_step_law(sweep, num_bootstrap=0), 1, 1, 3e-3 * np.e)
    >>> round(float(np.log1p(cost.value)), 6)
    0.001
    """
    warnings = law.range_warnings(N, D, allow_extrapolation)
    for name, value in (("lr", lr), ("batch", batch)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} must be finite and > 0, got {value}; give the run's own")
    if batch is not None and law.batch is None:
        raise UserError(f"batch must have been swept to say what one costs, got {batch:g} for a sweep of lr; leave it")
    best = {name: np.array([value]) for name, value in law.fit.parameters.items()}
    drawn = {name: values[:, 0] for name, values in samples_of(law.fit).items()}
    if batch is None and law.batch is not None:
        batch = law.batch(N, D)
    most = float(law.fit.data["window"])
    chosen = _along(law, best, N, D, lr, batch)
    each = np.minimum(_along(law, drawn, N, D, lr, batch), most)
    tail = (1 - law.fit.confidence) / 2
    low, high = np.quantile(each, [tail, 1 - tail])
    beyond = bool(chosen[0] >= most)
    return Excess(
        value=most if beyond else float(each.mean()),
        low=float(low),
        high=float(high),
        beyond=beyond,
        warnings=tuple(warnings),
    )


def flat_region(law: StepLaw, N: float, D: float, within: float = WITHIN) -> FlatRegion:
    """Return which learning rates and batches cost less than a share of the loss, by the fitted surface.

    Args:
        law: the fitted law.
        N: parameters.
        D: training tokens.
        within: the share, above 0 and at most the window of the fit.

    Raises:
        UserError: a share out of range.

    >>> from landscape_ray.laws import Sweep, fit_step_law
    >>> rates = np.geomspace(1e-4, 1e-1, 13)
    >>> law = fit_step_law(Sweep(rates, 2 * np.exp(0.001 * np.log(rates / 3e-3) ** 2)), num_bootstrap=0)
    >>> [round(end, 6) for end in flat_region(law, 1, 1, np.expm1(0.001)).lr]
    [0.001104, 0.008155]
    """
    window = float(law.fit.data["window"])
    if not 0 < within <= window:
        raise UserError(
            f"within must be > 0 and <= {window:g}, the window of the fit, got {within:g}; {WITHIN} is usual"
        )
    p, tried, level = law.fit.parameters, law.fit.data["offsets"], float(np.log1p(within))
    log_lr, log_batch = best_point(p, *_place(law, N, D))
    open_ends: list[str] = []

    def ends(name: str, limits: tuple[float, float], height: Callable[[Array], Array]) -> tuple[float, float]:
        found = []
        for side, limit in zip(("low", "high"), limits, strict=True):
            way = np.linspace(0.0, limit, _NUM_STEPS)
            above = np.flatnonzero(height(way) >= level)
            if not len(above):
                open_ends.append(f"{name} {side}")
                found.append(float(limit))
                continue
            i = int(above[0])
            before, after = height(way[i - 1 : i + 1])
            found.append(float(way[i - 1] + (level - before) / (after - before) * (way[i] - way[i - 1])))
        return found[0], found[1]

    lr = ends("lr", tried["u"], lambda u: np.asarray(rise(p, u, 0.0)))
    if log_batch is None:
        batch, at = None, None
    else:
        batch = ends("batch", tried["v"], lambda v: np.asarray(valley(p, v)[1]))
        at = valley(p, np.array(batch))[0]
    around = 0.0 if log_batch is None else float(log_batch)
    return FlatRegion(
        within=within,
        lr=(float(np.exp(log_lr + lr[0])), float(np.exp(log_lr + lr[1]))),
        batch=None if batch is None else (float(np.exp(around + batch[0])), float(np.exp(around + batch[1]))),
        lr_at_batch=None if at is None else (float(np.exp(log_lr + at[0])), float(np.exp(log_lr + at[1]))),
        open_ends=tuple(open_ends),
    )


def _place(law: StepLaw, N: float, D: float) -> tuple[float, float]:
    n0, d0 = centre(law.groups)
    return float(np.log(N / n0)), float(np.log(D / d0))


def _along(law: StepLaw, p: dict[str, Array], N: float, D: float, lr: float, batch: float | None) -> Array:
    """Return the excess (s,) for parameters (s,): the highest on the straight way from the optimum, as far as known."""
    log_lr, log_batch = best_point(p, *_place(law, N, D))
    u = np.log(lr) - log_lr
    v = np.zeros_like(u) if log_batch is None or batch is None else np.log(batch) - log_batch
    share = np.linspace(0, 1, _NUM_STEPS)
    heights = rise({name: values[:, None] for name, values in p.items()}, u[:, None] * share, v[:, None] * share)
    return np.asarray(np.expm1(np.max(np.broadcast_to(heights, (len(u), _NUM_STEPS)), axis=1)))
