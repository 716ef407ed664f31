"""The runs of one sweep on an MLflow server: found again by their tags, made once, doubles removed.

How far a run is stands on the run itself: a request that carries the last points of a part also carries the number of
parts, and the server stores points before tags. Any process that finds the run can go on, wherever it works.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from landscape_ray.config import config_id
from landscape_ray.records import TERMINAL_STATUSES
from landscape_ray.tracking import database, server
from landscape_ray.tracking.folder import Commit, SweepFolder, TrialFolder
from landscape_ray.tracking.labels import trial_tags
from landscape_ray.tracking.parts import read_part
from landscape_ray.tracking.points import mlflow_status, summary_text
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
    loaded: bool = True
    """Whether parameters, tags, metrics and events are here: not those of a run that has nothing left to do."""
    digest: tuple[tuple[str, ...], bytes] = ((), b"")
    """Names of the tags that were sent, and a digest of their values, of a run that is not loaded."""
    summary: bytes = b""
    """Digest of the summary that a run has that is not loaded."""

    def missing(self, params: Mapping[str, str]) -> dict[str, str]:
        """Return the parameters that the run does not have."""
        return {key: value for key, value in params.items() if key not in self.params}

    def unload(self) -> None:
        """Forget what is only needed to send more: a sweep may have ten thousand runs."""
        if self.loaded:
            names = _NAMES.setdefault(found := tuple(sorted(self.tags)), found)
            self.digest = names, _digest(self.tags, names)
            self.summary = _digest(self.tags, [server.SUMMARY]) if server.SUMMARY in self.tags else b""
            self.params, self.tags, self.metrics, self.events = _NOTHING
            self.loaded = False

    def holds(self, commit: Commit) -> bool:
        """Return whether a run that is not loaded has all of a trial that has ended.

        The summary is sent with the last points, by a request that stores points first.
        """
        status = commit.summary.status
        return (
            (not self.loaded and status in TERMINAL_STATUSES)
            and (self.num_rewinds, self.parts) == (commit.num_rewinds, commit.num_parts)
            and self.status == mlflow_status(status, closing=True)
            and self.summary == _digest({"": summary_text(commit.summary)}, [""])
        )

    def agrees(self, found: TrackedRun) -> bool:
        """Return whether the server has what it was known to have, perhaps with tags of others."""
        if (self.parts, self.status) != (found.parts, found.status):
            return False
        if self.loaded:
            return self.tags.items() <= found.tags.items()
        names, digest = self.digest
        return found.tags.keys() >= set(names) and _digest(found.tags, names) == digest


_NOTHING: tuple[set[str], dict[str, str], dict[str, float], list[dict[str, Any]]] = set(), {}, {}, []
"""What every run has that is not loaded; nothing is added to it: more is sent to loaded runs only."""
_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {}
"""The names of tags are the same for nearly all runs: one object for all of them."""


def _digest(tags: Mapping[str, str], names: Iterable[str]) -> bytes:
    return hashlib.sha256(json.dumps([tags[name] for name in names]).encode()).digest()[:16]


class SweepRuns:
    """The parent run of a sweep and the runs of its trials.

    Where the store is a database, what is written of trials waits for :meth:`flush`.

    Args:
        folder: the sweep.
        tracking_uri: address of the store.
        experiment: name of the experiment, made when there is none.
        before: the runs as they were known; what was sent completely is not compared again where the server agrees.

    Attributes:
        num_points: metric points of trials that were written, by `before` as well.
    """

    def __init__(self, folder: SweepFolder, tracking_uri: str, experiment: str, before: SweepRuns | None = None):
        meta = folder.meta
        self.client: server.Client = server.open_client(tracking_uri)
        self._sweep_id = str(meta["sweep_id"])
        self.experiment_id = server.experiment_id(self.client, tracking_uri, experiment, folder.path.parent)
        self._together: bool = self.client.writes_runs and (before is None or before._together)
        self._experiment: Experiment | None = None
        self._waiting: dict[str, tuple[TrackedRun, int, database.RunWrite]] = {}
        """What waits to be written, with the number of parts that the run has until then."""
        self._num_waiting = 0
        self.num_points: int = before.num_points if before else 0
        known = {run.run_id: run for run in before.trials.values()} if before else {}
        self.trials: dict[str, TrackedRun] = {}
        parents: list[tuple[Run, bool]] = []
        of_others: dict[str, str] = {}
        doubles: list[str] = []
        for run, whole in self.client.runs_of(self.experiment_id, self._sweep_id):
            trial_id = run.data.tags.get(server.TRIAL_ID)
            if run.data.tags.get(server.KIND) == "sweep":
                parents.append((run, whole))
            if trial_id is None:
                continue
            found = _tracked(run)
            other = self.trials.get(trial_id)
            if other is not None and other.num_rewinds >= found.num_rewinds:  # of equals the oldest stays
                doubles.append(found.run_id)
                continue
            if other is not None:
                doubles.append(other.run_id)
            self.trials[trial_id] = found
            of_others[found.run_id] = sys.intern(run.data.tags.get(server.PARENT, ""))
            same = known.get(found.run_id)
            if same is not None and same.agrees(found):
                found.seen, found.sent_at, found.found_at = same.seen, same.sent_at, same.found_at
            if not whole:
                found.unload()
        if not parents:
            start_ms = round(float(meta["created_unix"]) * 1000)
            parents = [(self._create(start_ms, str(meta["name"]), {server.KIND: "sweep"}), True)]
        self.parent = self._whole(*parents[0])
        self._delete([run.info.run_id for run, _ in parents[1:]] + doubles)
        for found in self.trials.values():
            if of_others[found.run_id] != self.parent.run_id:
                self.client.set_tag(found.run_id, server.PARENT, self.parent.run_id)
                if found.loaded:
                    found.tags[server.PARENT] = self.parent.run_id
                else:
                    found.digest = (), b""  # of tags that were there before

    def _whole(self, run: Run, whole: bool) -> TrackedRun:
        return _tracked(run if whole else self.client.get_run(run.info.run_id))

    def for_trial(self, trial: TrialFolder, commit: Commit, read: Callable[[Path], pa.Table] = read_part) -> TrackedRun:
        """Return the run of a trial, made if there is none, or if it holds points of rows that were given up.

        Args:
            trial: its folder.
            commit: what it has committed.
            read: returns the rows of a part.
        """
        run = self.trials.get(trial.trial_id)
        if run is not None and run.num_rewinds == commit.num_rewinds:
            return run if run.loaded else self._load(trial.trial_id, run)
        if run is not None:
            self.flush()
            self.client.delete_run(run.run_id)
            del self.trials[trial.trial_id]
        start_ms = None
        if commit.num_parts:
            first = read(trial.part_path(0)).slice(0, 1)
            start_ms = round((first["time_unix"][0].as_py() - first["elapsed_seconds"][0].as_py()) * 1000)
        tags = {
            server.KIND: "trial",
            server.TRIAL_ID: trial.trial_id,
            server.NUM_REWINDS: str(commit.num_rewinds),
            server.PARENT: self.parent.run_id,
            **trial_tags(commit.summary),
        }
        name = server.run_name(trial.trial_id, commit.initial_varied)
        self.trials[trial.trial_id] = run = self._begin(start_ms, name, tags)
        return run

    def _load(self, trial_id: str, run: TrackedRun) -> TrackedRun:
        """Return a run that is not loaded as the server has it."""
        self.flush()
        self.trials[trial_id] = found = _tracked(self.client.get_run(run.run_id))
        found.seen, found.sent_at, found.found_at = run.seen, run.sent_at, run.found_at
        return found

    def _begin(self, start_ms: int | None, name: str, tags: dict[str, str]) -> TrackedRun:
        """Return a new run of a trial."""
        if not self._together:
            return _tracked(self._create(start_ms, name, tags))
        run = TrackedRun(uuid.uuid4().hex, "RUNNING", set(), {}, {}, int(tags[server.NUM_REWINDS]))
        write = self._write(run)
        write.created = (start_ms or round(time.time() * 1000), name)
        write.tags |= (sent := {tag.key: tag.value for tag in to_tags({server.SWEEP_ID: self._sweep_id} | tags)})
        run.tags |= sent
        return run

    def log(
        self,
        run: TrackedRun,
        params: Iterable[Param] = (),
        metrics: Iterable[Metric] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send one request, or let it wait for others; what a run is known to have is kept up to date."""
        given = [tag for tag in to_tags(tags or {}) if run.tags.get(tag.key) != tag.value]
        params, metrics = list(params), list(metrics)
        if not (given or params or metrics):
            return
        if self._together and run is not self.parent:
            for name in [each.key for each in (*params, *metrics, *given)]:
                database.check_name(name)
            write = self._write(run)
            write.params |= {param.key: param.value for param in params}
            write.metrics += metrics
            write.tags |= {tag.key: tag.value for tag in given}
            self._num_waiting += len(metrics)
        else:
            self.client.log_batch(run.run_id, metrics=metrics, params=params, tags=given, synchronous=True)
            self.num_points += len(metrics) if run is not self.parent else 0
        run.params.update(sys.intern(param.key) for param in params)  # the same names for every run of a sweep
        run.tags.update((tag.key, tag.value) for tag in given)
        run.sent_at = time.monotonic()
        if self._num_waiting >= database.MAX_POINTS:
            self.flush()

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
            if self._together and run is not self.parent:
                self._write(run).datasets.append(dataset)
            else:
                context = InputTag("mlflow.data.context", "train")
                self.client.log_inputs(run.run_id, datasets=[DatasetInput(dataset, [context])])
        return {server.DATASET: digest}

    def set_status(self, run: TrackedRun, status: str) -> None:
        """Give the run this status, if it has another one."""
        if status == run.status:
            return
        if self._together and run is not self.parent:
            write = self._write(run)
            write.status = status
            write.end_ms = None if status == "RUNNING" else run.end_ms or round(time.time() * 1000)
        elif status == "RUNNING":
            self.client.update_run(run.run_id, status=status)
        else:
            self.client.set_terminated(run.run_id, status=status, end_time=run.end_ms)
        run.status = status

    @property
    def is_full(self) -> bool:
        """Whether as much waits as one transaction should be of."""
        return len(self._waiting) >= database.MAX_RUNS

    def flush(self) -> None:
        """Write what waits, in one transaction.

        Raises:
            MlflowException: the store failed, or some of the runs are deleted there; the others are written then. In
                both cases the runs must be looked up anew.
        """
        writes = [write for _, _, write in self._waiting.values()]
        if not writes:
            return
        try:
            if self._experiment is None:
                self._experiment = self.client.get_experiment(self.experiment_id)
            gone = self.client.write_runs(self._experiment, writes)
        except BaseException as error:
            if isinstance(error, MlflowException) and error.error_code == "BAD_REQUEST":
                self._together = False  # a row that does not fit: the store says of which run, one by one
            self.drop()
            raise
        self._waiting, self._num_waiting = {}, 0
        self.num_points += sum(len(write.metrics) for write in writes if write.run_id not in gone)
        if gone:
            raise MlflowException(
                f"{len(gone)} runs of the sweep were not found or are deleted in MLflow, {min(gone)} among them",
                RESOURCE_DOES_NOT_EXIST,
            )

    def drop(self) -> None:
        """Give up what waits; the runs must be looked up anew."""
        for run, parts, _ in self._waiting.values():
            run.seen, run.parts = None, parts
        self._waiting, self._num_waiting = {}, 0

    def _write(self, run: TrackedRun) -> database.RunWrite:
        """Return what waits to be written of a run."""
        held = self._waiting.get(run.run_id)
        if held is None:
            held = self._waiting[run.run_id] = run, run.parts, database.RunWrite(run.run_id)
        return held[2]

    def _create(self, start_ms: int | None, name: str, tags: dict[str, str]) -> Run:
        tags = {server.SWEEP_ID: self._sweep_id} | tags
        return self.client.create_run(self.experiment_id, start_time=start_ms, run_name=name, tags=tags)

    def _delete(self, run_ids: Iterable[str]) -> None:
        for run_id in run_ids:
            self.client.delete_run(run_id)


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
