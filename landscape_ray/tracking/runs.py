"""The runs of one sweep on an MLflow server: found again by their tags, made once, doubles removed."""

from __future__ import annotations

import contextlib
import dataclasses
import tomllib
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Run, RunTag

from landscape_ray.tracking import server
from landscape_ray.tracking.folder import Commit, SweepFolder, TrialFolder
from landscape_ray.tracking.labels import trial_tags
from landscape_ray.tracking.parts import read_part


@dataclasses.dataclass(slots=True)
class TrackedRun:
    """One run as the server has it."""

    run_id: str
    status: str
    params: set[str]
    """Names of the parameters that are there; MLflow refuses to change one."""
    num_rewinds: int = 0
    parts: int = 0
    """How many parts of the trial were sent."""
    end_ms: int | None = None
    seen: tuple[object, bool] | None = None
    """The state of trial.json that was sent completely."""


class SweepRuns:
    """The parent run of a sweep and the runs of its trials.

    Args:
        folder: the sweep.
        tracking_uri: address of the store.
        experiment: name of the experiment, made when there is none.
        parts_sent: for known run identifiers, how many parts were sent.
    """

    def __init__(self, folder: SweepFolder, tracking_uri: str, experiment: str, parts_sent: Mapping[str, int]):
        meta = folder.meta
        self.client: MlflowClient = server.open_client(tracking_uri)
        self._sweep_id = str(meta["sweep_id"])
        self._experiment_id = server.experiment_id(self.client, tracking_uri, experiment)
        runs = server.find_runs(self.client, self._experiment_id, self._sweep_id)
        parents = [run for run in runs if run.data.tags.get(server.KIND) == "sweep"]
        if not parents:
            start_ms = round(float(meta["created_unix"]) * 1000)
            parents = [self._create(start_ms, str(meta["name"]), {server.KIND: "sweep"})]
        self._delete(parents[1:])
        self.parent = _tracked(parents[0])
        with contextlib.suppress(tomllib.TOMLDecodeError):  # not ours to judge here; the text itself is an artifact
            self.log_params(self.parent, server.to_params(tomllib.loads(folder.spec_text)))
        self.trials: dict[str, TrackedRun] = {}
        for run in sorted(runs, key=lambda run: -_num_rewinds(run)):  # stable: of equals the oldest comes first
            trial_id = run.data.tags.get(server.TRIAL_ID)
            if trial_id is None:
                continue
            if trial_id in self.trials:
                self._delete([run])
                continue
            if run.data.tags.get(server.PARENT) != self.parent.run_id:
                self.client.set_tag(run.info.run_id, server.PARENT, self.parent.run_id)
            self.trials[trial_id] = _tracked(run)
            self.trials[trial_id].parts = parts_sent.get(run.info.run_id, 0)

    def for_trial(self, trial: TrialFolder, commit: Commit) -> TrackedRun:
        """Return the run of a trial, made if there is none, or if it holds points of rows that were given up."""
        run = self.trials.get(trial.trial_id)
        if run is not None and run.num_rewinds == commit.num_rewinds:
            return run
        if run is not None:
            self.client.delete_run(run.run_id)
            del self.trials[trial.trial_id]
        start_ms = None
        if commit.num_parts:
            first = read_part(trial.part_path(0)).slice(0, 1).to_pylist()[0]
            start_ms = round((first["time_unix"] - first["elapsed_seconds"]) * 1000)
        tags = {
            server.KIND: "trial",
            server.TRIAL_ID: trial.trial_id,
            server.NUM_REWINDS: str(commit.num_rewinds),
            server.PARENT: self.parent.run_id,
            **trial_tags(commit.summary),
        }
        run = _tracked(self._create(start_ms, server.run_name(trial.trial_id, commit.summary.varied), tags))
        self.trials[trial.trial_id] = run
        return run

    def log_params(self, run: TrackedRun, params: Mapping[str, str]) -> None:
        """Send the parameters that the run does not have."""
        missing = {key: value for key, value in params.items() if key not in run.params}
        for batch in server.param_batches(missing):
            self.client.log_batch(run.run_id, params=batch, synchronous=True)
            run.params.update(param.key for param in batch)

    def set_status(self, run: TrackedRun, status: str) -> None:
        """Give the run this status, if it has another one."""
        if status == run.status:
            return
        if status == "RUNNING":
            self.client.update_run(run.run_id, status=status)
        else:
            self.client.set_terminated(run.run_id, status=status, end_time=run.end_ms)
        run.status = status

    def _create(self, start_ms: int | None, name: str, tags: dict[str, str]) -> Run:
        tags = {server.SWEEP_ID: self._sweep_id} | tags
        return self.client.create_run(self._experiment_id, start_time=start_ms, run_name=name, tags=tags)

    def _delete(self, runs: list[Run]) -> None:
        for run in runs:
            self.client.delete_run(run.info.run_id)


def to_tags(tags: Mapping[str, str]) -> list[RunTag]:
    """Return tags as MLflow takes them, cut at its limit."""
    return [RunTag(server.clean_key(key), value[: server.MAX_TAG_CHARACTERS]) for key, value in tags.items()]


def _tracked(run: Run) -> TrackedRun:
    return TrackedRun(run.info.run_id, run.info.status, set(run.data.params), _num_rewinds(run))


def _num_rewinds(run: Run) -> int:
    return int(run.data.tags.get(server.NUM_REWINDS, "0"))
