"""The book of a population as Ray Tune's scheduler.

A member is one trial from its start to its end. While every member has an actor of its own, nobody is ever paused:
those that have to wait do so inside their actors. Where there are fewer actors than members, one that has reported
makes room for one that has something to do, and goes on later in whatever actor is free.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from landscape_ray.populations.decisions import points_from_json
from landscape_ray.sweep.population.book import Draft, PopulationBook
from landscape_ray.sweep.population.orders import Order
from landscape_ray.sweep.run import index_of


class PopulationScheduler(FIFOScheduler):
    """Hands reports to the book and orders to the exchange.

    Args:
        book: of the sweep.
        exchange: the actor that trials ask.
        num_actors: how many trials the cluster has room for.

    Attributes:
        spent_seconds: time that the driver has spent on results of trials.
        num_results: how many these were.
    """

    def __init__(self, book: PopulationBook, exchange: Any, num_actors: int) -> None:
        super().__init__()
        self.book, self._exchange = book, exchange
        self._crowded = num_actors < len(book.open)
        self._launched = list(book.open)
        self._broken = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="population")
        self._error: BaseException | None = None
        self.spent_seconds, self.num_results = 0.0, 0
        exchange.publish.remote([book.orders[member] for member in book.open])

    def _announce(self, draft: Draft, orders: list[Order]) -> None:
        """Save the book, then let members know; in a thread, so that the driver never waits for a disk."""
        try:
            if self._error is None:
                self.book.save(draft)
                self._exchange.publish.remote(orders)
        except BaseException as error:
            self._error = error
            self._exchange.close.remote()

    def close(self) -> None:
        """Wait for what is being saved, and delete weights that nobody needs any more.

        Raises:
            UserError: the book could not be saved; then the population has been given up.
        """
        self._pool.shutdown(wait=True)
        if self._error is not None:
            raise self._error
        self.book.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles the scheduler into its experiment state, which is never read."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return whether the trial goes on, possibly to wait; called for trials that have not ended."""
        start = time.perf_counter()
        try:
            return self._answer(tune_controller, trial, result)
        finally:
            self.spent_seconds += time.perf_counter() - start
            self.num_results += 1

    def _answer(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        member, serial = index_of(str(trial)), int(result["serial"])
        self.book.begun(member, serial)
        if not result["reached"]:
            return str(TrialScheduler.CONTINUE)
        orders = self.book.report(member, serial, points_from_json(result["points"]), int(result["num_tokens"]))
        if orders:
            self._pool.submit(self._announce, self.book.draft(), orders)
        stopped = {order.decision.member for order in orders if order.stops}
        for other in tune_controller.get_trials():
            if index_of(str(other)) in stopped and other.status == Trial.PAUSED:
                tune_controller.stop_trial(other)
        if member in stopped or ((self._broken or self._error is not None) and self.book.waits(member)):
            return str(TrialScheduler.STOP)
        if self._crowded and self._somebody_else(tune_controller, member):
            tune_controller.pause_trial(trial, should_checkpoint=False)  # everything is in its folder
            return str(TrialScheduler.NOOP)
        return str(TrialScheduler.CONTINUE)

    def _somebody_else(self, tune_controller: Any, member: int) -> bool:
        """Return whether another member has something to do and no actor to do it in."""
        trials = {index_of(str(trial)): trial for trial in tune_controller.get_trials()}
        return any(
            other != member
            and not self.book.waits(other)
            and not self.book.orders[other].stops
            and (other not in trials or trials[other].status in (Trial.PENDING, Trial.PAUSED))
            for other in self._launched
        )

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return, among the trials that have something to do and no actor, the one that has made the fewest updates.

        Not the one at the lowest step: two that copy each other's early weights would keep the others from their turn.
        """
        ready = []
        for trial in tune_controller.get_trials():
            member = index_of(str(trial))
            if trial.status in (Trial.PENDING, Trial.PAUSED) and not self.book.waits(member):
                ready.append((self.book.strategy.members[member].spent, member, trial))
        return min(ready, key=lambda each: each[:2])[2] if ready else None

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Give a synchronous population up when a member has failed for good: the others would wait for ever."""
        if not trial.should_recover() and self.book.strategy.synchronous:
            self._broken = True
            self._exchange.close.remote()
            for other in tune_controller.get_trials():
                if other.status == Trial.PAUSED:
                    tune_controller.stop_trial(other)

    def debug_string(self) -> str:
        """Return nothing: progress is shown elsewhere."""
        return ""
