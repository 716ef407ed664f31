"""Trials trained together as one vectorised program; each stays a trial, with its own folder, rows and checkpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from landscape_ray.errors import UserError
from landscape_ray.sweep.run import TrialRun, index_of
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.sweep.system import SystemSampler
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.training.cohort import Cohort


class CohortRun:
    """The trials of one cohort and their folders, with the interface of a `TrialRun` as far as a search needs it.

    Args:
        spec: the sweep; its table [cohort] says how the members are computed.
        folder: of the sweep.
        members: for each trial its `trial_id` and its searched `values`.
        attempt: counts the drivers that this sweep has had.
        mirror: as for `TrialRun`.
    """

    def __init__(
        self,
        spec: SweepSpec,
        folder: SweepFolder,
        members: Sequence[dict[str, Any]],
        attempt: int,
        mirror: Mirror | None = None,
    ) -> None:
        self.runs: list[TrialRun] = []
        for each in members:
            name = each["trial_id"]
            data = self.runs[0].state.data if self.runs else None
            try:
                values, note = dict(each["values"]), each.get("note")
                run = TrialRun(spec, folder.trial(name), index_of(name), values, attempt, data, note, mirror)
            except UserError as error:
                raise UserError(f"trial {name}: {error}") from None
            self.runs.append(run)
        route = spec.cohort.route if spec.cohort is not None else "auto"
        self._cohort = Cohort([run.state for run in self.runs], route)
        for k, run in enumerate(self.runs):
            if k:  # one process: its samples are among the rows of the first member
                run.system = SystemSampler(0)
            # the weights of a member are a row of a matrix; it is saved without the others
            run.write_state = functools.partial(self._cohort.leave, k)

    @property
    def finished(self) -> bool:
        """Whether every trial has ended."""
        return self._cohort.finished

    def advance(self) -> None:
        """Train all members to the next commit of the one that is furthest behind, and make it durable."""
        until = min(run.next_stop() for run in self.runs if not run.state.finished)
        for k, record in self._cohort.train(until):
            self.runs[k].note(record)
        for run in self.runs:
            run.commit()

    def result(self) -> dict[str, Any]:
        """Return what the driver needs to know of each trial; at the top what Ray wants of any."""
        results = {run.folder.trial_id: run.result() for run in self.runs}
        losses = [result["loss_nats"] for result in results.values() if math.isfinite(result["loss_nats"])]
        full = next((result["disk_full"] for result in results.values() if result["disk_full"]), "")
        best = min(losses, default=math.nan)
        return {"loss_nats": best, "done": self.finished, "members": results, "disk_full": full}
