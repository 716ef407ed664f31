"""The projector: one thread of the driver that copies committed rows to MLflow, in batches, as often as it must.

MLflow is a projection of the sweep folder, so everything here may be repeated: runs are found again by their tags
before one is made, and a point carries the time stamp of its record, so that sending it twice stores it once. What
was sent is noted in mlflow.json only to save work. A dead server costs nothing but the delay of its charts.

In MLflow: an experiment; in it one parent run a sweep (parameters: the specification, flattened), and one child run a
trial (parameters: its training configuration; tags `landscape_ray.*`). `train/*` is thinned to about 500 points a
run, by step number; evaluations and probes are all there; the Parquet parts are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric, RunTag

from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.tracking import server
from landscape_ray.tracking.folder import Commit, SweepFolder, TrialFolder
from landscape_ray.tracking.parts import read_part
from landscape_ray.tracking.points import mlflow_status, summary_text, to_points
from landscape_ray.tracking.runs import SweepRuns, TrackedRun, to_tags
from landscape_ray.tracking.uris import resolve_tracking_uri

_REQUEST_SECONDS = 10.0
_MAX_BACKOFF_SECONDS = 60.0
_MAX_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """How far the projection is."""

    points: int = 0
    """Metric points sent by this call."""
    total: int = 0
    """Metric points sent since the projector was made."""
    behind: int = 0
    """Committed parts that MLflow does not have yet."""
    error: str = ""
    """Why it is behind or what could not be sent; empty when all is well. Holds no secrets."""


@dataclasses.dataclass(slots=True)
class _ForParent:
    """Something to put on the sweep's own run."""

    metrics: list[Metric] = dataclasses.field(default_factory=list)
    tags: list[RunTag] = dataclasses.field(default_factory=list)
    artifact: Path | None = None
    attempts: int = 0


class _InterruptedError(Exception):
    """The projector is closing: what is left must wait for the next sync."""


