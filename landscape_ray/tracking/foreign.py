"""Logs of other programs: a CSV or Parquet file, and a map that says which of its columns are ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from landscape_ray.errors import UserError
from landscape_ray.records import COLUMN_NAMES
from landscape_ray.registry import suggest
from landscape_ray.tracking.collected import Collected, summarize
from landscape_ray.tracking.parts import ARROW_SCHEMA, conform

_RUN_FIELDS = ("num_params", "num_params_non_embedding", "num_steps")
_KINDS = ("step", "eval", "variant", "probe", "event", "system")
_STEP_ONLY = ("lr", "grad_norm", "weight_decay", "momentum")


def collect_csv(path: Path | str, columns: Mapping[str, str] | None = None) -> Collected:
    """Return a foreign CSV (also .csv.gz) or Parquet file as rows of ours.

    Without a `kind` column, each line becomes a step row with what was applied (`lr`, `weight_decay`, `momentum`,
    `grad_norm`) and an evaluation row with `loss_nats`; either is left out where its value (`lr`, `loss_nats`) is
    missing. That is what the annealing and scaling laws read; the lines of a run are sorted by step. With a `kind`
    column the lines are rows already and stay in their order. Values are taken as they are: a column must be in our
    unit (`loss_nats` in nats per token, `elapsed_seconds` in seconds ...).

    Args:
        path: the file.
        columns: our column name -> the file's. Ours are those of `records.COLUMNS`, and `num_params`,
            `num_params_non_embedding` and `num_steps`, which must be constant within a run. `step` and one of
            `lr` and `loss_nats` are needed; without `run_id` the file is one run, named after it. Without a map,
            the columns that bear our names are taken.

    Raises:
        UserError: no such file, not a table, unknown or missing columns, or values of the wrong type.
    """
    path = Path(path)
    foreign = _read(path)
    available = foreign.column_names
    ours = (*COLUMN_NAMES, *_RUN_FIELDS)
    mapping = dict(columns) if columns else {name: name for name in ours if name in available}
    for name, theirs in mapping.items():
        if name not in ours:
            raise UserError(f"columns: unknown column '{name}'; {suggest(name, ours)}")
        if theirs not in available:
            raise UserError(f"columns: {path} has no column '{theirs}' (for {name}); {suggest(theirs, available)}")
    if "step" not in mapping or not ({"lr", "loss_nats", "kind"} & mapping.keys()):
        raise UserError(
            f"columns must map 'step' and one of 'lr' and 'loss_nats', got {sorted(mapping)}; "
            f"write step=<column>; {path} has: {', '.join(sorted(available))}"
        )
    table = pa.table({name: _cast(path, name, theirs, foreign[theirs]) for name, theirs in mapping.items()})
    for name in ("step", "run_id"):
        if name in mapping and table[name].null_count:
            raise UserError(f"{name} must have a value in every line, got {table[name].null_count} empty in {path}")
    if "run_id" not in mapping:
        table = table.append_column("run_id", pa.array([path.name.split(".")[0]] * len(table), pa.string()))
    records = _typed_rows(path, table) if "kind" in mapping else _split_rows(table)
    run_ids = pc.unique(table["run_id"]).to_pylist()
    runs = [summarize(records, run_id, _run_fields(path, table, run_id)) for run_id in run_ids]
    return Collected(records, runs, [])


def read_columns(path: Path) -> dict[str, Any]:
    """Return the columns of a CSV (also .csv.gz) or Parquet file as arrays, text as objects; missing numbers are nan.

    Raises:
        UserError: no such file, or not a table.
    """
    table = _read(path)
    return {name: table[name].combine_chunks().to_numpy(zero_copy_only=False) for name in table.column_names}


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                return file.read()
        # "nan" is a loss that diverged; only an empty cell or NA is a missing one.
        missing = pacsv.ConvertOptions(null_values=["", "NA", "N/A", "NULL", "null"], strings_can_be_null=True)
        return pacsv.read_csv(path, convert_options=missing)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; give a CSV or Parquet file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as a table: {error}; give a CSV file with a header, or Parquet") from None


def _cast(path: Path, name: str, theirs: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a foreign column in our type: exact, or an error."""
    kind = ARROW_SCHEMA.field(name).type if name in COLUMN_NAMES else pa.int64()
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{name} must be {kind}, got column '{theirs}' of {column.type} in {path} ({error}); map another column"
        ) from None


def _typed_rows(path: Path, table: pa.Table) -> pa.Table:
    unknown = sorted({str(kind) for kind in pc.unique(table["kind"]).to_pylist()} - set(_KINDS))
    if unknown:
        raise UserError(f"kind must be one of {', '.join(_KINDS)}, got {unknown[0]!r} in {path}; leave kind out")
    return conform(table)


def _split_rows(table: pa.Table) -> pa.Table:
    """Return each line as a step row and an evaluation row; runs as they come, the lines of each by step."""
    run = table["run_id"].combine_chunks().dictionary_encode().indices  # numbered by first appearance
    halves = []
    for kind, wanted, unwanted in (("step", "lr", ("loss_nats",)), ("eval", "loss_nats", _STEP_ONLY)):
        if wanted in table.column_names:
            keep = [name for name in table.column_names if name not in unwanted]
            half = conform(table.select(keep).append_column("kind", pa.array([kind] * len(table), pa.string())))
            halves.append(half.append_column("run", run).filter(pc.is_valid(table[wanted])))
    rows = pa.concat_tables(halves)
    # A stable sort: of one step, the step row stays before the evaluation, and lines stay in order.
    order = pc.sort_indices(rows, sort_keys=[("run", "ascending"), ("step", "ascending")])
    return rows.take(order).drop_columns(["run"])


def _run_fields(path: Path, table: pa.Table, run_id: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in _RUN_FIELDS:
        if name in table.column_names:
            values = pc.unique(table.filter(pc.equal(table["run_id"], run_id))[name]).to_pylist()
            if len(values) != 1 or values[0] is None:
                raise UserError(f"{name} must be one number a run, got {values} for run '{run_id}' in {path}")
            fields[name] = values[0]
    return fields
