"""The driver's side of a storage: what it keeps goes up, what trials on other nodes have committed comes down.

One thread does both in turn. Rows that come down are followed by the projector like those of trials of this machine.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Final

from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.tracking.cache import bring_unit, everything, held, no_checkpoint, read_mark, trial_unit
from landscape_ray.tracking.folder import SweepFolder, TrialFolder, is_trial_id
from landscape_ray.tracking.storage import Storage, reason_of
from landscape_ray.tracking.unit import SupersededError, Unit, answers, files_of_sweep, files_of_trial, is_behind

INTERVAL_SECONDS: Final = 10.0
PATIENCE: Final = 10.0
"""The pause between two rounds is at least so many times as long as the last one took."""
FOLLOW_SECONDS: Final = 30.0
"""How long what the driver keeps waits for trials that are being uploaded."""
STATE_NAME: Final = "storage.json"


class DriverMirror:
    """Keeps a sweep's storage and the driver's folder alike, while the driver runs.

    After `start` nothing is raised into the driver: what is wrong is in `problem`.

    Args:
        folder: of the sweep; the driver holds its lock.
        sweep: where it is stored.
        interval_seconds: pause between two rounds of the thread.
    """

    def __init__(self, folder: SweepFolder, sweep: Storage, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._folder, self._sweep, self._interval = folder, sweep, interval_seconds
        self._unit = Unit(sweep, folder.path, copied=False)
        self._claimed = False
        self._complete: set[str] = set()
        """Trials that have ended and of which everything is here."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._problem = ""
        self._noted: str | None = None

    @property
    def problem(self) -> str:
        """Why the last round failed; empty when all is well. Holds no secrets."""
        return self._problem

    @property
    def superseded(self) -> bool:
        """Whether another driver has taken the sweep over, perhaps on another machine."""
        return self._unit.superseded

    def publish(self) -> None:
        """Send everything that is not stored, while no trial runs; a storage that does not answer gets it later."""
        if self._answers():
            self._do(self._send_trials, self._send_own)

    def start(self) -> None:
        """Keep both alike in a thread, until `gather` or `settle`."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="landscape_ray-storage")
        self._thread.start()

    def _loop(self) -> None:
        pause = self._interval
        while not self._stopping.wait(pause):
            begun = time.monotonic()
            self._do(self._follow_trials, self._pull)
            pause = max(self._interval, PATIENCE * (time.monotonic() - begun))

    def _do(self, *steps: Callable[[], None]) -> None:
        """Take the steps, and note how it went."""
        with self._lock:
            try:
                if not self._claimed:
                    self._unit.take_over()
                    self._claimed = True
                self._unit.fence()
                for step in steps:
                    step()
                self._note("")
            except SupersededError as error:
                self._note(str(error))
            except Exception as error:  # of any file system: nothing that happens here may end a sweep
                self._note(reason_of(error))

    def _answers(self) -> bool:
        answered = answers(self._sweep)
        if not answered:
            self._note(f"{self._sweep.shown} does not answer")
        return answered

    def _send_own(self) -> None:
        """Send what the driver keeps."""
        self._unit.publish(files_of_sweep(self._folder))

    def _send_trials(self) -> None:
        """Send the trials that are behind; nobody writes them."""
        for trial in self._folder.trials():
            if is_behind(trial):
                with contextlib.suppress(SupersededError):
                    send(self._sweep, trial)

    def _follow_trials(self) -> None:
        """Send what the driver keeps as it is now, when the trials of this machine are stored as they are now.

        What it decides is about what they have reported: a journal, or a population's orders, that name what is not
        stored could not be resumed elsewhere. A trial that takes too long is one that has no process any more.
        """
        files = files_of_sweep(self._folder)
        trials = [trial for trial in self._folder.trials() if trial.trial_id not in self._complete]
        behind = {trial.path: read_mark(trial.path) for trial in trials if is_behind(trial)}
        deadline = time.monotonic() + FOLLOW_SECONDS
        while behind and time.monotonic() < deadline and not self._stopping.wait(FOLLOW_SECONDS / 100):
            for path, before in list(behind.items()):
                now, first = read_mark(path), before.manifest.version if before is not None else (0, 0)
                # the manifest after the next one was begun after this moment, whatever was under way at it
                later = now is not None and now.done and now.manifest.version >= (first[0], first[1] + 2)
                if later or not is_behind(TrialFolder(path)):
                    del behind[path]
        if not self._stopping.is_set():
            self._unit.publish(files)

    def _pull(self) -> None:
        """Bring what other nodes have committed."""
        for name in self._sweep.folders("trials"):
            if not is_trial_id(name) or name in self._complete:
                continue
            trial = self._folder.trial(name)
            unit, mark = trial_unit(self._sweep, trial), read_mark(trial.path)
            versions = unit.versions()
            if mark is None or (versions and versions[-1] > mark.manifest.version):
                with held(trial.path):
                    bring_unit(unit, trial.path, no_checkpoint)
            summary = trial.summary()
            if summary is not None and summary.status in ("finished", "diverged") and not is_behind(trial):
                self._complete.add(name)

    def gather(self) -> None:
        """Bring everything that trials on other nodes have committed, now that none runs any more."""
        self.stop()
        if self._answers():
            self._do(self._pull)

    def fetch_checkpoint(self, trial: TrialFolder) -> None:
        """Bring the checkpoint of a trial here, where it is not; without an answer it stays away."""
        with contextlib.suppress(OSError, UserError), held(trial.path):
            bring_unit(trial_unit(self._sweep, trial), trial.path, everything)

    def settle(self) -> int:
        """Send what is not stored yet, trials first; return how many trials are behind."""
        self.stop()
        self.publish()
        return sum(is_behind(trial) for trial in self._folder.trials())

    def stop(self) -> None:
        """End the thread, where there is one."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(60.0)
            self._thread = None

    def _note(self, problem: str) -> None:
        if problem != self._noted:
            with contextlib.suppress(UserError):  # a full disk, which others will say
                write_atomic(self._folder.path / STATE_NAME, json.dumps({"problem": problem, "time_unix": time.time()}))
        self._problem = self._noted = problem


def send(sweep: Storage, trial: TrialFolder) -> None:
    """Upload a trial that nobody is writing any more; files that are not here stay as they are stored.

    Raises:
        SupersededError: somebody is.
        OSError: of the file system.
        UserError: what is stored cannot be read.
    """
    unit = Unit(trial_unit(sweep, trial), trial.path)
    unit.take_over(no_checkpoint)
    kept = {name: stored for name, stored in unit.inherited.items() if name.startswith("checkpoint/")}
    summary = trial.summary()
    ended = summary is not None and summary.status in ("finished", "diverged", "stopped")
    files = files_of_trial(trial, trial.num_parts())
    try:
        unit.publish({**kept, **files}, ended=ended)
    finally:
        for path in trial.checkpoint_path.glob(".stored-*"):
            path.unlink(missing_ok=True)


def storage_line(folder: SweepFolder) -> str:
    """Return in one line how far a storage has what is here; empty for a sweep without one."""
    shown = folder.meta.get("storage")
    if not shown:
        return ""
    behind, problem = sum(is_behind(trial) for trial in folder.trials()), ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        problem = str(json.loads((folder.path / STATE_NAME).read_text(encoding="utf-8")).get("problem", ""))
    state = f"{behind} trials are not stored up to their last commit" if behind else "up to date"
    return f"storage {shown}: {state}" + (f" ({problem})" if problem else "")