class Projector:
    """Copies a sweep to MLflow while it runs.

    After construction nothing is raised into the driver: errors are in the reports.

    Args:
        folder: the sweep.
        tracking_uri: where to; None for MLFLOW_TRACKING_URI or else the store beside the sweeps.
        experiment: name of the MLflow experiment.
        interval_seconds: pause between two syncs of the thread; doubled after each failure, up to a minute.
    """

    def __init__(
        self, folder: SweepFolder, tracking_uri: str | None, experiment: str, *, interval_seconds: float = 2.0
    ):
        self._folder = folder
        self._uri = resolve_tracking_uri(tracking_uri, folder.path.parent)
        self._experiment = experiment
        self._interval_seconds = interval_seconds
        self._runs: SweepRuns | None = None
        self._must_find_runs = True  # before anything is sent, and again after every failure
        self._for_parent: deque[_ForParent] = deque([_ForParent(artifact=folder.spec_path)])
        self._problems: list[str] = []
        self._total = 0
        self._report = SyncReport()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._deadline = math.inf
        self._lock = threading.Lock()

    @staticmethod
    def check(tracking_uri: str) -> None:
        """Raise unless runs can be written to this address. For the start of a sweep; takes at most about 6 s.

        Raises:
            UserError: says what is wrong with the address or the server, and what to do.
        """
        server.check_server(tracking_uri)

    @property
    def report(self) -> SyncReport:
        """The report of the last sync."""
        return self._report

    def start(self) -> None:
        """Begin to sync in a thread of its own, until :meth:`close`."""
        self._thread = threading.Thread(target=self._loop, daemon=True, name="landscape_ray-projector")
        self._thread.start()

    def _loop(self) -> None:
        delay, failures = 0.0, 0
        while not self._stopping.wait(delay):
            failures = failures + 1 if self.sync().error else 0
            longest = max(_MAX_BACKOFF_SECONDS, self._interval_seconds)
            delay = min(self._interval_seconds * 2.0 ** min(failures, 16), longest)

    def sync(self) -> SyncReport:
        """Send everything that is committed and not sent, and return how far that got. Never raises."""
        return self._sync(closing=False)

    def close(self, timeout_seconds: float = 30.0) -> SyncReport:
        """Stop the thread, send what is left, give every run its final status, and return how far that got.

        Trials that have not ended become KILLED; a later projector on the same folder sets them RUNNING again. The
        sweep's own run ends by the status in sweep.json: finished and stopped give FINISHED, failed gives FAILED,
        anything else KILLED.

        Args:
            timeout_seconds: when to give up; one request that is under way may add up to 10 seconds.
        """
        self._deadline = time.monotonic() + timeout_seconds
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_seconds + _REQUEST_SECONDS)
            if self._thread.is_alive():
                late = "the tracking store did not answer in time; `landscape-ray sync` sends the rest"
                self._report = dataclasses.replace(self._report, error=late, behind=self._behind())
                return self._report
            self._thread = None
        self._stopping.clear()
        try:
            return self._sync(closing=True)
        finally:
            self._deadline = math.inf

    def set_parent(self, metrics: Mapping[str, float], tags: Mapping[str, str], description: str = "") -> None:
        """Put metrics, tags and a description on the sweep's own run, at the next sync.

        Args:
            metrics: values for the run table, such as counts or the best loss; non-finite ones are left out.
            tags: for instance searcher and task.
            description: Markdown, shown at the top of the run's page; the first 8,000 characters are kept.
        """
        now_ms = round(time.time() * 1000)
        finite = {server.clean_key(key): float(value) for key, value in metrics.items() if math.isfinite(value)}
        named = {key: str(value) for key, value in tags.items()}
        if description:
            named[server.DESCRIPTION] = description
        points = [Metric(key, value, now_ms, 0) for key, value in finite.items()]
        self._for_parent.append(_ForParent(metrics=points, tags=to_tags(named)))

    def log_artifacts(self, paths: list[Path]) -> None:
        """Put copies of files on the sweep's own run, at the next sync; sending one again replaces it."""
        self._for_parent.extend(_ForParent(artifact=path) for path in paths)

    def _sync(self, *, closing: bool) -> SyncReport:
        with self._lock:
            total, error = self._total, ""
            self._problems = []
            remaining = self._deadline - time.monotonic()
            try:
                with server.bounded_http(min(_REQUEST_SECONDS, max(1.0, remaining))):
                    self._project(closing)
            except _InterruptedError:
                error = "not everything was sent before the time was up; `landscape-ray sync` sends the rest"
            except Exception as failure:
                self._must_find_runs = True
                error = server.describe(failure)
            with contextlib.suppress(UserError):  # a full disk: the notes only save work
                self._write_notes()
            if self._problems and not error:
                others = len(self._problems) - 1
                error = self._problems[0] + (f" (and {others} more)" if others else "")
            self._report = SyncReport(points=self._total - total, total=self._total, behind=self._behind(), error=error)
            return self._report

    def _project(self, closing: bool) -> None:
        runs = self._find_runs() if self._runs is None or self._must_find_runs else self._runs
        runs.set_status(runs.parent, mlflow_status(str(self._folder.meta.get("status")), closing))
        for trial in self._folder.trials():
            self._pause_point(closing)
            try:
                self._project_trial(runs, trial, closing)
            except Exception as failure:
                # Of one trial only: its files cannot be read now, or the server refuses its run (deleted in the UI).
                refused = server.is_refusal(failure)
                if not (refused or isinstance(failure, (OSError, UserError))):
                    raise
                self._must_find_runs |= refused
                self._problems.append(f"{trial.trial_id}: {server.describe(failure)}")
        self._project_parent(runs, closing)
        if closing:
            self._find_runs()  # a run whose creation seemed to fail may have appeared since: doubles go

    def _find_runs(self) -> SweepRuns:
        sent = {run.run_id: run.parts for run in self._runs.trials.values()} if self._runs else self._read_notes()
        self._runs = SweepRuns(self._folder, self._uri, self._experiment, sent)
        self._must_find_runs = False
        return self._runs

    def _pause_point(self, closing: bool) -> None:
        if time.monotonic() > self._deadline or (self._stopping.is_set() and not closing):
            raise _InterruptedError

    def _project_trial(self, runs: SweepRuns, trial: TrialFolder, closing: bool) -> None:
        """Bring one trial's run up to its trial.json."""
        seen = (_stamp(trial), closing)
        run = runs.trials.get(trial.trial_id)
        if seen[0] is None or (run and run.seen == seen):
            return
        commit = trial.read()
        if commit is None:
            return
        run = runs.for_trial(trial, commit)
        runs.log_params(run, server.to_params(commit.summary.config))
        self._send_rows(runs, run, trial, commit, closing)
        runs.set_status(run, mlflow_status(commit.summary.status, closing))
        run.seen = seen

    def _send_rows(self, runs: SweepRuns, run: TrackedRun, trial: TrialFolder, commit: Commit, closing: bool) -> None:
        """Send the parts that are not sent, in full requests; the last one carries the tags."""
        tags = to_tags({server.STATUS: commit.summary.status, server.SUMMARY: summary_text(commit.summary)})
        limit = server.MAX_METRICS - len(tags)  # the limit of a request counts both
        pending: list[Metric] = []
        for index in range(run.parts, commit.num_parts):
            try:
                table = read_part(trial.part_path(index))
            except UserError as error:  # damaged for good: go on without its rows, as `collect` does
                self._problems.append(str(error))
                continue
            pending += to_points(table, commit.summary.num_steps)
            run.end_ms = round(table["time_unix"][-1].as_py() * 1000)
            if len(pending) >= limit:
                for start in range(0, len(pending), limit):
                    self._pause_point(closing)
                    self._send(runs, run, pending[start : start + limit], [])
                pending = []
                run.parts = index + 1
        self._send(runs, run, pending, tags)
        run.parts = commit.num_parts

    def _send(self, runs: SweepRuns, run: TrackedRun, metrics: list[Metric], tags: list[RunTag]) -> None:
        runs.client.log_batch(run.run_id, metrics=metrics, tags=tags, synchronous=True)
        self._total += len(metrics)

    def _project_parent(self, runs: SweepRuns, closing: bool) -> None:
        """Send what waits for the parent run; what fails is tried again at later syncs, a few times."""
        for _ in range(len(self._for_parent)):
            self._pause_point(closing)
            item = self._for_parent[0]
            try:
                if item.artifact is not None:
                    runs.client.log_artifact(runs.parent.run_id, str(item.artifact))
                else:
                    runs.client.log_batch(runs.parent.run_id, metrics=item.metrics, tags=item.tags, synchronous=True)
            except Exception as failure:
                if item.artifact is None and not server.is_refusal(failure):
                    raise
                self._must_find_runs |= server.is_refusal(failure)
                what = f"artifact {item.artifact.name}" if item.artifact else "tags and metrics of the sweep"
                self._problems.append(f"{what}: {server.describe(failure)}")
                item.attempts += 1
                if item.attempts < _MAX_ATTEMPTS:
                    self._for_parent.append(item)
            self._for_parent.popleft()

    def _read_notes(self) -> dict[str, int]:
        """Return how many parts were sent to each known run. No notes, or damaged ones, are as good as empty ones."""
        try:
            notes = json.loads(self._folder.notes_path.read_text(encoding="utf-8"))
            return {str(trial["run_id"]): int(trial["parts"]) for trial in notes["trials"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write_notes(self) -> None:
        if self._runs is None:
            return
        trials = {name: {"run_id": run.run_id, "parts": run.parts} for name, run in self._runs.trials.items()}
        text = json.dumps({"parent_run_id": self._runs.parent.run_id, "trials": trials}, indent=1)
        try:
            unchanged = self._folder.notes_path.read_text(encoding="utf-8") == text
        except OSError:
            unchanged = False
        if not unchanged:
            write_atomic(self._folder.notes_path, text)

    def _behind(self) -> int:
        """Return how many committed parts MLflow does not have."""
        behind = 0
        for trial in self._folder.trials():
            run = self._runs.trials.get(trial.trial_id) if self._runs else None
            if run is None or run.seen is None or run.seen[0] != _stamp(trial):
                with contextlib.suppress(UserError):
                    behind += max(0, trial.num_parts() - (run.parts if run else 0))
        return behind


def _stamp(trial: TrialFolder) -> tuple[int, int, int] | None:
    """Return what changes whenever trial.json is replaced, None when there is none."""
    try:
        stat = trial.commit_path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
