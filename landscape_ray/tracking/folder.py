"""The sweep folder: the truth about a sweep, in files that can be killed at any instant and read at any time.

    <results>/<sweep>/
      spec.toml                             the specification, as launched
      sweep.json                            what the sweep is: identifier, name, status, seed, versions ...
      trials/<trial_id>/trial.json          how far the trial is committed, and its summary
      trials/<trial_id>/records/part-000000.parquet ...
      trials/<trial_id>/checkpoint/         owned by the trainable
      study.journal, population.json        what a search, or a population, has decided
      model/                                the best model, as MLflow loads it
      fits/*.json, report.html
      stored.json, trials/<trial_id>/stored.json   what a storage has of it, where it has one

Commit protocol of a worker: rows are buffered, `PartWriter.flush()` writes part k, the trainable saves a checkpoint
that says `num_parts = k + 1`, then `TrialFolder.commit(summary, num_parts)` writes trial.json. Only parts below the
number in trial.json exist for readers; after a crash the worker reopens its `PartWriter` with the number in the
checkpoint, which deletes the parts beyond it: their rows will be made again.

JSON files here may hold NaN and Infinity, as Python's own reader and writer understand them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

from landscape_ray.errors import UserError
from landscape_ray.files import storage_error, sync_folder, write_atomic
from landscape_ray.records import RunStatus, RunSummary
from landscape_ray.tracking.uris import mask_secrets

FORMAT_VERSION = 1

_TRIAL_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_SUMMARY_FIELDS = frozenset(field.name for field in dataclasses.fields(RunSummary))
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
    "str": (str,),
    "dict[str, Any]": (dict,),
}
_SUMMARY_KINDS = {
    field.name: _KINDS[str(field.type)] for field in dataclasses.fields(RunSummary) if str(field.type) in _KINDS
}


def is_trial_id(name: str) -> bool:
    """Return whether a name can be that of a trial: letters, digits, `_`, `.` and `-`, no dot in front."""
    return _TRIAL_ID.fullmatch(name) is not None


class Commit(NamedTuple):
    """The content of trial.json."""

    num_parts: int
    summary: RunSummary
    num_rewinds: int
    """How often committed parts were given up again (see :meth:`TrialFolder.rewind`)."""
    initial: dict[str, dict[str, Any]] | None = None
    """`config` and `varied` of the first commit, once they differ from those of the summary: a population changes
    what its members are, and a tracking server that starts empty must still be told what they began with."""

    @property
    def initial_config(self) -> dict[str, Any]:
        """The configuration that the trial began with."""
        return self.initial["config"] if self.initial else self.summary.config

    @property
    def initial_varied(self) -> dict[str, Any]:
        """The searched values that the trial began with."""
        return self.initial["varied"] if self.initial else self.summary.varied


def _check_summary(trial_id: str, fields: dict[str, Any]) -> None:
    """Raise ValueError unless a summary is what its trial wrote: others rely on its types and make file names of it."""
    if fields["run_id"] != trial_id:
        raise ValueError(f"it is of run {fields['run_id']!r}")
    if fields["status"] not in get_args(RunStatus):
        raise ValueError(f"status is {fields['status']!r}")
    for name, kind in _SUMMARY_KINDS.items():
        if name in fields and (not isinstance(fields[name], kind) or isinstance(fields[name], bool)):
            raise ValueError(f"{name} is {fields[name]!r}")


class TrialFolder:
    """The folder of one trial. Making the object makes no folder."""

    def __init__(self, path: Path):
        self.path = path
        self.trial_id = path.name
        self.checkpoint_path = path / "checkpoint"
        self.records_path = path / "records"
        self.commit_path = path / "trial.json"

    def __repr__(self) -> str:
        return f"TrialFolder({str(self.path)!r})"

    def part_path(self, index: int) -> Path:
        """Return where part `index` of the records is, or would be."""
        return self.records_path / f"part-{index:06d}.parquet"

    def read(self) -> Commit | None:
        """Return what is committed, None for a trial that has not committed anything.

        Raises:
            UserError: trial.json is damaged.
        """
        try:
            content = json.loads(self.commit_path.read_text(encoding="utf-8"))
            fields = {key: value for key, value in content["summary"].items() if key in _SUMMARY_FIELDS}
            _check_summary(self.trial_id, fields)
            initial = content.get("initial")
            if initial is not None:
                initial = {"config": dict(initial["config"]), "varied": dict(initial["varied"])}
            return Commit(int(content["num_parts"]), RunSummary(**fields), int(content.get("num_rewinds", 0)), initial)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.commit_path} is damaged ({error}); delete {self.path} to run this trial again"
            ) from None

    def summary(self) -> RunSummary | None:
        """Return the last committed summary, None before the first commit."""
        commit = self.read()
        return commit.summary if commit else None

    def num_parts(self) -> int:
        """Return how many parts are committed: parts 0 .. num_parts - 1 exist for readers."""
        commit = self.read()
        return commit.num_parts if commit else 0

    def commit(self, summary: RunSummary, num_parts: int) -> None:
        """Make the first `num_parts` parts and the summary the state of this trial.

        Args:
            summary: the summary of the run up to the last row of these parts.
            num_parts: what `PartWriter.flush()` returned, and what the checkpoint that is already saved says.

        Raises:
            ValueError: the numbers or the names do not fit what is on disk.
            UserError: trial.json cannot be written.
        """
        if summary.run_id != self.trial_id:
            raise ValueError(f"summary.run_id must be '{self.trial_id}', got '{summary.run_id}'")
        before = self.read()
        if before and num_parts < before.num_parts:
            raise ValueError(
                f"num_parts must be at least the {before.num_parts} committed before, got {num_parts}; "
                "open a PartWriter with the smaller number to give parts up"
            )
        if num_parts and not self.part_path(num_parts - 1).exists():
            raise ValueError(f"num_parts must be the number of written parts, got {num_parts}; flush before the commit")
        if before is None:
            self._write(Commit(num_parts, summary, 0))
            return
        initial = before.initial
        # a trial that failed before its first commit has an empty configuration, which it did not begin with
        if initial is None and before.summary.config and before.summary.config != summary.config:
            initial = {"config": before.summary.config, "varied": before.summary.varied}
        self._write(Commit(num_parts, summary, before.num_rewinds, initial))

    def rewind(self, num_parts: int) -> None:
        """Give up committed parts beyond `num_parts`, because the checkpoint that a trial starts from is older.

        The commit protocol never needs this; a checkpoint that was lost or replaced by hand does. What readers had
        seen of those rows is void, so the rewind is counted: the projector then starts the trial's run afresh.
        """
        before = self.read()
        if before and num_parts < before.num_parts:
            self._write(before._replace(num_parts=num_parts, num_rewinds=before.num_rewinds + 1))

    def set_status(self, status: RunStatus, message: str = "") -> None:
        """Change the status in trial.json. For the driver, when no worker is writing to this trial.

        A trial that never committed anything (its process died first) gets a summary without a configuration.
        """
        before = self.read()
        if before:
            summary = dataclasses.replace(before.summary, status=status, message=message or before.summary.message)
            self._write(before._replace(summary=summary))
        else:
            empty = RunSummary(run_id=self.trial_id, status=status, config={}, varied={}, message=message)
            self._write(Commit(0, empty, 0))

    def _write(self, commit: Commit) -> None:
        content = commit._asdict() | {"summary": dataclasses.asdict(commit.summary)}
        write_atomic(self.commit_path, json.dumps(content, indent=1))


class SweepFolder:
    """The folder of one sweep; make it with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path):
        self.path = path
        self.spec_path = path / "spec.toml"
        self.meta_path = path / "sweep.json"
        self.trials_path = path / "trials"
        self.fits_path = path / "fits"
        self.report_path = path / "report.html"
        self.ray_path = path / "ray_results"
        self.study_path = path / "study.journal"
        self.population_path = path / "population.json"
        self.model_path = path / "model"

    def __repr__(self) -> str:
        return f"SweepFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: Path, *, spec_text: str, meta: dict[str, Any]) -> SweepFolder:
        """Return a new sweep folder; it appears complete or not at all.

        Args:
            path: the folder to make.
            spec_text: the TOML text to keep as spec.toml.
            meta: what else to keep in sweep.json. Format version, sweep_id, name, created_unix and the status
                "running" are filled in; a password inside `tracking_uri` is masked.

        Raises:
            UserError: the path exists, or cannot be written.
        """
        if path.exists():
            raise UserError(exists_message(path))
        path = path.absolute()
        identity = {"sweep_id": uuid.uuid4().hex, "name": path.name, "created_unix": time.time()}
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            temporary.mkdir(parents=True)
            try:
                draft = cls(temporary)
                draft.trials_path.mkdir()
                write_atomic(draft.spec_path, spec_text)
                draft._write_meta({"format_version": FORMAT_VERSION} | identity | {"status": "running"} | meta)
                os.rename(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        except OSError as error:
            # Somebody else made the folder between the check above and the rename.
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and path.exists():
                raise UserError(exists_message(path)) from None
            raise storage_error(path, error) from None
        sync_folder(path.parent)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """Return an existing sweep folder.

        Raises:
            UserError: not a sweep folder, a damaged one, or one written by a newer version.
        """
        folder = cls(path.absolute())
        if not folder.meta_path.is_file():
            near = ", ".join(str(path.parent / sweep.path.name) for sweep in find_sweeps(path.parent))
            listing = f"; in that place: {near}" if near else "; give a folder that holds a sweep.json"
            raise UserError(f"not a sweep folder: {path}{listing}")
        version = folder.meta.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this landscape_ray reads up to {FORMAT_VERSION}; "
                "upgrade landscape_ray"
            )
        return folder

    @property
    def meta(self) -> dict[str, Any]:
        """The content of sweep.json, read at each access: other processes may change it."""
        try:
            content = json.loads(self.meta_path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
            problem = "not a JSON object"
        except (OSError, ValueError) as error:
            problem = str(error)
        raise UserError(f"{self.meta_path} is damaged ({problem}); restore it from a copy")

    def update_meta(self, **changes: Any) -> None:
        """Change entries of sweep.json, atomically. A password inside `tracking_uri` is masked."""
        self._write_meta(self.meta | changes)

    def _write_meta(self, meta: dict[str, Any]) -> None:
        if isinstance(uri := meta.get("tracking_uri"), str):
            meta = meta | {"tracking_uri": mask_secrets(uri)}
        write_atomic(self.meta_path, json.dumps(meta, indent=1))

    @property
    def spec_text(self) -> str:
        """The specification as launched."""
        return self.spec_path.read_text(encoding="utf-8")

    def trial(self, trial_id: str) -> TrialFolder:
        """Return the folder of one trial, which need not exist yet.

        Raises:
            UserError: the identifier is not a plain name.
        """
        if not is_trial_id(trial_id):
            raise UserError(f"trial_id must be made of A-Z a-z 0-9 _ . - and not begin with a dot, got {trial_id!r}")
        return TrialFolder(self.trials_path / trial_id)

    def trial_ids(self) -> list[str]:
        """Return the identifiers of all trials, sorted."""
        if not self.trials_path.is_dir():
            return []
        with os.scandir(self.trials_path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and is_trial_id(entry.name))

    def trials(self) -> list[TrialFolder]:
        """Return the folders of all trials, sorted by identifier."""
        return [TrialFolder(self.trials_path / name) for name in self.trial_ids()]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the sweep for this process, so that no second driver runs it; released also when the process is killed.

        Raises:
            UserError: another process holds it.
        """
        import fcntl  # here, because reading results must work where there is no fcntl

        with open(self.path / "driver.lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"sweep '{self.path.name}' is already being run by process {holder}; wait for it or stop it first"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def exists_message(path: Path) -> str:
    """Return what to do about a sweep folder that is there already."""
    return f"{path} exists; use another --name, or `landscape-ray resume {path.name}` to go on with it"


def find_sweeps(results: Path) -> list[SweepFolder]:
    """Return the sweeps in a results folder, newest first; folders that cannot be opened are left out."""
    found: list[tuple[float, SweepFolder]] = []
    for meta_path in results.glob("*/sweep.json"):
        if not meta_path.parent.name.startswith("."):
            with contextlib.suppress(UserError, TypeError, ValueError):
                folder = SweepFolder.open(meta_path.parent)
                found.append((float(folder.meta.get("created_unix", 0.0)), folder))
    return [folder for _, folder in sorted(found, key=lambda pair: (-pair[0], pair[1].path.name))]
