"""A trial of a search in a Ray actor: the trial's folder has everything, Ray gets a few numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ray import tune

from landscape_ray.sweep.cohort import CohortRun
from landscape_ray.sweep.limits import hang_path, limit_gpu_memory, time_limit
from landscape_ray.sweep.run import TrialRun, index_of
from landscape_ray.sweep.spec import spec_of
from landscape_ray.sweep.storing import open_for_trial
from landscape_ray.tracking.mirror import Mirror


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

    @property
    def _run(self) -> TrialRun | CohortRun:
        """The trial, or the trials of a cohort, continued where their folders stand."""
        if self._opened is None:
            torch.set_num_threads(self._given["num_threads"])
            trial, attempt = self._given["trial"], self._given["attempt"]
            path, storage = Path(self._given["sweep_path"]), self._given.get("storage")
            folder, self._mirror = open_for_trial(path, storage, attempt, self._mirror)
            spec = spec_of(folder)
            if spec.resources.gpus_per_trial == 0:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible to trials that asked for none
            limit_gpu_memory(spec.resources.gpus_per_trial)
            if "members" in trial:
                self._opened = CohortRun(spec, folder, trial["members"], attempt, self._mirror)
            else:
                name = self.trial_name
                values, note = dict(trial["values"]), trial.get("note")
                self._opened = TrialRun(
                    spec, folder.trial(name), index_of(name), values, attempt, note=note, mirror=self._mirror
                )
        return self._opened

    def step(self) -> dict[str, Any]:
        """Train to the next commit."""
        report = hang_path(Path(self._given["sweep_path"]), self.trial_name)
        with time_limit(self._given.get("max_report_seconds"), report):
            if not self._run.finished:
                self._run.advance()
            return self._run.result()

    def cleanup(self) -> None:
        """Upload what is left, where there is a storage; Ray calls this before it ends the actor."""
        if self._mirror is not None:
            self._mirror.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        if self._mirror is not None and not self._mirror.home:
            self._mirror.flush()
        self.setup(new_config)
        return True
