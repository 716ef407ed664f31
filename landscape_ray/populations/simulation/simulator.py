"""A population under a fake clock: the same decisions as in a real one, in seconds.

Members take turns on a number of workers; how long each stretch of training takes is drawn, so that reports arrive in
an order as irregular as on a cluster. What training does to weights is a :class:`Problem`: tabulated curves, a law, a
noisy quadratic.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Decision, Observation, Point, Values
from landscape_ray.populations.strategy import Strategy


class Problem(Protocol):
    """Something that can be trained, in a few numbers."""

    def start(self, generator: np.random.Generator) -> Any:
        """Return fresh weights."""

    def advance(
        self, weights: Any, values: Values, start_step: int, stop_step: int, generator: np.random.Generator
    ) -> tuple[Any, tuple[Point, ...]]:
        """Return the weights after training, and the evaluations on the way; `weights` stay as they are.

        The last evaluation is at stop_step, or where the loss was not finite any more.
        """

    def mix(self, weights: Any, fresh: Any, shrink: float, perturb: float) -> Any:
        """Return shrink * weights + perturb * fresh."""


class Simulator:
    """Runs a strategy on a problem.

    Attributes:
        now: the fake clock, in seconds.
        num_updates: updates made by all members together.
        snapshots: for each member that is still in the race, the step and the weights of its last observation.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        *,
        seed: int = 0,
        num_workers: int | None = None,
        spread: float = 0.0,
    ) -> None:
        """Prepare a run.

        Args:
            problem: what is trained.
            strategy: who decides; may be replaced between two events by one with the same state.
            seed: of weights, noise and durations; results do not depend on the order in which members are trained.
            num_workers: members that train at the same time; None for all.
            spread: standard deviation of the logarithm of the seconds per update, 0 for one second exactly.
        """
        if num_workers is not None and num_workers < 1:
            raise UserError(f"num_workers must be >= 1, got {num_workers}; somebody has to train")
        if not 0 <= spread < math.inf:
            raise UserError(f"spread must be finite and >= 0, got {spread}; 0 is for equal speeds")
        self.problem, self.strategy = problem, strategy
        self.now, self.num_updates = 0.0, 0
        self.snapshots: dict[int, tuple[int, Any]] = {}
        self._seed, self._spread = seed, spread
        self._free = math.inf if num_workers is None else num_workers
        self._queue: deque[tuple[Decision, int, Any]] = deque()
        self._running: list[tuple[float, int, Decision, int, Any]] = []
        self._serials: dict[int, int] = {}
        self._accept(strategy.start())

    def run(self) -> Iterator[tuple[Observation, list[Decision]]]:
        """Yield each observation with the decisions that followed, until nobody trains any more."""
        while True:
            while self._queue and self._free > 0:
                decision, step, weights = self._queue.popleft()
                self._free -= 1
                seconds = float(decision.until_step - step)
                if self._spread:
                    seconds *= math.exp(self._spread * self._generator(decision.member, 1).standard_normal())
                # of two that end at the same time, the one with the lower number is first
                heapq.heappush(self._running, (self.now + seconds, decision.member, decision, step, weights))
            if not self._running:
                return
            self.now, _, decision, step, weights = heapq.heappop(self._running)
            self._free += 1
            observation = self._train(decision, step, weights)
            decisions = self.strategy.observe(observation)
            self._accept(decisions)
            yield observation, decisions

    def finish(self) -> Strategy:
        """Run to the end; return the strategy."""
        for _ in self.run():
            pass
        return self.strategy

    def _generator(self, member: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, member, self._serials[member], purpose])

    def _train(self, decision: Decision, step: int, weights: Any) -> Observation:
        member = decision.member
        if weights is None:
            weights = self.problem.start(self._generator(member, 2))
        generator = self._generator(member, 0)
        weights, points = self.problem.advance(weights, decision.values, step, decision.until_step, generator)
        self.num_updates += points[-1].step - step
        self.snapshots[member] = points[-1].step, weights
        return Observation(member, points, num_tokens=points[-1].step)

    def _accept(self, decisions: list[Decision]) -> None:
        """Queue what was decided; all weights are those from before the first of these decisions."""
        before = {d.donor: self.snapshots[d.donor] for d in decisions if d.donor is not None}
        for decision in decisions:
            member = decision.member
            if decision.action == "stop":
                self.snapshots.pop(member, None)
                self._serials.pop(member, None)
                continue
            self._serials[member] = self._serials.get(member, 0) + 1
            if decision.donor is not None:
                self.snapshots[member] = before[decision.donor]
            elif decision.action == "start":
                self.snapshots[member] = 0, None  # drawn when its turn comes
            step, weights = self.snapshots[member]
            if decision.donor_step is not None and decision.donor_step != step:
                raise RuntimeError(f"decision names step {decision.donor_step} of weights that are of step {step}")
            if decision.restart is not None:
                fresh = self.problem.start(self._generator(member, 2))
                weights = self.problem.mix(weights, fresh, *decision.restart)
            self._queue.append((decision, step, weights))
