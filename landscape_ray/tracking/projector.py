"""The projector: one thread of the driver that copies committed rows to MLflow, in batches, as often as it must.

The sweep folder is the spool: append-only parts with checksums, written by the trials, which never wait for a server.
MLflow is a projection of it, so everything here may be repeated: runs are found again by their tags before one is
made, how far a run is stands on the run, and a point carries the time stamp of its record, so that sending it twice
stores it once. Nothing is noted in the folder: another machine with a copy of it, or a server that lost everything,
goes on by the same rules. A dead server costs nothing but the delay of its charts.

In MLflow: an experiment; in it one parent run a sweep (parameters: the specification, flattened; artifacts: what the
sweep is and came to), and one child run a trial (parameters: the training configuration that it began with; tags
`landscape_ray.*`). `train/*` is thinned to about 500 points a run, by step number; evaluations, probes and changed
values are all there; the Parquet parts are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
from mlflow.entities import Metric, Param

from landscape_ray.errors import UserError
from landscape_ray.records import TERMINAL_STATUSES
from landscape_ray.tracking import server
from landscape_ray.tracking.folder import Commit, SweepFolder, TrialFolder
from landscape_ray.tracking.parent_run import InterruptedSync, ParentRun
from landscape_ray.tracking.parts import read_part
from landscape_ray.tracking.patience import may_wait
from landscape_ray.tracking.pieces import Pieces
from landscape_ray.tracking.points import (
    charted_rows,
    closing_metrics,
    events_text,
    mlflow_status,
    summary_text,
    to_event,
    to_points,
    value_metrics,
)
from landscape_ray.tracking.runs import SweepRuns, TrackedRun
from landscape_ray.tracking.uris import resolve_tracking_uri

_REQUEST_SECONDS = 10.0
_FAILING_SECONDS = 5.0
_MAX_BACKOFF_SECONDS = 60.0
_GROUP_ROWS = 2000
"""Parts are put together until they have so many rows: what is done for a table is done once for many small parts."""
_MAX_TAGS = 20
"""More than a request to a trial's run carries."""
_ENDED_SECONDS = 30.0
"""The thread looks at trials whose run has ended only so often: of many trials nearly all have ..."""
_ENDED_SHARE = 30.0
"""... and not sooner than so many times as long after as that takes."""


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


