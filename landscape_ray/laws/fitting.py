"""The fitter that the laws share: variable projection, robust polish from many starts, and a certificate.

A law here is separable: linear in some parameters, all of them non-negative, and non-linear in a few exponents,

    prediction_i = sum_j linear_j * columns_ij(exponents),    linear_j >= 0,  lower <= exponents <= upper.

For given exponents the linear parameters are the solution of a small non-negative least-squares problem, solved
exactly. So the search runs over the exponents alone, where a handful of starts covers the box, and every start is
then polished in all parameters at once on the objective proper,

    objective = sum_i weights_i * huber(log y_i - log prediction_i),
    huber(r) = r^2 / 2 for |r| <= huber_delta, else huber_delta * (|r| - huber_delta / 2),

with analytic derivatives in float64. Everything is batched over a leading axis: starts and bootstrap draws are rows.

References:
    Golub and Pereyra 1973 (variable projection); Huber 1964 (the objective);
    Hoffmann et al. 2022, arXiv 2203.15556 (Huber on log loss, summed, as the convention of scaling laws).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError

Array = NDArray[np.float64]

_CONVERGED = 1e-17
"""The polish stops when the quadratic model promises less than this decrease, relative to the objective ..."""

_ROUNDING = 1e-13
"""... and steps that promise less than this are taken on trust: the objective itself can no longer tell."""

_WORTHWHILE = 1e-6
"""A step that fails although it promised this much, relative, is bent along the valley."""

_NEGLIGIBLE = 1e-9
"""A term that is nowhere a larger share of the prediction than this counts as zero."""

_MAX_ITERATIONS = 300
_CHUNK_ELEMENTS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SeparableLaw:
    """A law at the points of one data set: its columns as a function of the exponents.

    Attributes:
        columns: maps exponents (batch, k) to the columns (batch, n, m) and their slopes
            d columns / d exponents (batch, n, m, k). Scale the columns to be of order one.
        num_linear: m.
        lower: (k,) smallest exponents.
        upper: (k,) largest exponents.
        starts: (s, k) where the searches begin.
    """

    columns: Callable[[Array], tuple[Array, Array]]
    num_linear: int
    lower: Array
    upper: Array
    starts: Array


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where a batch of searches ended; parameters are the m linear ones followed by the k exponents.

    Attributes:
        parameters: (batch, m + k).
        objective: (batch,) summed objective.
        gradient: (batch, m + k) with respect to the logarithms of the parameters, zero where a bound holds one back.
        condition: (batch,) condition number of the Jacobian with columns scaled to unit length, bound ones left out.
        at_bound: (batch, m + k) whether a parameter ended on its bound.
    """

    parameters: Array
    objective: Array
    gradient: Array
    condition: Array
    at_bound: NDArray[np.bool_]

    def row(self, index: int) -> Optimum:
        """Return the search number `index` as a batch of one."""
        part = slice(index, index + 1)
        return Optimum(
            parameters=self.parameters[part],
            objective=self.objective[part],
            gradient=self.gradient[part],
            condition=self.condition[part],
            at_bound=self.at_bound[part],
        )


def huber(residual: Array, delta: float) -> Array:
    """Return the Huber loss of residuals: quadratic up to `delta`, linear beyond; `delta` = inf is half the square.

    >>> huber(np.array([0.5, 3.0]), 1.0)
    array([0.125, 2.5  ])
    """
    inner = np.minimum(np.abs(residual), delta)
    return np.asarray(inner * (np.abs(residual) - 0.5 * inner))


def solve_linear(columns: Array, y: Array, weights: Array) -> Array:
    """Return the non-negative linear parameters that minimise sum_i weights_i (1 - prediction_i / y_i)^2.

    Exact: every subset of non-zero parameters is solved, and the best one without a negative entry kept. That is
    2^m small systems, which for the m <= 5 of these laws is cheaper in a batch than an active-set iteration.

    Args:
        columns: (batch, n, m).
        y: (batch, n), positive.
        weights: (batch, n), non-negative.

    Returns:
        (batch, m).
    """
    relative = columns / y[..., None]
    weighted = (weights[..., None] * relative).swapaxes(1, 2)
    gram = weighted @ relative
    moment = weighted.sum(axis=2)
    scale = np.sqrt(np.einsum("bii->bi", gram))
    usable = scale > 0
    scale = np.where(usable, scale, 1.0)
    gram /= scale[:, :, None] * scale[:, None, :]
    moment /= scale
    best = np.zeros_like(moment)
    best_gain = np.zeros(len(moment))
    for subset in itertools.product((False, True), repeat=columns.shape[-1]):
        candidate = _solve_free(gram, moment, usable & np.array(subset))
        gain = np.einsum("bi,bi->b", candidate, moment)
        better = (candidate >= 0).all(axis=1) & (gain > best_gain)
        best[better], best_gain[better] = candidate[better], gain[better]
    return np.asarray(best / scale)


