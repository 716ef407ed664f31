"""The median stopping rule: a trial whose best loss so far is worse than the median of the others' is stopped.

References:
    Golovin et al. 2017, Google Vizier, section 3.2.2. There the median is one of running averages; of losses, which
    fall by orders of magnitude in the first updates, an average says little, so both sides are the best so far.
"""

from __future__ import annotations

import bisect
import math
from typing import Any, ClassVar

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.search.rule import StoppingRule, Verdict


class MedianStop(StoppingRule):
    """The median stopping rule.

    Args:
        min_steps: no verdict before this many updates, >= 1.
        min_trials: nor before this many other trials have come as far (or diverged before), >= 1.

    Raises:
        UserError: a number below 1.
    """

    name: ClassVar[str] = "median"

    def __init__(self, min_steps: int = 1, min_trials: int = 4) -> None:
        if min_steps < 1 or min_trials < 1:
            raise UserError(
                f"min_steps and min_trials must be at least 1, got {min_steps} and {min_trials}; raise them"
            )
        self.min_steps, self.min_trials = min_steps, min_trials
        self._steps: dict[int, list[int]] = {}
        self._best: dict[int, list[float]] = {}
        self._diverged: set[int] = set()

    def observe(self, trial: int, step: int, loss: float) -> Verdict:
        """Return stop where the trial is in the worse half of all that came as far."""
        if not math.isfinite(loss):
            self.end(trial, math.nan)
            return "stop"
        steps, best = self._steps.setdefault(trial, []), self._best.setdefault(trial, [])
        if not steps or step > steps[-1]:
            steps.append(step)
            best.append(min(loss, best[-1]) if best else loss)
        if step < self.min_steps:
            return "continue"
        seen = (self._at(other, trial, step) for other in sorted(self._steps.keys() | self._diverged))
        others = [value for value in seen if value is not None]
        if len(others) < self.min_trials:
            return "continue"
        here = best[bisect.bisect_right(steps, step) - 1]
        return "stop" if here > float(np.median(others)) else "continue"

    def _at(self, other: int, trial: int, step: int) -> float | None:
        """Return the best loss of another trial up to a step; inf if it diverged before, None if it is not there."""
        steps = self._steps.get(other, [])
        if other == trial:
            return None
        if not steps or steps[-1] < step:
            return math.inf if other in self._diverged else None
        place = bisect.bisect_right(steps, step)
        return self._best[other][place - 1] if place else None

    def end(self, trial: int, loss: float) -> None:
        """Remember a trial that diverged: it counts as worse than any other from then on."""
        if not math.isfinite(loss):
            self._diverged.add(trial)

    def state(self) -> dict[str, Any]:
        """Return the best losses so far of all trials."""
        return {
            "curves": [[trial, self._steps[trial], self._best[trial]] for trial in sorted(self._steps)],
            "diverged": sorted(self._diverged),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become the rule that `state()` was taken of."""
        self._steps = {trial: list(steps) for trial, steps, _ in state["curves"]}
        self._best = {trial: list(best) for trial, _, best in state["curves"]}
        self._diverged = set(state["diverged"])
