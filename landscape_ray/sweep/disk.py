"""How much of a disk a sweep takes, and what may go where it takes more than it may.

What always goes: weights of a population that no live exploit needs (`population/book.py`), the second checkpoint of a
trial that has ended, and all but the last checkpoint of the trunks of a search that has. What stays while there is
room: one checkpoint a trial, and the trunks that trials share.
Over `resources.max_disk_gib`, on whichever machine, these go until it fits again: checkpoints of trials of a search
that diverged or were stopped, trunks, checkpoints of finished trials from the worst to the best but for the best few,
and at last the fallbacks of trials that are training. Rows, summaries, and every checkpoint that a trial, a population
or a resume may begin from stay; where they alone are too large, the sweep pauses. A checkpoint that went is still
in the storage, where there is one (`landscape-ray probe STORAGE/NAME`).
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.tracking.folder import SweepFolder, TrialFolder

if TYPE_CHECKING:
    from landscape_ray.sweep.spec import SweepSpec

NUM_BEST: Final = 3
"""Finished trials whose checkpoints stay."""
CHECK_SECONDS: Final = 5.0
SHARE: Final = 0.02
"""Of a trial's time that looking at the disk may take."""


class Usage(NamedTuple):
    """Bytes of a sweep on this machine's disk; a file with several names counts once."""

    checkpoints: int
    records: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.records + self.other


def usage_of(path: Path) -> Usage:
    """Return what a sweep's folder takes."""
    seen: set[int] = set()
    sizes = {".pt": 0, ".parquet": 0}
    other = 0
    for root, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                state = os.lstat(os.path.join(root, name))
                if state.st_ino in seen:
                    continue
                seen.add(state.st_ino)
                ending = os.path.splitext(name)[1]
                if ending in sizes:
                    sizes[ending] += state.st_size
                else:
                    other += state.st_size
    return Usage(sizes[".pt"], sizes[".parquet"], other)


def usage_text(usage: Usage) -> str:
    """Return it in one line.

    >>> usage_text(Usage(3 * 2**30, 2**20, 0))
    'disk: 3.00 GiB (checkpoints 3.00 GiB, records 1.0 MiB, other 0.0 MiB)'
    """
    parts = {"checkpoints": usage.checkpoints, "records": usage.records, "other": usage.other}
    return f"disk: {_size(usage.total)} ({', '.join(f'{name} {_size(value)}' for name, value in parts.items())})"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


class DiskBound:
    """Keeps a sweep on this machine's disk within its bound.

    Args:
        spec: the sweep; without `resources.max_disk_gib` nothing is looked at.
        folder: of the sweep, or of the part of it that is here.
    """

    def __init__(self, spec: SweepSpec, folder: SweepFolder) -> None:
        self._spec, self._folder = spec, folder
        gib = spec.resources.max_disk_gib
        self._bound = math.inf if gib is None else gib * 2**30
        self._next, self._verdict = 0.0, ""

    def check(self) -> str:
        """Delete what may go where there is too much; return what to do where that is not enough, else nothing.

        The disk is not looked at all the time; in between the last answer stands.
        """
        begun = time.monotonic()
        if self._bound == math.inf or begun < self._next:
            return self._verdict
        self._verdict = self._look()
        now = time.monotonic()
        self._next = now + max(CHECK_SECONDS, (now - begun) / SHARE)
        return self._verdict

    def _look(self) -> str:
        used = usage_of(self._folder.path).total
        if used > self._bound:
            for path in expendable(self._spec, self._folder):
                used -= _delete(path)
                if used <= self._bound:
                    break
            used = usage_of(self._folder.path).total
        if used <= self._bound:
            return ""
        return (
            f"{self._folder.path} takes {_size(used)}, over resources.max_disk_gib = "
            f"{self._spec.resources.max_disk_gib:g}, and nothing of it may go; raise the bound and go on with "
            "`landscape-ray resume --spec FILE`"
        )


def _delete(path: Path) -> int:
    """Delete a file and return what that frees."""
    try:
        state = path.stat()
        path.unlink()
    except OSError:  # somebody else did
        return 0
    return state.st_size if state.st_nlink == 1 else 0


def expendable(spec: SweepSpec, folder: SweepFolder) -> Iterator[Path]:
    """Yield the files that may go, in the order in which they do."""
    if spec.search is None:  # members of a population copy each other, and a longer run begins at its checkpoint
        return
    ended: dict[str, list[tuple[RunSummary, TrialFolder]]] = {"finished": [], "diverged": [], "stopped": []}
    training: list[TrialFolder] = []
    for trial in folder.trials():
        with contextlib.suppress(UserError):  # a damaged summary says nothing
            if (summary := trial.summary()) is not None:
                (ended[summary.status].append((summary, trial)) if summary.status in ended else training.append(trial))
    for status in ("diverged", "stopped"):
        for _, trial in ended[status]:
            yield from sorted(trial.checkpoint_path.glob("*.pt"))
    yield from sorted((folder.path / "trunks").glob("*/*.pt"))
    fidelity = spec.search.fidelity

    def rank(each: tuple[RunSummary, TrialFolder]) -> tuple[float, float]:
        """Return what puts the best first: at the highest fidelity, the lowest loss."""
        level = float(each[0].varied.get(fidelity.name, 0)) if fidelity is not None else 0.0
        loss = each[0].final_loss_nats
        return -level, loss if math.isfinite(loss) else math.inf

    for _, trial in reversed(sorted(ended["finished"], key=rank)[NUM_BEST:]):
        yield from sorted(trial.checkpoint_path.glob("*.pt"))
    for trial in training:
        yield trial.checkpoint_path / "previous.pt"
