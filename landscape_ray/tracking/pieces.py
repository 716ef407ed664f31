"""Rows that were read once and are needed again at the end of the sweep, in a temporary file.

A trial of a second commits a few parts with a few rows each, and opening a part costs more than all of its rows do. The
projector reads every part when its points are sent; what it has read of small ones is kept here, all in one file, for
the artifact that holds the rows of the whole sweep. The parts remain what counts: what is not here is read from them.
"""

from __future__ import annotations

import functools
import mmap
import tempfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import pyarrow as pa

from landscape_ray.tracking.parts import ARROW_SCHEMA

MAX_ROWS = 2000
"""Tables with more rows are not kept: their parts are read as fast."""
MAX_BYTES = 2**30
"""The file grows no further."""


class Kept(NamedTuple):
    """The rows of the first parts of a trial."""

    num_rewinds: int
    """Of the trial when they were read, see `TrialFolder.rewind`."""
    num_parts: int
    read: Callable[[], pa.Table]
    """Returns the rows."""


class Pieces:
    """Keeps tables of consecutive parts of trials, until they are taken out together."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self._batches = self._bytes = 0
        self._kept: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        """By trial: its number of rewinds; of each batch of its rows the part after its last, and its number."""

    def keep(self, trial_id: str, num_rewinds: int, first: int, stop: int, table: pa.Table) -> None:
        """Keep the rows of parts `first` up to `stop` of a trial; what was kept of these or later parts is void."""
        rewinds, kept = self._kept.get(trial_id, (num_rewinds, []))
        kept = [piece for piece in kept if piece[0] <= first and rewinds == num_rewinds]
        follows = first == (kept[-1][0] if kept else 0)
        if not follows or not 0 < len(table) <= MAX_ROWS or self._bytes > MAX_BYTES:
            self._kept.pop(trial_id, None)
            return
        if self._writer is None:
            self._file = tempfile.TemporaryFile(prefix="landscape_ray-")  # noqa: SIM115  # until it is taken out of
            self._writer = pa.ipc.new_file(self._file, ARROW_SCHEMA)
        (batch,) = table.combine_chunks().to_batches()
        self._writer.write_batch(batch)
        self._kept[trial_id] = num_rewinds, [*kept, (stop, self._batches)]
        self._batches += 1
        self._bytes += batch.nbytes

    def take(self) -> dict[str, Kept]:
        """Return what is kept, by trial, and begin anew."""
        if self._writer is None or self._file is None:
            return {}
        self._writer.close()
        with self._file as file:
            file.flush()
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # stays there as long as a table does
        reader = pa.ipc.open_file(pa.py_buffer(content))
        found = {
            trial_id: Kept(num_rewinds, kept[-1][0], functools.partial(_table, reader, [number for _, number in kept]))
            for trial_id, (num_rewinds, kept) in self._kept.items()
        }
        self._begin()
        return found


def _table(reader: Any, numbers: list[int]) -> pa.Table:
    return pa.Table.from_batches([reader.get_batch(number) for number in numbers])
