"""The search for the largest rise of the loss within a ball around the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import Batches, FixedLoss
from landscape_ray.probes.sharpness.perturbation import Ball, Landscape, Norm, PerturbationProbe, Scaling, subsets_of

FULL_STEP = 4.0
"""First step of the ascent, in radii: on the boundary nearly the fixed-point step `z = radius steepest(slope)`, which
never lowers a convex loss and on a quadratic one is power iteration."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A displacement z, the rise of the loss there, and its gradient by z."""

    z: Tensor
    rise: float
    slope: Tensor

    def promise(self, ball: Ball, radius: float) -> float:
        """Return the most that the slope promises elsewhere in the ball."""
        return radius * ball.reach(self.slope) - float(self.slope @ self.z)


class Ascent:
    """The search for the worst case on one landscape, radius by radius."""

    def __init__(self, landscape: Landscape, ball: Ball) -> None:
        """Evaluate the loss and its gradient at the centre; one gradient."""
        self.landscape, self.ball = landscape, ball
        zero = torch.zeros_like(ball.scale)
        self.base, gradient = landscape.gradient_at(zero)
        rise = self.base - self.base  # 0, or nan where the loss is not finite
        self.centre = Point(z=zero, rise=rise, slope=ball.scale * gradient)
        self.best = self.centre

    def value_after_one_step(self, radius: float) -> float:
        """Return the rise after the step that SAM takes; one forward pass."""
        z = radius * self.ball.steepest(self.centre.slope)
        return self.landscape.value_at(self.ball.scale * z) - self.base

    def search(
        self, radius: float, num_steps: int, num_starts: int, tol: float, generator: torch.Generator
    ) -> tuple[Point, bool]:
        """Return the best point within the radius, and whether it is stationary; at most steps x starts gradients.

        Called with rising radii: what was found in a smaller ball counts in the larger one.
        """
        ball = self.ball
        for start in range(num_starts):
            guided = start == 0 and bool(self.centre.slope.any())
            current = self._evaluate(
                radius * (ball.steepest(self.centre.slope) if guided else ball.draw_boundary(generator))
            )
            step = FULL_STEP
            if guided and not current.rise > self.best.rise:  # also where it is nan
                current = self.best
                step = 0.5 if current is self.centre else step  # longer ones from there end where this one did
            for _ in range(num_steps - 1):
                if not math.isfinite(current.rise) or current.promise(ball, radius) <= tol * current.rise:
                    break
                found = self._evaluate(ball.project(current.z + step * radius * ball.steepest(current.slope), radius))
                if found.rise > current.rise:
                    current = found
                else:
                    step = min(step, 1.0) / 2
            if math.isfinite(current.rise) and current.rise > self.best.rise:
                self.best = current
        return self.best, self.best.promise(ball, radius) <= tol * self.best.rise

    def _evaluate(self, z: Tensor) -> Point:
        value, gradient = self.landscape.gradient_at(self.ball.scale * z)
        return Point(z=z, rise=value - self.base, slope=self.ball.scale * gradient)


class RiseProbe(PerturbationProbe):
    """What the probes of one step and of many share: one landscape, or the mean over subsets of the examples."""

    def __init__(
        self,
        batches: Batches,
        *,
        radii: Sequence[float],
        scaling: Scaling,
        norm: Norm,
        eta: float,
        one_dimensional: bool,
        subset_examples: int,
        normalise_logits: bool,
        eval_mode: bool,
        seed: int,
    ) -> None:
        """Keep the settings; `subset_examples` is m of m-sharpness, 0 for all examples together.

        Raises:
            UserError: an argument out of its range.
        """
        if subset_examples < 0:
            raise UserError(f"subset_examples must be at least 0, got {subset_examples}; 0 takes all together")
        super().__init__(
            batches,
            radii=radii,
            scaling=scaling,
            norm=norm,
            eta=eta,
            one_dimensional=one_dimensional,
            normalise_logits=normalise_logits,
            eval_mode=eval_mode,
            seed=seed,
        )
        self.subset_examples = subset_examples

    def mean_over_landscapes(self, function: FixedLoss, rises: Callable[[Ascent], list[float]]) -> list[float]:
        """Return the numbers of `rises`, averaged over the subsets where there are any, on all processes."""
        ball = self.ball(function)
        if not self.subset_examples:
            return rises(Ascent(function, ball))
        subsets = subsets_of(function, self.subset_examples)
        rows = [[subset.share * number for number in rises(Ascent(subset, ball))] for subset in subsets]
        total = torch.tensor(rows, dtype=torch.float64).sum(0)
        return cast(list[float], function.reduce(total.to(function.device)).tolist())
