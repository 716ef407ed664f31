"""What populations are measured against: Ray Tune's own scheduler, and a search with early stopping, in one process.

`StockRay` is not a copy of Ray's rules: it is a strategy that asks an unchanged object of Ray's class. Trials and their
controller are stand-ins of a few lines that remember what the scheduler did to them.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from landscape_ray.config import parse, with_values
from landscape_ray.data import open_data
from landscape_ray.domains import Domain
from landscape_ray.populations import Choice, Observation, Strategy, Values
from landscape_ray.populations.strategies import Truncation

METRIC, TIME = "loss", "step"


@dataclass(frozen=True)
class Saved:
    """A checkpoint, as far as a scheduler can tell."""

    member: int
    step: int


class Trial:
    """What Ray's scheduler sees of a member, with the attributes of `ray.tune.experiment.Trial` that it touches."""

    def __init__(self, member: int, config: Values) -> None:
        self.member, self.config = member, dict(config)
        self.trial_id = self.experiment_tag = str(member)
        self.status, self.checkpoint = "RUNNING", Saved(member, 0)
        self.evaluated_params: Values = {}
        self.last_result: dict[str, Any] = {}
        self.temporary_state = SimpleNamespace(saving_to=None)
        checkpoints = SimpleNamespace(_latest_checkpoint_result=None, checkpoint_config=SimpleNamespace(num_to_keep=0))
        self.run_metadata = SimpleNamespace(checkpoint_manager=checkpoints)

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: Values) -> None:
        self.config = config


class Controller:
    """What Ray's scheduler sees of the driver, with the methods of `TuneController` that it calls."""

    search_alg = None

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.is_finished()]

    def pause_trial(self, trial: Trial, should_checkpoint: bool) -> None:
        trial.status = "PAUSED"

    def _schedule_trial_save(self, trial: Trial, result: dict[str, Any]) -> Saved:
        return Saved(trial.member, result[TIME])


class StockRay(Strategy):
    """`ray.tune.schedulers.PopulationBasedTraining` with its defaults, asked for each decision.

    Members report to it as trials do: in their order, at every interval, a member that has diverged with NaN for ever.
    Whom it puts under another configuration and checkpoint is what this strategy decides. All that is not Ray's are the
    initial values, which the rows of a comparison share.

    Ray draws from global generators; they are seeded here.
    """

    name = "stock_ray"

    def __init__(self, space: dict[str, Domain], *, seed: int = 0, **options: Any) -> None:
        from ray import tune
        from ray.tune.schedulers import PopulationBasedTraining

        super().__init__(space, seed=seed, **options)
        mutations = {
            name: list(domain.choices)
            if domain.choices is not None
            else (tune.loguniform if domain.log_uniform else tune.uniform)(*domain.bounds)
            for name, domain in space.items()
        }
        self.scheduler = PopulationBasedTraining(
            time_attr=TIME,
            metric=METRIC,
            mode="min",
            perturbation_interval=self.interval_steps,
            hyperparam_mutations=mutations,
            log_config=False,
            synch=self.synchronous,
        )
        logging.getLogger("ray.tune").setLevel(logging.WARNING)  # it writes a paragraph for each copy
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # Ray's domains draw from it
        self.trials = {number: Trial(number, member.values) for number, member in self.members.items()}
        self.controller = Controller(list(self.trials.values()))
        for trial in self.trials.values():
            self.scheduler.on_trial_add(self.controller, trial)

    def learn(self, observation: Observation) -> None:
        """Let Ray's driver end a trial that has come to the horizon: its scheduler does not see the last result."""
        if observation.step >= self.num_steps and math.isfinite(observation.loss):
            self.trials[observation.member].status = "TERMINATED"

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Report to the scheduler, and see what it did."""
        step = max(self.members[n].step for n in ready)
        lost = [n for n, m in self.members.items() if self.synchronous and not m.sound]
        before = {n: self.trials[n].config for n in ready}
        for number in sorted({*ready, *lost}):
            self._report(self.trials[number], step if number in lost else self.members[number].step)
        choices = {}
        for number in ready:
            trial = self.trials[number]
            trial.status = "RUNNING"
            if trial.config is not before[number]:
                saved = trial.run_metadata.checkpoint_manager._latest_checkpoint_result.checkpoint
                if saved.step != self.members[saved.member].step:
                    raise RuntimeError(f"Ray names step {saved.step} of a member at {self.members[saved.member].step}")
                choices[number] = Choice(dict(trial.config), saved.member)
        return choices

    def _report(self, trial: Trial, step: int) -> None:
        member = self.members[trial.member]
        result = {TIME: step, METRIC: member.loss if member.sound else math.nan, "training_iteration": step}
        trial.last_result, trial.checkpoint = result, Saved(trial.member, step)
        if self.scheduler.on_trial_result(self.controller, trial, result) == "PAUSE":
            trial.status = "PAUSED"

    def rescue(self, number: int) -> Choice:
        """Leave a diverged member as it is, as Ray does: it would report NaN to the end."""
        if not self.synchronous:
            self._report(self.trials[number], self.members[number].step)
        return Choice(reason="diverged")

    def _check_values(self, values: Values, source: str) -> None:
        """Let values leave their domains: Ray's perturbation knows no bounds."""


