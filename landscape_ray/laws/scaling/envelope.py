"""Approach 1 of Hoffmann et al.: the lower envelope of training curves over compute.

    for every C: the run with the lowest loss among those that pass C gives N*(C), D*(C) = C / (k N*), L*(C)
    N* = k_N C^a by least squares in logarithms, over the C at which a run between the smallest and the largest won

Legend: N parameters, D tokens seen, C = k N D training FLOPs (k = 6), L loss (nats per token).

A run passes a C in the middle of its schedule: unless the learning rate had decayed there, its loss is higher than that
of a run made for that C, and the envelope is biased. Runs of several horizons a size are what the approach asks for.

References:
    Hoffmann et al. 2022, arXiv 2203.15556.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import check_options
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.propagate import Interval, interval
from landscape_ray.laws.scaling.chinchilla import FLOPS_PER_TOKEN

Array: TypeAlias = NDArray[np.float64]

MIN_SIZES = 4
"""Fewest sizes: the smallest and the largest are never known to be the best."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Envelope:
    """The lower envelope of training curves.

    Attributes:
        flops: (k,) compute at which the best size was bracketed.
        size: (k,) N*.
        tokens: (k,) D*.
        loss: (k,) L*.
        exponent: a in N* ~ C^a.
        factor: k_N.
        winners: sizes that were the best somewhere.
        warnings: each "name: sentence".
    """

    flops: Array
    size: Array
    tokens: Array
    loss: Array
    exponent: Interval
    factor: Interval
    winners: tuple[float, ...]
    warnings: tuple[str, ...]


def fit_envelope(
    points: Points,
    *,
    flops_per_token: float = FLOPS_PER_TOKEN,
    num_flops: int = 1500,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> Envelope:
    """Return the best size over compute from whole training curves.

    Args:
        points: with variables N and D, the loss, and `run_of`: the points of one run are its curve.
        flops_per_token: FLOPs per parameter and token.
        num_flops: number of compute values, evenly in the logarithm.
        num_bootstrap: samples of runs for the intervals, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: columns are missing, a value is not positive, a run has two sizes or one point, there are too few
            sizes, or no size between the smallest and the largest ever wins.
    """
    check_options(num_bootstrap, confidence)
    sizes, curves = _curves(points, flops_per_token)
    low = min(np.exp(log_c[0]) for log_c, _ in curves)
    high = max(np.exp(log_c[-1]) for log_c, _ in curves)
    grid = np.geomspace(low, high, num_flops)
    table = np.array([np.interp(np.log(grid), *curve, left=np.inf, right=np.inf) for curve in curves])
    everyone = np.ones((1, len(curves)), dtype=bool)
    winner, bracketed = _winners(sizes, table, everyone)
    chosen = bracketed[0]
    if len(np.unique(sizes[winner[0, chosen]])) < 2:
        raise UserError(
            "points must show at least two sizes that win over both smaller and larger ones, got "
            f"{len(np.unique(sizes[winner[0, chosen]]))}; add sizes, or longer runs"
        )
    exponent, factor = _line(sizes, winner, bracketed, grid)
    rng = np.random.default_rng(seed)
    present = rng.multinomial(len(curves), np.full(len(curves), 1 / len(curves)), size=num_bootstrap) > 0
    exponents, factors = _line(sizes, *_winners(sizes, table, present), grid)
    best = sizes[winner[0, chosen]]
    flops = grid[chosen]
    warnings = ["schedule: points inside a run whose learning rate had not decayed bias the envelope; see approach 3"]
    if chosen.mean() < 0.5:
        warnings.append(f"bracketed: at only {chosen.mean():.0%} of the compute values both neighbours lost")
    return Envelope(
        flops=flops,
        size=best,
        tokens=flops / (flops_per_token * best),
        loss=np.exp(table[winner[0, chosen], np.flatnonzero(chosen)]),
        exponent=interval(exponent, exponents, confidence),
        factor=interval(factor, factors, confidence),
        winners=tuple(float(size) for size in np.unique(best)),
        warnings=tuple(warnings),
    )


def _curves(points: Points, flops_per_token: float) -> tuple[Array, list[tuple[Array, Array]]]:
    """Return the size of every run and its (log C, log loss)."""
    if "N" not in points.variables or "D" not in points.variables:
        raise UserError(
            f"points must have N and D, got {', '.join(points.variables) or 'none'}; D counts the tokens seen so far"
        )
    n, d = (np.asarray(points.variables[name], dtype=np.float64) for name in ("N", "D"))
    y = np.asarray(points.response, dtype=np.float64)
    for name, values in (("N", n), ("D", d), ("loss", y)):
        if not (values > 0).all():
            raise UserError(f"{name} must be > 0, got {values[~(values > 0)][0]:g}; drop these points")
    sizes, curves = [], []
    for number, run_id in enumerate(points.run_ids):
        member = np.flatnonzero(points.run == number)
        if len(np.unique(n[member])) > 1 or len(np.unique(d[member])) < 2:
            raise UserError(
                f"run '{run_id}' must have one size and two points at least, got {len(np.unique(n[member]))} sizes and "
                f"{len(np.unique(d[member]))} points; name the run of every point"
            )
        member = member[np.argsort(d[member], kind="stable")]
        sizes.append(float(n[member[0]]))
        curves.append((np.log(flops_per_token * n[member] * d[member]), np.log(y[member])))
    if len(set(sizes)) < MIN_SIZES:
        raise UserError(f"N must have at least {MIN_SIZES} different values, got {len(set(sizes))}; add sizes")
    return np.array(sizes), curves


def _winners(sizes: Array, table: Array, present: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the run with the lowest loss (batch, k), and whether smaller and larger ones passed there too."""
    order = np.argsort(sizes, kind="stable")
    winner = np.empty((len(present), table.shape[1]), dtype=np.int64)
    bracketed = np.empty(winner.shape, dtype=bool)
    for row, kept in enumerate(present):
        losses = np.where(kept[:, None], table, np.inf)
        winner[row] = order[np.argmin(losses[order], axis=0)]
        passed = np.isfinite(losses)
        least = np.where(passed, sizes[:, None], np.inf).min(axis=0)
        most = np.where(passed, sizes[:, None], -np.inf).max(axis=0)
        bracketed[row] = (sizes[winner[row]] > least) & (sizes[winner[row]] < most)
    return winner, bracketed


def _line(sizes: Array, winner: NDArray[np.int64], bracketed: NDArray[np.bool_], grid: Array) -> tuple[Array, Array]:
    """Return exponents and factors (batch,) of log N* over log C; nan where fewer than two sizes won."""
    exponent, factor = np.full(len(winner), np.nan), np.full(len(winner), np.nan)
    z = np.log(grid)
    for row in range(len(winner)):
        best = np.log(sizes[winner[row, bracketed[row]]])
        if len(np.unique(best)) > 1:
            at = z[bracketed[row]]
            exponent[row] = np.cov(at, best, bias=True)[0, 1] / at.var()
            factor[row] = np.exp(best.mean() - exponent[row] * at.mean())
    return exponent, factor
