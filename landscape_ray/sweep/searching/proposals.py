"""The proposals of a search, made in a thread of their own while trials run.

What comes in meanwhile is kept back until the next proposal begins. So a proposal depends on what was known when it
began, not on how long it took, and the driver never waits for a sampler while it has trials to serve.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from landscape_ray.domains import Value
from landscape_ray.sweep.searching.guard import Hold, LearningRateGuard
from landscape_ray.sweep.searching.journal import Journal
from landscape_ray.sweep.searching.measures import direction
from landscape_ray.sweep.searching.proposer import Outcome, Proposal, Proposer
from landscape_ray.sweep.spec import SweepSpec


class Made(NamedTuple):
    """A new proposal."""

    number: int
    """In this sweep."""
    values: dict[str, Value]
    note: dict[str, Any]
    """What was changed about it; empty for nothing."""


class Proposals:
    """Asks and tells the proposer, one stretch at a time.

    Args:
        spec: the sweep; must have a [search] table.

    Raises:
        UserError: a sampler that does not work.
    """

    def __init__(self, spec: SweepSpec) -> None:
        assert spec.search is not None
        self._search = spec.search
        self._proposer = Proposer(
            spec.space,
            sampler=self._search.sampler,
            options=self._search.options,
            seed=spec.seed,
            directions=[direction(name) for name in self._search.objectives],
        )
        self._guard = LearningRateGuard(spec) if self._search.guard is not None else None
        self._news: dict[int, Outcome] = {}
        """What the proposer has not been told yet."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="proposals")
        self._asked: Future[list[tuple[Proposal, dict[str, Any]]]] | None = None

    def load(self, journal: Journal) -> None:
        """Begin where a journal ends. New proposals are appended to it; what came of its own is told by `tell`."""
        self._journal = journal
        self._proposer.load(journal.as_asked(), journal.attributes())

    @property
    def guarded(self) -> bool:
        """Whether learning rates are held below the limit of stability, for which `learn` is needed."""
        return self._guard is not None

    @property
    def under_way(self) -> bool:
        """Whether proposals are being made, or are there to be taken."""
        return self._asked is not None

    @property
    def ready(self) -> bool:
        """Whether `take` would not wait."""
        return self._asked is not None and self._asked.done()

    def tell(self, index: int, outcome: Outcome) -> None:
        """Take note what became of a proposal, or what is known of it so far; the proposer hears of it when it may."""
        self._news[index] = outcome

    def learn(self, index: int, values: Mapping[str, Value], probes: Mapping[str, float]) -> None:
        """Take note of what a run's probes have measured first."""
        if self._guard is not None:
            self._guard.learn(index, values, probes)

    def begin(self, first: int, count: int, num_known: int) -> None:
        """Begin to make proposals; none may be under way.

        Args:
            first: number of the first.
            count: how many.
            num_known: of so many trials, the first ones, the proposer may know what has come in.
        """
        for index in sorted(index for index in self._news if index < num_known):
            self._proposer.tell(self._journal.num_priors + index, self._news.pop(index))
        hold = None if self._guard is None else self._guard.holder(num_known)
        self._asked = self._pool.submit(self._ask, first, count, hold)

    def _ask(self, first: int, count: int, hold: Hold | None) -> list[tuple[Proposal, dict[str, Any]]]:
        """Make proposals; in the thread of the pool, the only one to touch the proposer meanwhile."""
        found = []
        given = [*self._search.initial, *self._journal.points]
        for index in range(first, first + count):
            note: dict[str, Any] = {}
            adjust = None if hold is None else functools.partial(hold, note=note)
            point = given[index] if index < len(given) else None
            found.append((self._proposer.ask(point, adjust), note))
        return found

    def take(self) -> Iterator[Made]:
        """Wait for the proposals that are under way; append each to the journal, and yield it."""
        assert self._asked is not None
        found, self._asked = self._asked.result(), None
        for proposal, note in found:
            trial = self._proposer.frozen(proposal.number)
            self._journal.add(trial, note, self._proposer.study_attributes())
            yield Made(proposal.number - self._journal.num_priors, proposal.values, note)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
