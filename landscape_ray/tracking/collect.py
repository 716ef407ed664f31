"""Finished or running sweeps, MLflow servers and foreign files to one table in the `records` schema."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from landscape_ray.errors import UserError
from landscape_ray.tracking.collected import Collected, columns_by_run, run_columns
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.foreign import collect_csv
from landscape_ray.tracking.parts import ARROW_SCHEMA, read_part

if TYPE_CHECKING:
    from landscape_ray.tracking.from_mlflow import Route

__all__ = ["Collected", "collect", "collect_csv", "collect_mlflow", "columns_by_run", "run_columns"]


def collect(path_or_folder: Path | str | SweepFolder) -> Collected:
    """Return all committed rows and summaries of a sweep, finished or running.

    A damaged or missing part loses its own rows only and is named in `warnings`; trials that have not committed
    anything are left out.

    Raises:
        UserError: not a sweep folder.
    """
    folder = path_or_folder if isinstance(path_or_folder, SweepFolder) else SweepFolder.open(Path(path_or_folder))
    tables, runs, warnings = [ARROW_SCHEMA.empty_table()], [], []
    nothing: dict[pa.DataType, pa.Array] = {}
    for trial in folder.trials():
        try:
            commit = trial.read()
        except UserError as error:
            warnings.append(str(error))
            continue
        if commit is None:
            continue
        runs.append(commit.summary)
        for index in range(commit.num_parts):
            try:
                tables.append(_shared_nulls(read_part(trial.part_path(index)), nothing))
            except OSError as error:
                reason = os.strerror(error.errno).lower() if error.errno else str(error)
                warnings.append(f"{trial.part_path(index)}: {reason}; its rows cannot be read")
            except UserError as error:
                warnings.append(str(error))
    return Collected(pa.concat_tables(tables), runs, warnings)


def _shared_nulls(table: pa.Table, nothing: dict[pa.DataType, pa.Array]) -> pa.Table:
    """Return the table with its empty columns, about half, in one memory for all parts.

    Args:
        table: of one part.
        nothing: missing values by type, which grow as needed.
    """
    columns, count = [], len(table)
    for field, column in zip(table.schema, table.columns, strict=True):
        if count and column.null_count == count:
            if len(nothing.get(field.type, ())) < count:
                nothing[field.type] = pa.nulls(count, field.type)
            column = pa.chunked_array([nothing[field.type].slice(0, count)])
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=table.schema)


def collect_mlflow(tracking_uri: str, experiment: str, *, route: Route = "auto") -> Collected:
    """Return what an MLflow experiment holds of our metrics.

    For each sweep the first of these that is complete: its folder, where the server says that it is and this machine
    has it; the Parquet copy on the sweep's run, made when the sweep ended; the store's bulk interface (an SQLite file
    is read directly); one request for each run and metric.

    Metrics are thinner than Parquet: `train/*` was thinned when it was projected, time stamps are whole milliseconds,
    non-finite values and columns that are no metrics are missing. Runs of other programs are read as well when they
    log the same keys (`train/loss_nats`, `train/lr`, `eval/loss_nats`, `probe/<name>` ...).

    Args:
        tracking_uri: address of an MLflow server or `sqlite:///` store.
        experiment: name of the experiment.
        route: `parquet`, `bulk` or `history` to take only that one; `parquet` leaves out what has no such copy.

    Raises:
        UserError: the server does not answer, or has no such experiment.
    """
    from landscape_ray.tracking.from_mlflow import read_experiment  # here: importing mlflow takes a second

    return read_experiment(tracking_uri, experiment, route)
