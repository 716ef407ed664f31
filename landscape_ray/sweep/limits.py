"""A limit on the time that a trial may take for one report: who hangs is ended by a watch that needs no interpreter."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from pathlib import Path


def hang_path(sweep: Path, trial_name: str) -> Path:
    """Return where a trial that hung has left what it was doing."""
    return sweep / "hangs" / f"{trial_name}.txt"


@contextlib.contextmanager
def time_limit(seconds: float | None, report: Path) -> Iterator[None]:
    """End this process if the block takes too long, with the stack of every thread in `report`.

    The watch is a thread of C that does not need the interpreter's lock: it also ends a process that hangs in a
    library, a driver or a file system. A process that the kernel has stopped it cannot end.

    Args:
        seconds: the limit; None for none.
        report: file to write; removed when the block ends in time.
    """
    if seconds is None:
        yield
        return
    report.parent.mkdir(parents=True, exist_ok=True)
    with open(report, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    report.unlink(missing_ok=True)
