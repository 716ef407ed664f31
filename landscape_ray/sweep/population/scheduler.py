"""The book of a population as Ray Tune's scheduler.

A member is one trial from its start to its end. While every member has an actor of its own, nobody is ever paused:
those that have to wait do so inside their actors. Where there are fewer actors than members, one that has reported
makes room for one that has something to do, and goes on later in whatever actor is free.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from landscape_ray.populations.decisions import points_from_json
from landscape_ray.sweep.population.book import Draft, PopulationBook
from landscape_ray.sweep.population.orders import Order, Weights
from landscape_ray.sweep.run import index_of


class PopulationScheduler(FIFOScheduler):
    """Hands reports to the book and orders to the exchange.

    Args:
        book: of the sweep.
        exchange: the actor that trials ask.
        num_actors: how many trials the cluster has room for.
    """

    def __init__(self, book: PopulationBook, exchange: Any, num_actors: int) -> None:
        super().__init__()
        self.book, self._exchange = book, exchange
        self._crowded = num_actors < len(book.open)
        self._launched = list(book.open)
        self._failed: set[int] = set()
        self._given_up = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="population")
        self._error: BaseException | None = None
        exchange.publish.remote([book.orders[member] for member in book.open], book.needed())

    def _announce(self, draft: Draft, orders: list[Order], needed: frozenset[Weights]) -> None:
        """Save the book, then let members know; in a thread, so that the driver never waits for a disk."""
        try:
            if self._error is None:
                self.book.save(draft)
                self._exchange.publish.remote(orders, needed)
        except BaseException as error:
            self._error = error
            self._give_up()

    def _give_up(self) -> None:
        """Let everybody go home who waits for orders that nobody will give."""
        self._given_up = True
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
        member, serial = index_of(str(trial)), int(result["serial"])
        self.book.begun(member, serial)
        if not result["reached"]:
            return str(TrialScheduler.CONTINUE)
        orders = self.book.report(member, serial, points_from_json(result["points"]), int(result["num_tokens"]))
        if orders:
            self._pool.submit(self._announce, self.book.draft(), orders, self.book.needed())
        self._give_up_if_stuck()
        if self.book.orders[member].stops or (self._given_up and self.book.waits(member)):
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
            if trial.status == Trial.PAUSED and (self._given_up or self.book.orders[member].stops):
                tune_controller.stop_trial(trial)
            elif trial.status in (Trial.PENDING, Trial.PAUSED) and not self.book.waits(member):
                ready.append((self.book.strategy.members[member].spent, member, trial))
        return min(ready, key=lambda each: each[:2])[2] if ready else None

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Take note of a member that has failed for good."""
        if not trial.should_recover():
            self._failed.add(index_of(str(trial)))
            self._give_up_if_stuck()

    def _give_up_if_stuck(self) -> None:
        """Give the population up when all others wait for members that have failed."""
        alive = [member for member in self.book.open if member not in self._failed]
        if self._failed and all(self.book.waits(member) for member in alive):
            self._give_up()

    def debug_string(self) -> str:
        """Return nothing: progress is shown elsewhere."""
        return ""
