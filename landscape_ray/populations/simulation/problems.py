"""Problems whose best schedules are known, or can be computed: where a population's rule is put to the test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.populations.decisions import Point, Values
from landscape_ray.schedules import Schedule

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class ToyQuadratic:
    """The example of the first paper on population-based training, Figure 2.

    Maximise Q = 1.2 - (theta_0^2 + theta_1^2), knowing only the gradient of 1.2 - (h_0 theta_0^2 + h_1 theta_1^2),
    from theta = (0.9, 0.9). With h = (1, 0) held, one coordinate never moves: Q = 1.2 - 0.81 = 0.39.

    Loss: 1.2 - Q. Values: h0, h1.

    References:
        Jaderberg et al. 2017, arXiv 1711.09846, Figure 2.
    """

    lr: float = 0.01

    def start(self, generator: np.random.Generator) -> Array:
        """Return theta = (0.9, 0.9)."""
        return np.array([0.9, 0.9])

    def advance(
        self, weights: Array, values: Values, start_step: int, stop_step: int, generator: np.random.Generator
    ) -> tuple[Array, tuple[Point, ...]]:
        """Make gradient steps on the surrogate; evaluate at the end."""
        h = np.array([float(values["h0"]), float(values["h1"])])
        moved = weights * (1 - 2 * self.lr * h) ** (stop_step - start_step)
        return moved, (Point(stop_step, float(moved @ moved)),)

    def mix(self, weights: Array, fresh: Array, shrink: float, perturb: float) -> Array:
        """Return shrink * weights + perturb * fresh."""
        return shrink * weights + perturb * fresh


@dataclass(frozen=True)
class TriangleWave:
    """A score that grows fastest at a learning rate that first has to rise tenfold and then to fall again.

    A score s grows by up to 1 an update where the rate is near the best one, 1e-4 s held to [1e-3, 1e-2] on the way to
    s = 100 and its mirror image from there to 200; it falls where the rate is more than 3 times too high. The problem
    of Ray Tune's example of population-based training: no constant rate gets far.

    Loss: 200 - s. Values: lr.
    """

    goal: float = 200.0

    def start(self, generator: np.random.Generator) -> float:
        """Return a score of zero."""
        return 0.0

    def advance(
        self, weights: float, values: Values, start_step: int, stop_step: int, generator: np.random.Generator
    ) -> tuple[float, tuple[Point, ...]]:
        """Make updates; evaluate at the end."""
        lr, score, middle = float(values["lr"]), weights, self.goal / 2
        uniform = generator.random(stop_step - start_step)
        noise = 2 * generator.standard_normal(stop_step - start_step)
        for u, e in zip(uniform.tolist(), noise.tolist(), strict=True):
            best = min(max(0.01 * (1 - abs(score / middle - 1)), 0.001), 0.01)
            error = max(lr, best) / min(lr, best)
            if error < 3:
                score += u / error
            elif lr > best:
                score -= (error - 3) * u
            score = max(score + e, 0.0)
        return score, (Point(stop_step, self.goal - score, lr),)

    def mix(self, weights: float, fresh: float, shrink: float, perturb: float) -> float:
        """Return shrink * weights + perturb * fresh."""
        return shrink * weights + perturb * fresh


@dataclass(frozen=True)
class NoisyQuadratic:
    """Stochastic gradient descent on a quadratic with a spectrum: where a low learning rate looks good and is not.

    loss = L0 + 1/2 sum_i h_i theta_i^2,  theta_i <- (1 - eta h_i) theta_i + eta sqrt(c_i) xi,
    h_i = i^-p,  c_i = s^2 h_i

    The noise of a high rate hides the progress that it makes along flat directions; once the rate comes down, the noise
    is gone within a few updates. Whoever ranks by the loss of the moment brings the rate down too early (short-horizon
    bias). Stretches at one rate are drawn in one go, exactly in distribution.

    Values: `lr_name`, the peak of `schedule`.

    Attributes:
        schedule: of the learning rate, with peak 1.
        num_dimensions: number of eigenvalues.
        power: p.
        noise: s.
        floor: L0.
        eval_steps: updates between evaluations.
        lr_name: hyperparameter that is the peak learning rate.

    References:
        Schaul, Zhang and LeCun 2013, arXiv 1206.1106; Wu et al. 2018, arXiv 1803.02021 (short-horizon bias);
        Zhang et al. 2019, arXiv 1907.04164 (the spectrum i^-1, noise c = h).
    """

    schedule: Schedule
    num_dimensions: int = 200
    power: float = 1.0
    noise: float = 0.3
    floor: float = 1.0
    eval_steps: int = 20
    lr_name: str = "lr"
    _spectrum: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_spectrum", np.arange(1, self.num_dimensions + 1) ** -self.power)

    def start(self, generator: np.random.Generator) -> Array:
        """Return theta = (1, ..., 1) but for a little noise."""
        return 1 + 0.1 * generator.standard_normal(self.num_dimensions)

    def loss(self, weights: Array) -> float:
        """Return the loss without noise of its own."""
        return float(self.floor + 0.5 * (self._spectrum @ weights**2))

    def advance(
        self, weights: Array, values: Values, start_step: int, stop_step: int, generator: np.random.Generator
    ) -> tuple[Array, tuple[Point, ...]]:
        """Train, evaluating every `eval_steps` updates and at the end."""
        peak, h = float(values[self.lr_name]), self._spectrum
        rates = peak * np.asarray(self.schedule(np.arange(start_step, stop_step)))
        points: list[Point] = []
        stops = _stops(start_step, stop_step, self.eval_steps)
        for first, last in zip([start_step, *stops], stops, strict=False):
            eta = rates[first - start_step : last - start_step]
            if np.ptp(eta) <= 1e-9 * eta.max():
                a, n = 1 - eta[0] * h, last - first
                with np.errstate(all="ignore"):
                    decay = a**n
                    series = np.where(np.abs(1 - a * a) < 1e-12, n, (1 - decay**2) / (1 - a * a))
                    spread = eta[0] * self.noise * np.sqrt(h * series)
                    weights = decay * weights + spread * generator.standard_normal(len(h))
            else:
                for rate, xi in zip(eta, generator.standard_normal((len(eta), len(h))), strict=True):
                    weights = (1 - rate * h) * weights + rate * self.noise * np.sqrt(h) * xi
            with np.errstate(over="ignore", invalid="ignore"):
                loss = self.loss(weights)
            points.append(Point(last, loss if loss < 1e6 else math.inf, float(eta.mean())))
            if not math.isfinite(points[-1].loss):
                break
        return weights, tuple(points)

    def expected(self, rates: Array) -> float:
        """Return the expected loss at the end of a schedule, shape (num_steps,): the closed form that ranks schedules.

        v <- (1 - eta h)^2 v + eta^2 c for the second moments v.
        """
        h = self._spectrum
        moments = np.full(len(h), 1.01)
        for rate in rates:
            moments = (1 - rate * h) ** 2 * moments + rate**2 * self.noise**2 * h
        return float(self.floor + 0.5 * (h @ moments))

    def mix(self, weights: Array, fresh: Array, shrink: float, perturb: float) -> Array:
        """Return shrink * weights + perturb * fresh."""
        return shrink * weights + perturb * fresh


@dataclass(frozen=True)
class LawState:
    """Where a run under a law stands: progress, and the noise in each of the modes of forgetting."""

    progress: float
    noise: tuple[float, ...]
    scale: float
    diverged: bool = False


@dataclass(frozen=True)
class LawCurves:
    """Loss curves of a law in which the learning rate acts on progress, on noise and on stability.

    L = L0 + A (1 + S / S0)^-alpha + sum_j b_j n_j,   S <- S + eta / (1 + (eta / eta_max)^4),
    n_j <- n_j + (1 - exp(-eta / tau_j)) (eta - n_j)

    The noise forgets in the intrinsic time S at several speeds tau_j, as a power-law kernel does (functional scaling
    law). Evaluations carry a relative error; runs differ a little in A; rates above `divergence` diverge.

    Values: `lr_name`, the peak of `schedule`.

    References:
        Li et al. 2025, arXiv 2509.19189; Tissue et al. 2024, arXiv 2408.11029.
    """

    schedule: Schedule
    floor: float = 2.5
    amplitude: float = 3.0
    alpha: float = 0.5
    start_area: float = 0.05
    taus: tuple[float, ...] = (0.005, 0.05, 0.5)
    shares: tuple[float, ...] = (30.0, 12.0, 5.0)
    lr_max: float = 0.02
    divergence: float = 0.08
    error: float = 0.002
    spread: float = 0.01
    eval_steps: int = 20
    lr_name: str = "lr"

    def start(self, generator: np.random.Generator) -> LawState:
        """Return a run at step 0."""
        scale = math.exp(self.spread * generator.standard_normal())
        return LawState(0.0, (0.0,) * len(self.taus), scale)

    def advance(
        self, weights: LawState, values: Values, start_step: int, stop_step: int, generator: np.random.Generator
    ) -> tuple[LawState, tuple[Point, ...]]:
        """Train, evaluating every `eval_steps` updates and at the end."""
        rates = float(values[self.lr_name]) * np.asarray(self.schedule(np.arange(start_step, stop_step)))
        points: list[Point] = []
        stops = _stops(start_step, stop_step, self.eval_steps)
        for first, last in zip([start_step, *stops], stops, strict=False):
            eta = rates[first - start_step : last - start_step]
            weights = self._moved(weights, eta)
            if eta.max() > self.divergence:
                weights = dataclasses.replace(weights, diverged=True)
            loss = self.loss(weights) * math.exp(self.error * generator.standard_normal())
            points.append(Point(last, loss, float(eta.mean())))
            if not math.isfinite(loss):
                break
        return weights, tuple(points)

    def _moved(self, state: LawState, eta: Array) -> LawState:
        progress = state.progress + float((eta / (1 + (eta / self.lr_max) ** 4)).sum())
        left = np.exp(-eta[:, None] / np.array(self.taus))
        # n_end = n_start prod(left) + sum_k (1 - left_k) eta_k prod_{l > k} left_l
        after = np.concatenate([np.cumprod(left[::-1], axis=0)[::-1], np.ones((1, len(self.taus)))])
        noise = np.array(state.noise) * after[0] + ((1 - left) * eta[:, None] * after[1:]).sum(axis=0)
        return dataclasses.replace(state, progress=progress, noise=tuple(noise.tolist()))

    def loss(self, state: LawState) -> float:
        """Return the loss without the error of an evaluation."""
        if state.diverged:
            return math.inf
        signal = self.amplitude * state.scale * (1 + state.progress / self.start_area) ** -self.alpha
        noise = sum(b * n for b, n in zip(self.shares, state.noise, strict=True))
        return float(self.floor + signal + noise)

    def expected(self, rates: Array) -> float:
        """Return the loss at the end of a schedule, shape (num_steps,), for a run of median A."""
        state = LawState(0.0, (0.0,) * len(self.taus), 1.0)
        return self.loss(self._moved(state, rates)) if rates.max() <= self.divergence else math.inf

    def mix(self, weights: LawState, fresh: LawState, shrink: float, perturb: float) -> LawState:
        """Return a run that has kept the share shrink / (shrink + perturb) of its progress, and no noise."""
        share = shrink / (shrink + perturb)
        return dataclasses.replace(weights, progress=share * weights.progress, noise=fresh.noise)


@dataclass(frozen=True)
class Tabulated:
    """Loss curves that were measured: each value of one hyperparameter has a table of losses by step.

    A copy goes on along the curve of its own value from the donor's step. What a change of the value does to weights is
    not in a table: this is for searches and for the timing of populations, not for their quality.

    Values: `name`, a choice.

    Attributes:
        name: the hyperparameter.
        curves: for each of its values the steps and losses, steps increasing.
    """

    name: str
    curves: Mapping[Any, tuple[Sequence[int], Sequence[float]]]

    def start(self, generator: np.random.Generator) -> None:
        """Return nothing: all is in the tables."""
        return

    def advance(
        self, weights: None, values: Values, start_step: int, stop_step: int, generator: np.random.Generator
    ) -> tuple[None, tuple[Point, ...]]:
        """Return the tabulated evaluations in (start_step, stop_step], and the interpolated one at the end."""
        steps, losses = self.curves[values[self.name]]
        points = [Point(s, float(v)) for s, v in zip(steps, losses, strict=True) if start_step < s < stop_step]
        for index, point in enumerate(points):
            if not math.isfinite(point.loss):
                return None, tuple(points[: index + 1])
        return None, (*points, Point(stop_step, float(np.interp(stop_step, steps, losses))))

    def mix(self, weights: None, fresh: None, shrink: float, perturb: float) -> None:
        """Return nothing."""
        return


def _stops(start: int, stop: int, every: int) -> list[int]:
    """Return the multiples of `every` in (start, stop), and stop."""
    return [*range((start // every + 1) * every, stop, every), stop]
