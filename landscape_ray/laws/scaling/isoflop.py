"""Approach 2 of Hoffmann et al.: a parabola through every IsoFLOP profile, and the power law of its vertices.

    L = c0 + c1 log N + c2 (log N)^2 at one compute C,    N*(C) = exp(-c1 / (2 c2)),    N* = k C^a

Legend: N parameters, D tokens, C training FLOPs, L loss (nats per token); N*, D* what is best for a given C.

The parabola is a Taylor series cut after two terms. Where the exponents of size and data differ, or the sizes do not
lie evenly about the best one, its vertex is off even without noise, by a factor that hangs on the exponents and the
grid alone; a grid that drifts biases the exponent too. So every answer here comes with the bias that the method has on
noise-free losses of the Chinchilla law fitted to the same points, whose best sizes are known in closed form.

A vertex outside the sizes that were run is no minimum that was seen: such a budget is refused.

References:
    Hoffmann et al. 2022, arXiv 2203.15556 (the approach); Czech et al. 2026, arXiv 2603.22339 (its bias).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import check_options, fit
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.propagate import Interval, interval
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA, FLOPS_PER_TOKEN, optimal_size

Array: TypeAlias = NDArray[np.float64]

MIN_SIZES = 4
"""Fewest sizes of a profile: three fix a parabola, and leave nothing to judge it by."""

SAME_BUDGET = 0.02
"""Budgets that differ by less than this, relative, are one profile."""

LARGE_BIAS = 0.02
"""A bias of the best size by more than this, relative, is worth a warning."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class IsoFlops:
    """What the parabolas of IsoFLOP profiles say.

    Attributes:
        flops: (k,) budgets whose vertex was seen.
        size: vertices N*.
        loss: losses there.
        exponent: a in N* = k C^a.
        factor: k.
        exponent_bias: a of the method on noise-free losses of the Chinchilla law fitted to the same points, minus the
            true one; nan if that law could not be fitted.
        size_bias: (k,) relative error of the vertices on these losses: .04 is 4 % too large.
        surface: the fit of that law, None if there is none.
        refused: reason by budget that was refused.
        warnings: each "name: sentence".
    """

    flops: Array
    size: Interval
    loss: Interval
    exponent: Interval
    factor: Interval
    exponent_bias: float
    size_bias: Array
    surface: FitResult | None
    refused: Mapping[float, str]
    warnings: tuple[str, ...]

    def predict(self, flops: ArrayLike) -> Interval:
        """Return N* for other budgets (m,)."""
        budgets = np.atleast_1d(np.asarray(flops, dtype=np.float64))
        samples = self.factor.samples * budgets**self.exponent.samples
        return interval(self.factor.value * budgets**self.exponent.value, samples, self.size.confidence)


