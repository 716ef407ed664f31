"""The way of a sweep into a storage: what was committed here is uploaded by a thread that nobody waits for.

Trials write their folders on the disk of their node, which is fast, atomic, and works without any network. After each
commit the files of that moment are noted, the checkpoint by a hard link of its own, and uploaded in the background; of
several commits of one trial that wait, the last one counts. So the queue holds one entry a trial and one checkpoint
beside it, and a storage that is slow or dead costs nothing but the delay: it is asked again, up to a minute apart,
and what it has not got goes there when the sweep ends, or is resumed.

On other machines than the driver's, trials wait before the driver decides on what they report: it gets their rows
through the storage, and no decision may name work that is lost with its node. How long is bounded. On its own machine
nobody waits; what the driver stores of its decisions follows what the trials have stored (`driver_mirror.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

from landscape_ray.errors import UserError
from landscape_ray.tracking.cache import SPEC, Mark, bring_unit, everything, held, read_mark, trial_unit, write_mark
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.storage import Manifest, Storage, Stored, digest_of, is_plain, reason_of

FLUSH_SECONDS: Final = 30.0
OPEN_SECONDS: Final = 10.0
"""How long a trial that begins waits for what the storage has of it."""
MAX_BACKOFF_SECONDS: Final = 60.0

Files: TypeAlias = dict[str, bytes | Path | Stored]
"""Files of a unit at one moment: by path in its folder, in memory, where they are here, or what is stored already."""


class SupersededError(RuntimeError):
    """Another process has taken over what this one writes, which must not write any more."""


class Unit:
    """A folder that this process writes, and its place in the storage.

    Args:
        storage: the place.
        folder: of this machine.
        copied: noted in the folder's mark.
    """

    def __init__(self, storage: Storage, folder: Path, *, copied: bool = True) -> None:
        self._storage, self._folder, self._copied = storage, folder, copied
        self._generation, self._serial = 1, 0
        self._last: Manifest | None = None
        self._objects: set[str] = set()
        """Names of objects that are there and whole."""
        self._tidy = False
        self._digests: dict[tuple[int, int, int], Stored] = {}
        self.superseded = False

    def take_over(self, wanted: Callable[[str], bool] = everything, *, alone: bool = False) -> None:
        """Bring the folder up to what is stored, and count up the generation.

        Args:
            wanted: by path, whether a file is to be fetched.
            alone: not to ask the storage: what is here counts.

        Raises:
            OSError: of the file system.
            UserError: what is stored cannot be read.
        """
        with held(self._folder):
            for path in (self._folder / "checkpoint").glob(".stored-*"):
                path.unlink(missing_ok=True)  # of a process that was killed
            there = None
            if not alone:
                there = bring_unit(self._storage, self._folder, wanted) or self._storage.latest()
            mark = read_mark(self._folder)
            known = [each for each in (there, mark.manifest if mark else None) if each is not None]
            self._generation = max((each.generation for each in known), default=0) + 1
            self._last, self._objects = there, there.objects() if there is not None else set()
            # before anything is written: whoever fetches for this machine leaves the folder alone from here on
            files = mark.manifest.files if mark is not None else {}
            self._serial = 0 if there is None else 1
            manifest = Manifest(self._generation, self._serial, files)
            write_mark(self._folder, Mark(manifest, done=False, copied=self._copied))
        if there is not None:  # at once: an earlier writer that is still at it ends by this
            claim = Manifest(self._generation, self._serial, there.files)
            self._storage.put(claim.name, claim.to_bytes())

    @property
    def inherited(self) -> dict[str, Stored]:
        """What the last manifest in the storage names."""
        return dict(self._last.files) if self._last is not None else {}

    def check(self) -> None:
        """Raise if another process has taken the unit over, as far as is known here.

        Raises:
            SupersededError: it has.
        """
        mark = read_mark(self._folder)
        if self.superseded or (mark is not None and mark.manifest.generation > self._generation):
            raise SupersededError(f"{self._storage.shown} was taken over by another process, so this one ends")

    def fence(self) -> None:
        """Raise if another process has taken the unit over, as far as the storage knows.

        Raises:
            SupersededError: it has.
            OSError: of the file system.
        """
        versions = self._storage.versions()
        if versions and versions[-1] > (self._generation, self._serial):
            self.superseded = True
            self.check()

    def publish(self, files: Files, *, ended: bool = False) -> None:
        """Upload what is new, then the manifest; then delete what it replaces.

        Args:
            files: all files of the unit.
            ended: whether nothing will follow: then no fallback is kept.

        Raises:
            SupersededError: another process has taken the unit over.
            OSError: of the file system.
        """
        self.fence()
        found: dict[str, Stored] = {}
        before_digests, self._digests = self._digests, {}
        for relative, content in files.items():
            if isinstance(content, Stored):
                found[relative] = content
                continue
            try:
                found[relative] = stored = self._digest(content, before_digests)
                name = stored.object_name(relative)
                if name not in self._objects:
                    self._storage.put(name, content)
                    self._objects.add(name)
            except FileNotFoundError:
                if isinstance(content, bytes) or content.exists() or not content.name.startswith("observed-"):
                    raise
                found.pop(relative, None)  # nobody needs these weights any more
        if self._last is not None and found == self._last.files and self._last.generation == self._generation:
            return
        self._serial += 1
        manifest = Manifest(self._generation, self._serial, found)
        self._note(manifest, done=False)
        self._storage.put(manifest.name, manifest.to_bytes())
        self._note(manifest, done=True)
        before, self._last = self._last, manifest
        self._clear([manifest] if before is None or ended else [manifest, before])

    def _note(self, manifest: Manifest, *, done: bool) -> None:
        with held(self._folder):
            self.check()
            write_mark(self._folder, Mark(manifest, done=done, copied=self._copied))

    def _clear(self, kept: list[Manifest]) -> None:
        """Delete manifests and objects that are not kept; the first time also what others have left behind."""
        objects = set().union(*(manifest.objects() for manifest in kept))
        there = self._objects
        if not self._tidy:
            there = there | {f"objects/{name}" for name in self._storage.names("objects")}
        self._storage.delete(sorted(there - objects))
        self._objects &= objects
        names = {manifest.name for manifest in kept}
        old = (Manifest(*version, {}).name for version in self._storage.versions() if version < kept[0].version)
        self._storage.delete(name for name in old if name not in names)
        self._tidy = True

    def _digest(self, content: bytes | Path, known: Mapping[tuple[int, int, int], Stored]) -> Stored:
        """Return the digest of a content; of a file that has not changed since, the known one."""
        if isinstance(content, bytes):
            return digest_of(content)
        state = content.stat()
        key = (state.st_ino, state.st_mtime_ns, state.st_size)
        self._digests[key] = stored = known.get(key) or self._digests.get(key) or digest_of(content)
        return stored


class Mirror:
    """Uploads what this process commits. One a process; it may be used for many trials.

    Args:
        sweep: where the sweep is stored.
        home: whether this machine has the driver's folder. Elsewhere what the driver is to know comes to it through the
            storage, and is waited for.
    """

    def __init__(self, sweep: Storage, *, home: bool = True) -> None:
        self.sweep, self.home = sweep, home
        self.problem = ""
        """Why the last upload failed; empty when all is well. Holds no secrets."""
        self._units: dict[str, Unit] = {}
        self._waiting: dict[str, tuple[Files, bool]] = {}
        self._under_way = ""
        self._urgent = self._closing = False
        self._tries = 0
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    # --- trials ---------------------------------------------------------------------------------------------------

    def take_over(self, trial: TrialFolder) -> None:
        """Bring a trial that begins here up to what is stored of it, and count this process as its writer.

        A storage that does not answer is waited for a while. Then what is here counts; it turns out later if another
        process was further: then this one ends at its next commit.

        Raises:
            UserError: what is stored is damaged, or is known to be further than what is here and cannot be had.
        """
        place, mark = trial_unit(self.sweep, trial), read_mark(trial.path)
        state = "checkpoint/state.pt"
        elsewhere = mark is not None and state in mark.manifest.files and not (trial.path / state).exists()
        unit = Unit(place, trial.path)
        try:
            hopeless = bool(self.problem) and self.home and not elsewhere
            if hopeless or not answers(place):
                raise OSError(self.problem or f"{self.sweep.shown} does not answer")
            unit.take_over()
        except OSError as error:
            self.problem = reason_of(error)
            if elsewhere:
                raise UserError(
                    f"{place.shown} has the checkpoint of this trial, and cannot be read ({self.problem}); "
                    "`landscape-ray resume` goes on when it can"
                ) from None
            unit = Unit(place, trial.path)
            unit.take_over(alone=True)
        with self._news:
            self._units[trial.trial_id] = unit
            left = self._waiting.pop(trial.trial_id, None)  # of the process before, or of an attempt that failed
        if left is not None:
            _drop_links(left[0])

    def check(self, trial: TrialFolder) -> None:
        """Raise if another process has taken the trial over.

        Raises:
            SupersededError: it has.
        """
        self._units[trial.trial_id].check()

    def committed(self, trial: TrialFolder, *, ended: bool) -> None:
        """Take note of a commit, to be uploaded.

        Args:
            trial: that has committed.
            ended: whether it was the last one.
        """
        files = files_of_trial(trial, trial.num_parts())
        self._hand_over(trial.trial_id, files, ended)

    def read(self, trial: TrialFolder, relative: str, patience_seconds: float = FLUSH_SECONDS) -> bytes:
        """Return a file of another trial, which may be about to be uploaded.

        Raises:
            UserError: it does not come.
        """
        unit, deadline, problem = trial_unit(self.sweep, trial), time.monotonic() + patience_seconds, "not there"
        while True:
            try:
                manifest = unit.latest()
                stored = manifest.files.get(relative) if manifest is not None else None
                if stored is not None:
                    content = unit.get(stored.object_name(relative))
                    if hashlib.sha256(content).hexdigest() == stored.sha256:
                        return content
                    problem = "its checksum differs"
            except OSError as error:
                problem = reason_of(error)
            if time.monotonic() > deadline:
                raise UserError(f"{unit.shown}/{relative} cannot be read ({problem}); restore it, or start a new sweep")
            time.sleep(0.5)

    # --- the queue ------------------------------------------------------------------------------------------------

    def _hand_over(self, key: str, files: Files, ended: bool) -> None:
        with self._news:
            before = self._waiting.pop(key, None)
            self._waiting[key] = files, ended
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, daemon=True, name="landscape_ray-mirror")
                self._thread.start()
            self._news.notify_all()
        if before is not None:
            _drop_links(before[0])

    def _loop(self) -> None:
        failures = 0
        while True:
            with self._news:
                pause = min(2.0 ** (failures - 1), MAX_BACKOFF_SECONDS) if failures else 0.0
                self._news.wait_for(lambda: self._urgent or self._closing, timeout=pause)
                self._urgent = False
                self._news.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                if self._closing and failures:
                    return
                key = next(iter(self._waiting))
                files, ended = self._waiting.pop(key)
                unit, self._under_way = self._units[key], key
            problem = ""
            try:
                unit.publish(files, ended=ended)
                failures = 0
            except SupersededError:
                pass  # whoever commits next is told
            except Exception as error:  # of any file system: nothing that happens here may end a trial
                problem = reason_of(error)
                failures += 1
            with self._news:
                self.problem, self._tries = problem, self._tries + 1
                retried = bool(problem) and key not in self._waiting and self._units[key] is unit
                if retried:
                    self._waiting[key] = files, ended
                self._under_way = ""
                self._news.notify_all()
            if not retried:
                _drop_links(files)

    @property
    def behind(self) -> int:
        """Number of trials with something that is not uploaded yet."""
        with self._news:
            return len(self._waiting) + bool(self._under_way)

    def flush(self, patience_seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until everything is uploaded, and return whether it is.

        Args:
            patience_seconds: how long. At home nobody waits for a storage that failed last time.
        """
        with self._news:
            if self.problem and self.home:
                return not self._waiting and not self._under_way
            self._urgent = True
            self._news.notify_all()
            return self._news.wait_for(
                lambda: (not self._waiting and not self._under_way) or (bool(self.problem) and self.home),
                timeout=patience_seconds,
            ) and not (self._waiting or self._under_way)

    def close(self, patience_seconds: float = FLUSH_SECONDS) -> bool:
        """Upload what is left, end the thread, and return whether all is stored.

        A storage that failed last time is tried once more; at home it is not, as the driver will do it.
        """
        with self._news:
            patience_seconds = 0.0 if self.problem and self.home else patience_seconds
            tried = self._tries + bool(self._under_way) + 1
            self._urgent = True
            self._news.notify_all()
            self._news.wait_for(
                lambda: not (self._waiting or self._under_way) or (bool(self.problem) and self._tries >= tried),
                timeout=patience_seconds,
            )
            self._closing = True
            self._news.notify_all()
            done, left = not (self._waiting or self._under_way), [files for files, _ in self._waiting.values()]
            self._waiting.clear()
        for files in left:
            _drop_links(files)
        return done