def search(law: SeparableLaw, y: Array, delta: float) -> Optimum:
    """Return where every start of the law ended, polished, the best first.

    Args:
        law: the law at the points of the data.
        y: (n,) observations, positive.
        delta: Huber threshold on the log residual; inf for least squares.

    Raises:
        UserError: the law is not positive at any start.
    """
    num_starts, num_points = len(law.starts), len(y)
    y = np.broadcast_to(y, (num_starts, num_points))
    columns, _ = law.columns(law.starts)
    linear = solve_linear(columns, y, np.ones_like(y))
    start = np.concatenate([linear, law.starts], axis=1)
    prediction = np.einsum("bnm,bm->bn", columns, linear)
    residual = np.log(y) - np.log(np.maximum(prediction, 1e-12))
    # Far below the size of the residuals the objective is almost piecewise linear: approach it from a smoother one.
    stage = float(np.median(np.abs(residual)))
    while stage > 10 * delta:
        start = polish(law, y, np.ones_like(y), stage, start, max_iterations=20).parameters
        stage /= 10
    found = polish(law, y, np.ones_like(y), delta, start)
    if not np.isfinite(found.objective).any():
        raise UserError("loss_nats must be described by some positive law, got none from any start; check the data")
    order = np.argsort(found.objective, kind="stable")
    return Optimum(
        parameters=found.parameters[order],
        objective=found.objective[order],
        gradient=found.gradient[order],
        condition=found.condition[order],
        at_bound=found.at_bound[order],
    )


