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

import hashlib
import threading
import time
from typing import Final

from landscape_ray.errors import UserError
from landscape_ray.tracking.cache import read_mark, trial_unit
from landscape_ray.tracking.folder import TrialFolder
from landscape_ray.tracking.storage import Storage, reason_of
from landscape_ray.tracking.unit import Files, SupersededError, Unit, answers, drop_links, files_of_trial

FLUSH_SECONDS: Final = 30.0
MAX_BACKOFF_SECONDS: Final = 60.0


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
            drop_links(left[0])

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
            drop_links(before[0])

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
                else:
                    drop_links(files)
                self._under_way = ""
                self._news.notify_all()

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
            drop_links(files)
        return done
