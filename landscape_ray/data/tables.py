"""Documents out of columnar files: Parquet, and the Arrow files of a Hugging Face dataset saved on disk.

The Arrow files are read directly, so the package `datasets` is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from landscape_ray.data.documents import Document, SourceFile, list_file, record_text
from landscape_ray.data.shards import SplitName, one_line
from landscape_ray.errors import UserError

TOKEN_COLUMN = "tokens"
BLOCK_TOKENS = 1024
"""A plain column of integers has no documents; it is split in blocks of this many tokens."""

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
"""Names of a held-out split in a saved DatasetDict, in order of preference."""


def parquet_documents(file: SourceFile, text_field: str) -> Iterator[Document]:
    """Yield the rows of a Parquet file as documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as parquet:
            column = _choose_column(parquet.schema_arrow, text_field, file.path)
            yield from _documents(parquet.iter_batches(batch_size=8192, columns=[column]), column, file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path} cannot be read as Parquet ({one_line(error)}); write the file again") from None


def arrow_documents(file: SourceFile, text_field: str) -> Iterator[Document]:
    """Yield the rows of an Arrow file (stream or file format) as documents."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file.path)) as mapped:
            try:
                reader = pa.ipc.open_stream(mapped)
                batches: Any = reader
            except pa.ArrowInvalid:
                mapped.seek(0)
                reader = pa.ipc.open_file(mapped)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            column = _choose_column(reader.schema, text_field, file.path)
            yield from _documents((batch.select([column]) for batch in batches), column, file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path} cannot be read as Arrow ({one_line(error)}); save the dataset again") from None


def saved_dataset_files(folder: Path) -> tuple[SourceFile, ...] | None:
    """Return the Arrow files of a folder written by `save_to_disk`, None if it is not one.

    A saved DatasetDict gives its `train` split and the first split of :data:`VALIDATION_NAMES` that it has; without
    one, the training split is divided by document.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits", [])
        if "train" not in names:
            raise UserError(f"{folder} must have a split 'train', got {names}; point data.source at one of its folders")
        held_out = next((name for name in VALIDATION_NAMES if name in names), None)
        if held_out is None:
            return _arrow_files(folder / "train", None)
        return (*_arrow_files(folder / "train", "train"), *_arrow_files(folder / held_out, "validation"))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _arrow_files(folder, None)
    return None


def _arrow_files(folder: Path, split: SplitName | None) -> tuple[SourceFile, ...]:
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} holds a selection of rows by index; save dataset.flatten_indices() instead")
    names = [entry["filename"] for entry in state.get("_data_files") or ()]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        listed = f"'{missing[0]}', which is missing" if missing else "no data files"
        raise UserError(f"{folder / 'state.json'} names {listed}; save the dataset again")
    prefix = f"{folder.name}/" if split else ""
    return tuple(list_file(folder / name, prefix + name, split) for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); save the dataset again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(found).__name__}; save the dataset again")
    return found


def _choose_column(schema: Any, text_field: str, path: Path) -> str:
    for name in (text_field, TOKEN_COLUMN):
        if name in schema.names:
            return name
    raise UserError(
        f"{path} must have a column '{text_field}' or '{TOKEN_COLUMN}', got {', '.join(schema.names) or 'none'}; "
        f"name the column in data.text_field"
    )


def _documents(batches: Any, name: str, file: SourceFile) -> Iterator[Document]:
    import pyarrow.compute as pc
    import pyarrow.types as types

    row = 0
    for batch in batches:
        column = batch.column(name)
        if not len(column):
            continue
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.null_count:
            at = row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise UserError(f"{file.path}: '{name}' must have no missing values, got one in row {at}; drop such rows")
        if types.is_string(column.type) or types.is_large_string(column.type):
            yield from _text_rows(column, row, file)
        elif types.is_integer(column.type):
            values = _token_array(column, name, file)
            for start in range(0, len(values), BLOCK_TOKENS):
                yield Document(f"{file.name}:{row + start}", values[start : start + BLOCK_TOKENS])
        elif _is_list(column.type) and types.is_integer(column.type.value_type):
            values = _token_array(column.flatten(), name, file)
            ends = np.cumsum(pc.list_value_length(column).to_numpy(), dtype=np.int64)
            for index, piece in enumerate(np.split(values, ends[:-1])):
                if len(piece):
                    yield Document(f"{file.name}:{row + index}", piece)
        else:
            raise UserError(
                f"{file.path}: '{name}' must be strings, integers or lists of integers, got {column.type}; "
                f"name another column in data.text_field"
            )
        row += len(column)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _text_rows(column: Any, row: int, file: SourceFile) -> Iterator[Document]:
    import pyarrow as pa

    column.validate(full=True)  # Arrow does not check UTF-8 on reading
    binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    for index, text in enumerate(column.cast(binary).to_pylist()):
        if text:
            yield Document(f"{file.name}:{row + index}", record_text(text))


def _token_array(column: Any, name: str, file: SourceFile) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return integers as uint32: the width that tells tokens from text, whatever the width in the file."""
    if column.null_count:
        raise UserError(f"{file.path}: '{name}' must have no missing tokens; drop such rows")
    values = column.to_numpy()
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= 1 << 32):
        bad = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise UserError(f"{file.path}: '{name}' must be in 0 .. 2**32 - 1, got {bad}; write token identifiers")
    return np.asarray(values, dtype=np.uint32)
