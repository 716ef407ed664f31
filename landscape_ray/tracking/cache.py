"""Sweeps out of a storage, in folders of this machine: what is missing is fetched, what came is checked.

A folder that holds files of a unit says in `stored.json` which manifest they are of. Who writes the unit here notes the
next manifest before it is written, so a folder is never taken for older than what was made of it, and nothing that was
done here is overwritten by what the storage knows of it. A later manifest of somebody else, another machine that drives
the sweep or another node that took a trial over, replaces the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.tracking.folder import SweepFolder, TrialFolder, is_trial_id
from landscape_ray.tracking.storage import ATTEMPTS, Manifest, Storage, Stored, reason_of

MARK_NAME: Final = "stored.json"
SPEC, META = "spec.toml", "sweep.json"
NUM_THREADS: Final = 8
"""Trials that are fetched side by side."""


class Mark(NamedTuple):
    """What `stored.json` says of the folder that it is in."""

    manifest: Manifest
    done: bool
    """Whether the manifest is known to be in the storage."""
    copied: bool
    """Whether the folder is a copy: of the sweep itself, one from which no driver of this machine works."""


def read_mark(folder: Path) -> Mark | None:
    """Return what is noted in a folder; None where nothing is, or nothing that can be read."""
    try:
        content = json.loads((folder / MARK_NAME).read_text(encoding="utf-8"))
        files = {name: Stored(str(digest), int(size)) for name, (digest, size) in content["files"].items()}
        version = int(content["generation"]), int(content["serial"])
        return Mark(Manifest(*version, files), bool(content["done"]), bool(content["copied"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_mark(folder: Path, mark: Mark) -> None:
    """Note which manifest the files of a folder are of."""
    manifest = mark.manifest
    content = {
        "generation": manifest.generation,
        "serial": manifest.serial,
        "done": mark.done,
        "copied": mark.copied,
        "files": {name: [stored.sha256, stored.size_bytes] for name, stored in manifest.files.items()},
    }
    write_atomic(folder / MARK_NAME, json.dumps(content))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from changing a folder's `stored.json`, and from fetching into the folder, meanwhile."""
    import fcntl  # here, because reading results must work where there is no fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".stored.lock", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def everything(relative: str) -> bool:
    """Take every file."""
    return True


def no_checkpoint(relative: str) -> bool:
    """Take what results are made of."""
    return not relative.startswith("checkpoint/")


def bring_unit(unit: Storage, folder: Path, wanted: Callable[[str], bool] = everything) -> Manifest | None:
    """Bring the files of a unit up to its last manifest; the caller holds the folder (see `held`).

    Args:
        unit: where it is stored.
        folder: of this machine.
        wanted: by path, whether a file is to be fetched.

    Returns:
        The manifest that the folder is of now, or None where there is none or the folder is further.

    Raises:
        OSError: of the file system.
        UserError: no manifest's files can be read; the first reason.
    """
    mark, reason = read_mark(folder), ""
    for _ in range(ATTEMPTS):
        for manifest in unit.manifests():
            if mark is not None and manifest.version < mark.manifest.version:
                return None
            try:
                _bring(unit, folder, manifest, mark, wanted)
            except (FileNotFoundError, UserError) as error:
                reason = reason or str(error)  # the one before is whole, where this one is damaged
            else:
                return manifest
        if not reason:
            return None
    raise UserError(f"{unit.shown} cannot be brought here: {reason_of(ValueError(reason))}")


def _bring(unit: Storage, folder: Path, manifest: Manifest, mark: Mark | None, wanted: Callable[[str], bool]) -> None:
    same = mark is not None and mark.manifest.version == manifest.version
    known = mark.manifest.files if mark is not None else {}
    last = [name for name in ("trial.json", META) if name in manifest.files]
    for relative in [*(name for name in sorted(manifest.files) if name not in last), *last]:
        stored, path = manifest.files[relative], folder / relative
        there = path.exists() and (same or known.get(relative) == stored)
        if not there and wanted(relative):
            unit.fetch(stored.object_name(relative), stored, path)
    if not same:
        for path in (folder / "records").glob("part-*.parquet"):
            if f"records/{path.name}" not in manifest.files:
                path.unlink(missing_ok=True)
        for path in (folder / "checkpoint").glob("*.pt"):  # of an earlier owner: no fallback for this one
            if f"checkpoint/{path.name}" not in manifest.files or not wanted(f"checkpoint/{path.name}"):
                path.unlink(missing_ok=True)
        write_mark(folder, Mark(manifest, done=True, copied=True))


def trial_unit(sweep: Storage, trial: TrialFolder) -> Storage:
    """Return where a trial is stored."""
    return sweep.at(f"trials/{trial.trial_id}")


def stored_meta(sweep: Storage) -> dict[str, object] | None:
    """Return sweep.json as it is stored, None where no such sweep is.

    Raises:
        OSError: of the file system.
        UserError: it is damaged.
    """
    manifest = sweep.latest()
    if manifest is None:
        return None
    try:
        stored = manifest.files[META]
        content = sweep.get(stored.object_name(META))
        if hashlib.sha256(content).hexdigest() != stored.sha256:
            raise ValueError("its checksum differs")
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (KeyError, ValueError) as error:
        raise UserError(f"{sweep.shown} is damaged (sweep.json: {error}); restore it from a copy") from None
    return found


def bring_sweep(
    sweep: Storage, path: Path, *, checkpoints: bool = False, progress: Callable[[int, int], None] | None = None
) -> SweepFolder:
    """Bring a sweep up to what is stored of it; return its folder on this machine.

    Args:
        sweep: where it is stored.
        path: the folder, which is made, or brought up to date, or is further than the storage.
        checkpoints: whether checkpoints are fetched as well; else results only.
        progress: called with the number of trials that are done, and of all.

    Raises:
        UserError: no such sweep, another one is in the folder, it is damaged, or the storage does not answer.
    """
    try:
        meta = stored_meta(sweep)
        if meta is None:
            raise UserError(f"no sweep at {sweep.shown}; give STORAGE/NAME as it was launched with --storage")
        if (path / META).is_file():
            if SweepFolder.open(path).meta.get("sweep_id") != meta.get("sweep_id"):
                raise UserError(f"{path} holds another sweep than {sweep.shown}; choose another --results folder")
        elif path.exists() and any(each.name[0] != "." and each.name != "trials" for each in path.iterdir()):
            raise UserError(f"{path} is in the way of {sweep.shown}; choose another --results folder")
        trials = [name for name in sorted(sweep.folders("trials")) if is_trial_id(name)]
        (path / "trials").mkdir(parents=True, exist_ok=True)
        wanted = everything if checkpoints else no_checkpoint

        def bring(name: str) -> None:
            trial = TrialFolder(path / "trials" / name)
            with held(trial.path):
                bring_unit(trial_unit(sweep, trial), trial.path, wanted)

        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="bring") as pool:
            for done, _ in enumerate(pool.map(bring, trials), 1):
                if progress is not None:
                    progress(done, len(trials))
        with held(path):
            bring_unit(sweep, path)  # last: a folder with a sweep.json has all of its trials
    except OSError as error:
        raise UserError(f"{sweep.shown} cannot be read ({reason_of(error)}); check address and network") from None
    return SweepFolder.open(path)
