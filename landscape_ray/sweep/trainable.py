"""A trial of a search in a Ray actor: the trial's folder has everything, Ray gets a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ray import tune

from landscape_ray.sweep.cohort import CohortRun
from landscape_ray.sweep.limits import confine, hang_path, time_limit
from landscape_ray.sweep.run import TrialRun, index_of
from landscape_ray.sweep.spec import SweepSpec, spec_of
from landscape_ray.sweep.storing import open_for_trial
from landscape_ray.sweep.workers import Workers, workers_of
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.training import train


class SweepTrainable(tune.Trainable):
    """Ray Tune's view of a `TrialRun`. An actor is reused by many trials, one after the other.

    The trial's folder is opened by the first step, not by the constructor: Ray starts actors for a trial
    and then lets another one, which became free, run it. An actor that is never asked to work must touch nothing.

    Configuration keys: `sweep_path`, `num_threads`, `attempt`, `max_report_seconds` and `storage` (may be absent),
    `trial` (`trial_id`, `values` and `note`; for a cohort its `members`, each with these).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take note of the trial."""
        self._given = config
        self._opened: TrialRun | CohortRun | None = None
        self._mirror: Mirror | None = getattr(self, "_mirror", None)
        self._workers: Workers | None = getattr(self, "_workers", None)

    @property
    def _run(self) -> TrialRun | CohortRun:
        """The trial, or the trials of a cohort, continued where their folders stand."""
        if self._opened is None:
            folder, spec, self._mirror = open_sweep(self._given, self._mirror)
            self._workers = workers_of(spec.resources, self._workers)
            trial, attempt = self._given["trial"], self._given["attempt"]
            if "members" in trial:
                self._opened = CohortRun(spec, folder, trial["members"], attempt, self._mirror)
            else:
                name = self.trial_name
                values, note = dict(trial["values"]), trial.get("note")
                self._opened = TrialRun(
                    spec,
                    folder.trial(name),
                    index_of(name),
                    values,
                    attempt,
                    note=note,
                    mirror=self._mirror,
                    loop=train if self._workers is None else self._workers.train,
                )
        return self._opened

    def step(self) -> dict[str, Any]:
        """Train to the next commit."""
        with watched(self._given, self.trial_name):
            if not self._run.finished:
                self._run.advance()
            return self._run.result()

    def cleanup(self) -> None:
        """Upload what is left, where there is a storage, and end the trial's other processes.

        Ray calls this before it ends the actor.
        """
        if self._workers is not None:
            self._workers.close()
        if self._mirror is not None:
            self._mirror.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        if self._mirror is not None and not self._mirror.home:
            self._mirror.flush()
        self.setup(new_config)
        return True


def open_sweep(given: Mapping[str, Any], mirror: Mirror | None) -> tuple[SweepFolder, SweepSpec, Mirror | None]:
    """Return the sweep that an actor of Ray works for, with this process held to what a trial of it may use.

    Args:
        given: configuration of the actor: `sweep_path`, `num_threads`, `attempt`, and `storage` where there is one.
        mirror: of the actor's trial before this one.
    """
    folder, mirror = open_for_trial(Path(given["sweep_path"]), given.get("storage"), given["attempt"], mirror)
    spec = spec_of(folder)
    confine(given["num_threads"], spec.resources.gpus_per_worker)
    return folder, spec, mirror


def watched(given: Mapping[str, Any], trial_name: str) -> AbstractContextManager[None]:
    """Return a block that ends this process where one report takes too long.

    Args:
        given: configuration of the actor: `sweep_path`, and `max_report_seconds` where there is a limit.
        trial_name: whose report it is.
    """
    return time_limit(given.get("max_report_seconds"), hang_path(Path(given["sweep_path"]), trial_name))