def fit_isoflops(
    points: Points,
    *,
    flops_per_token: float = FLOPS_PER_TOKEN,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> IsoFlops:
    """Return the best size of every budget and its power law, by approach 2, with its bias.

    Args:
        points: with variables N and C, or N and D, and the loss; points of one budget form a profile.
        flops_per_token: FLOPs per parameter and token.
        num_bootstrap: samples of residuals for the intervals, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: columns are missing, a loss, size or budget is not positive, or fewer than two budgets are left.

    >>> c, offset = (axis.ravel() for axis in np.meshgrid([6e18, 6e19, 6e20], np.linspace(-1, 1, 7)))
    >>> n = np.sqrt(c / 6) * np.exp(offset)
    >>> loss = 1.7 + 400 * n**-0.3 + 400 * (c / (6 * n)) ** -0.3
    >>> found = fit_isoflops(Points({"N": n, "C": c}, loss), num_bootstrap=0)
    >>> found.size.value.round(-3).tolist(), round(float(found.exponent.value[0]), 9)
    ([1000000000.0, 3162278000.0, 10000000000.0], 0.5)
    """
    check_options(num_bootstrap, confidence)
    n, c, y = _columns(points, flops_per_token)
    budgets, profile = _profiles(c)
    kept, refused = [], {}
    for number, budget in enumerate(budgets):
        member = profile == number
        reason = _refusal(n[member], y[member])
        if reason:
            refused[float(budget)] = reason
        else:
            kept.append(number)
    if len(kept) < 2:
        reasons = "; ".join(f"C = {budget:.3g}: {reason}" for budget, reason in refused.items())
        raise UserError(
            f"points must hold at least two budgets whose best size was seen, got {len(kept)} ({reasons or 'one C'}); "
            "add sizes on the other side of the best one"
        )
    flops = budgets[kept]
    members = [np.flatnonzero(profile == number) for number in kept]
    vertex, lowest, residual = _vertices(n, y[None], members)
    exponent, factor = _power(vertex, flops)
    drawn = _resample(y, residual, members, num_bootstrap, seed)
    with np.errstate(all="ignore"):
        vertices, losses, _ = _vertices(n, drawn, members)
        exponents, factors = _power(vertices, flops)
    surface, bias, exponent_bias = _bias(n, c, y, members, flops, flops_per_token)
    warnings = [f"refused: C = {budget:.3g}: {reason}" for budget, reason in refused.items()]
    warnings += _warnings(vertices, bias, exponent_bias, surface)
    return IsoFlops(
        flops=flops,
        size=interval(vertex[0], vertices, confidence),
        loss=interval(lowest[0], losses, confidence),
        exponent=interval(exponent, exponents, confidence),
        factor=interval(factor, factors, confidence),
        exponent_bias=exponent_bias,
        size_bias=bias,
        surface=surface,
        refused=refused,
        warnings=tuple(warnings),
    )


def _columns(points: Points, flops_per_token: float) -> tuple[Array, Array, Array]:
    x = {name: np.asarray(values, dtype=np.float64) for name, values in points.variables.items()}
    if "N" not in x or not ("C" in x or "D" in x):
        raise UserError(f"points must have N and C, or N and D, got {', '.join(x) or 'none'}; name the columns so")
    c = x["C"] if "C" in x else flops_per_token * x["N"] * x["D"]
    y = np.asarray(points.response, dtype=np.float64)
    for name, values in (("N", x["N"]), ("C", c), ("loss", y)):
        if not (values > 0).all():
            raise UserError(f"{name} must be > 0, got {values[~(values > 0)][0]:g}; drop these points")
    return x["N"], c, y


def _profiles(flops: Array) -> tuple[Array, NDArray[np.int64]]:
    """Return the budgets (k,) and the number of the budget of every point: neighbours within 2 % are one."""
    order = np.argsort(flops, kind="stable")
    step = np.diff(np.log(flops[order])) > np.log1p(SAME_BUDGET)
    number = np.empty(len(flops), dtype=np.int64)
    number[order] = np.concatenate([[0], np.cumsum(step)])
    budgets = np.array([np.exp(np.log(flops[number == k]).mean()) for k in range(number.max() + 1)])
    return budgets, number


def _refusal(sizes: Array, losses: Array) -> str:
    distinct = len(np.unique(sizes))
    if distinct < MIN_SIZES:
        return f"{distinct} sizes, fewer than {MIN_SIZES}"
    z = np.log(sizes)
    _, slope, curvature = np.polynomial.polynomial.polyfit(z - z.mean(), losses, 2)
    if curvature <= 0:
        return "the profile has no minimum"
    vertex = z.mean() - slope / (2 * curvature)
    if not z.min() <= vertex <= z.max():
        return f"the vertex {np.exp(vertex):.3g} lies outside the sizes {sizes.min():.3g} to {sizes.max():.3g}"
    return ""


def _vertices(n: Array, y: Array, members: list[NDArray[np.int64]]) -> tuple[Array, Array, Array]:
    """Return vertices and losses there (batch, k), and the residuals (n,) of the first row, inflated.

    A vertex that was not seen, outside the sizes or of a parabola that opens downward, is nan.
    """
    vertex, lowest = (np.empty((len(y), len(members))) for _ in range(2))
    residual = np.zeros(len(n))
    for number, member in enumerate(members):
        z = np.log(n[member])
        centred = z - z.mean()
        design = np.stack([np.ones_like(z), centred, centred**2], axis=1)
        coefficients = y[:, member] @ np.linalg.pinv(design).T
        _, slope, curvature = coefficients.T
        offset = -slope / (2 * curvature)
        seen = (curvature > 0) & (centred.min() <= offset) & (offset <= centred.max())
        vertex[:, number] = np.where(seen, np.exp(z.mean() + np.where(seen, offset, 0.0)), np.nan)
        lowest[:, number] = np.where(seen, coefficients[:, 0] - slope**2 / (4 * curvature), np.nan)
        if len(y):
            off = y[0, member] - design @ coefficients[0]
            residual[member] = off * np.sqrt(len(member) / max(len(member) - 3, 1))
    return vertex, lowest, residual


def _power(vertex: Array, flops: Array) -> tuple[Array, Array]:
    """Return exponents and factors (batch,) of the least-squares line of log N* over log C, nan where a vertex is."""
    z = np.log(flops)
    centred = z - z.mean()
    exponent = np.log(vertex) @ centred / (centred @ centred)
    return exponent, np.exp(np.log(vertex).mean(axis=1) - exponent * z.mean())


def _resample(y: Array, residual: Array, members: list[NDArray[np.int64]], count: int, seed: int) -> Array:
    """Return losses (count, n): the parabolas plus residuals drawn from all profiles."""
    rng = np.random.default_rng(seed)
    used = np.concatenate(members)
    pool = residual[used] - residual[used].mean()
    fitted = y.copy()
    for member in members:
        fitted[member] = y[member] - residual[member] / np.sqrt(len(member) / max(len(member) - 3, 1))
    return np.asarray(fitted + pool[rng.integers(len(pool), size=(count, len(y)))])


def _bias(
    n: Array, c: Array, y: Array, members: list[NDArray[np.int64]], flops: Array, flops_per_token: float
) -> tuple[FitResult | None, Array, float]:
    """Return the Chinchilla fit of the same points, the relative bias of the vertices (k,) and that of the exponent."""
    none = None, np.full(len(flops), np.nan), float("nan")
    d = c / (flops_per_token * n)
    try:
        surface = fit(CHINCHILLA, Points({"N": n, "D": d}, y), num_bootstrap=0)
    except UserError:
        return none
    p = surface.parameters
    if surface.status == "failed" or not (p["A"] > 0 and p["B"] > 0):
        return none
    exact = CHINCHILLA.predict({"N": n, "D": d}, p)
    vertex, _, _ = _vertices(n, exact[None], members)
    best = optimal_size(p, flops, flops_per_token)
    exponent, _ = _power(vertex, flops)
    return surface, vertex[0] / best - 1, float(exponent[0] - p["beta"] / (p["alpha"] + p["beta"]))


def _warnings(vertices: Array, bias: Array, exponent_bias: float, surface: FitResult | None) -> list[str]:
    warnings = []
    lost = float(np.isnan(vertices).any(axis=1).mean()) if len(vertices) else 0.0
    if lost > 0.05:
        warnings.append(f"unstable: in {lost:.0%} of the samples a vertex lies outside the sizes that were run")
    if surface is None:
        warnings.append("bias_unknown: no Chinchilla law could be fitted to these points to measure the bias with")
    elif not np.abs(bias).max() <= LARGE_BIAS:
        warnings.append(
            f"bias: on noise-free losses of the law fitted to these points, the parabolas are off by {bias.min():+.1%} "
            f"to {bias.max():+.1%} in the best size and by {exponent_bias:+.4f} in its exponent; prefer approach 3"
        )
    return warnings
