"""The best learning rate (and batch) of every group of a sweep, by a parabola in the logarithms, with its interval.

    log L = m + h11 x^2/2 + h12 x y + h22 y^2/2 + g1 x + g2 y,   x = log lr, y = log B,   (x*, y*) = -H^-1 g

Legend: L final loss; lr peak learning rate; B batch; H curvatures, g slopes.

The interval comes from draws of the coefficients by their t distribution, whose noise is pooled over the groups: a
vertex is a ratio, and where the curvature could as well be zero its interval is all of (0, inf), not a symmetric one.

References:
    Bjorck et al. 2024, arXiv 2409.19913 (parabolas in log lr near the optimum); Fieller 1954 (intervals of ratios).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.optima.sweep import Sweep

Array: TypeAlias = NDArray[np.float64]

WINDOW = 0.02
"""Runs that are worse than the best of their group by more than this are left out: a parabola is a local thing."""

SPARE_RUNS = 2
"""The window is widened to so many runs more than a parabola has coefficients, where there are as many."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Optimum:
    """Where the parabola of one group is lowest.

    Attributes:
        N: parameters of the group.
        D: training tokens of the group.
        lr: best learning rate.
        lr_interval: (low, high); (0, inf) where the curvature is not significant.
        batch: best batch, or the one batch of the group, or None.
        batch_interval: likewise; None where the batch was not swept.
        loss: at the vertex.
        num_runs: runs in the window.
        samples: (num_samples, k) draws of log lr* (and log B*); none without an estimate of the noise.
        warnings: "name: sentence".
    """

    N: float
    D: float
    lr: float
    lr_interval: tuple[float, float]
    batch: float | None
    batch_interval: tuple[float, float] | None
    loss: float
    num_runs: int
    samples: Array
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        text = f"N {self.N:g}, D {self.D:g}: lr {self.lr:.3g} [{self.lr_interval[0]:.3g}, {self.lr_interval[1]:.3g}]"
        if self.batch is not None:
            text += f", batch {self.batch:.3g}"
        if self.batch_interval is not None:
            text += f" [{self.batch_interval[0]:.3g}, {self.batch_interval[1]:.3g}]"
        return "; ".join([text, *self.warnings])


class Optima(NamedTuple):
    """The optima of all groups that have one, and why the others have none, by (N, D) or (N, D, batch)."""

    found: tuple[Optimum, ...]
    refused: dict[tuple[float, ...], str]


class _Parabola(NamedTuple):
    coefficients: Array
    covariance: Array  # over the variance of the noise
    residual: Array
    centre: Array
    rows: NDArray[np.int64]


def group_optima(
    sweep: Sweep,
    *,
    by_batch: bool = False,
    window: float = WINDOW,
    confidence: float = 0.9,
    num_samples: int = 400,
    seed: int = 0,
) -> Optima:
    """Return the best learning rate, and batch if it was swept, of every group.

    Args:
        sweep: the runs.
        by_batch: take each batch as a group of its own, for laws of the learning rate against the batch.
        window: runs worse than the best of their group by more than this, relative, are left out.
        confidence: level of the intervals, in (0, 1).
        num_samples: draws behind them.
        seed: of the draws.

    Returns:
        What was found, and the groups that have no optimum: too few learning rates, a parabola that opens downward, or
        a vertex outside what was tried.

    Raises:
        UserError: an option out of range, or no group has an optimum.

    >>> lr = np.geomspace(1e-4, 1e-2, 7)
    >>> found = group_optima(Sweep(lr, 2 * np.exp(0.01 * np.log(lr / 1e-3) ** 2))).found
    >>> round(found[0].lr, 9)
    0.001
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be in (0, 1), got {confidence}; .9 is usual")
    if not window > 0:
        raise UserError(f"window must be > 0, got {window}; {WINDOW} is usual")
    if by_batch and sweep.batch is None:
        raise UserError("by_batch must have a batch for every run, got a sweep without; give the column")
    parabolas: dict[tuple[float, ...], _Parabola] = {}
    refused: dict[tuple[float, ...], str] = {}
    for key, rows in _members(sweep, by_batch).items():
        try:
            parabolas[key] = _fit(sweep, rows, window, two=not by_batch)
        except UserError as error:
            refused[key] = str(error)
    freedom = sum(len(p.residual) - len(p.coefficients) for p in parabolas.values())
    noise = sum(float(p.residual @ p.residual) for p in parabolas.values()) / freedom if freedom else np.nan
    rng = np.random.default_rng(seed)
    found = []
    for key, parabola in parabolas.items():
        try:
            found.append(_vertex(sweep, key, parabola, noise, freedom, confidence, num_samples, rng))
        except UserError as error:
            refused[key] = str(error)
    if not found:
        raise UserError(f"sweep must have an optimum in some group, got none ({next(iter(refused.values()))})")
    return Optima(tuple(found), refused)


def _members(sweep: Sweep, by_batch: bool) -> dict[tuple[float, ...], NDArray[np.int64]]:
    """Return the numbers of the runs of every group."""
    members = {}
    for key, mask in sweep.groups.items():
        rows = np.flatnonzero(mask)
        if not by_batch:
            members[tuple(key)] = rows
            continue
        batch = np.asarray(sweep.batch)[rows]
        members |= {(*key, float(b)): rows[batch == b] for b in np.unique(batch)}
    return members


def _fit(sweep: Sweep, rows: NDArray[np.int64], window: float, *, two: bool) -> _Parabola:
    """Return the parabola of a group by least squares on the runs in the window."""
    swept = [np.log(np.asarray(sweep.lr))]
    if two and sweep.batch is not None and len(np.unique(np.asarray(sweep.batch)[rows])) > 1:
        swept.append(np.log(np.asarray(sweep.batch)))
    for name, values in zip(("lr", "batch"), swept, strict=False):
        distinct = len(np.unique(values[rows]))
        if distinct < 3:
            raise UserError(f"{name} must have three different values for a parabola, got {distinct}; add runs")
    loss = np.asarray(sweep.loss)
    num_coefficients = 3 if len(swept) == 1 else 6
    order = rows[np.argsort(loss[rows], kind="stable")]
    count = max(int((loss[order] <= loss[order[0]] * (1 + window)).sum()), num_coefficients + SPARE_RUNS)
    kept = order[:count]
    x = np.stack([values[kept] for values in swept], axis=1)
    centre = x.mean(axis=0)
    design = _design(x - centre)
    if np.linalg.matrix_rank(design) < num_coefficients:
        raise UserError(
            f"sweep must determine {num_coefficients} coefficients of a parabola, got {len(kept)} runs on too few "
            "learning rates or batches; add runs next to the best"
        )
    y = np.log(loss[kept])
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    covariance = np.asarray(np.linalg.inv(design.T @ design), dtype=np.float64)
    return _Parabola(coefficients, covariance, y - design @ coefficients, centre, kept)


def _design(x: Array) -> Array:
    """Return 1, the slopes, and the curvatures as columns."""
    if x.shape[1] == 1:
        return np.column_stack([np.ones(len(x)), x, x**2 / 2])
    return np.column_stack([np.ones(len(x)), x, x[:, 0] ** 2 / 2, x[:, 0] * x[:, 1], x[:, 1] ** 2 / 2])


def _lowest(coefficients: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return the vertices (s, k) of coefficients (s, p) relative to the centre, and which parabolas open upward."""
    if coefficients.shape[1] == 3:
        slope, curvature = coefficients[:, 1], coefficients[:, 2]
        convex = curvature > 0
        return (-slope / np.where(convex, curvature, 1.0))[:, None], convex
    gradient = coefficients[:, 1:3]
    a, c, b = coefficients[:, 3:].T
    convex = (a > 0) & (a * b > c**2)
    determinant = np.where(convex, a * b - c**2, 1.0)
    x = -(b * gradient[:, 0] - c * gradient[:, 1]) / determinant
    y = -(a * gradient[:, 1] - c * gradient[:, 0]) / determinant
    return np.stack([x, y], axis=1), convex


