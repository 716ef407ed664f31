"""When what a trial has committed may wait for more, so that one request carries what several commits have brought."""

from __future__ import annotations

import time

from landscape_ray.records import TERMINAL_STATUSES
from landscape_ray.tracking.folder import Commit
from landscape_ray.tracking.runs import TrackedRun

_BATCH_SHARE = 10.0
"""A run that is training is sent to at most every so many times as long as the last pass over all runs took."""
_BATCH_AGE = 0.1
"""The pause between two requests to a run grows by this share of how long it is followed ..."""
_LONGEST_BATCH = 3.0
"""... up to so many times of what it is at first."""
_BATCH_COMMITS = 10
"""A request waits for so many commits of its trial: what it costs is shared between them ..."""
_LONGEST_WAIT = 10.0
"""... but by the same growth up to so many pauses at most, by default five minutes."""


def may_wait(run: TrackedRun, commit: Commit, batch_seconds: float, pass_seconds: float) -> bool:
    """Return whether what a trial has committed can go with what it will have committed a little later.

    Args:
        run: of the trial.
        commit: what it has committed.
        batch_seconds: the shortest pause between two requests to a run.
        pass_seconds: how long the last pass over all runs took.
    """
    if commit.summary.status in TERMINAL_STATUSES or run.num_rewinds != commit.num_rewinds:
        return False
    now = time.monotonic()
    few = commit.num_parts - run.parts < _BATCH_COMMITS
    by_age = min((_LONGEST_WAIT if few else _LONGEST_BATCH) * batch_seconds, _BATCH_AGE * (now - run.found_at))
    return now - run.sent_at < max(batch_seconds, by_age, _BATCH_SHARE * pass_seconds)
