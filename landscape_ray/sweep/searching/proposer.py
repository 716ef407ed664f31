"""Ask and tell on domains: an Optuna study in memory, for searches and for populations alike."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from landscape_ray.domains import Domain, Value, applies, in_order
from landscape_ray.errors import UserError
from landscape_ray.sweep.searching.samplers import build_sampler

State: TypeAlias = Literal["complete", "pruned", "failed"]

STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a proposal.

    Attributes:
        state: complete, pruned (stopped before its end), or failed (diverged).
        values: of the objectives, if complete.
        intermediate: loss by step, as far as it was followed.
        constraints: by how much each constraint is violated; at most 0 where it is kept.
    """

    state: State
    values: tuple[float, ...] | None = None
    intermediate: Mapping[int, float] = dataclasses.field(default_factory=dict)
    constraints: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def told_values(self) -> list[float] | None:
        """Values as Optuna keeps them: of a pruned trial its last loss."""
        if self.values is not None:
            return list(self.values)
        if self.state == "pruned" and self.intermediate:
            return [self.intermediate[max(self.intermediate)]]
        return None

    def constraint_attributes(self) -> dict[str, Any]:
        """Return the constraints as Optuna stores them, by way of its own `set_constraint`."""
        frozen = create_trial(state=TrialState.PRUNED)
        for name, value in self.constraints.items():
            frozen.set_constraint(name, value)
        return dict(frozen.system_attrs)


class Proposal(NamedTuple):
    """A point to try."""

    number: int
    values: dict[str, Value]


Adjust: TypeAlias = Callable[[dict[str, Value]], dict[str, Value]]
"""Returns proposed values, changed where they must not be tried as they are; inside their domains."""


class _RevisableStorage(optuna.storages.InMemoryStorage):
    """A study in memory whose trials may be told more than once: a paused trial is told as pruned, and may go on."""

    def check_trial_is_updatable(self, trial_id: int, trial_state: TrialState) -> None:
        """Allow every change."""


