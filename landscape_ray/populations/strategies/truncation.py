"""Truncation selection, the population-based training that everybody means, and its variant with a test.

References:
    Jaderberg et al. 2017, arXiv 1711.09846: truncation selection and t-test selection (section 4.1.1), perturbation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Choice, Values
from landscape_ray.populations.strategy import Strategy


class Truncation(Strategy):
    """The worst share of the population copies the best share and mutates; all others go on as they are.

    Two hooks make it other strategies: :meth:`scores`, what members are ranked by, and :meth:`replaces`, whether a
    particular donor is good enough.
    """

    name: ClassVar[str] = "truncation"

    def scores(self, members: list[int]) -> dict[int, float]:
        """Return what members are ranked by, lower is better: the last held-out loss."""
        return {number: self.members[number].loss for number in members}

    def replaces(self, donor: int, member: int) -> bool:
        """Return whether the donor is worth the member's place: by its rank alone."""
        return True

    def propose(self, donor: int) -> Values:
        """Return the values that a copy of the donor goes on with."""
        return self.explored(self.members[donor].values)

    def ranked(self, members: Iterable[int]) -> list[int]:
        """Return the sound members that have reported, best first."""
        known = [number for number in members if self.members[number].sound]
        scores = self.scores(known) if known else {}
        return sorted(known, key=lambda number: (scores[number], number))

    def quantile(self, num_members: int) -> int:
        """Return how many of so many members are replaced, and how many copied: rounded up, at most half."""
        return min(math.ceil(self.quantile_fraction * num_members), num_members // 2)

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Replace the ready members that are among the worst of all."""
        return self.truncate(ready, self.members)

    def truncate(self, ready: list[int], population: Iterable[int]) -> dict[int, Choice]:
        """Return the choices of truncation selection in a part of the population."""
        order = self.ranked(population)
        share = self.quantile(len(order))
        best, worst = order[:share], order[len(order) - share :]
        choices = {}
        for number in ready:
            if number not in worst:
                continue
            donors = [donor for donor in self.donors(number, best) if self.replaces(donor, number)]
            if donors:
                donor = self.draw(donors)
                choices[number] = Choice(self.propose(donor), donor)
        return choices


class Significance(Truncation):
    """Truncation selection that replaces a member only where Welch's t-test says that the donor is better.

    Compared are the last evaluations of the two lineages, each less the slope that the two have in common: both improve
    while they are measured, which is no noise.

    Args:
        significance: largest p-value of the one-sided test.
        num_points: evaluations compared, of each lineage; nobody is replaced before there are so many.
        **options: of every strategy.
    """

    name: ClassVar[str] = "significance"

    def __init__(self, *args: Any, significance: float = 0.05, num_points: int = 5, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0 < significance < 1:
            raise UserError(f"significance must be in (0, 1), got {significance}; .05 is usual")
        if num_points < 2:
            raise UserError(f"num_points must be >= 2, got {num_points}; a spread needs two")
        self.significance, self.num_points = significance, num_points

    def replaces(self, donor: int, member: int) -> bool:
        """Return whether the donor's last losses are significantly lower."""
        curves = [self.lineage.curve(number)[-self.num_points :] for number in (donor, member)]
        if min(map(len, curves)) < self.num_points:
            return False
        return (
            welch(
                *_without_slope(
                    [p.step for p in curves[0]],
                    [p.loss for p in curves[0]],
                    [p.step for p in curves[1]],
                    [p.loss for p in curves[1]],
                )
            )
            <= self.significance
        )


def _without_slope(
    steps: list[int], losses: list[float], other_steps: list[int], other_losses: list[float]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return both groups of losses, moved along their common slope to the last step of all."""
    x = [np.array(steps, float), np.array(other_steps, float)]
    y = [np.array(losses), np.array(other_losses)]
    centred = [(a - a.mean(), b - b.mean()) for a, b in zip(x, y, strict=True)]
    spread = sum(float(a @ a) for a, _ in centred)
    slope = sum(float(a @ b) for a, b in centred) / spread if spread else 0.0
    end = max(a.max() for a in x)
    return y[0] + slope * (end - x[0]), y[1] + slope * (end - x[1])


def welch(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Return the p-value of Welch's t-test for: the mean of the first is lower than that of the second.

    >>> round(welch(np.array([1.0, 2, 3]), np.array([4.0, 6, 8])), 4)
    0.0274
    """
    from scipy.special import stdtr  # here, as scipy takes longer to import than the rest

    shares = [group.var(ddof=1) / len(group) for group in (first, second)]
    variance = sum(shares)
    difference = float(first.mean() - second.mean())
    if variance == 0:
        return 0.0 if difference < 0 else 1.0
    freedom = variance**2 / sum(s**2 / (len(g) - 1) for s, g in zip(shares, (first, second), strict=True))
    return float(stdtr(freedom, difference / math.sqrt(variance)))
