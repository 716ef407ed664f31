"""A unit of a sweep, the sweep itself or a trial, as its writer sees it: what is uploaded, and who may.

See `storage.py` for what is there, and `cache.py` for what a folder says of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

from landscape_ray.tracking.cache import SPEC, Mark, bring_unit, everything, held, read_mark, write_mark
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.storage import Manifest, Storage, Stored, digest_of, is_plain

ANSWER_SECONDS: Final = 10.0
"""How long a storage has to answer where somebody waits for it."""

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
        self._kept: list[Manifest] = []
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
        last = self._last
        if last is None or found != last.files or last.generation != self._generation:
            self._serial += 1
            manifest = Manifest(self._generation, self._serial, found)
            self._note(manifest, done=False)
            self._storage.put(manifest.name, manifest.to_bytes())
            self._note(manifest, done=True)
            self._kept = [manifest] if last is None or ended else [manifest, last]
            self._last = manifest
            self._clear(self._kept)
        elif not self._tidy:  # the last time it was cut off
            self._clear(self._kept)

    def _note(self, manifest: Manifest, *, done: bool) -> None:
        with held(self._folder):
            self.check()
            write_mark(self._folder, Mark(manifest, done=done, copied=self._copied))

    def _clear(self, kept: list[Manifest]) -> None:
        """Delete manifests and objects that are not kept; the first time also what others have left behind."""
        objects = set().union(*(manifest.objects() for manifest in kept))
        there, self._objects = self._objects, self._objects & objects  # at once: what may be gone is not counted on
        tidy, self._tidy = self._tidy, False
        if not tidy:
            there = there | {f"objects/{name}" for name in self._storage.names("objects")}
        self._storage.delete(sorted(there - objects))
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


def answers(storage: Storage, seconds: float = ANSWER_SECONDS) -> bool:
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


def drop_links(files: Files) -> None:
    """Delete the links that were made for an upload."""
    for content in files.values():
        if isinstance(content, Path) and content.name.startswith(".stored-"):
            content.unlink(missing_ok=True)
