"""The one interface of all populations: observations in, decisions out, state that can be saved at any time.

A strategy never trains and never waits. Whoever runs it (Ray, a cohort in one process, the simulator) carries out
decisions and reports back; a member that has reported waits until it is decided about. That is all there is to
synchronous operation: decisions are held back until every member has reported.

What subclasses cannot get wrong, because it is done here: values stay inside their domains, weights that have diverged
are replaced, the donor's step is the step of the donor's last observation, every member has a lineage, and one seed
gives one history.

A member that fails, so that it will never report, is to a strategy one that has diverged: it has no rank, nobody copies
it, and :meth:`Strategy.rescue` says whom it copies. One that finds nobody to copy, or has been rescued often enough, is
left out: the others go on without it, and decisions wait for it no more.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from landscape_ray.domains import Domain
from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Action, Choice, Decision, Failure, Observation, Values, decode, encode
from landscape_ray.populations.explore import Explorer, explore, initial_members
from landscape_ray.populations.lineage import Lineage

STATE_VERSION = 2

Status = Literal["training", "waiting", "finished", "stopped", "failed"]


@dataclass
class Member:
    """What a strategy knows of a member.

    Attributes:
        values: the hyperparameters that it trains under, or trained under when it stopped.
        step: updates behind the weights of its last observation, its own or its donor's.
        loss: held-out loss of these weights; nan before any.
        status: training, waiting for a decision, finished (reached the horizon), stopped, or failed: left out until it
            is tried again.
        tested: whether its last observation was made under `values`.
        spent: updates that it has made itself.
        failure: why it will not report about what it was told last; empty where nothing is known against it.
    """

    values: Values
    step: int = 0
    loss: float = math.nan
    status: Status = "training"
    tested: bool = False
    spent: int = 0
    failure: str = ""

    @property
    def sound(self) -> bool:
        """Whether its weights have a finite loss, and it has not failed since."""
        return math.isfinite(self.loss) and not self.failure


class Strategy(ABC):
    """A population of runs and the rule by which it copies and mutates.

    Subclasses answer :meth:`decide`; extra state goes through :meth:`extra_state` and :meth:`load_extra_state`.

    Args:
        space: domains of what the population may change, by name.
        num_members: runs that train at the same time.
        num_steps: horizon, in updates of a lineage.
        interval_steps: updates between two decisions about a member.
        seed: of every draw.
        synchronous: whether members wait for each other.
        initial: values of the first members; the others are drawn as a Latin hypercube.
        quantile_fraction: share of the population that is replaced, and share that is copied, in (0, 0.5].
        factors: of the perturbation of numbers, > 0.
        resample_probability: of drawing a value anew instead.
        explorer: proposes the values of copies instead; None to perturb those of the donor.

    Raises:
        UserError: an option is out of range.
    """

    name: ClassVar[str]
    rescues: ClassVar[bool] = True
    """Whether a diverged member that finds nobody to copy waits until somebody has reported."""

    def __init__(
        self,
        space: dict[str, Domain],
        *,
        num_members: int,
        num_steps: int,
        interval_steps: int,
        seed: int = 0,
        synchronous: bool = True,
        initial: Sequence[Values] = (),
        quantile_fraction: float = 0.25,
        factors: Sequence[float] = (0.8, 1.25),
        resample_probability: float = 0.1,
        explorer: Explorer | None = None,
    ) -> None:
        if not space:
            raise UserError("space must name at least one hyperparameter, got none; name what members may change")
        if num_members < 1:
            raise UserError(f"num_members must be >= 1, got {num_members}; a population has members")
        if not 1 <= interval_steps <= num_steps:
            raise UserError(
                f"interval_steps must be in [1, num_steps = {num_steps}], got {interval_steps}; decide more often"
            )
        if not 0 < quantile_fraction <= 0.5:
            raise UserError(f"quantile_fraction must be in (0, 0.5], got {quantile_fraction}; .25 is usual")
        if not factors or min(factors) <= 0:
            raise UserError(f"factors must be positive and at least one, got {list(factors)}; (0.8, 1.25) is usual")
        if not 0 <= resample_probability <= 1:
            raise UserError(f"resample_probability must be in [0, 1], got {resample_probability}; .1 is usual")
        self.space = dict(space)
        self.num_steps, self.interval_steps = num_steps, interval_steps
        self.synchronous = synchronous
        self.quantile_fraction = quantile_fraction
        self.factors, self.resample_probability = tuple(factors), resample_probability
        self.generator = np.random.default_rng(seed)
        self.explorer = explorer
        self.lineage = Lineage()
        self.failures: list[Failure] = []
        """What members have failed of so far, in order."""
        drawn = initial_members(self.space, num_members, self.generator)
        self.members: dict[int, Member] = {}
        self._waiting: set[int] = set()
        self._num_training = num_members
        for number, values in enumerate([*initial, *drawn][:num_members]):
            self._check_values(values, f"initial[{number}]")
            self.members[number] = Member(dict(values))

    # the interface

    def start(self) -> list[Decision]:
        """Return the first decision about each member."""
        decisions = [
            Decision(number, "start", dict(member.values), self._next_stop(0))
            for number, member in self.members.items()
        ]
        self.lineage.begin(decisions)
        return decisions

    def observe(self, observation: Observation) -> list[Decision]:
        """Take note of a member's progress; return the decisions that can be made now, perhaps none, in member order.

        Raises:
            UserError: a report that cannot be: no such member, one that is not training, no points, or steps that do
                not increase.
        """
        number = observation.member
        member = self.members.get(number)
        if member is None or member.status != "training":
            what = "unknown" if member is None else member.status
            raise UserError(f"member {number} must be training to report, got one that is {what}; report once")
        if not observation.points:
            raise UserError(f"points of member {number} must hold an evaluation, got none; evaluate before reporting")
        steps = [member.step, *(point.step for point in observation.points)]
        if any(later < earlier for earlier, later in itertools.pairwise(steps)):
            raise UserError(f"points of member {number} must come after step {member.step}, got steps {steps[1:]}")
        self.lineage.end(observation)
        member.spent += observation.step - member.step
        member.step, member.loss, member.tested = observation.step, observation.loss, True
        member.status = "waiting"
        self._waiting.add(number)
        self._num_training -= 1
        if self.explorer is not None and (seen := self._improvement(number)) is not None:
            self.explorer.learn(*seen)
        self.learn(observation)
        if self.synchronous and self._num_training:
            return []
        return self._settle()

    def fail(self, number: int, why: str, *, final: bool = False) -> list[Decision]:
        """Take note that a member will not report; return the decisions that can be made now, perhaps none.

        Where it is replaced, that is an exploit like any other. Where it is not, there is no decision about it: what it
        was told last stands, for `retry`.

        Args:
            number: which.
            why: it failed, in one line.
            final: leave it out, instead of replacing it.

        Raises:
            UserError: no such member, or one that is not training.
        """
        member = self.members.get(number)
        if member is None or member.status != "training":
            what = "unknown" if member is None else member.status
            raise UserError(f"member {number} must be training to fail, got one that is {what}; report it once")
        member.failure = why or "for no reason given"
        self._num_training -= 1
        if final:
            self._leave_out(number)
        else:
            member.status = "waiting"
            self._waiting.add(number)
        if self.synchronous and self._num_training:
            return []
        return self._settle()

    def retry(self) -> list[int]:
        """Let members that failed train on as they were told last, and count on them again; return them, in order."""
        failed = [number for number, member in self.members.items() if member.failure]
        for number in failed:
            self.members[number].failure, self.members[number].status = "", "training"
        self._waiting -= set(failed)
        self._num_training += len(failed)
        return failed

    def reopen(self) -> list[Decision]:
        """Take up again members that had reached a shorter horizon; return the decisions about them, perhaps none."""
        ended = [
            n for n, member in self.members.items() if member.status == "finished" and member.step < self.num_steps
        ]
        for number in ended:
            self.members[number].status = "waiting"
        self._waiting |= set(ended)
        if not ended or (self.synchronous and self._num_training):
            return []
        return self._settle()

    @abstractmethod
    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Return a choice for members that wait; one that is left out goes on as it is.

        Args:
            ready: members that wait, have a finite loss and have not reached the horizon; in order.
        """

    def learn(self, observation: Observation) -> None:  # noqa: B027  # a hook that most strategies leave empty
        """Take from an observation what `decide` will need, beyond `members` and `lineage`."""

    def extra_state(self) -> dict[str, Any]:
        """Return what a subclass has to save, JSON-able."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027  # as `learn`
        """Take over what `extra_state` returned."""

    def best(self) -> int:
        """Return the member with the lowest loss that has come furthest.

        Raises:
            UserError: no member has a finite loss.
        """
        sound = {number: member for number, member in self.members.items() if member.sound}
        if not sound:
            raise UserError("a member must have a finite loss, got none; the whole population has diverged or failed")
        furthest = max(member.step for member in sound.values())
        return min((n for n, m in sound.items() if m.step == furthest), key=lambda n: (sound[n].loss, n))

    @property
    def finished(self) -> bool:
        """Whether nobody trains or waits any more."""
        return not self._num_training and not self._waiting

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later decisions depend on, as JSON can hold it."""
        return {
            "version": STATE_VERSION,
            "name": self.name,
            "generator": self.generator.bit_generator.state,
            "members": [
                [number, {**vars(member), "loss": encode(member.loss)}] for number, member in self.members.items()
            ],
            "lineage": self.lineage.state_dict(),
            "extra": self.extra_state(),
            "explorer": None if self.explorer is None else self.explorer.state_dict(),
            "failures": [list(failure) for failure in self.failures],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, to the bit.

        Raises:
            UserError: state of another strategy or version.
        """
        if state.get("name") != self.name or state.get("version") != STATE_VERSION:
            raise UserError(
                f"state must be of strategy '{self.name}', version {STATE_VERSION}, got '{state.get('name')}', "
                f"version {state.get('version')}; continue with the strategy that saved it"
            )
        self.generator.bit_generator.state = state["generator"]
        self.members = {number: Member(**row | {"loss": decode(row["loss"])}) for number, row in state["members"]}
        self._waiting = {number for number, member in self.members.items() if member.status == "waiting"}
        self._num_training = sum(member.status == "training" for member in self.members.values())
        self.lineage.load_state_dict(state["lineage"])
        self.failures = [Failure(*row) for row in state.get("failures", ())]  # absent in what earlier versions wrote
        self.load_extra_state(state["extra"])
        if self.explorer is not None:
            self.explorer.load_state_dict(state["explorer"])

    # for subclasses

    def explored(self, values: Values) -> Values:
        """Return mutated values, inside their domains."""
        if self.explorer is not None:
            return self.explorer.explore(values)
        return explore(
            values,
            self.space,
            self.generator,
            factors=self.factors,
            resample_probability=self.resample_probability,
        )

    def donors(self, member: int, among: Iterable[int] | None = None) -> list[int]:
        """Return the members whose weights this one may take, in order.

        They are sound, tested under their present values, still in the race, and at most one interval behind: what a
        lineage goes back has to be paid again. A member that has spent twice the horizon goes back no more, so that
        every population ends. For one that has diverged, any step will do.
        """
        own = self.members[member]
        least = own.step - (self.interval_steps if own.spent < 2 * self.num_steps else 0)
        return [
            number
            for number in (self.members if among is None else among)
            if number != member
            and (other := self.members[number]).sound
            and other.tested
            and other.status in ("training", "waiting")
            and other.step < self.num_steps
            and (other.step >= least or not own.sound)
        ]

    def draw(self, options: Sequence[int]) -> int:
        """Return one of the options with equal probabilities."""
        return options[int(self.generator.integers(len(options)))]

    def rescue(self, number: int) -> Choice:
        """Return whom a member copies that has diverged or failed: one of the better ones.

        One that has failed needs a donor, also for a restart: its own weights may be what it failed of.
        """
        donors = sorted(self.donors(number), key=lambda n: (self.members[n].loss, n))
        if not donors:
            return Choice(reason="diverged, and nobody to copy")
        donor = self.draw(donors[: max(1, math.ceil(self.quantile_fraction * len(donors)))])
        return Choice(self.explored(self.members[donor].values), donor, reason="diverged")

    def _improvement(self, member: int) -> tuple[Values, float] | None:
        """Return the values of a member's last segment and how fast the loss fell; None where that can't be said."""
        path = self.lineage.path(member)
        if len(path) < 2 or path[-1].restart is not None:
            return None
        segment, start = path[-1], path[-2].points[-1].loss
        span, end = (segment.stop_step - segment.start_step) / self.num_steps, segment.points[-1].loss
        if not (math.isfinite(start) and start > 0):
            return None
        if not (math.isfinite(end) and end > 0):
            return segment.values, math.nan
        return (segment.values, math.log(start / end) / span) if span > 0 else None

    # carrying decisions out

    def _settle(self) -> list[Decision]:
        """Decide about everybody who waits."""
        waiting = sorted(self._waiting)
        self._waiting.clear()
        done = [n for n in waiting if self.members[n].sound and self.members[n].step >= self.num_steps]
        ready = [n for n in waiting if n not in done]
        sound = [n for n in ready if self.members[n].sound]
        choices = self.decide(sound) if sound else {}
        choices |= {n: self.rescue(n) for n in ready if n not in sound}
        if self.rescues and self._num_training:  # among those that train there may soon be somebody to copy
            lost = {n for n in ready if n not in sound and choices[n].donor is None and choices[n].restart is None}
            self._waiting |= lost
            ready = [n for n in ready if n not in lost]
        for number in [n for n in ready if self.members[n].failure and choices[n].donor is None]:
            ready.remove(number)
            self._leave_out(number)
        # Donors' weights are those of before this round, whatever is decided about the donors themselves.
        before = {n: (self.members[n].step, self.members[n].loss if self.members[n].sound else math.nan) for n in ready}
        made = [self._carry_out(n, choices.get(n, Choice()), before) for n in ready]
        self.lineage.begin([decision for decision in made if decision.action != "stop"])
        made += [self._stop(n, "finished", "reached the horizon") for n in done]
        return sorted(made, key=lambda decision: decision.member)

    def _carry_out(self, number: int, choice: Choice, before: dict[int, tuple[int, float]]) -> Decision:
        """Check a choice, make it the member's state, and return it as a decision."""
        member = self.members[number]
        if not member.sound and choice.donor is None and choice.restart is None:
            return self._stop(number, "stopped", choice.reason)
        values = member.values if choice.values is None else choice.values
        self._check_values(values, f"the choice for member {number}")
        if choice.donor is not None:
            donor = self.members.get(choice.donor, member)
            step, loss = before.get(choice.donor, (donor.step, donor.loss if donor.sound else math.nan))
            if choice.donor == number or not math.isfinite(loss):
                raise UserError(
                    f"donor of member {number} must be another member with a finite loss, got {choice.donor}; "
                    "choose among `donors`"
                )
            if member.failure:
                self.failures.append(Failure(number, member.step, member.failure, choice.donor, step))
            member.step, member.loss = step, loss
        reason = f"failed: {member.failure}" if member.failure else choice.reason
        action: Action = "continue"
        if choice.restart is not None:
            action = "restart"
        elif choice.donor is not None:
            action = "exploit"
        elif values != member.values:
            action = "explore"
        member.tested = action == "continue"
        member.values, member.status, member.failure = dict(values), "training", ""
        self._num_training += 1
        return Decision(
            number,
            action,
            dict(member.values),
            self._next_stop(member.step),
            donor=choice.donor,
            donor_step=None if choice.donor is None else member.step,
            restart=choice.restart,
            reason=reason,
        )

    def _leave_out(self, number: int) -> None:
        member = self.members[number]
        member.status = "failed"
        self.failures.append(Failure(number, member.step, member.failure))

    def _stop(self, number: int, status: Status, reason: str) -> Decision:
        member = self.members[number]
        member.status = status
        return Decision(number, "stop", dict(member.values), member.step, reason=reason)

    def _next_stop(self, step: int) -> int:
        """Return the next multiple of the interval, or the horizon."""
        return min((step // self.interval_steps + 1) * self.interval_steps, self.num_steps)

    def _check_values(self, values: Values, source: str) -> None:
        for name, domain in self.space.items():
            if name not in values or not domain.contains(values[name]):
                raise UserError(
                    f"{source} must hold {name} inside its domain, got {values.get(name)!r}; "
                    f"{'choices' if domain.choices else 'bounds'} are {domain.extremes}"
                )
