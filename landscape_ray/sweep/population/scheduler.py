"""The book of a population as Ray Tune's scheduler.

A member is one trial from its start to its end. While every member has an actor of its own, nobody is ever paused:
those that have to wait do so inside their actors. Where there are fewer actors than members, one that has reported
makes room for one that has something to do, and goes on later in whatever actor is free.

Ray gives a trial up that has failed too often. The book then says what becomes of the member: with its next order, if
there is one, it is a trial anew, with as many attempts as before.
"""

from __future__ import annotations

from collections.abc import Callable
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
        failed: told of each trial that Ray gives up; returns why it failed, in one line.
    """

    def __init__(
        self, book: PopulationBook, exchange: Any, num_actors: int, failed: Callable[[Trial], str] = str
    ) -> None:
        super().__init__()
        self.book, self._exchange, self._note_failed = book, exchange, failed
        self._crowded = num_actors < len(book.open)
        self._launched = list(book.open)
        self._lost: dict[int, Trial] = {}
        """Trials of members that Ray has given up and that have not been told yet how to go on."""
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
            self._tell(tune_controller, orders)
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
        """Take note of a member that has used up its attempts, and let those go on that waited for it."""
        if trial.should_recover() and trial.status != Trial.PENDING:  # Ray tries no pending one again
            return
        member = index_of(str(trial))
        self._lost[member] = trial
        self._tell(tune_controller, self.book.fail(member, self._note_failed(trial)))

    def _tell(self, tune_controller: Any, orders: list[Order]) -> None:
        """Announce orders, and start members again that had none to go on with."""
        self._pool.submit(self._announce, self.book.draft(), orders, self.book.needed())
        for order in orders:
            lost = self._lost.pop(order.decision.member, None)
            if lost is None or order.stops:
                continue
            trial = lost.reset()
            tune_controller.add_trial(trial)  # which sets its configuration
            # its actor may ask before the order is published, and must not get the one that it failed of
            news = {"serial": order.serial, "values": order.decision.values, "donor": order.decision.donor}
            given = trial.config["trial"] | news
            trial.set_config({**trial.config, "trial": given})

    def debug_string(self) -> str:
        """Return nothing: progress is shown elsewhere."""
        return ""
