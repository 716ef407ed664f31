"""The runs of one sweep on an MLflow server: found again by their tags, made once, doubles removed.

How far a run is stands on the run itself: a request that carries the last points of a part also carries the number of
parts, and the server stores points before tags. Any process that finds the run can go on, wherever it works.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag

from landscape_ray.config import config_id
from landscape_ray.tracking import server
from landscape_ray.tracking.folder import Commit, SweepFolder, TrialFolder
from landscape_ray.tracking.labels import trial_tags
from landscape_ray.tracking.parts import read_part
from landscape_ray.tracking.uris import mask_secrets, masked


@dataclasses.dataclass(slots=True)
class TrackedRun:
    """One run as the server has it."""

    run_id: str
    status: str
    params: set[str]
    """Names of the parameters that are there; MLflow refuses to change one."""
    tags: dict[str, str]
    metrics: dict[str, float]
    """The last value of each metric when the run was found."""
    num_rewinds: int = 0
    parts: int = 0
    """How many parts of the trial were sent."""
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The newest events among the rows that were sent."""
    end_ms: int | None = None
    seen: tuple[object, bool] | None = None
    """The state of trial.json that was sent completely, and whether there is nothing left to do at closing time."""
    sent_at: float = -math.inf
    """When a request went to this run, by the monotonic clock."""
    found_at: float = dataclasses.field(default_factory=time.monotonic)
    """When the run was found or made, by the same clock."""

    def missing(self, params: Mapping[str, str]) -> dict[str, str]:
        """Return the parameters that the run does not have."""
        return {key: value for key, value in params.items() if key not in self.params}


class SweepRuns:
    """The parent run of a sweep and the runs of its trials.

    Args:
        folder: the sweep.
        tracking_uri: address of the store.
        experiment: name of the experiment, made when there is none.
        before: the runs as they were known; what was sent completely is not compared again where the server agrees.
    """

    def __init__(self, folder: SweepFolder, tracking_uri: str, experiment: str, before: SweepRuns | None = None):
        meta = folder.meta
        self.client: MlflowClient = server.open_client(tracking_uri)
        self._sweep_id = str(meta["sweep_id"])
        self.experiment_id = server.experiment_id(self.client, tracking_uri, experiment, folder.path.parent)
        runs = server.find_runs(self.client, self.experiment_id, self._sweep_id)
        parents = [run for run in runs if run.data.tags.get(server.KIND) == "sweep"]
        if not parents:
            start_ms = round(float(meta["created_unix"]) * 1000)
            parents = [self._create(start_ms, str(meta["name"]), {server.KIND: "sweep"})]
        self._delete(parents[1:])
        self.parent = _tracked(parents[0])
        known = {run.run_id: run for run in before.trials.values()} if before else {}
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
                run.data.tags[server.PARENT] = self.parent.run_id
            found = self.trials[trial_id] = _tracked(run)
            same = known.get(found.run_id)
            if (
                same is not None
                and (same.parts, same.status) == (found.parts, found.status)
                and (same.tags.items() <= found.tags.items())
            ):
                found.seen, found.sent_at, found.found_at = same.seen, same.sent_at, same.found_at

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
        run = _tracked(self._create(start_ms, server.run_name(trial.trial_id, commit.initial_varied), tags))
        self.trials[trial.trial_id] = run
        return run

    def log(
        self,
        run: TrackedRun,
        params: Iterable[Param] = (),
        metrics: Iterable[Metric] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send one request; what a run is known to have is kept up to date."""
        given = [tag for tag in to_tags(tags or {}) if run.tags.get(tag.key) != tag.value]
        params, metrics = list(params), list(metrics)
        if not (given or params or metrics):
            return
        self.client.log_batch(run.run_id, metrics=metrics, params=params, tags=given, synchronous=True)
        run.params.update(sys.intern(param.key) for param in params)  # the same names for every run of a sweep
        run.tags.update((tag.key, tag.value) for tag in given)
        run.sent_at = time.monotonic()

    def log_dataset(self, run: TrackedRun, data: Mapping[str, Any], corpus_id: str | None) -> dict[str, str]:
        """Name the data as an input of the run, once, and return the tags that say so, which the caller sends.

        Args:
            run: of a trial or the sweep.
            data: the table [train.data]; empty where it is not known.
            corpus_id: what identifies the content; None for the configuration's own hash.
        """
        if not data:
            return {}
        digest = (corpus_id or config_id(data))[:36]
        if run.tags.get(server.DATASET) != digest:
            source = json.dumps(masked(data), default=str)
            name = mask_secrets(str(data.get("source") or data.get("name") or "text"))[:500]
            dataset = Dataset(name, digest, "landscape_ray", source, profile=source)
            context = InputTag("mlflow.data.context", "train")
            self.client.log_inputs(run.run_id, datasets=[DatasetInput(dataset, [context])])
        return {server.DATASET: digest}

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
        return self.client.create_run(self.experiment_id, start_time=start_ms, run_name=name, tags=tags)

    def _delete(self, runs: list[Run]) -> None:
        for run in runs:
            self.client.delete_run(run.info.run_id)


def to_tags(tags: Mapping[str, str]) -> list[RunTag]:
    """Return tags as MLflow takes them, cut at its limit."""
    return [RunTag(server.clean_key(key), value[: server.MAX_TAG_CHARACTERS]) for key, value in tags.items()]


def _tracked(run: Run) -> TrackedRun:
    tags = dict(run.data.tags)
    return TrackedRun(
        run.info.run_id,
        run.info.status,
        {sys.intern(name) for name in run.data.params},
        tags,
        dict(run.data.metrics),
        _num_rewinds(run),
        int(tags.get(server.NUM_PARTS, "0")),
        _events(tags),
    )


def _events(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    try:
        events = json.loads(tags.get(server.EVENTS, "[]"))
    except ValueError:  # cut or edited by hand
        return []
    return events if isinstance(events, list) else []


def _num_rewinds(run: Run) -> int:
    return int(run.data.tags.get(server.NUM_REWINDS, "0"))
