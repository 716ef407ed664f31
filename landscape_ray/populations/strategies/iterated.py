"""IPBT: when the population stagnates, it starts again with a longer interval.

References:
    Chebykin, Alderliesten and Bosman 2025, arXiv 2511.09190: Iterated Population Based Training with Task-Agnostic
    Restarts; Ash and Adams 2020, arXiv 1910.08475 (shrink and perturb).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Choice, Restart
from landscape_ray.populations.strategies.bandit import Bandit


class Iterated(Bandit):
    """PB2 in iterations, each with twice the interval of the one before.

    An iteration ends when the best loss has not improved by `tolerance` for `patience` rounds. Then half of the members
    shrink and perturb the weights of the best ones, half draw fresh ones; half of the values come from the bandit, half
    are drawn. Two things differ from the paper: the best member goes on untouched, so that a restart can lose nothing;
    and there is none where less than a third of the horizon is left, which would be too little to come back.

    Args:
        patience: rounds without improvement.
        tolerance: relative improvement of the loss that counts.
        growth: factor of the interval.
        shrink: factor of the old weights.
        perturb: factor of fresh weights that are added.
        **options: of PB2.
    """

    name: ClassVar[str] = "ipbt"

    def __init__(
        self,
        *args: Any,
        patience: int = 3,
        tolerance: float = 1e-3,
        growth: float = 2.0,
        shrink: float = 0.2,
        perturb: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if patience < 1:
            raise UserError(f"patience must be >= 1, got {patience}; 3 is usual")
        if not growth >= 1:
            raise UserError(f"growth must be >= 1, got {growth}; 2 doubles the interval")
        if not (0 <= shrink <= 1 and 0 <= perturb <= 1 and shrink + perturb > 0):
            raise UserError(f"shrink and perturb must be in [0, 1], not both 0, got {shrink}, {perturb}; try 0.2, 0.1")
        self.patience, self.tolerance, self.growth = patience, tolerance, growth
        self.restarting = Restart(shrink, perturb)
        self._lowest, self._round, self._stagnant = math.inf, 0, 0

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Evolve, or begin the next iteration."""
        step = max(self.members[n].step for n in ready)
        if step // self.interval_steps > self._round:  # once a round, also where members report one by one
            self._round = step // self.interval_steps
            lowest = min((m.loss for m in self.members.values() if m.sound), default=math.inf)
            improved = lowest < self._lowest - self.tolerance * abs(self._lowest) or math.isinf(self._lowest)
            self._stagnant = 0 if improved else self._stagnant + 1
            self._lowest = min(lowest, self._lowest)
        if self._stagnant >= self.patience and 3 * step <= 2 * self.num_steps:
            self._stagnant, self._lowest = 0, math.inf
            self.interval_steps = min(round(self.growth * self.interval_steps), self.num_steps)
            self._round = step // self.interval_steps
            return self._begin_again(ready)
        return super().decide(ready)

    def _begin_again(self, ready: list[int]) -> dict[int, Choice]:
        """Restart the ready members but for the best one; where members report one by one, that is one of them."""
        order = self.ranked(self.members)
        best = order[: max(1, self.quantile(len(order)))]
        choices = {}
        for number in ready:
            if number == order[0]:
                continue
            donors = self.donors(number, best)
            donor = self.draw(donors) if donors else None
            values = self.members[number if donor is None else donor].values
            random, fresh = self.generator.random(2) < 0.5
            chosen = None if random else self.suggested(self.members[number].step, values)
            if chosen is None:
                chosen = {name: self.space[name].at(self.generator.random()) for name in sorted(self.space)}
            restart = Restart(0.0, 1.0) if fresh else self.restarting
            choices[number] = Choice(values | chosen, donor, restart, reason="stagnation")
        return choices

    def extra_state(self) -> dict[str, Any]:
        """Return the state of the iteration as well."""
        own = {
            "interval_steps": self.interval_steps,
            "lowest": repr(self._lowest),
            "round": self._round,
            "stagnant": self._stagnant,
        }
        return super().extra_state() | own

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take it over."""
        super().load_extra_state(state)
        self.interval_steps, self._lowest = state["interval_steps"], float(state["lowest"])
        self._round, self._stagnant = state["round"], state["stagnant"]
