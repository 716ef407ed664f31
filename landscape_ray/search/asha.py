"""Asynchronous successive halving that promotes and pauses.

At rung k, a number of updates, a trial waits; the best 1 / eta of all that ever reached the rung may go on to the next.
Nobody waits for a rung to fill: whenever a worker is free, the best trial that has earned it is promoted, from the
highest rung down, and only if there is none a new trial starts. A trial that is among the best when it arrives goes on
without a break.

What this is not: the variant that stops a trial for ever when it is not among the best at the moment when it arrives.
There the first trials of a sweep always pass, and a trial that would be among the best of a fuller rung is lost.

References:
    Li et al. 2020, arXiv 1810.05934, algorithm 2.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from landscape_ray.errors import UserError
from landscape_ray.search.rule import StoppingRule, Verdict


def rungs_of(min_steps: int, num_steps: int, reduction_factor: int) -> list[int]:
    """Return the steps of the rungs: min_steps times powers of the reduction factor, below the end of the run.

    >>> rungs_of(10, 300, 3)
    [10, 30, 90, 270]
    """
    rungs = []
    step = min_steps
    while step < num_steps:
        rungs.append(step)
        step *= reduction_factor
    return rungs


class Asha(StoppingRule):
    """Asynchronous successive halving.

    Args:
        rungs: increasing; updates, or any resource that is counted in whole numbers. The end of a run is none.
        reduction_factor: eta >= 2; one in so many trials of a rung goes on.

    Raises:
        UserError: rungs that are not increasing positive numbers, or a reduction factor below 2.
    """

    name: ClassVar[str] = "asha"

    def __init__(self, rungs: Sequence[int], reduction_factor: int = 3) -> None:
        steps = list(rungs)
        if not steps or steps[0] < 1 or any(after <= before for before, after in pairwise(steps)):
            raise UserError(f"rungs must be increasing steps >= 1, got {steps}; lower min_steps or raise num_steps")
        if reduction_factor < 2:
            raise UserError(f"reduction_factor must be at least 2, got {reduction_factor}; 3 or 4 is usual")
        self.rungs, self.reduction_factor = tuple(steps), reduction_factor
        self._reached: list[dict[int, int]] = [{} for _ in steps]
        """For each rung, the step at which each trial was seen there."""
        self._ranking: list[list[tuple[float, int]]] = [[] for _ in steps]
        """For each rung, loss and trial, the best first; inf for trials that diverged before it."""
        self._promoted: list[set[int]] = [set() for _ in steps]
        self._ended: set[int] = set()

    def milestones(self) -> tuple[int, ...]:
        """Return the rungs."""
        return self.rungs

    def observe(self, trial: int, step: int, loss: float) -> Verdict:
        """Return whether the trial goes on from the rung that it has reached."""
        if not math.isfinite(loss):
            self.end(trial, math.nan)
            return "stop"
        arrived = None
        for k, rung in enumerate(self.rungs):
            if step < rung:
                break
            if trial not in self._reached[k]:
                self._enter(k, trial, step, loss)
                arrived = k
            elif step > self._reached[k][trial]:
                self._promoted[k].add(trial)  # it has been let go on, perhaps by a driver that is gone
        if arrived is None:
            at_rung = next((k for k, seen in enumerate(self._reached) if seen.get(trial) == step), None)
            waiting = at_rung is not None and trial not in self._promoted[at_rung]
            return "pause" if waiting and trial not in self._ended else "continue"
        for below in range(arrived):  # several rungs at once: it was not seen at those in between
            self._promoted[below].add(trial)
        if trial in self._candidates(arrived):
            self._promoted[arrived].add(trial)
            return "continue"
        return "pause"

    def _enter(self, k: int, trial: int, step: int, loss: float) -> None:
        self._reached[k][trial] = step
        bisect.insort(self._ranking[k], (loss, trial))

    def end(self, trial: int, loss: float) -> None:
        """Take the trial off the candidates; one that diverged counts, as the worst, at the rung that it was bound for.

        Without that, a space in which half of the trials diverge early would promote twice the share of the others.
        """
        if trial in self._ended:
            return
        self._ended.add(trial)
        if not math.isfinite(loss):
            bound_for = next((k for k, seen in enumerate(self._reached) if trial not in seen), None)
            if bound_for is not None:
                self._enter(bound_for, trial, self.rungs[bound_for], math.inf)

    def _candidates(self, k: int) -> list[int]:
        """Return the trials of rung k that may go on and have not, the best first."""
        top = self._ranking[k][: len(self._ranking[k]) // self.reduction_factor]
        return [
            trial
            for loss, trial in top
            if trial not in self._promoted[k] and trial not in self._ended and loss < math.inf
        ]

    def promotable(self) -> list[int]:
        """Return the paused trials that may go on, from the highest rung down, the best of a rung first."""
        return [trial for k in reversed(range(len(self.rungs))) for trial in self._candidates(k)]

    def promote(self, trial: int) -> None:
        """Take note that a paused trial goes on from the rung where it is.

        Raises:
            UserError: it is not waiting on any rung.
        """
        at = next((k for k in reversed(range(len(self.rungs))) if trial in self._reached[k]), None)
        if at is None or trial in self._promoted[at] or trial in self._ended:
            raise UserError(f"trial must wait on a rung to be promoted, got {trial}; promotable() names those that do")
        self._promoted[at].add(trial)

    def state(self) -> dict[str, Any]:
        """Return the rungs and who is on them."""
        return {
            "rungs": [
                [
                    [trial, self._reached[k][trial], None if math.isinf(loss) else loss, trial in self._promoted[k]]
                    for loss, trial in self._ranking[k]
                ]
                for k in range(len(self.rungs))
            ],
            "ended": sorted(self._ended),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become the rule that `state()` was taken of.

        Raises:
            UserError: it was taken of a rule with another number of rungs.
        """
        if len(state["rungs"]) != len(self.rungs):
            raise UserError(
                f"state must be of a rule with {len(self.rungs)} rungs, got {len(state['rungs'])}; "
                "restore it under the settings that it was saved under"
            )
        self._ended = set(state["ended"])
        for k, entries in enumerate(state["rungs"]):
            self._reached[k] = {trial: step for trial, step, _, _ in entries}
            self._ranking[k] = sorted((math.inf if loss is None else loss, trial) for trial, _, loss, _ in entries)
            self._promoted[k] = {trial for trial, _, _, promoted in entries if promoted}
