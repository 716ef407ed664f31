"""The sweep's own run on the server: parameters, tags, metrics, artifacts and the best model, as far as they differ."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

from landscape_ray.tracking import parent, server
from landscape_ray.tracking.folder import Commit, SweepFolder
from landscape_ray.tracking.model import log_model
from landscape_ray.tracking.pieces import Pieces
from landscape_ray.tracking.runs import SweepRuns, TrackedRun

_MAX_ATTEMPTS = 3


class ParentRun:
    """What is left to do for the sweep's own run. What fails is tried again at later syncs, a few times.

    Args:
        folder: the sweep.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._given: dict[str, Path] = {}
        self._attempts: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        """What could not be sent by the last projection, one sentence each."""
        self.refused = False
        """Whether the server refused any of it: the run may be gone."""
        self._done: tuple[SweepRuns, list[str]] | None = None
        """The runs and the files of the last projection, if it had no problems."""

    def keep(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Keep metrics and tags in the sweep folder, from where each projection takes them."""
        self._folder.update_meta(parent_run={"metrics": dict(metrics), "tags": dict(tags), "time_unix": time.time()})

    def give(self, paths: list[Path]) -> None:
        """Hand over files that are to be artifacts."""
        self._given |= {path.name: path for path in paths}

    def project(self, runs: SweepRuns, closing: bool, pause: Callable[[], None], pieces: Pieces | None = None) -> None:
        """Bring the run up to the sweep folder.

        Args:
            runs: of the sweep.
            closing: whether this is the last time, when what sums the sweep up is sent.
            pause: called before each request; raises when the time is up.
            pieces: rows that were read already.
        """
        now = (runs, self._stamps())  # a new object stands for runs that were looked up anew
        if now == self._done and not self._given and not closing:
            return
        self.problems, self.refused, self._done = [], False, None
        kept = self._folder.meta.get("parent_run", {})
        commits = parent.commits_of(self._folder) if closing else None
        version = str(kept.get("time_unix"))
        self._attempt("tags and metrics of the sweep", version, closing, lambda: self._log(runs, kept, commits, pause))
        with tempfile.TemporaryDirectory(prefix="landscape_ray-") as temporary:
            self._log_artifacts(runs, Path(temporary), commits, pause, pieces)
        if closing and (self._folder.model_path / "MLmodel").is_file():
            pause()
            self._attempt("the best model", "", closing, lambda: log_model(runs, self._folder))
        if not self.problems:
            self._done = now

    def _stamps(self) -> list[str]:
        """Return what changes whenever a file does that the run is made of while the sweep goes on."""
        paths = (self._folder.meta_path, self._folder.spec_path, self._folder.report_path)
        return [parent.stamp(path) if path.exists() else "" for path in paths]

    def _attempt(self, what: str, which: str, closing: bool, action: Callable[[], None]) -> bool:
        """Do something and return whether it succeeded; after a few failures it is left out until the end."""
        if self._attempts[what, which] >= _MAX_ATTEMPTS and not closing:
            return False
        try:
            action()
        except Exception as failure:
            refused = server.is_refusal(failure)
            of_artifacts = what.startswith(("artifact", "the best"))  # these have a store and servers of their own
            if not (refused or of_artifacts) or isinstance(failure, InterruptedSync):
                raise
            self.refused |= refused
            self.problems.append(f"{what}: {server.describe(failure)}")
            self._attempts[what, which] += 1
            return False
        return True

    def _log(
        self,
        runs: SweepRuns,
        kept: Mapping[str, Any],
        commits: Mapping[str, Commit] | None,
        pause: Callable[[], None],
    ) -> None:
        run, meta = runs.parent, self._folder.meta
        params = deque(server.param_batches(run.missing(parent.spec_params(self._folder))))
        pause()
        tags = runs.log_dataset(run, parent.data_table(self._folder), meta.get("corpus_id"))
        while len(params) > 1:
            pause()
            runs.log(run, params.popleft())
        values: dict[str, float] = dict(kept.get("metrics", {}))
        if commits is not None:
            values = parent.sweep_metrics(commits) | values
        at_ms = round(1000 * float(kept.get("time_unix") or meta["created_unix"]))
        new = {server.clean_key(key): value for key, value in values.items()}
        new = {key: value for key, value in new.items() if run.metrics.get(key) != value}
        points = [Metric(key, value, at_ms, 0) for key, value in new.items()]
        tags |= {server.FOLDER: self._folder.path.as_uri(), **kept.get("tags", {})}
        pause()
        runs.log(run, params[0] if params else (), points, tags)
        run.metrics |= new

    def _log_artifacts(
        self,
        runs: SweepRuns,
        temporary: Path,
        commits: Mapping[str, Commit] | None,
        pause: Callable[[], None],
        pieces: Pieces | None,
    ) -> None:
        run, closing = runs.parent, commits is not None
        made_of = _artifacts_of(run)

        def send(artifact: parent.Artifact) -> None:
            artifact.write(temporary / artifact.name)
            runs.client.log_artifact(run.run_id, str(temporary / artifact.name))
            made_of[artifact.name] = artifact.made_of

        for artifact in parent.artifacts(self._folder, commits, pieces):
            if made_of.get(artifact.name) != artifact.made_of and artifact.name not in self._given:
                pause()
                self._attempt(f"artifact {artifact.name}", artifact.made_of, closing, functools.partial(send, artifact))
        for name, path in list(self._given.items()):
            pause()
            what, which = f"artifact {name}", str(path)
            log = functools.partial(runs.client.log_artifact, run.run_id, str(path))
            done = self._attempt(what, which, closing, log)
            if done:
                made_of[name] = parent.stamp(path)
            if done or self._attempts[what, which] >= _MAX_ATTEMPTS:
                del self._given[name]
        pause()
        self._attempt(
            "the list of artifacts", "", closing, lambda: runs.log(run, tags={server.ARTIFACTS: json.dumps(made_of)})
        )


class InterruptedSync(Exception):  # noqa: N818  # nothing went wrong: the rest waits for the next sync
    """The projector is closing: what is left must wait for the next sync."""


def _artifacts_of(run: TrackedRun) -> dict[str, str]:
    """Return what the artifacts on the server were made of; nothing where that cannot be read."""
    try:
        made_of = json.loads(run.tags.get(server.ARTIFACTS, "{}"))
    except ValueError:
        return {}
    return dict(made_of) if isinstance(made_of, dict) else {}
