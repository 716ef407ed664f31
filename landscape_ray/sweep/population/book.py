"""The book of a population: its strategy, and what every member is told to do; in a file that survives the driver."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from landscape_ray.domains import Value
from landscape_ray.errors import UserError
from landscape_ray.files import link_or_copy, write_atomic
from landscape_ray.populations import Decision, Failure, Observation, Point, Strategy
from landscape_ray.sweep.population.config import build_strategy
from landscape_ray.sweep.population.orders import Order, Weights
from landscape_ray.sweep.run import CHECKPOINT, index_of, trial_id_of
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder

BOOK_VERSION = 1


class Draft(NamedTuple):
    """The book of one moment."""

    text: str
    weights: frozenset[Weights]
    """What a driver that reads it may have copied."""


class PopulationBook:
    """The strategy of a sweep and its orders.

    Nobody may hear of an order before the book that has it is saved. What has been reported since the last decision
    need not be: members that are asked again report the same again.

    Args:
        spec: the sweep; must have a [population] table.
        folder: of the sweep; its book is begun when absent.

    Attributes:
        strategy: who decides.
        orders: the latest order of each member.

    Raises:
        UserError: no [population] table, a strategy that can't be made, or a folder that an earlier version began.
    """

    def __init__(self, spec: SweepSpec, folder: SweepFolder) -> None:
        if spec.population is None:
            raise UserError(f"sweep '{spec.name}' has no [population] table; add one")
        self._folder = folder
        self._path = folder.population_path
        self._weights: dict[int, Weights] = {}
        """What others copy when they copy a member."""
        self._reported: dict[int, int] = {}
        self._saved: frozenset[Weights] = frozenset()
        """What the book on disk may have copied."""
        self._begun: dict[int, int] = {}
        """Serial of the last order that each member has made durable."""
        self._rescued: dict[int, int] = {}
        """How often this driver has seen each member fail for good and be replaced."""
        self._max_rescues = max(1, spec.resources.max_failures)
        self.orders: dict[int, Order] = {}
        if self._path.exists():
            self.strategy = strategy_of(spec, ())
            self._read()
        else:
            if any(folder.trials()):
                raise UserError(
                    f"{folder.path} was begun by an earlier version of landscape_ray and has no {self._path.name}; "
                    "start a new sweep"
                )
            self.strategy = strategy_of(spec, initial_values(spec))
            self._take(self.strategy.start())
            self.save(self.draft())
        self._files = {
            Weights(index_of(trial.trial_id), int(path.stem.removeprefix("observed-")))
            for trial in folder.trials()
            for path in trial.checkpoint_path.glob("observed-*.pt")
        }

    @property
    def open(self) -> list[int]:
        """Members that have not been told to stop, in order."""
        return [member for member, order in sorted(self.orders.items()) if not order.stops]

    def waits(self, member: int) -> bool:
        """Return whether a member has reported and not been told yet how to go on."""
        return self._reported.get(member, -1) >= self.orders[member].serial

    def begun(self, member: int, serial: int) -> None:
        """Take note that a member has made an order its own: the weights that came with it are in its folder."""
        if self._begun.get(member, -1) < serial:
            self._begun[member] = serial
            self.clear()

    def report(self, member: int, serial: int, points: Sequence[Point], num_tokens: int) -> list[Order]:
        """Take note that a member has come to the end of an order; return the new orders, perhaps none.

        They must not be carried out before a `draft` made after this has been saved.

        Args:
            member: which.
            serial: of the order. A report that has been heard before changes nothing.
            points: evaluations made under it.
            num_tokens: units of data that the weights have seen.
        """
        if serial != self.orders[member].serial or self.waits(member):
            return []
        self._reported[member] = serial
        self._weights[member] = Weights(member, serial)
        self._files.add(Weights(member, serial))
        made = self._take(self.strategy.observe(Observation(member, tuple(points), num_tokens)))
        self.clear()
        return made

    def fail(self, member: int, why: str) -> list[Order]:
        """Take note that a member has used up its attempts at an order; return the new orders, perhaps none.

        They must not be carried out before a `draft` made after this has been saved. A member is replaced by a copy of
        a good one as often as it may be tried again, at least once, and then left out until the next driver.

        Args:
            member: which. Nothing is wrong with one that has reported: what it failed of came after.
            why: in one line.
        """
        if self.orders[member].stops or self.waits(member) or self.strategy.members[member].failure:
            return []
        self._rescued[member] = self._rescued.get(member, 0) + 1
        made = self._take(self.strategy.fail(member, why, final=self._rescued[member] > self._max_rescues))
        self.clear()
        return made

    def reopen(self) -> None:
        """Take up again members that had failed, and such as had come to their end where the sweep has a later one now.

        For a new driver, before it does anything else: the former train on as they were told last.
        """
        self.strategy.retry()
        decisions = self.strategy.reopen()
        for decision in decisions:
            member = decision.member
            weights, folder = self._weights[member], self._folder.trial(trial_id_of(member))
            link_or_copy(
                folder.checkpoint_path / CHECKPOINT, weights.path(folder)
            )  # others may copy what is now its last
            self._files.add(weights)
        self._take(decisions)

    def _take(self, decisions: list[Decision]) -> list[Order]:
        """Make orders of decisions."""
        before = dict(self._weights)
        made: list[Order] = []
        for decision in decisions:
            member = decision.member
            latest = self.orders.get(member)
            # nobody begins an order to stop: what comes after all is in its place
            serial = 0 if latest is None else latest.serial + (0 if latest.stops else 1)
            source = None if decision.donor is None else before[decision.donor]
            if source is not None:
                self._weights[member] = source
            failed = latest is not None and not latest.stops and not self.waits(member)
            abandoned = latest.abandoned + 1 if latest is not None and failed else 0
            self.orders[member] = Order(serial, decision, source, abandoned)
            made.append(self.orders[member])
        return made

    def clear(self) -> None:
        """Delete weights that nobody will ask for any more, now or after a crash."""
        needed = self.needed()
        for weights in self._files - needed:
            weights.path(self._folder.trial(trial_id_of(weights.member))).unlink(missing_ok=True)
        self._files &= needed

    def needed(self) -> frozenset[Weights]:
        """Return the weights that somebody may ask for, now or after a crash."""
        needed: set[Weights] = set(self._saved)
        for member, order in self.orders.items():
            if not order.stops:
                present = Weights(member, order.serial)  # of a report that this driver may not have heard yet
                needed |= {present, self._weights.get(member, present)}
            if order.source is not None and self._begun.get(member, -1) < order.serial:
                needed.add(order.source)
        return frozenset(needed)

    def draft(self) -> Draft:
        """Return the book as it stands, to be saved."""
        content = {
            "version": BOOK_VERSION,
            "strategy": self.strategy.state_dict(),
            "orders": [order.to_json() for order in self.orders.values()],
            "weights": [[member, list(weights)] for member, weights in self._weights.items()],
        }
        kept = frozenset(weights for member, weights in self._weights.items() if not self.orders[member].stops)
        return Draft(json.dumps(content, allow_nan=False), kept)

    def save(self, draft: Draft) -> None:
        """Make a draft the book on disk; drafts in the order in which they were made, in any thread.

        Raises:
            UserError: the disk is full, or cannot be written.
        """
        write_atomic(self._path, draft.text)
        self._saved = draft.weights

    def _read(self) -> None:
        try:
            content: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            if content["version"] != BOOK_VERSION:
                raise UserError(
                    f"{self._path} has version {content['version']}, this landscape_ray reads {BOOK_VERSION}; "
                    "use the version that wrote it"
                )
            orders = [Order.from_json(row) for row in content["orders"]]
            self._weights = {member: Weights(*weights) for member, weights in content["weights"]}
            self.strategy.load_state_dict(content["strategy"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self._path} is damaged ({error}); restore it from a copy, or start a new sweep"
            ) from None
        self.orders = {order.decision.member: order for order in orders}
        self._saved = frozenset(self._weights.values())
        members = self.strategy.members.items()
        waiting = [member for member, known in members if known.status == "waiting" and not known.failure]
        self._reported = {member: self.orders[member].serial for member in waiting}


def strategy_of(spec: SweepSpec, initial: Sequence[dict[str, Value]]) -> Strategy:
    """Return a new strategy as a sweep describes it."""
    assert spec.population is not None
    config = spec.train_config(spec.first_values(), 0)
    schedule = config.schedule.build(config.num_steps)
    explorer = None
    if (wanted := spec.population.explorer) is not None:
        from landscape_ray.sweep.population.explorer import OptunaExplorer  # here: importing Optuna takes a while

        explorer = OptunaExplorer(spec.space, wanted.sampler, wanted.options, spec.seed)
    return build_strategy(
        spec.population,
        spec.space,
        num_steps=spec.num_steps,
        schedule=schedule,
        seed=spec.seed,
        initial=initial,
        explorer=explorer,
    )


def initial_values(spec: SweepSpec) -> list[dict[str, Value]]:
    """Return the values that members start with, as far as the sweep file or its initialiser says."""
    population = spec.population
    assert population is not None
    given = list(population.initial)
    if population.initialiser is None:
        return given
    from landscape_ray.sweep.searching.proposer import Proposer  # here: importing Optuna takes a while

    proposer = Proposer(
        spec.space, sampler=population.initialiser.sampler, options=population.initialiser.options, seed=spec.seed
    )
    return [proposer.ask(given[k] if k < len(given) else None).values for k in range(population.num_members)]


def population_of(spec: SweepSpec, folder: SweepFolder) -> Strategy:
    """Return the strategy of a sweep as its last decision left it: members, and the lineage of their weights.

    Raises:
        UserError: no population has been begun in this folder, or its book can't be read.
    """
    if not folder.population_path.exists():
        raise UserError(
            f"{folder.path} must hold a population, got no {folder.population_path.name}; run the sweep first"
        )
    return PopulationBook(spec, folder).strategy


def failures_of(folder: SweepFolder) -> list[Failure]:
    """Return what members of a population have failed of for good, and what became of them; nothing for other sweeps.

    Reads what is needed only, and takes a book that can't be read for an empty one: for summaries.
    """
    try:
        rows = json.loads(folder.population_path.read_text(encoding="utf-8"))["strategy"].get("failures", ())
        return [Failure(*row) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return []


def failure_text(failure: Failure) -> str:
    """Return a failure in one line.

    >>> failure_text(Failure(2, 20, "RuntimeError: a faulty batch", 0, 40))
    't0002 failed after step 20, replaced by a copy of t0000 at step 40: RuntimeError: a faulty batch'
    """
    became = "left out until `landscape-ray resume`"
    if failure.donor is not None:
        became = f"replaced by a copy of {trial_id_of(failure.donor)} at step {failure.donor_step}"
    return f"{trial_id_of(failure.member)} failed after step {failure.step}, {became}: {failure.why}"
