"""Parts: immutable Parquet files that hold the rows of a trial, at full resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.records import COLUMNS, SCHEMA_VERSION, Record, to_row
from landscape_ray.tracking.folder import TrialFolder

_VERSION_KEY: Final = b"landscape_ray.schema_version"
_TYPES: Final = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}

ARROW_SCHEMA: Final = pa.schema(
    [pa.field(column.name, _TYPES[column.dtype], metadata={"unit": column.unit}) for column in COLUMNS],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""The columns of `records.COLUMNS`; None is null, NaN and the infinities are themselves."""


class PartWriter:
    """Collects the records of one trial and writes them as parts. One writer a trial at any time.

    Args:
        folder: the trial.
        num_parts: how many parts stand, as the checkpoint says that the trial starts from. Parts beyond it are
            deleted: their rows belong to work that will be done again.

    Attributes:
        num_parts: parts written so far, the next one's number.
    """

    def __init__(self, folder: TrialFolder, num_parts: int = 0):
        if num_parts < 0 or (num_parts and not folder.part_path(num_parts - 1).exists()):
            raise ValueError(
                f"num_parts must be the number of a part that exists in {folder.records_path}, plus one, "
                f"got {num_parts}; the checkpoint does not belong to this folder"
            )
        self._folder = folder
        self._buffer: list[Record] = []
        self.num_parts = num_parts
        folder.rewind(num_parts)  # before the files go, so that no reader is promised a part that is not there
        for path in folder.records_path.glob("part-*.parquet"):
            if int(path.stem.removeprefix("part-")) >= num_parts:
                path.unlink()
        for path in folder.records_path.glob(".*.tmp"):
            path.unlink()

    def append(self, record: Record) -> None:
        """Buffer one record."""
        self._buffer.append(record)

    def flush(self) -> int:
        """Write the buffered records as one part and return the number of parts; an empty buffer makes no part.

        Raises:
            UserError: the disk is full or cannot be written. The records stay in the buffer.
        """
        if self._buffer:
            sink = pa.BufferOutputStream()
            options = _SMALL if len(self._buffer) < _SMALL_ROWS else WRITE_OPTIONS
            pq.write_table(to_table(self._folder.trial_id, self._buffer), sink, **options)
            write_atomic(self._folder.part_path(self.num_parts), sink.getvalue().to_pybytes())
            self._buffer.clear()
            self.num_parts += 1
        return self.num_parts


WRITE_OPTIONS: Final = {"compression": "zstd", "write_page_checksum": True}
_SMALL_ROWS = 100
_SMALL: Final = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}
"""Of a part with few rows most is what describes it: as they are, they are no larger, and written and read in two
thirds of the time."""


def to_table(run_id: str, records: list[Record]) -> pa.Table:
    """Return records as a table under :data:`ARROW_SCHEMA`."""
    rows = [to_row(run_id, record) for record in records]
    # from_pandas=False: a NaN is a value, only None is missing.
    arrays = [pa.array([row[field.name] for row in rows], field.type, from_pandas=False) for field in ARROW_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=ARROW_SCHEMA)


def read_part(path: Path) -> pa.Table:
    """Return the rows of one part.

    Raises:
        OSError: no such part, or it cannot be read now.
        UserError: the file is damaged, or written by a newer version.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the file system; Arrow's own, about the content, carry no number
        raise UserError(f"{path} is damaged ({_first_line(error)}); its rows cannot be read") from None
    version = int((table.schema.metadata or {}).get(_VERSION_KEY, b"0"))
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this landscape_ray reads up to {SCHEMA_VERSION}; "
            "upgrade landscape_ray"
        )
    return conform(table)


def conform(table: pa.Table) -> pa.Table:
    """Return the table under :data:`ARROW_SCHEMA`: known columns in order, missing ones null, unknown ones dropped."""
    if table.schema.equals(ARROW_SCHEMA, check_metadata=False):
        return table.replace_schema_metadata(ARROW_SCHEMA.metadata)
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in ARROW_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=ARROW_SCHEMA)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
