"""FIRE-PBT: parents are judged by how fast their weights improve under the values of the greedy part.

References:
    Dalibard and Jaderberg 2021, arXiv 2109.13800: Faster Improvement Rate Population Based Training.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import (
    Choice,
    Observation,
    Point,
    points_from_json,
    points_to_json,
)
from landscape_ray.populations.strategies.truncation import Truncation


class ImprovementRate(Truncation):
    """A greedy part, a part of parents, and evaluators between them.

    The greedy part evolves by its losses. An evaluator takes the weights of the parent that has waited longest and
    trains them under the values of the best greedy member. Parents evolve by the curves of their evaluators: of two
    that pass through the same loss, the one that falls faster there is better; else the one that is lower. An evaluator
    that comes out lower than the best of the greedy part replaces the worst of it. So high learning rates, which look
    bad and lead to weights that improve fast once the rate is lowered, survive among the parents.

    Of the paper's chain of parts there are two, and curves are compared by their straight-line fits instead of
    Gaussian-process smoothing.

    Args:
        num_evaluators: members that are evaluators; None for a quarter.
        num_parents: members that are parents; None for half of the rest, rounded up.
        eval_intervals: intervals for which an evaluator follows one parent.
        **options: of every strategy.
    """

    name: ClassVar[str] = "fire"

    def __init__(
        self,
        *args: Any,
        num_evaluators: int | None = None,
        num_parents: int | None = None,
        eval_intervals: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        count = len(self.members)
        evaluators = max(1, count // 4) if num_evaluators is None else num_evaluators
        parents = math.ceil((count - evaluators) / 2) if num_parents is None else num_parents
        if evaluators < 1 or parents < 2 or count - evaluators - parents < 2:
            raise UserError(
                f"num_members must allow 1 evaluator, 2 parents and 2 greedy members, got {count} with {evaluators} "
                f"evaluators and {parents} parents; 8 members are usual"
            )
        if eval_intervals < 1:
            raise UserError(f"eval_intervals must be >= 1, got {eval_intervals}; a rate takes time to see")
        self.eval_intervals = eval_intervals
        greedy = count - evaluators - parents
        self.greedy, self.parents = range(greedy), range(greedy, greedy + parents)
        self.evaluators = range(greedy + parents, count)
        self._task: dict[int, tuple[int, int]] = {}
        """For each busy evaluator its parent, and the intervals it has followed it."""
        self._curves: dict[int, tuple[Point, ...]] = {}
        """The last evaluation of each parent, as far as it has come."""
        self._turns: dict[int, int] = {}
        """When each parent was last given to an evaluator, in turns."""

    def learn(self, observation: Observation) -> None:
        """Add what an evaluator saw to the curve of its parent."""
        number = observation.member
        if number not in self._task:
            return
        parent, intervals = self._task[number]
        curve = self._curves.get(parent, ()) if intervals else ()
        self._curves[parent] = curve + observation.points
        self._task[number] = parent, intervals + 1

    def scores(self, members: list[int]) -> dict[int, float]:
        """Return the share of comparisons lost for parents, the loss for all others."""
        return {n: self._lost(n) if n in self.parents else self.members[n].loss for n in members}

    def _lost(self, parent: int) -> float:
        others = [n for n in self.parents if n != parent and n in self._curves]
        if parent not in self._curves or not others:
            return 0.5  # nothing is known
        return float(np.mean([not faster(self._curves[parent], self._curves[n]) for n in others]))

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Let each part evolve by its own rule."""
        choices = self.truncate([n for n in ready if n in self.greedy], self.greedy)
        judged = [n for n in self.parents if n in self._curves]
        choices |= self.truncate([n for n in ready if n in judged], judged)
        best = self.ranked(self.greedy)
        for number in (n for n in ready if n in self.evaluators):
            if number in self._task and best and self.members[number].loss < self.members[best[0]].loss:
                # the worst greedy member that is being decided about gives way
                worst = [n for n in best[::-1] if n in ready and number in self.donors(n, [number])]
                if worst and worst[0] != best[0]:
                    choices[worst[0]] = Choice(dict(self.members[number].values), number, reason="evaluator")
                    del self._task[number]
            if number not in self._task or self._task[number][1] >= self.eval_intervals:
                self._task.pop(number, None)
                choices |= self._next_parent(number, best)
        for number in choices:  # copied weights have to be judged anew
            self._curves.pop(number, None)
        return choices

    def rescue(self, number: int) -> Choice:
        """Return whom a member copies; an evaluator follows its parent no more, a parent has to be judged anew."""
        self._task.pop(number, None)
        self._curves.pop(number, None)
        return super().rescue(number)

    def _next_parent(self, evaluator: int, best: list[int]) -> dict[int, Choice]:
        busy = {parent for n, (parent, _) in self._task.items() if self.members[n].status in ("training", "waiting")}
        waiting = [n for n in self.donors(evaluator, self.parents) if n not in busy]
        if not waiting or not best:
            return {}
        parent = min(waiting, key=lambda n: (self._turns.get(n, -1), n))
        self._turns[parent] = 1 + max(self._turns.values(), default=-1)
        self._task[evaluator] = parent, 0
        return {evaluator: Choice(dict(self.members[best[0]].values), parent, reason="evaluation")}

    def extra_state(self) -> dict[str, Any]:
        """Return tasks, turns and curves."""
        return {
            "task": [[evaluator, *task] for evaluator, task in self._task.items()],
            "turns": list(map(list, self._turns.items())),
            "curves": [[parent, points_to_json(curve)] for parent, curve in self._curves.items()],
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._task = {evaluator: (parent, intervals) for evaluator, parent, intervals in state["task"]}
        self._turns = dict(map(tuple, state["turns"]))
        self._curves = {parent: points_from_json(rows) for parent, rows in state["curves"]}


def faster(curve: tuple[Point, ...], other: tuple[Point, ...]) -> bool:
    """Return whether a curve is better: steeper where both pass through the same losses, else lower.

    >>> steep, flat = [(0, 2.0), (1, 1.0)], [(0, 1.5), (1, 1.2)]
    >>> faster(tuple(Point(*p) for p in steep), tuple(Point(*p) for p in flat))
    True
    """
    ends = [[p for p in c if math.isfinite(p.loss)] for c in (curve, other)]
    if not ends[0] or not ends[1]:
        return len(ends[0]) > len(ends[1])
    ranges = [(min(p.loss for p in c), max(p.loss for p in c)) for c in ends]
    overlap = max(ranges[0][0], ranges[1][0]) <= min(ranges[0][1], ranges[1][1])
    if overlap and min(map(len, ends)) > 1:
        return _slope(ends[0]) < _slope(ends[1])
    return ends[0][-1].loss < ends[1][-1].loss


def _slope(curve: list[Point]) -> float:
    step = np.array([p.step for p in curve], dtype=np.float64)
    loss = np.array([p.loss for p in curve])
    centred = step - step.mean()
    return float(centred @ loss / (centred @ centred))