class AveragedTruncation(Truncation):
    """Truncation selection by losses of averaged weights: what forecasts gain beyond less noise in the losses."""

    name = "averaged"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._annealed: dict[int, float] = {}

    def learn(self, observation: Observation) -> None:
        self._annealed[observation.member] = observation.points[-1].annealed

    def scores(self, members: list[int]) -> dict[int, float]:
        """Return the lower one of both losses; all members report before a decision, so these are of their weights."""
        return {number: self._annealed[number] for number in members}


def asha_tpe(
    train: dict[str, Any], space: dict[str, Domain], seed: int, *, num_steps: int, min_steps: int, budget: int
) -> dict[str, Any]:
    """Spend `budget` updates on trials proposed by TPE and promoted by ASHA; return the best that was finished.

    One trial at a time, which is the most that both can know: a trial that has earned it goes on, else a new one
    starts. What does not fit into what is left of the budget is not begun.

    Args:
        train: the table [train] of all trials.
        space: of the proposals.
        seed: of proposals, weights and data.
        num_steps: updates of a finished trial.
        min_steps: of the first rung; the next ones at 3, 9 ... times as many.
        budget: updates of all trials together.
    """
    import optuna

    from landscape_ray.search.asha import Asha, rungs_of
    from landscape_ray.sweep.searching.proposer import Outcome, Proposer
    from landscape_ray.training import TrainConfig, TrainState
    from landscape_ray.training import train as training

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rungs = rungs_of(min_steps, num_steps, 3)
    rule, proposer = Asha(rungs), Proposer(space, sampler="tpe", seed=seed)
    states: dict[int, TrainState] = {}
    values: dict[int, Values] = {}
    losses: dict[int, dict[int, float]] = {}
    data, spent = None, 0
    finished: dict[int, float] = {}
    while True:
        waiting = rule.promotable()
        at = states[waiting[0]].step if waiting else 0
        stop = next(rung for rung in [*rungs, num_steps] if rung > at)
        if spent + stop - at > budget:
            break
        if waiting:
            number = waiting[0]
            rule.promote(number)
        else:
            number, values[number] = proposer.ask()
            own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            config = parse(TrainConfig, with_values(train, {**values[number], "seed": own}), f"trial {number}")
            data = open_data(config.data) if data is None else data
            states[number], losses[number] = TrainState(config, data), {}
        state = states[number]
        verdict = "continue"
        while verdict == "continue" and not state.finished:
            stop = next(rung for rung in [*rungs, num_steps] if rung > state.step)
            if spent + stop - state.step > budget:
                break
            begun = state.step
            for _ in training(state, stop):
                pass
            spent += state.step - begun
            if state.diverged is not None:
                rule.end(number, math.nan)
                proposer.tell(number, Outcome(state="failed", intermediate=losses[number]))
            elif state.step >= num_steps:
                finished[number] = state.loss_nats
                rule.end(number, state.loss_nats)
                proposer.tell(number, Outcome(state="complete", values=(state.loss_nats,), intermediate=losses[number]))
            else:
                losses[number][state.step] = state.loss_nats
                verdict = rule.observe(number, state.step, state.loss_nats)
                proposer.tell(number, Outcome(state="pruned", intermediate=losses[number]))
    best = min(finished, key=lambda n: finished[n], default=0)
    return {
        "loss": finished.get(best, math.inf),
        "values": values[best],
        "updates": spent,
        "trials": len(states),
        "finished": len(finished),
    }
