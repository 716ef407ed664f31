"""PB2: copies get the values that a time-varying Gaussian process expects to bring the loss down fastest.

References:
    Parker-Holder, Nguyen and Roberts 2020, arXiv 2002.02518 (time-varying GP bandit); Bogunovic et al. 2016, arXiv
    1601.06650 (its kernel); Parker-Holder et al. 2021, arXiv 2106.15883 (categories); Garrido-Merchan and
    Hernandez-Lobato 2020, arXiv 1805.03463 (integers: the kernel sees rounded values).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Choice, Observation, Values
from landscape_ray.populations.explore import position
from landscape_ray.populations.strategies.truncation import Truncation

Array: TypeAlias = NDArray[np.float64]

MIN_POINTS = 4
"""Below so many improvements a copy is perturbed, as in plain population-based training."""


class Bandit(Truncation):
    """Truncation selection whose explore step maximises an upper confidence bound.

    The Gaussian process maps time and values to the rate at which the logarithm of the loss falls. Values are seen in
    the scale of their domain: logarithms where it is log-uniform, integers as rounded, choices as equal or different.
    Choices among values that this round has already handed out are discouraged, as their outcome would teach nothing
    new (their variance is taken as if the expected outcome had been seen).

    Args:
        window: improvements that the process is fitted to, the newest.
        num_candidates: points among which the bound is maximised.
        exploration: factor of the standard deviation in the bound; None for PB2's sqrt(.2 log(.4 n)), n the number of
            improvements seen.
        **options: of every strategy.
    """

    name: ClassVar[str] = "pb2"

    def __init__(
        self,
        *args: Any,
        window: int = 150,
        num_candidates: int = 400,
        exploration: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if window < MIN_POINTS:
            raise UserError(f"window must be >= {MIN_POINTS}, got {window}; a fit needs points")
        if num_candidates < 1:
            raise UserError(f"num_candidates must be >= 1, got {num_candidates}; a few hundred are usual")
        self.window, self.num_candidates, self.exploration = window, num_candidates, exploration
        self._names = sorted(self.space)
        self._seen: list[list[float]] = []
        """Improvements: time, rate, and the coordinates of the values."""
        self._pending: list[list[float]] = []
        self._process: Process | None = None
        """Fitted to what has been seen so far."""

    def learn(self, observation: Observation) -> None:
        """Note how fast the loss fell since the last observation of these weights."""
        path = self.lineage.path(observation.member)
        segment, before = path[-1], path[-2] if len(path) > 1 else None
        if before is None or segment.restart is not None or not math.isfinite(before.points[-1].loss):
            return
        span = (segment.stop_step - segment.start_step) / self.num_steps
        start, end = before.points[-1].loss, observation.loss
        if span <= 0 or start <= 0:
            return
        if math.isfinite(end) and end > 0:
            rate = math.log(start / end) / span
        else:  # diverging is as bad as the worst seen, and no worse, or it would be all that the process sees
            rate = min((row[1] for row in self._seen), default=0.0)
        self._seen.append([segment.stop_step / self.num_steps, rate, *self._coordinates(segment.values)])
        del self._seen[: -self.window]
        self._process = None

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Replace as truncation does; a new round begins with nothing handed out."""
        self._pending = []
        return super().decide(ready)

    def propose(self, donor: int) -> Values:
        """Return the values with the largest upper confidence bound at the donor's step."""
        values = self.members[donor].values
        chosen = self.suggested(self.members[donor].step, values)
        return self.explored(values) if chosen is None else values | chosen

    def suggested(self, step: int, near: Values) -> Values | None:
        """Return values for all names of the space; None while too little has been seen.

        Args:
            step: updates completed.
            near: values around which a third of the candidates lie.
        """
        if len(self._seen) < MIN_POINTS:
            return None
        rows = np.array(self._seen)
        if self._process is None:
            self._process = Process(rows[:, 0], rows[:, 2:], rows[:, 1], self._categorical())
        count = self.num_candidates
        units = self.generator.random((count, len(self._names)))
        centre = np.array([position(self.space[name], near[name]) for name in self._names])
        local = count // 3
        units[:local] = np.clip(centre + 0.1 * self.generator.standard_normal((local, len(self._names))), 0, 1)
        candidates = [dict(zip(self._names, self._values(row), strict=True)) for row in units.tolist()]
        points = np.array([self._coordinates(candidate) for candidate in candidates])
        time = np.full(count, step / self.num_steps)
        pending = np.array(self._pending).reshape(-1, len(self._names))
        mean, deviation = self._process.predict(time, points, pending)
        kappa = self.exploration
        if kappa is None:
            kappa = math.sqrt(max(0.2 * math.log(0.4 * len(rows)), 0.0))
        best = int(np.argmax(mean + kappa * deviation))
        self._pending.append(points[best].tolist())
        return candidates[best]

    def extra_state(self) -> dict[str, Any]:
        """Return the improvements."""
        return {"seen": self._seen}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._seen, self._process = [list(row) for row in state["seen"]], None

    def _values(self, units: list[float]) -> list[Any]:
        return [self.space[name].at(unit) for name, unit in zip(self._names, units, strict=True)]

    def _coordinates(self, values: Values) -> list[float]:
        return [position(self.space[name], values[name]) for name in self._names]

    def _categorical(self) -> NDArray[np.bool_]:
        return np.array([self.space[name].choices is not None for name in self._names])


