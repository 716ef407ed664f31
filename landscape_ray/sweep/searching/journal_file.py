"""The file that a search's study is kept in: Optuna's journal, with several lines written as one."""

from __future__ import annotations

import contextlib
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
        self._file = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
        self._held: list[dict[str, Any]] | None = None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines, or keep them for the end of the block of `together`."""
        if self._held is not None:
            self._held.extend(logs)
        else:
            self._file.append_logs(logs)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Return the lines that are in the file, from this number on."""
        lines: Iterable[dict[str, Any]] = self._file.read_logs(log_number_from)
        return lines

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


def mend_journal(path: Path) -> None:
    """Cut off a last line that a killed driver has not finished; Optuna could never read past it again."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)
