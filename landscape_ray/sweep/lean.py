"""What Ray Tune (2.60) does for every trial, and keeps of it, that a search does without.

**Requests for places.** Whenever there is a trial in line, its place is asked for: a placement group, and a task that
waits for it. When an actor comes free for that trial, the request is withdrawn, and the next trial in line makes
another one: with trials of a second, one of each a trial. Here the next trial takes the request over.

**Classes.** The trainable is looked up by name five times a trial, each time on the head node, and unpickled each time
into another class, for each of which Ray keeps a remote one. Here it is looked up once.

**Metrics of actors.** Whenever a trial is given an actor, that one is asked where it runs and for how long, twice a
trial, for tables that are not shown. Here nobody asks.

**Ended trials.** Everything about a trial is kept to the end of the experiment, for a snapshot that a later Ray could
go on from, for the tables of its result, and by a callback of its own that prints progress, or nothing. A sweep goes on
from its own folder and reads none of it. Here a trial is forgotten when it has ended and its actor is free; failed ones
stay.

All but the callback is done in private methods, so only in the Ray that they were read in. Another one is left as it
is: sweeps run, and cost more.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray.tune import registry
from ray.tune.execution import tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback

_READ_IN = "2.60."
_MODULE: Any = tune_controller
_CONTROLLER = ("_remove_actor", "on_step_end", "_cleanup_trials")
_SPARE_SECONDS = 1.0
"""How long a request that nobody has taken over is kept: it may hold a place."""


class NoProgress(TrialProgressCallback):
    """Stands where Ray puts a callback that prints progress of trials, and keeps all of them even if it prints none."""

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:
        """Print nothing and keep nothing."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print nothing and keep nothing."""


@contextlib.contextmanager
def lean_trials() -> Iterator[None]:
    """Let Ray Tune, inside the block, ask for places and classes once, and forget trials that have ended."""
    names = getattr(registry, "_global_registry", None)
    manager = getattr(_MODULE, "RayActorManager", None)
    there = all(hasattr(TuneController, name) for name in _CONTROLLER) and names is not None and manager is not None
    if not (there and ray.__version__.startswith(_READ_IN)):
        yield
        return
    with _kept_requests(manager), _forgotten_trials(), _silent_actors(), _remembered_classes(names):
        yield


@contextlib.contextmanager
def _remembered_classes(names: Any) -> Iterator[None]:
    """Look a name up in Ray's registry once."""
    known: dict[tuple[str, str], Any] = {}
    get, contains = names.get, names.contains

    def found(category: str, key: str) -> Any:
        if (category, key) not in known:
            known[category, key] = get(category, key)
        return known[category, key]

    def has(category: str, key: str) -> bool:
        return (category, key) in known or bool(contains(category, key))

    names.get, names.contains = found, has
    try:
        yield
    finally:
        del names.get, names.contains  # what the class has stands again


@contextlib.contextmanager
def _kept_requests(manager: Any) -> Iterator[None]:
    """Let a trial take over the request for a place that another one needs no more."""
    controller: Any = TuneController
    remove, step_end, clean_up, add = (
        controller._remove_actor,
        controller.on_step_end,
        controller._cleanup_trials,
        manager.add_actor,
    )
    spare: list[tuple[Any, float]] = []
    """Requests that stand and that nobody waits for, and since when."""

    def removed(self: Any, tracked_actor: Any) -> None:
        asked = self._actor_manager._pending_actors_to_attrs.pop(tracked_actor, None)
        if asked is None:
            remove(self, tracked_actor)
            return
        request = asked[2]
        self._actor_manager._resource_request_to_pending_actors[request].remove(tracked_actor)
        spare.append((request, time.monotonic()))

    def added(self: Any, cls: Any, kwargs: dict[str, Any], resource_request: Any, **hooks: Any) -> Any:
        place = next((i for i, (request, _) in enumerate(spare) if request == resource_request), None)
        if place is None:
            return add(self, cls, kwargs, resource_request, **hooks)
        del spare[place]
        tracked_actor = _MODULE.TrackedActor(uuid.uuid4().int, **hooks)
        self._pending_actors_to_attrs[tracked_actor] = cls, kwargs, resource_request
        self._resource_request_to_pending_actors[resource_request].append(tracked_actor)
        return tracked_actor

    def withdraw(self: Any, before: float) -> None:
        while spare and spare[0][1] < before:
            self._actor_manager._resource_manager.cancel_resource_request(spare.pop(0)[0])

    def stepped(self: Any) -> None:
        step_end(self)
        withdraw(self, time.monotonic() - _SPARE_SECONDS)

    def cleaned_up(self: Any) -> None:
        withdraw(self, float("inf"))
        controller._remove_actor = remove  # nobody takes a request over any more
        clean_up(self)

    controller._remove_actor, controller.on_step_end = removed, stepped
    controller._cleanup_trials, manager.add_actor = cleaned_up, added
    try:
        yield
    finally:
        controller._remove_actor, controller.on_step_end = remove, step_end
        controller._cleanup_trials, manager.add_actor = clean_up, add


@contextlib.contextmanager
def _forgotten_trials() -> Iterator[None]:
    """Drop trials that have ended, but for one, without which Ray would look for them in its snapshot."""
    controller: Any = TuneController
    step_end = controller.on_step_end

    def stepped(self: Any) -> None:
        step_end(self)
        busy = self._staged_trials | self._resetting_trials | self._trial_to_actor.keys()
        gone = self._stopped_trials - busy
        if len(gone) == len(self._trials) and gone:
            gone.discard(self._trials[-1])
        if not gone:
            return
        self._stopped_trials -= gone
        self._live_trials -= gone
        self._trials_to_cache -= gone
        self._trials[:] = [trial for trial in self._trials if trial not in gone]
        for trial in gone:
            self._trial_metadata.pop(trial.trial_id, None)

    controller.on_step_end = stepped
    try:
        yield
    finally:
        controller.on_step_end = step_end


@contextlib.contextmanager
def _silent_actors() -> Iterator[None]:
    """Give a trial its actor and ask that one nothing."""
    trial: Any = Trial
    before = trial.set_ray_actor

    def given(self: Any, ray_actor: Any) -> None:
        self.temporary_state.ray_actor = ray_actor

    trial.set_ray_actor = given
    try:
        yield
    finally:
        trial.set_ray_actor = before
