"""The file that a search's study is kept in: Optuna's journal, with several lines written as one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock


class JournalFile(BaseJournalBackend):
    """Optuna's journal file, as `optuna-dashboard` and `JournalFileBackend` read it. One process writes it at a time.

    What a driver that was killed has left is cleared when the file is opened: its lock, and a line half written.

    Args:
        path: the file; made when absent.
    """

    def __init__(self, path: Path) -> None:
        # The lock of a killed driver: the sweep's own lock allows one driver at a time.
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        mend_journal(path)
        self._path, self._file = path, open_file(path)
        self._held: list[dict[str, Any]] | None = None
        self._read = (0, 0)
        """How many lines were read, and where the next one begins."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines, or keep them for the end of the block of `together`."""
        if self._held is not None:
            self._held.extend(logs)
        else:
            self._file.append_logs(logs)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Return the lines that are in the file, from this number on.

        Optuna's own keeps in mind where each line begins, 150 bytes a line, of which a trial has five.
        """
        number, offset = self._read if log_number_from >= self._read[0] else (0, 0)
        found = []
        with open(self._path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing it
                    break
                if number >= log_number_from:
                    found.append(json.loads(line))
                number, offset = number + 1, offset + len(line)
        self._read = number, offset
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write what is appended inside the block at its end: locked, opened and synced once, not once a line.

        The study in memory learns of it when it is next asked, so nothing inside may depend on what it says.
        """
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            if held:
                self._file.append_logs(held)


def open_file(path: Path) -> JournalFileBackend:
    """Return a journal as Optuna opens it, behind the lock that all of its writers take."""
    return JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))


def mend_journal(path: Path) -> None:
    """Cut off a last line that a killed driver has not finished; Optuna could never read past it again."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)
