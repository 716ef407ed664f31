"""What collecting gives: one table of rows, one summary a run, and what could not be read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from landscape_ray.records import RunSummary


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """The rows of many runs under the schema of `records.COLUMNS`, in the order in which they were made."""

    records: pa.Table
    runs: list[RunSummary]
    warnings: list[str]
    """What could not be read and is therefore missing, one sentence each."""


def run_columns(table: pa.Table, run_id: str, kind: str) -> dict[str, np.ndarray]:
    """Return the rows of one run and one kind as arrays, one for each column.

    Args:
        table: `Collected.records`.
        run_id: the run.
        kind: step, eval, probe or event.

    Returns:
        float64 columns with NaN where there is no value; int64 columns, as float64 with NaN if a value is missing;
        text columns as object arrays with None.
    """
    mask = pc.and_(pc.equal(table["run_id"], run_id), pc.equal(table["kind"], kind))
    rows = table.filter(mask)
    return {name: rows[name].combine_chunks().to_numpy(zero_copy_only=False) for name in table.column_names}


def columns_by_run(table: pa.Table, kind: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the rows of one kind as arrays by run, as :func:`run_columns` gives them, in one pass over the table.

    Args:
        table: `Collected.records`.
        kind: step, eval, variant, probe or event.

    Returns:
        For each run that has such rows its columns, views of common arrays; rows in the order of the table.
    """
    kept = pc.equal(table["kind"], kind)
    names = table["run_id"].filter(kept)
    run_ids = pc.unique(names)
    codes = pc.index_in(names, value_set=run_ids).combine_chunks().to_numpy(zero_copy_only=False)
    order = None
    if (np.diff(codes) < 0).any():  # runs that stand together, as in a sweep, need no sorting
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
    # Column by column, so that no second table of all rows is ever held.
    arrays = {name: _array(table[name].filter(kept)) for name in table.column_names}
    if order is not None:
        arrays = {name: values[order] for name, values in arrays.items()}
    bounds = np.searchsorted(codes, np.arange(len(run_ids) + 1))
    return {
        run_id: {name: values[bounds[i] : bounds[i + 1]] for name, values in arrays.items()}
        for i, run_id in enumerate(run_ids.to_pylist())
    }


def _array(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as an array; values that are missing everywhere, as most are, take no memory, nor do repeats."""
    if column.null_count == len(column) and len(column):
        number = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
        nothing = np.array([np.nan]) if number else np.array([None], dtype=object)
        return np.broadcast_to(nothing, (len(column),))
    if pa.types.is_string(column.type):
        words = pc.unique(column)
        if len(words) < len(column) // 2:
            codes = pc.index_in(column, value_set=words).combine_chunks().to_numpy(zero_copy_only=False)
            return np.asarray(np.array(words.to_pylist(), dtype=object)[codes])
    return np.asarray(column.combine_chunks().to_numpy(zero_copy_only=False))


def summarize(table: pa.Table, run_id: str, extra: dict[str, Any]) -> RunSummary:
    """Return the summary of a run that brought none along, from its rows.

    Args:
        table: rows of many runs.
        run_id: the run.
        extra: fields that are known from elsewhere and win over what the rows say.
    """
    rows = table.filter(pc.equal(table["run_id"], run_id))
    losses = [v for v in rows.filter(pc.equal(rows["kind"], "eval"))["loss_nats"].to_pylist() if v is not None]
    finite = [value for value in losses if math.isfinite(value)]
    fields: dict[str, Any] = {
        "status": "finished",
        "config": {},
        "varied": {},
        "step": _largest(rows["step"].to_pylist(), 0),
        "num_tokens": _largest(rows["num_tokens"].to_pylist(), 0),
        "flops": _largest(rows["flops"].to_pylist(), 0.0),
        "elapsed_seconds": _largest(rows["elapsed_seconds"].to_pylist(), 0.0),
        "final_loss_nats": losses[-1] if losses else math.nan,
        "best_loss_nats": min(finite, default=math.nan),
    }
    fields["num_steps"] = fields["step"]
    return RunSummary(run_id=run_id, **(fields | extra))


def _largest(values: Iterable[Any], default: Any) -> Any:
    return max((value for value in values if value is not None), default=default)
