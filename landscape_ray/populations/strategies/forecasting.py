"""What a population's own losses say about where its members will end: one annealing law, fitted to all lineages.

    L = L0 + A S^-alpha + sum_k c_k N_k

Legend: S progress, the sum of f(eta) over the updates of a lineage, f(eta) = eta / (1 + (eta / eta_max)^2): a rate
beyond eta_max makes less of an update, not more; N_k noise floor that forgets at the speed tau_k in intrinsic time,
N_k <- N_k + (1 - exp(-eta / tau_k)) (eta - N_k), so that it follows the learning rate with a delay and tends to eta
where the rate stays; L0, A, c_k >= 0, alpha, eta_max fitted.

Why not the momentum annealing law of `landscape_ray.laws`: it compares schedules of one peak. Members of a population
differ in their peaks, and under that law a higher one is always better, now and at the end. Here the rate acts on three
things that differences between members, and changes within a lineage, tell apart: the speed of progress, the height of
the noise floor, which a cooldown removes, and the limit beyond which nothing is gained. A mixture of exponential
kernels stands for the power-law kernel of the functional scaling law (Li et al. 2025), because it has a state of a few
numbers: what a member inherits with a donor's weights.

For given (alpha, eta_max) the law is linear, and solved exactly by non-negative least squares; these two are searched
on a grid.

References:
    Li et al. 2025, arXiv 2509.19189 (functional scaling law); Tissue et al. 2024, arXiv 2408.11029 (annealing law);
    Wu et al. 2018, arXiv 1803.02021 (short-horizon bias).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.populations.decisions import Point

Array: TypeAlias = NDArray[np.float64]

ALPHAS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3, 1.7])
NUM_TAUS = 5
NUM_LIMITS = 8
MAX_ROWS = 4000
"""Evaluations that a fit sees, the newest; the cost of a fit and the size of the state are bounded by it."""


@dataclass
class LineageState:
    """What the law needs to know of a lineage's past.

    Attributes:
        progress: (NUM_LIMITS + 1,) S for each candidate of eta_max.
        noise: (NUM_TAUS,) N_k.
        step: updates completed.
    """

    progress: Array
    noise: Array
    step: int

    def copy(self) -> LineageState:
        """Return an equal state of its own."""
        return LineageState(self.progress.copy(), self.noise.copy(), self.step)


@dataclass(frozen=True)
class Fit:
    """The fitted law.

    Attributes:
        limit: index of eta_max.
        alpha: exponent.
        coefficients: (2 + NUM_TAUS,) L0, A S_ref^-alpha, c_k.
        reference: S_ref.
        rmse: weighted root mean square of the relative residuals.
    """

    limit: int
    alpha: float
    coefficients: Array
    reference: float
    rmse: float

    def loss(self, progress: Array, noise: Array) -> Array:
        """Return L for S (..., NUM_LIMITS + 1) and N (..., NUM_TAUS)."""
        signal = (progress[..., self.limit] / self.reference) ** -self.alpha
        return np.asarray(
            self.coefficients[0] + self.coefficients[1] * signal + noise @ self.coefficients[2:], dtype=np.float64
        )


class Forecaster:
    """Collects the evaluations of all lineages, fits the law and predicts.

    Args:
        low: lowest learning rate that a member may have.
        high: highest.
        num_steps: horizon, in updates.
    """

    def __init__(self, low: float, high: float, num_steps: int) -> None:
        # The fastest noise forgets in about one update at a middling rate, the slowest in a quarter of the longest run.
        self.taus = np.geomspace(2 * math.sqrt(low * high), max(high * num_steps / 4, 4 * high), NUM_TAUS)
        self.limits = np.append(np.geomspace(4 * low, high, NUM_LIMITS), math.inf)
        self.rows: list[list[float]] = []
        """For each evaluation its step, loss, S for each eta_max, N for each tau."""

    def fresh(self) -> LineageState:
        """Return the state of weights that have just been drawn."""
        return LineageState(np.zeros(len(self.limits)), np.zeros(len(self.taus)), 0)

    def advance(self, state: LineageState, lr: float, num_updates: int) -> None:
        """Let a lineage make updates at one learning rate."""
        state.progress += num_updates * lr / (1 + (lr / self.limits) ** 2)
        state.noise = lr + (state.noise - lr) * np.exp(-num_updates * lr / self.taus)
        state.step += num_updates

    def follow(self, state: LineageState, rates: Array) -> LineageState:
        """Return the state after updates at the given rates, shape (n,)."""
        end = state.copy()
        end.progress += (rates[:, None] / (1 + (rates[:, None] / self.limits) ** 2)).sum(axis=0)
        left = np.exp(-rates[:, None] / self.taus)
        after = np.concatenate([np.cumprod(left[::-1], axis=0)[::-1], np.ones((1, len(self.taus)))])
        end.noise = end.noise * after[0] + ((1 - left) * rates[:, None] * after[1:]).sum(axis=0)
        end.step += len(rates)
        return end

    def learn(self, state: LineageState, points: Sequence[Point]) -> list[list[float]]:
        """Take evaluations of a lineage in, advancing its state; return their rows."""
        rows = []
        for point in points:
            self.advance(state, point.lr, point.step - state.step)
            if math.isfinite(point.loss):
                # averaged weights have lost their noise, as after a cooldown
                noise = state.noise if math.isnan(point.averaged) else np.zeros_like(state.noise)
                rows.append([float(point.step), point.annealed, *state.progress.tolist(), *noise.tolist()])
        self.rows = [*self.rows, *rows][-MAX_ROWS:]
        return rows

    def law(self, fit: Fit, rows: list[list[float]]) -> float:
        """Return the mean loss of the law at evaluations."""
        table = np.array(rows)
        split = 2 + len(self.limits)
        return float(np.mean(fit.loss(table[:, 2:split], table[:, split:])))

    def excess(self, fit: Fit, rows: list[list[float]]) -> float:
        """Return how far evaluations are above the law on average."""
        return float(np.mean([row[1] for row in rows])) - self.law(fit, rows)

    def fit(self, skip_steps: int = 0) -> Fit | None:
        """Return the law fitted to everything seen after `skip_steps`, later evaluations counting more; None if few."""
        from scipy.optimize import nnls  # here, as scipy takes longer to import than the rest

        rows = np.array([row for row in self.rows if row[0] > skip_steps])
        if len(rows) < 4 * (2 + len(self.taus)):
            return None
        step, loss = rows[:, 0], rows[:, 1]
        progress, noise = rows[:, 2 : 2 + len(self.limits)], rows[:, 2 + len(self.limits) :]
        scale = np.maximum(noise.max(axis=0), 1e-300)
        # Later evaluations count more, and those far above the best so far less: the law need not hold for runs that
        # nobody will copy, such as those that have not left the first plateau.
        order = np.argsort(step, kind="stable")
        lowest = np.empty_like(loss)
        lowest[order] = np.minimum.accumulate(loss[order])
        base = (step / step.max()) * (lowest / loss) ** 2 / loss
        weight = base
        best: Fit | None = None
        for _ in range(2):  # the second time with the outliers of the first held down
            best = None
            for limit in range(len(self.limits)):
                s = progress[:, limit]
                if s.min() <= 0:
                    continue
                reference = float(np.exp(np.log(s).mean()))
                for alpha in ALPHAS.tolist():
                    columns = np.column_stack([np.ones_like(s), (s / reference) ** -alpha, noise / scale])
                    found, norm = nnls(columns * weight[:, None], loss * weight)
                    rmse = float(norm / math.sqrt(len(loss)))
                    if best is None or rmse < best.rmse:
                        coefficients = np.concatenate([found[:2], found[2:] / scale])
                        best = Fit(limit, alpha, coefficients, reference, rmse)
            if best is None:
                return None
            residual = np.abs(loss / best.loss(progress, noise) - 1)
            excess = np.maximum(residual / max(2 * float(np.median(residual)), 1e-12), 1)
            weight = base / np.sqrt(excess)
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen, JSON-able."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.rows = [list(row) for row in state["rows"]]
