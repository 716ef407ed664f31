"""The fitter that the laws share: variable projection, robust polish from many starts, and a certificate.

A law here is separable: linear in some parameters, which are non-negative unless declared free, and non-linear in a few
exponents,

    prediction_i = offset_i(exponents) + sum_j linear_j * columns_ij(exponents),    lower <= exponents <= upper.

For given exponents the linear parameters are the solution of a small non-negative least-squares problem, solved
exactly. So the search runs over the exponents alone, where a handful of starts covers the box, and every start is
then polished in all parameters at once on the objective proper,

    objective = sum_i weights_i * huber(residual_i) + sum_k stiffness_k / 2 * (exponents_k - centre_k)^2,
    residual_i = log y_i - log prediction_i, or y_i - prediction_i in raw space,
    huber(r) = r^2 / 2 for |r| <= huber_delta, else huber_delta * (|r| - huber_delta / 2),

with exact derivatives in float64. Everything is batched over a leading axis: starts, bootstrap draws and points of a
profile are rows, each with bounds of its own.

References:
    Golub and Pereyra 1973 (variable projection); Huber 1964 (the objective);
    Hoffmann et al. 2022, arXiv 2203.15556 (Huber on log loss, summed, as the convention of scaling laws).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.separable import SeparableLaw, solve_free

Array = NDArray[np.float64]

_CONVERGED = 1e-17
"""The polish stops when the quadratic model promises less than this decrease, relative to the objective ..."""

_CONVERGED_NEAR = 1e-12
"""... for resamples, whose optima are known well enough within 1e-4 of their spread ..."""

_ROUNDING = 1e-13
"""... and steps that promise less than this are taken on trust: the objective itself can no longer tell."""

_WORTHWHILE = 1e-6
"""A step that fails although it promised this much, relative, is bent along the valley."""

_NEGLIGIBLE = 1e-9
"""A term that is nowhere a larger share of the prediction than this counts as zero."""

_MAX_POLISHED = 32
"""Of more starts than this, only so many are polished: half of them those whose projection fits best."""

_MAX_ITERATIONS = 300
_CHUNK_ELEMENTS = 300_000


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

    def rows(self, index: Any) -> Optimum:
        """Return some of the searches, by anything that indexes the batch."""
        return Optimum(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def huber(residual: Array, delta: float) -> Array:
    """Return the Huber loss of residuals: quadratic up to `delta`, linear beyond; `delta` = inf is half the square.

    >>> huber(np.array([0.5, 3.0]), 1.0)
    array([0.125, 2.5  ])
    """
    inner = np.minimum(np.abs(residual), delta)
    return np.asarray(inner * (np.abs(residual) - 0.5 * inner))


def search(law: SeparableLaw, y: Array, delta: float, weights: Array | None = None) -> Optimum:
    """Return where the starts of the law ended, polished, the best first.

    Args:
        law: the law at the points of the data.
        y: (n,) observations, positive in log space.
        delta: Huber threshold on the residual; inf for least squares.
        weights: (n,) weight of every point, non-negative; None for 1.

    Raises:
        UserError: the law is not positive at any start.
    """
    starts = law.starts
    each = np.ones_like(y) if weights is None else weights
    observed, weight = (np.broadcast_to(a, (len(starts), len(y))) for a in (y, each))
    start = np.concatenate([law.project(starts, observed, weight), starts], axis=1)
    prediction = law.predict(start)
    if len(starts) > _MAX_POLISHED:
        off = 1 - prediction / observed if law.space == "log" else observed - prediction
        order = np.argsort(np.einsum("bn,bn->b", weight, off**2), kind="stable")
        rest = order[_MAX_POLISHED // 2 :]
        spread = rest[np.linspace(0, len(rest) - 1, _MAX_POLISHED - _MAX_POLISHED // 2).astype(int)]
        kept = np.concatenate([order[: _MAX_POLISHED // 2], spread])
        start, prediction, observed, weight = start[kept], prediction[kept], observed[kept], weight[kept]
    found = descend(law, observed, weight, delta, start)
    if not np.isfinite(found.objective).any():
        raise UserError("loss_nats must be described by some positive law, got none from any start; check the data")
    return found.rows(np.argsort(found.objective, kind="stable"))


def descend(law: SeparableLaw, y: Array, weights: Array, delta: float, start: Array, *, near: bool = False) -> Optimum:
    """Return the local optima next to `start`, see :func:`polish`, by way of smoother objectives where that helps.

    Far below the size of the residuals the objective is almost piecewise linear, and a direct polish stops short of its
    kinks: it is approached by thresholds that fall from the residuals' size by tens.

    Args:
        law: see :func:`polish`.
        y: see :func:`polish`.
        weights: see :func:`polish`.
        delta: see :func:`polish`.
        start: see :func:`polish`.
        near: see :func:`polish`.
    """
    stage = float(np.median(np.abs(_residual(law, y, law.predict(start)))))
    while stage > 10 * delta:
        start = polish(law, y, weights, stage, start, max_iterations=20, near=near).parameters
        stage /= 10
    return polish(law, y, weights, delta, start, near=near)


def _residual(law: SeparableLaw, y: Array, prediction: Array) -> Array:
    return np.log(y) - np.log(np.maximum(prediction, 1e-12)) if law.space == "log" else y - prediction


def polish(
    law: SeparableLaw,
    y: Array,
    weights: Array,
    delta: float,
    start: Array,
    max_iterations: int = _MAX_ITERATIONS,
    *,
    lower: Array | None = None,
    upper: Array | None = None,
    near: bool = False,
) -> Optimum:
    """Return the local optima of the objective next to `start`, all parameters free within their bounds.

    A damped Gauss-Newton method. The curvature of a residual beyond delta is 0 for Newton and delta/|r| for
    reweighting; the former converges in few steps near the optimum, the latter descends from anywhere. The damping
    moves between the two and adds Marquardt's diagonal, so that the objective never rises.

    Args:
        law: the law at the points of the data.
        y: (batch, n) observations, positive in log space.
        weights: (batch, n) weight of every point, non-negative.
        delta: Huber threshold on the residual.
        start: (batch, m + k) parameters to start from.
        max_iterations: limit, for each row.
        lower: (batch, k) smallest exponents of each row, in place of the law's; equal to `upper` holds one fixed.
        upper: (batch, k) largest.
        near: the optima are close to the start, and a small part of what resampling moves them by is close enough.
    """
    rows = max(1, _CHUNK_ELEMENTS // (y.shape[1] * start.shape[1]))
    low = np.broadcast_to(law.lower if lower is None else lower, (len(start), len(law.lower)))
    high = np.broadcast_to(law.upper if upper is None else upper, low.shape)
    parts = []
    for i in range(0, len(start), rows):
        part = slice(i, i + rows)
        parts.append(
            _polish_chunk(law, y[part], weights[part], delta, start[part], max_iterations, low[part], high[part], near)
        )
    return Optimum(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _polish_chunk(
    law: SeparableLaw,
    y: Array,
    weights: Array,
    delta: float,
    start: Array,
    max_iterations: int,
    exponents_lower: Array,
    exponents_upper: Array,
    near_start: bool,
) -> dict[str, Any]:
    linear_lower = np.broadcast_to(law.linear_lower, (len(start), law.num_linear))
    lower = np.concatenate([linear_lower, exponents_lower], axis=1)
    upper = np.concatenate([np.full_like(linear_lower, np.inf), exponents_upper], axis=1)
    stiffness, centre = _penalty(law)
    q = np.clip(start, lower, upper)
    objective, residual, jacobian = _evaluate(law, y, weights, delta, q)
    damping = np.full(len(q), 0.2 if near_start else 1.0)
    converged = _CONVERGED_NEAR if near_start else _CONVERGED
    live = np.arange(len(q))
    for _ in range(max_iterations):
        r, jac, w = residual[live], jacobian[live], weights[live]
        reweighted = np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
        newton = (np.abs(r) <= delta).astype(np.float64)
        mix = np.minimum(damping[live], 1.0)[:, None]
        transposed = jac.swapaxes(1, 2)
        descent = (transposed @ (w * np.clip(r, -delta, delta))[..., None])[..., 0] - stiffness * (q[live] - centre)
        curvature = transposed @ ((w * (newton + mix * (reweighted - newton)))[..., None] * jac)
        diagonal = (np.square(transposed) @ (w * reweighted)[..., None])[..., 0] + stiffness
        scale = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        curvature /= scale[:, :, None] * scale[:, None, :]
        index = np.arange(q.shape[1])
        curvature[:, index, index] += (1e-2 * damping[live])[:, None] + stiffness / scale**2
        low, high = lower[live], upper[live]
        held = ((q[live] <= low) & (descent <= 0)) | ((q[live] >= high) & (descent >= 0)) | (diagonal <= 0)
        step = solve_free(curvature, descent / scale, ~held) / scale
        promised = 0.5 * np.einsum("bp,bp->b", step, np.where(held, 0.0, descent))
        trial = np.clip(q[live] + step, low, high)
        trial_objective, trial_residual, trial_jacobian = _evaluate(law, y[live], w, delta, trial)
        missed = np.flatnonzero((trial_objective >= objective[live]) & (promised > _WORTHWHILE * objective[live]))
        if len(missed):
            # The valley of nearly collinear parameters is curved: follow it by the exponents alone, and solve the rest.
            rows, bent = live[missed], trial[missed]
            exponents = bent[:, law.num_linear :]
            bent[:, : law.num_linear] = law.project(exponents, y[rows], w[missed] * reweighted[missed])
            new = _evaluate(law, y[rows], w[missed], delta, bent)
            better = new[0] < trial_objective[missed]
            for old, value in zip((trial, trial_objective, trial_residual, trial_jacobian), (bent, *new), strict=True):
                old[missed[better]] = value[better]
        near = (damping[live] <= 1.0) & (promised <= _ROUNDING * objective[live] + 1e-30)
        accepted = (trial_objective < objective[live]) | near & (trial_objective <= objective[live] * (1 + _ROUNDING))
        done = (damping[live] <= 1.0) & (promised <= converged * objective[live] + 1e-30)
        done |= (near & ~accepted) | (damping[live] > 1e12)
        moved = live[accepted]
        q[moved], objective[moved] = trial[accepted], trial_objective[accepted]
        residual[moved], jacobian[moved] = trial_residual[accepted], trial_jacobian[accepted]
        damping[live] = np.where(accepted, np.maximum(damping[live] / 5, 1e-9), np.maximum(damping[live] * 4, 1e-3))
        live = live[~done]
        if not len(live):
            break
    return _diagnose(law, q, objective, residual, jacobian, weights, delta, lower, upper)


def _penalty(law: SeparableLaw) -> tuple[Array, Array]:
    """Return stiffness and centre (m + k,) of the penalty, zero for the linear parameters."""
    none = np.zeros(law.num_linear)
    stiffness = np.zeros(len(law.lower)) if law.stiffness is None else law.stiffness
    centre = np.zeros(len(law.lower)) if law.centre is None else law.centre
    return np.concatenate([none, stiffness]), np.concatenate([none, centre])


def _evaluate(law: SeparableLaw, y: Array, weights: Array, delta: float, q: Array) -> tuple[Array, Array, Array]:
    """Return objective (batch,), residuals (batch, n) and their slopes by minus the parameters (batch, n, m + k)."""
    linear, exponents = q[:, : law.num_linear], q[:, law.num_linear :]
    columns, slopes = law.columns(exponents)
    prediction = (columns @ linear[..., None])[..., 0]
    bent = np.zeros((*columns.shape[:2], slopes.shape[-1]))
    for j in range(law.num_linear):  # most columns have few slopes that are not 0; an einsum would not know
        bent += slopes[:, :, j] * linear[:, j, None, None]
    if law.offset is not None:
        offset, offset_slopes = law.offset(exponents)
        prediction, bent = prediction + offset, bent + offset_slopes
    jacobian = np.concatenate([columns, bent], axis=2)
    if law.space == "log":
        possible = (prediction > 0).all(axis=1)
        prediction = np.where(prediction > 0, prediction, 1.0)
        residual = np.log(y) - np.log(prediction)
        jacobian /= prediction[..., None]
    else:
        possible = np.isfinite(prediction).all(axis=1)
        residual = y - prediction
    stiffness, centre = _penalty(law)
    objective = np.einsum("bn,bn->b", weights, huber(residual, delta)) + 0.5 * (q - centre) ** 2 @ stiffness
    return np.where(possible, objective, np.inf), residual, jacobian


def _diagnose(
    law: SeparableLaw,
    q: Array,
    objective: Array,
    residual: Array,
    jacobian: Array,
    weights: Array,
    delta: float,
    lower: Array,
    upper: Array,
) -> dict[str, Any]:
    stiffness, centre = _penalty(law)
    descent = np.einsum("bnp,bn->bp", jacobian, weights * np.clip(residual, -delta, delta)) - stiffness * (q - centre)
    # A linear parameter whose term is rounding noise is at its bound as much as one that is exactly zero.
    margin = np.where(np.isinf(upper), _NEGLIGIBLE / np.maximum(np.abs(jacobian).max(axis=1), 1e-300), 0.0)
    fixed = lower == upper
    at_bound = ((q <= lower + margin) | (q >= upper)) & ~fixed
    pushed = ((q <= lower) & (descent <= 0)) | ((q >= upper) & (descent >= 0)) | fixed
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
