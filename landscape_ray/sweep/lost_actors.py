"""A worker that dies between two trials costs its next trial an attempt, and no more.

Ray Tune (2.60) reuses an actor by resetting it for its next trial, which is pending meanwhile. When the process dies
in that moment, or has died since its last trial, Ray hears of it twice: from the actor, upon which it puts the trial
back into the queue, and from the task, upon which it gives the trial up, since only one that is running is tried again.
It also takes the trial for one that is being reset for ever after, and never starts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial


@contextlib.contextmanager
def lost_actors_forgiven() -> Iterator[None]:
    """Let Ray Tune, inside the block, hear of a death between two trials once."""
    controller: Any = TuneController
    original = controller._trial_task_failure

    def handled(self: Any, trial: Any, exception: Exception) -> None:
        self._resetting_trials.discard(trial)
        # the first call comes with the trial set running; it is pending again where that one has put it back
        if not (isinstance(exception, RayActorError) and trial.status == Trial.PENDING):
            original(self, trial, exception)

    controller._trial_task_failure = handled
    try:
        yield
    finally:
        controller._trial_task_failure = original