class Process:
    """A Gaussian process over time and values, its three hyperparameters at the maximum of the marginal likelihood.

    k = exp(-d^2 / (2 l^2)) (1 - w)^(|t - t'| T / 2) + s^2 [same point], for standardised targets; d^2 sums squared
    differences of coordinates and one for each choice that differs. T, the number of distinct times, makes w the
    forgetting from one round to the next.

    Args:
        time: (n,) in [0, 1].
        points: (n, d) in [0, 1].
        targets: (n,).
        categorical: (d,) which coordinates are choices.
    """

    def __init__(self, time: Array, points: Array, targets: Array, categorical: NDArray[np.bool_]) -> None:
        from scipy.optimize import minimize  # here, as scipy takes longer to import than the rest

        self._time, self._points, self._categorical = time, points, categorical
        self._mean, self._scale = float(targets.mean()), float(targets.std()) or 1.0
        self._targets = (targets - self._mean) / self._scale
        self._rounds = len(np.unique(time))
        self._distance = self._squared(points, points)
        self._lag = np.abs(time[:, None] - time[None, :]) * self._rounds / 2
        starts = [(math.log(0.2), math.log(0.05), math.log(0.3)), (math.log(0.5), math.log(0.3), math.log(0.1))]
        bounds = [(math.log(0.05), math.log(3.0)), (math.log(1e-3), math.log(0.9)), (math.log(0.03), math.log(2.0))]
        found = [minimize(self._cost, x0, method="L-BFGS-B", bounds=bounds, options={"maxiter": 25}) for x0 in starts]
        self.hyperparameters = np.exp(min(found, key=lambda f: float(f.fun)).x)

    def _squared(self, a: Array, b: Array) -> Array:
        difference = np.abs(a[:, None, :] - b[None, :, :])
        difference = np.where(self._categorical, (difference > 1e-9).astype(float), difference)
        return np.asarray((difference**2).sum(axis=2))

    @staticmethod
    def _kernel(distance: Array, lag: Array, length: float, forgetting: float) -> Array:
        return np.asarray(np.exp(-0.5 * distance / length**2) * (1 - forgetting) ** lag)

    def _cost(self, x: Array) -> float:
        """Return the negative logarithm of the marginal likelihood."""
        length, forgetting, noise = np.exp(x)
        matrix = self._kernel(self._distance, self._lag, length, forgetting)
        matrix[np.diag_indices_from(matrix)] += noise**2
        factor = np.linalg.cholesky(matrix)
        white = np.linalg.solve(factor, self._targets)
        return float(0.5 * white @ white + np.log(np.diag(factor)).sum())

    def predict(self, time: Array, points: Array, pending: Array) -> tuple[Array, Array]:
        """Return mean (m,) and standard deviation (m,) of the target at points (m, d).

        Args:
            time: (m,).
            points: (m, d).
            pending: (q, d) points at the same time whose outcome is yet to come: they lower the deviation only.
        """
        length, forgetting, noise = self.hyperparameters
        matrix = self._kernel(self._distance, self._lag, length, forgetting)
        matrix[np.diag_indices_from(matrix)] += noise**2
        cross = self._cross(time, points, self._time, self._points)
        mean = cross @ np.linalg.solve(matrix, self._targets)
        all_time = np.concatenate([self._time, np.full(len(pending), time[0])])
        all_points = np.concatenate([self._points, pending])
        whole = self._cross(all_time, all_points, all_time, all_points)
        whole[np.diag_indices_from(whole)] += noise**2
        cross = self._cross(time, points, all_time, all_points)
        variance = 1 - (cross * np.linalg.solve(whole, cross.T).T).sum(axis=1)
        return self._mean + self._scale * mean, self._scale * np.sqrt(np.maximum(variance, 1e-12))

    def _cross(self, time: Array, points: Array, other_time: Array, other: Array) -> Array:
        length, forgetting, _ = self.hyperparameters
        lag = np.abs(time[:, None] - other_time[None, :]) * self._rounds / 2
        return self._kernel(self._squared(points, other), lag, length, forgetting)