def polish(
    law: SeparableLaw, y: Array, weights: Array, delta: float, start: Array, max_iterations: int = _MAX_ITERATIONS
) -> Optimum:
    """Return the local optima of the objective next to `start`, all parameters free within their bounds.

    A damped Gauss-Newton method. The curvature of a residual beyond delta is 0 for Newton and delta/|r| for
    reweighting; the former converges in few steps near the optimum, the latter descends from anywhere. The damping
    moves between the two and adds Marquardt's diagonal, so that the objective never rises.

    Args:
        law: the law at the points of the data.
        y: (batch, n) observations, positive.
        weights: (batch, n) weight of every point, non-negative.
        delta: Huber threshold on the log residual.
        start: (batch, m + k) parameters to start from.
        max_iterations: limit, for each row.
    """
    rows = max(1, _CHUNK_ELEMENTS // (y.shape[1] * start.shape[1]))
    parts = [
        _polish_chunk(law, y[i : i + rows], weights[i : i + rows], delta, start[i : i + rows], max_iterations)
        for i in range(0, len(start), rows)
    ]
    return Optimum(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _polish_chunk(
    law: SeparableLaw, y: Array, weights: Array, delta: float, start: Array, max_iterations: int
) -> dict[str, Any]:
    log_y = np.log(y)
    lower = np.concatenate([np.zeros(law.num_linear), law.lower])
    upper = np.concatenate([np.full(law.num_linear, np.inf), law.upper])
    q = np.clip(start, lower, upper)
    objective, residual, jacobian = _evaluate(law, log_y, weights, delta, q)
    damping = np.ones(len(q))
    live = np.arange(len(q))
    for _ in range(max_iterations):
        r, jac, w = residual[live], jacobian[live], weights[live]
        reweighted = np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
        newton = (np.abs(r) <= delta).astype(np.float64)
        mix = np.minimum(damping[live], 1.0)[:, None]
        transposed = jac.swapaxes(1, 2)
        descent = (transposed @ (w * np.clip(r, -delta, delta))[..., None])[..., 0]
        curvature = transposed @ ((w * (newton + mix * (reweighted - newton)))[..., None] * jac)
        diagonal = np.einsum("bnp,bn->bp", jac**2, w * reweighted)
        scale = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        curvature /= scale[:, :, None] * scale[:, None, :]
        index = np.arange(len(lower))
        curvature[:, index, index] += (1e-2 * damping[live])[:, None]
        held = ((q[live] <= lower) & (descent <= 0)) | ((q[live] >= upper) & (descent >= 0)) | (diagonal <= 0)
        step = _solve_free(curvature, descent / scale, ~held) / scale
        promised = 0.5 * np.einsum("bp,bp->b", step, np.where(held, 0.0, descent))
        trial = np.clip(q[live] + step, lower, upper)
        trial_objective, trial_residual, trial_jacobian = _evaluate(law, log_y[live], w, delta, trial)
        missed = np.flatnonzero((trial_objective >= objective[live]) & (promised > _WORTHWHILE * objective[live]))
        if len(missed):
            # The valley of nearly collinear parameters is curved: follow it by the exponents alone, and solve the rest.
            rows, bent = live[missed], trial[missed]
            columns, _ = law.columns(bent[:, law.num_linear :])
            bent[:, : law.num_linear] = solve_linear(columns, y[rows], w[missed] * reweighted[missed])
            new = _evaluate(law, log_y[rows], w[missed], delta, bent)
            better = new[0] < trial_objective[missed]
            for old, value in zip((trial, trial_objective, trial_residual, trial_jacobian), (bent, *new), strict=True):
                old[missed[better]] = value[better]
        near = (damping[live] <= 1.0) & (promised <= _ROUNDING * objective[live] + 1e-30)
        accepted = (trial_objective < objective[live]) | near & (trial_objective <= objective[live] * (1 + _ROUNDING))
        done = (damping[live] <= 1.0) & (promised <= _CONVERGED * objective[live] + 1e-30)
        done |= (near & ~accepted) | (damping[live] > 1e12)
        moved = live[accepted]
        q[moved], objective[moved] = trial[accepted], trial_objective[accepted]
        residual[moved], jacobian[moved] = trial_residual[accepted], trial_jacobian[accepted]
        damping[live] = np.where(accepted, np.maximum(damping[live] / 5, 1e-9), np.maximum(damping[live] * 4, 1e-3))
        live = live[~done]
        if not len(live):
            break
    return _diagnose(q, objective, residual, jacobian, weights, delta, lower, upper)


def _evaluate(law: SeparableLaw, log_y: Array, weights: Array, delta: float, q: Array) -> tuple[Array, Array, Array]:
    """Return objective (batch,), log residuals (batch, n) and d log prediction / d parameters (batch, n, m + k)."""
    linear, exponents = q[:, : law.num_linear], q[:, law.num_linear :]
    columns, slopes = law.columns(exponents)
    prediction = np.einsum("bnm,bm->bn", columns, linear)
    possible = (prediction > 0).all(axis=1)
    prediction = np.where(prediction > 0, prediction, 1.0)
    residual = log_y - np.log(prediction)
    jacobian = np.concatenate([columns, np.einsum("bnmk,bm->bnk", slopes, linear)], axis=2) / prediction[..., None]
    objective = np.einsum("bn,bn->b", weights, huber(residual, delta))
    return np.where(possible, objective, np.inf), residual, jacobian


def _diagnose(
    q: Array,
    objective: Array,
    residual: Array,
    jacobian: Array,
    weights: Array,
    delta: float,
    lower: Array,
    upper: Array,
) -> dict[str, Any]:
    descent = np.einsum("bnp,bn->bp", jacobian, weights * np.clip(residual, -delta, delta))
    # A linear parameter whose term is rounding noise is at its bound as much as one that is exactly zero.
    margin = np.where(np.isinf(upper), _NEGLIGIBLE / np.maximum(np.abs(jacobian).max(axis=1), 1e-300), 0.0)
    at_bound = (q <= lower + margin) | (q >= upper)
    pushed = ((q <= lower) & (descent <= 0)) | ((q >= upper) & (descent >= 0))
    reweighted = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    matrix = jacobian * np.sqrt(weights * reweighted)[..., None]
    length = np.sqrt(np.einsum("bnp,bnp->bp", matrix, matrix))
    condition = np.ones(len(q))
    for b in range(len(q)) if len(q) <= 64 else ():
        kept = (length[b] > 0) & ~pushed[b]
        if kept.sum() > 1:
            condition[b] = np.linalg.cond(matrix[b][:, kept] / length[b, kept])
    return {
        "parameters": q,
        "objective": objective,
        "gradient": np.where(pushed, 0.0, -descent * q),
        "condition": condition,
        "at_bound": at_bound,
    }


def _solve_free(matrix: Array, right: Array, free: NDArray[np.bool_]) -> Array:
    """Return the solutions (batch, p) of the symmetric systems restricted to the free entries; zero elsewhere."""
    both = free[:, :, None] & free[:, None, :]
    index = np.arange(matrix.shape[-1])
    restricted = np.where(both, matrix, 0.0)
    # A ridge at rounding level keeps exactly collinear columns solvable; held entries get a one.
    restricted[:, index, index] = np.where(free, restricted[:, index, index] + 1e-14, 1.0)
    return np.asarray(np.linalg.solve(restricted, np.where(free, right, 0.0)[..., None])[..., 0])
