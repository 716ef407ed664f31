"""Ray Tune's own scheduler beside the strategies: fixtures, and trials that do in this process what it tells them.

The scheduler is an unchanged object of Ray's class. Its stand-ins for trials and their controller are those that the
benchmark's row "stock Ray" is made with.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from landscape_ray.populations import Decision, Observation, Point, Strategy

SCRIPT = Path(__file__).parents[2] / "scripts" / "population_rivals.py"

INTERVAL = 10
"""Updates between two decisions about a member."""


@pytest.fixture(scope="module")
def rivals() -> Iterator[Any]:
    """The benchmark's module, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("population_rivals", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture
def generators() -> Iterator[None]:
    """The global generators, which Ray draws from: seeded, and put back."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002  # Ray draws from these
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    yield
    random.setstate(before)
    np.random.set_state(numpy_before)  # noqa: NPY002


def trained(weights: float, lr: float, steps: int) -> float:
    """Return what becomes of a network with one weight: it grows by the learning rate at every update."""
    for _ in range(steps):
        weights += lr
    return weights


class RayPopulation:
    """Trials under Ray's scheduler, one at a time; each trains a number.

    They do what Ray's driver does for it, in its order: a trial's last result is that before until the scheduler has
    been asked about the new one.

    Args:
        rivals: the benchmark's module.
        scheduler: an object of Ray's; its time is the step, its metric the loss.
        configs: of each trial.
        folder: where Ray logs what it has done.
    """

    def __init__(self, rivals: Any, scheduler: Any, configs: list[dict[str, Any]], folder: Path) -> None:
        self.rivals, self.scheduler, self.folder = rivals, scheduler, folder
        self.trials = [self._trial(number, config) for number, config in enumerate(configs)]
        self.weights = [0.0] * len(configs)
        self.steps = [0] * len(configs)
        self.saved: dict[Any, float] = {}
        self.copies: list[tuple[int, int, int, int]] = []
        """Of each exploit: the member and its step, the donor and the step of the weights that were copied."""
        self._begin()

    def _trial(self, number: int, config: dict[str, Any]) -> Any:
        trial = self.rivals.Trial(number, config)
        trial.local_experiment_path = trial.local_dir = str(self.folder)
        trial.status = "PENDING"
        return trial

    def _begin(self) -> None:
        self.controller = self.rivals.Controller(list(self.trials))
        for trial in self.trials:
            self.scheduler.on_trial_add(self.controller, trial)

    def report(self, number: int, step: int, loss: float) -> None:
        """Train a trial to this step, report, and do what the scheduler says."""
        trial = self.trials[number]
        trial.status = "RUNNING"
        self.weights[number] = trained(self.weights[number], trial.config["lr"], step - self.steps[number])
        self.steps[number] = step
        result = {"step": step, "training_iteration": step, "loss": loss}
        self.saved[self.rivals.Saved(number, step)] = self.weights[number]
        before = {other.member: other.config for other in self.trials}
        verdict = self.scheduler.on_trial_result(self.controller, trial, result)
        trial.last_result = result
        if verdict == "PAUSE":
            trial.status, trial.checkpoint = "PAUSED", self.rivals.Saved(number, step)
        for other in self.trials:
            if other.config is not before[other.member]:
                source = other.run_metadata.checkpoint_manager._latest_checkpoint_result.checkpoint
                self.copies.append((other.member, self.steps[other.member], source.member, source.step))
                self.weights[other.member], self.steps[other.member] = self.saved[source], source.step
                other.checkpoint = source

    def go_on(self, num_steps: int, loss: Callable[[int, int], float]) -> bool:
        """Train whatever the scheduler chooses, up to a horizon; return whether all have come there."""
        for trial in self.trials:
            if trial.status == "RUNNING":
                trial.status = "PENDING"  # one machine: nothing trains while another one does
        while (trial := self.scheduler.choose_trial_to_run(self.controller)) is not None:
            step = self.steps[trial.member] + INTERVAL
            if step < num_steps:
                self.report(trial.member, step, loss(trial.member, step))
                trial.status = "PAUSED" if trial.status == "RUNNING" else trial.status
            else:  # the driver ends a trial without asking
                self.steps[trial.member], trial.status = num_steps, "TERMINATED"
                self.scheduler.on_trial_complete(self.controller, trial, {"step": num_steps})
        return all(trial.is_finished() for trial in self.trials)

    def restored(self, scheduler: Any) -> RayPopulation:
        """Return what `Tuner.restore` makes of this: trials with what their metadata hold, and a new scheduler.

        The checkpoint of an experiment has its trials, its searcher and its callbacks; of its scheduler it has nothing.
        """
        configs = [dict(trial.config) for trial in self.trials]
        other = RayPopulation(self.rivals, scheduler, configs, self.folder)
        other.weights, other.steps, other.saved = list(self.weights), list(self.steps), dict(self.saved)
        for old, new in zip(self.trials, other.trials, strict=True):
            new.last_result, new.checkpoint = dict(old.last_result), old.checkpoint
        return other


class OurPopulation:
    """The same network under a strategy: members train and report when they are told to.

    Attributes:
        copies: as those of `RayPopulation`.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.weights = dict.fromkeys(strategy.members, 0.0)
        self.steps = dict.fromkeys(strategy.members, 0)
        self.copies: list[tuple[int, int, int, int]] = []
        self.decided: list[Decision] = []
        self._reported: dict[int, float] = {}
        self._orders = {decision.member: decision for decision in strategy.start()}

    def train(self, number: int, step: int) -> None:
        """Train a member to this step, without a word to the strategy."""
        lr = float(self._orders[number].values["lr"])
        self.weights[number] = trained(self.weights[number], lr, step - self.steps[number])
        self.steps[number] = step

    def report(self, number: int, loss: float) -> None:
        """Train a member to the end of its order, report, and do what the strategy says."""
        order = self._orders.pop(number)
        self._orders[number] = order
        self.train(number, order.until_step)
        self._reported[number] = self.weights[number]
        point = Point(order.until_step, loss, float(order.values["lr"]))
        made = self.strategy.observe(Observation(number, (point,), num_tokens=order.until_step))
        reported = dict(self._reported)
        for decision in made:
            if decision.donor is not None:
                assert decision.donor_step is not None
                self.copies.append((decision.member, self.steps[decision.member], decision.donor, decision.donor_step))
                self.weights[decision.member] = self._reported[decision.member] = reported[decision.donor]
                self.steps[decision.member] = decision.donor_step
            self._orders[decision.member] = decision
        self.decided += made

    def go_on(self, loss: Callable[[int, int], float]) -> None:
        """Let all members report in turn to the end."""
        while not self.strategy.finished:
            for number, member in self.strategy.members.items():
                if member.status == "training":
                    self.report(number, loss(number, self._orders[number].until_step))

    def restored(self, strategy: Strategy) -> OurPopulation:
        """Return the population under a new strategy with the state of this one, through JSON text."""
        other = OurPopulation(strategy)
        strategy.load_state_dict(json.loads(json.dumps(self.strategy.state_dict(), allow_nan=False)))
        other.weights, other.steps = dict(self.weights), dict(self.steps)
        other._reported, other._orders = dict(self._reported), dict(self._orders)
        return other
