"""A member of a population in a Ray actor: orders from the exchange, weights through the object store."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.exceptions import RayError

from landscape_ray.data import Data
from landscape_ray.sweep.population.exchange import Handout
from landscape_ray.sweep.population.member import MemberRun
from landscape_ray.sweep.run import index_of
from landscape_ray.sweep.trainable import open_sweep, watched
from landscape_ray.sweep.workers import Workers, workers_of
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.training import train

FETCH_SECONDS = 60.0
"""After which weights in the object store count as lost."""


class MemberTrainable(tune.Trainable):
    """Ray Tune's view of a `MemberRun`. An actor is reused by many members, one after the other.

    As with `SweepTrainable`, the folder is opened by the first step: Ray starts actors for a trial and then lets
    another one run it. Ray keeps no checkpoint of a member: whoever opens it asks the exchange what it is to do.

    Configuration keys: `sweep_path`, `num_threads`, `attempt`, `exchange` (name of the actor), `weights_limit` (bytes),
    `max_report_seconds` (may be absent; waiting does not count), `storage` (likewise), `trial` (`trial_id`, `values`,
    and of a member that goes on after a failure the `serial` of the first order to carry out, and its `donor`).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take note of the trial."""
        self._given = config
        self._run: MemberRun | None = None
        self._mirror: Mirror | None = getattr(self, "_mirror", None)
        self._workers: Workers | None = getattr(self, "_workers", None)
        self._data: Data | None = getattr(self, "_data", None)
        self._exchange: Any = getattr(self, "_exchange", None)
        self._returned = time.perf_counter()

    def step(self) -> dict[str, Any]:
        """Take up the next order where the last one is done; train to the next commit."""
        copied = waited = 0.0
        if self._run is None or self._run.reached:
            handout = self._next()
            if handout is None or handout.order.stops:
                return self._end()
            received = time.perf_counter()
            waited = received - self._returned
            self._take_up(handout)
            copied = time.perf_counter() - received if handout.order.source is not None else 0.0
        run = self._run
        assert run is not None
        if not run.reached:
            with watched(self._given, self.trial_name):
                run.advance()
        if run.reached:
            self._offer(run)
        self._returned = time.perf_counter()
        return {**run.result(), "waited_seconds": waited, "copied_seconds": copied}

    def _next(self) -> Handout | None:
        """Return what to do, when it is known; None when the population has been given up."""
        if self._exchange is None:
            self._exchange = ray.get_actor(self._given["exchange"])
        serial = self._given["trial"].get("serial", 0) if self._run is None else self._run.order.serial + 1
        found: Handout | None = ray.get(self._exchange.next.remote(index_of(self.trial_name), serial))
        return found

    def _take_up(self, handout: Handout) -> None:
        weights = self._fetched(handout)
        if self._run is not None:
            self._run.begin(handout.order, weights)
            if self._mirror is not None:
                self._run.forget(handout.needed)
            return
        folder, spec, self._mirror = open_sweep(self._given, self._mirror)
        self._workers = workers_of(spec.resources, self._workers)
        loop = train if self._workers is None else self._workers.train
        trial, attempt = folder.trial(self.trial_name), self._given["attempt"]
        self._run = MemberRun(spec, trial, handout.order, attempt, self._data, weights, self._mirror, loop)
        self._data = self._run.state.data  # the same for all members

    def _fetched(self, handout: Handout) -> bytes | None:
        """Return the weights of an order out of the object store; None where they are lost: the file has them."""
        if not handout.weights:
            return None
        try:
            found: np.ndarray[Any, Any] = ray.get(handout.weights[0], timeout=FETCH_SECONDS)
        except RayError:  # of all kinds: owner died, object lost, store full, too slow
            return None
        return found.tobytes()

    def _offer(self, run: MemberRun) -> None:
        """Put the weights that are reported where others can copy them."""
        content = run.take_content()
        if content is None or len(content) > self._given["weights_limit"]:
            return
        try:
            reference = ray.put(np.frombuffer(content, dtype=np.uint8))
            ray.get(self._exchange.deposit.remote(run.observed, [reference]))
        except RayError:
            return  # the store is full: those who copy read the file

    def _end(self) -> dict[str, Any]:
        """Return the last result of a member that has been told to stop, or is let go."""
        last = (
            self._run.result()
            if self._run is not None
            else {"loss_nats": float("nan"), "ended": False, "disk_full": ""}
        )
        return {**last, "done": True, "reached": False}

    def cleanup(self) -> None:
        """Upload what is left, where there is a storage, and end the trial's other processes.

        Ray calls this before it ends the actor.
        """
        if self._workers is not None:
            self._workers.close()
        if self._mirror is not None:
            self._mirror.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another member."""
        if self._mirror is not None and not self._mirror.home:
            self._mirror.flush()
        self.setup(new_config)
        return True
