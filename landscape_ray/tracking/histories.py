"""Metric histories of many runs as one table, by the fastest way that the store has."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from landscape_ray.tracking.uris import is_postgres, sqlite_path

POINTS: Final = pa.schema(
    [
        ("run", pa.int64()),
        ("key", pa.string()),
        ("step", pa.int64()),
        ("timestamp", pa.int64()),
        ("value", pa.float64()),
    ]
)
"""A point a row: number of the run in the list that was asked for, metric, step, milliseconds, value."""

_BULK_PATH = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
_BULK_RUNS = 25  # a thousand points each fill one answer
_BULK_RESULTS = 25_000
_SQL_RUNS = 500
_SQL = "SELECT run_uuid, key, step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics WHERE run_uuid IN"
_SQL_ROWS = 200_000


def read_points(client: MlflowClient, tracking_uri: str, runs: Sequence[Run], *, bulk: bool = True) -> pa.Table:
    """Return every point of every metric of these runs under :data:`POINTS`, in no particular order.

    Args:
        client: of the store.
        tracking_uri: its address.
        runs: as the store's search returned them.
        bulk: ask for many runs at once where the store can: a database is read directly, a server is asked as its
            own pages ask it. Otherwise, and where that fails, one request for each run and metric.
    """
    if bulk:
        database = sqlite_path(tracking_uri)
        with contextlib.suppress(sqlite3.Error, SQLAlchemyError, MlflowException, ValueError, KeyError, TypeError):
            if database is not None:
                return _concat(_from_sqlite(database, runs))
            if is_postgres(tracking_uri):
                return _concat(_from_database(client, runs))
            return _concat(_from_server(client, runs))
    return _concat(_one_by_one(client, runs))


def _concat(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([POINTS.empty_table(), *tables])


def _table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(POINTS)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, POINTS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=POINTS)


def _from_sqlite(database: Path, runs: Sequence[Run]) -> Iterator[pa.Table]:
    """Read the table of metrics, without a lock that would hold up a writer."""
    address = f"file:{urllib.parse.quote(str(database))}?mode=ro"
    number = {run.info.run_id: index for index, run in enumerate(runs)}
    with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
        for start in range(0, len(runs), _SQL_RUNS):
            chosen = [run.info.run_id for run in runs[start : start + _SQL_RUNS]]
            cursor = connection.execute(f"{_SQL} ({','.join('?' * len(chosen))})", chosen)
            while rows := cursor.fetchmany(_SQL_ROWS):
                yield _numbered(rows, number)


def _from_database(client: MlflowClient, runs: Sequence[Run]) -> Iterator[pa.Table]:
    """Read the table of metrics through the connections of MLflow's own store."""
    number = {run.info.run_id: index for index, run in enumerate(runs)}
    query = sqlalchemy.text(f"{_SQL} :chosen").bindparams(sqlalchemy.bindparam("chosen", expanding=True))
    with client._tracking_client.store.engine.connect() as connection:
        for start in range(0, len(runs), _SQL_RUNS):
            chosen = [run.info.run_id for run in runs[start : start + _SQL_RUNS]]
            streaming = connection.execution_options(stream_results=True, max_row_buffer=_SQL_ROWS)
            for rows in streaming.execute(query, {"chosen": chosen}).partitions(_SQL_ROWS):
                yield _numbered([tuple(row) for row in rows], number)


def _numbered(rows: Sequence[tuple[Any, ...]], number: Mapping[str, int]) -> pa.Table:
    """Return rows of the table of metrics under :data:`POINTS`."""
    names, *columns = zip(*rows, strict=True)
    values = np.asarray(columns[-1], dtype=np.float64)  # None becomes nan
    arrays = [[number[name] for name in names], *columns[:-1], values]
    return pa.Table.from_arrays(
        [pa.array(array, field.type) for array, field in zip(arrays, POINTS, strict=True)], schema=POINTS
    )


def _from_server(client: MlflowClient, runs: Sequence[Run]) -> Iterator[pa.Table]:
    """Ask for a metric of many runs at a time; an answer that may have been cut is asked for again in smaller ones."""
    number = {run.info.run_id: index for index, run in enumerate(runs)}
    for key in sorted({key for run in runs for key in run.data.metrics}):
        having = [run.info.run_id for run in runs if key in run.data.metrics]
        waiting = [having[start : start + _BULK_RUNS] for start in range(0, len(having), _BULK_RUNS)]
        while waiting:
            chosen = waiting.pop()
            points = _ask(client, key, chosen)
            if len(points) < _BULK_RESULTS:
                yield _table([(number[p["run_id"]], key, p["step"], p["timestamp"], float(p["value"])) for p in points])
            elif len(chosen) > 1:
                waiting += [chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]]
            else:
                yield _history(client, number[chosen[0]], chosen[0], key)


def _ask(client: MlflowClient, key: str, run_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the answer of the server's bulk interface, which has no method of the client.

    Raises:
        MlflowException: no answer, or a refusal.
        ValueError: not what such a server answers.
    """
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    store = client._tracking_client.store
    query = {"run_id": list(run_ids), "metric_key": key, "max_results": _BULK_RESULTS}
    response = http_request(store.get_host_creds(), _BULK_PATH, "GET", params=query)
    points = json.loads(verify_rest_response(response, _BULK_PATH).text)["metrics"]
    if not isinstance(points, list):
        raise ValueError(f"metrics must be a list, got {type(points).__name__}")
    return points


def _one_by_one(client: MlflowClient, runs: Sequence[Run]) -> Iterator[pa.Table]:
    for index, run in enumerate(runs):
        for key in run.data.metrics:
            yield _history(client, index, run.info.run_id, key)


def _history(client: MlflowClient, index: int, run_id: str, key: str) -> pa.Table:
    points = client.get_metric_history(run_id, key)
    return _table([(index, key, point.step, point.timestamp, point.value) for point in points])
