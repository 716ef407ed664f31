"""The book of a search as Ray Tune's searcher, and its stopping rule as Ray Tune's scheduler.

A trial that is paused by its rule ends as far as Ray is concerned: its checkpoint is in its folder, and its actor goes
on with another trial. When the rule promotes it, the searcher hands it out again under its old name. Ray's own pauses
live in the memory of the driver and die with it; these survive.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from landscape_ray.sweep.searching.book import Book

OBJECTIVE = "loss_nats"
"""Key of the last held-out loss in the results of a trial."""

ROOM_SECONDS = 5.0
"""How long the number of places is taken to be what it was."""


class OptunaSearcher(Searcher):
    """Hands out the trials of one sweep and tells its book what became of them.

    One trial more than there is room for is out at any time. Ray starts a worker for every trial that is out, and lets
    a trial that waits for its own have the first that comes free: with one waiting trial, as is Ray's custom with
    searchers, trials shorter than the start of a worker would run one after the other for ever.

    Args:
        book: of the sweep.
        fixed: entries that every trial's configuration gets.
        places: returns for how many trials there is room; asked every few seconds, for clusters grow. None: no bound.
    """

    def __init__(self, book: Book, fixed: dict[str, Any], places: Callable[[], int] | None = None) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self.book, self._fixed, self._places = book, fixed, places
        self._room, self._asked_at = 0, -math.inf
        cohort = book.spec.cohort
        self._size = cohort.num_members if cohort is not None else 1
        self._open: dict[str, list[tuple[int, str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles the searcher into its experiment state, which is never read."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next run, or the next ones as one cohort; None while there is none yet; at the end a word."""
        if self._crowded():
            return None
        jobs = self.book.next(self._size)
        if jobs is None:
            return str(Searcher.FINISHED)
        if not jobs:
            return None
        self._open[trial_id] = [(job.number, job.trial_id) for job in jobs]
        trials = [{"trial_id": job.trial_id, "values": job.values, "note": job.note} for job in jobs]
        if self._size == 1:
            return {**self._fixed, "trial": trials[0]}
        name = f"{trials[0]['trial_id']}-{trials[-1]['trial_id']}"
        return {**self._fixed, "trial": {"trial_id": name, "members": trials}}

    def _crowded(self) -> bool:
        """Return whether enough trials are out for the room that there is."""
        if self._places is None:
            return False
        now = time.monotonic()
        if now - self._asked_at > ROOM_SECONDS:
            self._room, self._asked_at = self._places(), now
        return len(self._open) > self._room

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on the new evaluations, and what the probes have measured first."""
        for index, prefix in self._members(trial_id):
            self.book.note(index, _evals(result.get(f"{prefix}evals")))
            self.book.learn(index, _pairs(result.get(f"{prefix}first_probes")))

    def judge(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Return whether a trial is to train on, given its new evaluations."""
        ((index, _),) = self._open[trial_id]
        return self.book.observe(index, _evals(result.get("evals"))) == "continue"

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the book how a trial left its actor: ended, taken off by the rule, failed or interrupted."""
        for index, prefix in self._members(trial_id):
            if error:
                self.book.failed(index)
            elif result is None or not result.get(f"{prefix}ended"):
                self.book.taken_off(index)
            else:
                self.book.note(index, _evals(result.get(f"{prefix}evals")))
                self.book.learn(index, _pairs(result.get(f"{prefix}first_probes")))
                measured = _pairs(result.get(f"{prefix}measures"))
                if result.get(f"{prefix}diverged"):
                    measured[OBJECTIVE] = math.nan
                self.book.ended(index, measured)
        self._open.pop(trial_id, None)

    def _members(self, trial_id: str) -> list[tuple[int, str]]:
        """Return number and prefix of the results of each trial that a trial of Ray's stands for."""
        # Ray flattens what it hands over
        return [(i, f"members/{name}/" if self._size > 1 else "") for i, name in self._open.get(trial_id, [])]

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the journal file is always current."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a new book reads the journal file."""


class SearchScheduler(FIFOScheduler):
    """Lets trials run in the order in which they were handed out, as Ray Tune's own does.

    That one goes through every trial that there ever was, at each event: a millisecond a trial for every thousand.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: list[Any] = []
        self._requests: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing, see the searcher."""
        return {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take note of a new trial."""
        # Ray makes one for each trial and compares them, entry by entry, a few times an event; the same one is equal
        request = trial.placement_group_factory
        trial.placement_group_factory = self._requests.setdefault(request, request)
        self._live.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the first trial that waits for its turn, then the first that was paused; None without one."""
        self._live = [trial for trial in self._live if not trial.is_finished()]
        for status in (Trial.PENDING, Trial.PAUSED):
            for trial in self._live:
                if trial.status == status:
                    return trial
        return None


class StoppingScheduler(SearchScheduler):
    """Takes a trial off its actor when the stopping rule of the search says pause or stop.

    Args:
        searcher: of the same sweep; it keeps the rule, because what is promoted is handed out by it.
    """

    def __init__(self, searcher: OptunaSearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial goes on; called for trials that have not ended."""
        goes_on = self._searcher.judge(trial.trial_id, result)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


def _evals(found: Any) -> list[tuple[int, float]]:
    return [(int(step), float(loss)) for step, loss in found or ()]


def _pairs(found: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in found or ()}