def answers(storage: Storage, seconds: float = OPEN_SECONDS) -> bool:
    """Return whether a storage lists a folder within this time; clients of object stores try for minutes."""
    answered: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            storage.versions()
            answered.append(True)

    thread = threading.Thread(target=ask, daemon=True, name="landscape_ray-storage")
    thread.start()
    thread.join(seconds)
    return bool(answered)


def files_of_trial(trial: TrialFolder, num_parts: int) -> Files:
    """Return the files of a trial as they are committed now; the checkpoint under a link of its own."""
    files: Files = {"trial.json": trial.commit_path.read_bytes()}
    for index in range(num_parts):
        path = trial.part_path(index)
        files[f"records/{path.name}"] = path
    state = trial.checkpoint_path / "state.pt"
    if state.exists():
        link = trial.checkpoint_path / f".stored-{uuid.uuid4().hex[:12]}.pt"
        try:
            os.link(state, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(state, link)
        files["checkpoint/state.pt"] = link
    for path in trial.checkpoint_path.glob("observed-*.pt"):
        files[f"checkpoint/{path.name}"] = path
    return files


def files_of_sweep(folder: SweepFolder) -> Files:
    """Return the files of a sweep that are not those of its trials, and that are not made of others."""
    paths: Iterable[Path] = [folder.path / SPEC, folder.study_path, folder.population_path, folder.report_path]
    paths = [*paths, *folder.fits_path.glob("*.json"), *(folder.path / "hangs").glob("*.txt"), folder.meta_path]
    found: Files = {}
    for path in paths:
        relative = str(path.relative_to(folder.path))
        if is_plain(relative):
            with contextlib.suppress(FileNotFoundError):  # not every sweep has all of them
                found[relative] = path.read_bytes()  # they change: what is sent is of one moment
    return found


def is_behind(trial: TrialFolder) -> bool:
    """Return whether a trial that was written here has a commit that is not known to be stored."""
    mark = read_mark(trial.path)
    if not trial.commit_path.exists():
        return False
    if mark is None or not mark.done:
        return True
    stored = mark.manifest.files.get("trial.json")
    return stored is None or stored.sha256 != hashlib.sha256(trial.commit_path.read_bytes()).hexdigest()


def _drop_links(files: Files) -> None:
    for content in files.values():
        if isinstance(content, Path) and content.name.startswith(".stored-"):
            content.unlink(missing_ok=True)