def _vertex(
    sweep: Sweep,
    key: tuple[float, ...],
    parabola: _Parabola,
    noise: float,
    freedom: int,
    confidence: float,
    num_samples: int,
    rng: np.random.Generator,
) -> Optimum:
    """Return the optimum of a parabola, or raise where it has none inside the sweep."""
    vertex, convex = _lowest(parabola.coefficients[None])
    if not convex[0]:
        raise UserError(
            "the parabola must open upward, got one that does not: the loss has no lowest point; sweep wider"
        )
    best = vertex[0] + parabola.centre
    members = _members(sweep, len(key) == 3)[key]
    swept = [("lr", np.asarray(sweep.lr)[members])]
    if len(best) == 2:
        swept.append(("batch", np.asarray(sweep.batch)[members]))
    warnings = []
    winner = int(np.argmin(np.asarray(sweep.loss)[members]))
    for (name, tried), at in zip(swept, np.exp(best), strict=True):
        if not tried.min() <= at <= tried.max():
            raise UserError(
                f"{name} of the vertex must lie in what was tried, [{tried.min():.4g}, {tried.max():.4g}], got "
                f"{at:.4g}; sweep further in that direction"
            )
        if tried[winner] in (tried.min(), tried.max()):
            warnings.append(f"edge: the best {name} measured is the last one tried, {tried[winner]:g}")
    intervals = [(0.0, float("inf"))] * len(best)
    samples = np.empty((0, len(best)))
    if freedom:
        root = np.linalg.cholesky(parabola.covariance) * np.sqrt(noise)
        normal = rng.standard_normal((num_samples, len(root))) @ root.T
        drawn = parabola.coefficients + normal * np.sqrt(freedom / rng.chisquare(freedom, (num_samples, 1)))
        vertices, opens = _lowest(drawn)
        tail = (1 - confidence) / 2
        samples = vertices[opens] + parabola.centre
        if (~opens).mean() < tail:
            ends = np.exp(np.quantile(samples, [tail, 1 - tail], axis=0))
            intervals = [(float(low), float(high)) for low, high in ends.T]
        else:
            warnings.append("flat: the curvature is not significant, so any optimum is possible; sweep wider")
            samples = np.empty((0, len(best)))
    else:
        warnings.append("no_noise: no more runs than coefficients, so there is no interval; add runs")
    one = np.unique(np.asarray(sweep.batch)[members]) if sweep.batch is not None else np.empty(0)
    depth = parabola.coefficients[0] + _design(vertex)[0, 1:] @ parabola.coefficients[1:]
    return Optimum(
        N=key[0],
        D=key[1],
        lr=float(np.exp(best[0])),
        lr_interval=intervals[0],
        batch=float(np.exp(best[1])) if len(best) == 2 else (float(one[0]) if len(one) == 1 else None),
        batch_interval=intervals[1] if len(best) == 2 else None,
        loss=float(np.exp(depth)),
        num_runs=len(parabola.residual),
        samples=samples,
        warnings=tuple(warnings),
    )