class Proposer:
    """Proposes points of a space, from any sampler, and learns what became of them.

    The sampler is made anew for each proposal from (seed, number of the proposal); what it knows is in the study. A
    proposal therefore depends on the seed, its number and what was told before, not on the process that asks.

    Args:
        space: domains by name; an entry with `when` is only asked where it applies.
        sampler: see `samplers.build_sampler`.
        options: keyword arguments of the sampler.
        seed: of all proposals.
        directions: minimize or maximize, one for each objective.

    Raises:
        UserError: no such sampler, or options that it does not take.

    >>> proposer = Proposer({"lr": Domain(log_uniform=[1e-4, 1e-1])}, sampler="random", seed=1)
    >>> number, values = proposer.ask()
    >>> proposer.tell(number, Outcome(state="complete", values=(0.5,)))
    >>> number, 1e-4 <= values["lr"] <= 1e-1
    (0, True)
    """

    def __init__(
        self,
        space: Mapping[str, Domain],
        *,
        sampler: str = "tpe",
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        directions: Sequence[str] = ("minimize",),
    ) -> None:
        self._space, self._sampler, self._options, self._seed = dict(space), sampler, dict(options or {}), seed
        self._order = list(in_order(self._space))
        self._distributions = {name: distribution_of(domain) for name, domain in self._order}
        self._directions = list(directions)
        self._start()

    def _start(self) -> None:
        self._storage = _RevisableStorage()
        self.study = optuna.create_study(
            storage=self._storage,
            study_name="proposals",
            directions=self._directions,
            sampler=build_sampler(self._sampler, self._seed, 0, self._options),
        )
        self._study_id = self._storage.get_study_id_from_name("proposals")

    def __len__(self) -> int:
        return len(self._storage.get_all_trials(self._study_id, deepcopy=False))

    def ask(self, given: Mapping[str, Value] | None = None, adjust: Adjust | None = None) -> Proposal:
        """Return the next point to try.

        Args:
            given: take this point instead of one of the sampler's; what it lacks is proposed.
            adjust: changes the values before they are recorded.
        """
        number = len(self)
        self.study.sampler = build_sampler(self._sampler, self._seed, number, self._options)
        if given is not None:
            self.study.enqueue_trial(dict(given))
        trial = self.study.ask()
        values = self._suggested(trial)
        if adjust is not None:
            for name, value in adjust(dict(values)).items():
                if value != values[name]:
                    distribution = self._distributions[name]
                    internal = distribution.to_internal_repr(value)
                    self._storage.set_trial_param(trial._trial_id, name, internal, distribution)
                    values[name] = value
        return Proposal(number, values)

    def _suggested(self, trial: optuna.Trial) -> dict[str, Value]:
        """Return one value for every entry that applies: the space is made as it is walked through."""
        values: dict[str, Value] = {}
        for name, domain in self._order:
            if not applies(domain, values):
                continue
            if domain.choices is not None:
                values[name] = trial.suggest_categorical(name, domain.choices)
            elif domain.integers is not None:
                values[name] = trial.suggest_int(name, *domain.integers)
            else:
                low, high = domain.bounds
                values[name] = trial.suggest_float(name, low, high, log=domain.log_uniform is not None)
        return values

    def tell(self, number: int, outcome: Outcome) -> None:
        """Record what became of a proposal; what was told before of the same one is replaced.

        Raises:
            UserError: there was no such proposal, or the values are not one for each objective.
        """
        if not 0 <= number < len(self):
            raise UserError(f"number must be that of a proposal, 0 to {len(self) - 1}, got {number}; ask first")
        self._check(outcome)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        for step, loss in outcome.intermediate.items():
            self._storage.set_trial_intermediate_value(trial_id, step, loss)
        for key, value in outcome.constraint_attributes().items():
            self._storage.set_trial_system_attr(trial_id, key, value)
        self._storage.set_trial_state_values(trial_id, STATES[outcome.state], outcome.told_values)

    def add(self, values: Mapping[str, Value], outcome: Outcome) -> int:
        """Record a point that was not asked for, such as one of an earlier sweep; return its number.

        Raises:
            UserError: a value outside its domain, a missing one, or values that are not one for each objective.
        """
        self._check(outcome)
        trial = frozen_trial(self._order, values, outcome)
        self._storage.create_new_trial(self._study_id, template_trial=trial)
        return len(self) - 1

    def _check(self, outcome: Outcome) -> None:
        if outcome.state == "complete" and len(outcome.values or ()) != len(self._directions):
            raise UserError(
                f"outcome.values must be {len(self._directions)}, one for each objective, got {outcome.values}; "
                "tell a trial without them as failed"
            )

    def frozen(self, number: int) -> FrozenTrial:
        """Return a proposal as the study has it."""
        return self._storage.get_trial(self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number))

    def study_attributes(self) -> dict[str, Any]:
        """Return what the samplers have noted about the study as a whole, beside its trials."""
        return dict(self._storage.get_study_system_attrs(self._study_id))

    def load(self, trials: Sequence[FrozenTrial], study_attributes: Mapping[str, Any]) -> None:
        """Take over the trials of another storage; only into a proposer that has none.

        Raises:
            UserError: there are some.
        """
        if len(self):
            raise UserError(f"trials must be loaded into an empty proposer, got one with {len(self)}; make a new one")
        for key, value in study_attributes.items():
            self._storage.set_study_system_attr(self._study_id, key, value)
        for trial in trials:
            self._storage.create_new_trial(self._study_id, template_trial=trial)

    def state(self) -> dict[str, Any]:
        """Return all proposals and what was told of them, as JSON values."""
        return {
            "study": self.study_attributes(),
            "trials": [_packed(trial) for trial in self._storage.get_all_trials(self._study_id, deepcopy=False)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the proposer that `state()` was taken of: it proposes what that one would have."""
        self._start()
        self.load([_unpacked(trial) for trial in state["trials"]], state["study"])


def distribution_of(domain: Domain) -> BaseDistribution:
    """Return a domain as Optuna has it."""
    if domain.choices is not None:
        return CategoricalDistribution(domain.choices)
    low, high = domain.bounds
    if domain.integers is not None:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=domain.log_uniform is not None)


def frozen_trial(order: Sequence[tuple[str, Domain]], values: Mapping[str, Value], outcome: Outcome) -> FrozenTrial:
    """Return a point with its outcome as a trial of Optuna.

    Args:
        order: the space in the order of `in_order`.
        values: one for every entry that applies; others are left out.
        outcome: what became of it.

    Raises:
        UserError: a value is missing or outside its domain.
    """
    params: dict[str, Value] = {}
    distributions: dict[str, BaseDistribution] = {}
    for name, domain in order:
        if not applies(domain, params):
            continue
        if name not in values or not domain.contains(values[name]):
            got = repr(values[name]) if name in values else "none"
            raise UserError(f"{name} must lie in its domain {domain.extremes}, got {got}; leave this point out")
        params[name], distributions[name] = values[name], distribution_of(domain)
    return create_trial(
        state=STATES[outcome.state],
        values=outcome.told_values,
        params=params,
        distributions=distributions,
        intermediate_values=dict(outcome.intermediate),
        system_attrs=outcome.constraint_attributes(),
    )


def _packed(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "state": trial.state.name,
        "values": trial.values,
        "params": trial.params,
        "distributions": {name: distribution_to_json(each) for name, each in trial.distributions.items()},
        "intermediate": [[step, loss] for step, loss in trial.intermediate_values.items()],
        "attributes": trial.system_attrs,
    }


def _unpacked(packed: Mapping[str, Any]) -> FrozenTrial:
    state = TrialState[packed["state"]]
    now = datetime.datetime.now()
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=state,
        value=None,
        values=packed["values"],
        datetime_start=now,
        datetime_complete=now if state.is_finished() else None,
        params=dict(packed["params"]),
        distributions={name: json_to_distribution(each) for name, each in packed["distributions"].items()},
        user_attrs={},
        system_attrs=dict(packed["attributes"]),
        intermediate_values=dict(packed["intermediate"]),
    )
