"""Two things that Ray Tune (2.60) does when actors are reused, done otherwise.

**A death between two trials.** An actor is reset for its next trial, which is pending meanwhile. When the process dies
in that moment, or has died since its last trial, Ray hears of it twice: from the actor, upon which it puts the trial
back into the queue, and from the task, upon which it gives the trial up, since only one that is running is tried again.
It also takes the trial for one that is being reset for ever after, and never starts it.

**Trials shorter than the start of a worker.** An actor that comes free goes to the trial that has waited longest, and
the worker that was being started for that one is sent away. With trials of a second and workers that take five to
load, all trials run in the first worker, one after the other, and processor time goes into workers that are never used.

Both are mended in private methods. A later Ray that has them no more is left as it is: sweeps run, with its faults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

_METHODS = ("_trial_task_failure", "_maybe_reuse_cached_actor")


@contextlib.contextmanager
def careful_reuse() -> Iterator[None]:
    """Let Ray Tune, inside the block, hear of a death between two trials once, and wait for workers that are coming."""
    controller: Any = TuneController
    if not all(hasattr(controller, name) for name in _METHODS):
        yield
        return
    fail, reuse = controller._trial_task_failure, controller._maybe_reuse_cached_actor

    def failed(self: Any, trial: Any, exception: Exception) -> None:
        self._resetting_trials.discard(trial)
        # the first call comes with the trial set running; it is pending again where that one has put it back
        if not (isinstance(exception, RayActorError) and trial.status == Trial.PENDING):
            fail(self, trial, exception)

    def reused(self: Any, trial: Any) -> bool:
        own = self._trial_to_actor.get(trial)
        starting = own is not None and self._actor_manager.is_actor_started(own) and own not in self._started_actors
        if starting and trial not in self._resetting_trials:
            return False  # its worker has a place and is loading: another trial may have the free one
        found: bool = reuse(self, trial)
        return found

    controller._trial_task_failure, controller._maybe_reuse_cached_actor = failed, reused
    try:
        yield
    finally:
        controller._trial_task_failure, controller._maybe_reuse_cached_actor = fail, reuse