class Projector:
    """Copies a sweep to MLflow while it runs.

    After construction nothing is raised into the driver: errors are in the reports.

    Args:
        folder: the sweep.
        tracking_uri: where to; None for MLFLOW_TRACKING_URI or else the store beside the sweeps.
        experiment: name of the MLflow experiment.
        interval_seconds: pause between two syncs of the thread; doubled after each failure, up to a minute.
        batch_seconds: the thread sends to the run of a trial that is training at most so often: what comes in
            between goes in one request. First and last rows don't wait. By default as often as MLflow's pages ask for
            news.
    """

    def __init__(
        self,
        folder: SweepFolder,
        tracking_uri: str | None,
        experiment: str,
        *,
        interval_seconds: float = 2.0,
        batch_seconds: float = 30.0,
    ):
        self._folder = folder
        self._uri = resolve_tracking_uri(tracking_uri, folder.path.parent)
        self._experiment = experiment
        self._interval_seconds = interval_seconds
        self._runs: SweepRuns | None = None
        self._must_find_runs = True  # before anything is sent, and again after every failure
        self._batch_seconds = batch_seconds
        self._pass_seconds = 0.0
        self._patient = False
        self._parent = ParentRun(folder)
        self._problems: list[str] = []
        self._ended: set[str] = set()
        self._pieces = Pieces()
        self._read_last: tuple[Path, pa.Table] | None = None
        self._look_at_ended = 0.0
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
            failures = failures + 1 if self._sync(closing=False, patient=True).error else 0
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
            timeout_seconds: when to give up; one request that is under way may add up to 10 seconds. A store that
                failed last time is given five seconds: whoever waits here has finished training.
        """
        if self._report.error:
            timeout_seconds = min(timeout_seconds, _FAILING_SECONDS)
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
        """Put metrics, tags and a description on the sweep's own run, at the next sync; kept in the sweep folder.

        Args:
            metrics: values for the run table, such as counts or the best loss; non-finite ones are left out.
            tags: for instance searcher and task.
            description: Markdown, shown at the top of the run's page; the first 8,000 characters are kept.
        """
        named = {key: str(value) for key, value in tags.items()}
        if description:
            named[server.DESCRIPTION] = description
        finite = {server.clean_key(key): float(value) for key, value in metrics.items() if math.isfinite(value)}
        self._parent.keep(finite, named)

    def log_artifacts(self, paths: list[Path]) -> None:
        """Put copies of files on the sweep's own run, at the next sync; sending one again replaces it."""
        self._parent.give(paths)

    def _sync(self, *, closing: bool, patient: bool = False) -> SyncReport:
        with self._lock:
            total, error = self._total(), ""
            begun, self._patient = time.monotonic(), patient
            self._problems = []
            remaining = self._deadline - time.monotonic()
            try:
                with server.bounded_http(min(_REQUEST_SECONDS, max(1.0, remaining))):
                    self._project(closing)
            except InterruptedSync:
                error = "not everything was sent before the time was up; `landscape-ray sync` sends the rest"
            except Exception as failure:
                self._must_find_runs = True
                error = server.describe(failure)
                if self._runs is not None:
                    self._runs.drop()
            self._pass_seconds = time.monotonic() - begun
            if self._problems and not error:
                others = len(self._problems) - 1
                error = self._problems[0] + (f" (and {others} more)" if others else "")
            sent = self._total()
            self._report = SyncReport(points=sent - total, total=sent, behind=self._behind(), error=error)
            return self._report

    def _total(self) -> int:
        return self._runs.num_points if self._runs is not None else 0

    def _project(self, closing: bool) -> None:
        # At the end the server is looked at again: it may have lost what it had, or a run whose creation seemed to
        # fail may have appeared since.
        found_anew = self._must_find_runs or closing or self._runs is None
        runs = self._find_runs() if found_anew or self._runs is None else self._runs
        runs.set_status(runs.parent, mlflow_status(str(self._folder.meta.get("status")), closing))
        try:
            self._project_trials(runs, closing, everything=found_anew or not self._patient)
        except InterruptedSync:
            self._try(runs.flush)
            raise
        self._try(runs.flush)
        self._parent.project(runs, closing, lambda: self._pause_point(closing), self._pieces)
        self._must_find_runs |= self._parent.refused
        self._problems += self._parent.problems

    def _find_runs(self) -> SweepRuns:
        self._runs = SweepRuns(self._folder, self._uri, self._experiment, self._runs)
        self._must_find_runs = False
        return self._runs

    def _project_trials(self, runs: SweepRuns, closing: bool, everything: bool) -> None:
        begun = time.monotonic()
        everything = everything or begun >= self._look_at_ended
        for trial_id in self._folder.trial_ids():
            if everything or trial_id not in self._ended:
                self._pause_point(closing)
                self._try(functools.partial(self._project_trial, runs, trial_id, closing), trial_id)
                if runs.is_full:
                    self._try(runs.flush)
        if everything:
            now = time.monotonic()
            self._look_at_ended = now + max(_ENDED_SECONDS, _ENDED_SHARE * (now - begun))

    def _try(self, action: Callable[[], None], which: str = "") -> None:
        """Do something for one trial, or for a few: what is wrong with them keeps nobody else waiting."""
        try:
            action()
        except Exception as failure:
            # Its files cannot be read now, or the server refuses its run (deleted in the UI).
            refused = server.is_refusal(failure)
            if not (refused or isinstance(failure, (OSError, UserError))):
                raise
            self._must_find_runs |= refused
            self._problems.append(f"{which}: {server.describe(failure)}" if which else server.describe(failure))

    def _pause_point(self, closing: bool) -> None:
        if time.monotonic() > self._deadline or (self._stopping.is_set() and not closing):
            raise InterruptedSync

    def _project_trial(self, runs: SweepRuns, trial_id: str, closing: bool) -> None:
        """Bring one trial's run up to its trial.json."""
        stamp = self._stamp(trial_id)
        run = runs.trials.get(trial_id)
        if run is not None and run.seen == (stamp, True):
            self._ended.add(trial_id)
            return
        self._ended.discard(trial_id)
        if stamp is None or (run and run.seen == (stamp, closing)):
            return
        trial, self._read_last = self._folder.trial(trial_id), None
        commit = trial.read()
        if commit is None or (
            run and not closing and self._patient and may_wait(run, commit, self._batch_seconds, self._pass_seconds)
        ):
            return
        if run is not None and run.holds(commit):  # as an earlier driver has left it
            run.seen = stamp, True
            self._ended.add(trial_id)
            return
        run = runs.for_trial(trial, commit, self._read)
        # of a corpus that is searched over, each trial has another one
        same_data = not any(key.startswith("data.") for key in commit.initial_varied)
        corpus_id = self._folder.meta.get("corpus_id") if same_data else None
        tags = runs.log_dataset(run, commit.initial_config.get("data", {}), corpus_id)
        self._send_rows(runs, run, trial, commit, tags, closing)
        runs.set_status(run, mlflow_status(commit.summary.status, closing))
        # a run that has ended is the same whether this is the last time or not
        run.seen = stamp, closing or commit.summary.status in TERMINAL_STATUSES
        if commit.summary.status in TERMINAL_STATUSES:
            run.unload()
            self._ended.add(trial_id)

    def _send_rows(
        self,
        runs: SweepRuns,
        run: TrackedRun,
        trial: TrialFolder,
        commit: Commit,
        tags: dict[str, str],
        closing: bool,
    ) -> None:
        """Send what the run does not have, in full requests; the last one carries the tags."""
        summary = commit.summary
        params = deque(server.param_batches(run.missing(server.to_params(commit.initial_config))))
        limit = server.MAX_METRICS - server.MAX_PARAMS - _MAX_TAGS  # the limit of a request counts all of them
        pending: list[Metric] = []
        events = list(run.events)
        for first, stop, table in self._groups(trial, run.parts, commit.num_parts):
            self._pieces.keep(trial.trial_id, commit.num_rewinds, first, stop, table)
            times = table["time_unix"]
            if first == 0:
                begun_ms = round(times[0].as_py() * 1000)
                began_with = value_metrics(commit.initial_varied)
                pending += [Metric(server.clean_key(key), value, begun_ms, 0) for key, value in began_with.items()]
            run.end_ms = round(times[-1].as_py() * 1000)
            so_far = {server.NUM_PARTS: str(first)} | ({server.EVENTS: events_text(events)} if events else {})
            for rows in charted_rows(table, summary.num_steps):
                pending += to_points(rows, summary.num_steps)
                events += [to_event(row) for row in rows if row["kind"] == "event"]
                while len(pending) > limit:
                    # with this request, all rows of earlier groups are there
                    self._send(runs, run, closing, params, pending[:limit], so_far)
                    pending = pending[limit:]
        costs: list[Metric] = []
        if summary.status in TERMINAL_STATUSES:
            pending += (costs := self._closing_points(run, trial, commit))
        tags |= {server.STATUS: summary.status, server.SUMMARY: summary_text(summary)}
        tags |= {server.NUM_PARTS: str(commit.num_parts)}
        if events:
            tags[server.EVENTS] = events_text(events)
        if trial.checkpoint_path.is_dir():
            tags[server.CHECKPOINT] = trial.checkpoint_path.as_uri()
        while len(params) > 1:
            self._send(runs, run, closing, params, [], {})
        self._send(runs, run, closing, params, pending, tags)
        run.parts, run.events = commit.num_parts, events
        run.metrics |= {point.key: point.value for point in costs}

    def _groups(self, trial: TrialFolder, first: int, stop: int) -> Iterator[tuple[int, int, pa.Table]]:
        """Yield the rows of these parts, small parts together, each group with its first part and the next group's."""
        waiting: list[pa.Table] = []
        begun = first
        for index in range(first, stop):
            try:
                waiting.append(self._read(trial.part_path(index)))
            except UserError as error:  # damaged for good: go on without its rows, as `collect` does
                self._problems.append(str(error))
            if sum(map(len, waiting)) >= _GROUP_ROWS:
                yield begun, index + 1, pa.concat_tables(waiting)
                waiting, begun = [], index + 1
        if waiting:
            yield begun, stop, pa.concat_tables(waiting)

    def _read(self, path: Path) -> pa.Table:
        """Return the rows of a part; of the one that was read last, without reading it again."""
        if self._read_last is None or self._read_last[0] != path:
            self._read_last = path, read_part(path)
        return self._read_last[1]

    def _closing_points(self, run: TrackedRun, trial: TrialFolder, commit: Commit) -> list[Metric]:
        """Return what a trial cost in the end, at its last row."""
        costs = closing_metrics(commit.summary)
        if run.end_ms is None and commit.num_parts:
            with contextlib.suppress(UserError):
                run.end_ms = round(read_part(trial.part_path(commit.num_parts - 1))["time_unix"][-1].as_py() * 1000)
        if run.end_ms is None:
            return []
        new = {key: value for key, value in costs.items() if run.metrics.get(key) != value}
        return [Metric(key, value, run.end_ms, commit.summary.step) for key, value in new.items()]

    def _send(
        self,
        runs: SweepRuns,
        run: TrackedRun,
        closing: bool,
        params: deque[list[Param]],
        metrics: list[Metric],
        tags: Mapping[str, str],
    ) -> None:
        self._pause_point(closing)
        runs.log(run, params[0] if params else [], metrics, tags)
        if params:
            params.popleft()

    def _behind(self) -> int:
        """Return how many committed parts MLflow does not have."""
        behind = 0
        for trial_id in self._folder.trial_ids():
            run = self._runs.trials.get(trial_id) if self._runs else None
            if run is not None and run.seen is not None and trial_id in self._ended:
                continue
            if run is None or run.seen is None or run.seen[0] != self._stamp(trial_id):
                with contextlib.suppress(UserError):
                    behind += max(0, self._folder.trial(trial_id).num_parts() - (run.parts if run else 0))
        return behind

    def _stamp(self, trial_id: str) -> tuple[int, int, int] | None:
        """Return what changes whenever a trial.json is replaced, None when there is none."""
        try:
            stat = os.stat(f"{self._folder.trials_path}/{trial_id}/trial.json")
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
