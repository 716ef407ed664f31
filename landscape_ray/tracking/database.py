"""The runs of many trials written to a store's database in one transaction.

MLflow's own store spends some 40 ms of processor time on a short trial: each of its requests is a session that looks
the run up, reads back what it has written and syncs the file. A sweep of many short trials falls behind by that. What
is written here are the same rows of the same tables, by MLflow's own definitions of them, which its tables are checked
against; a store whose tables have changed since is written by MLflow's client, as a server is.
"""

from __future__ import annotations

import dataclasses
import functools
import posixpath
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import sqlalchemy
from mlflow.entities import Dataset, LifecycleStage, Metric, Run, RunData, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels import models
from mlflow.utils.uri import append_to_uri_path
from sqlalchemy.dialects import postgresql, sqlite

MAX_RUNS = 50
"""A transaction is of so many runs at most: it holds up other writers of an SQLite file ..."""
MAX_POINTS = 5000
"""... and of so many points."""

_COLUMNS: Final = {
    "SqlRun": "run_uuid name source_type source_name entry_point_name user_id status start_time end_time deleted_time"
    " source_version lifecycle_stage artifact_uri experiment_id",
    "SqlTag": "key value run_uuid",
    "SqlParam": "key value run_uuid",
    "SqlMetric": "key value timestamp step is_nan run_uuid",
    "SqlLatestMetric": "key value timestamp step is_nan run_uuid",
    "SqlInput": "input_uuid source_type source_id destination_type destination_id step",
    "SqlInputTag": "input_uuid name value",
    "SqlDataset": "dataset_uuid experiment_id name digest dataset_source_type dataset_source dataset_schema"
    " dataset_profile",
}
"""The columns that this was written for."""

_INSERTS: Final[Mapping[str, Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_NAME: Final = "mlflow.runName"
_CHUNK = 500
_DATASETS = 100


@dataclasses.dataclass(slots=True)
class RunWrite:
    """What is to be written of one run.

    Attributes:
        run_id: of the run.
        created: when it began, in milliseconds, and its name; None of a run that is there.
        params: by name; one that is there is left as it is.
        metrics: finite points; those that are there are left out.
        tags: by name; they replace what is there.
        datasets: that the run was trained on.
        status: MLflow's word; None leaves it.
        end_ms: when it ended.
    """

    run_id: str
    created: tuple[int, str] | None = None
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: list[Metric] = dataclasses.field(default_factory=list)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    datasets: list[Dataset] = dataclasses.field(default_factory=list)
    status: str | None = None
    end_ms: int | None = None


def is_known(store: Any) -> bool:
    """Return whether a store of MLflow's is a database with the tables that this was written for."""
    dialect = getattr(getattr(store, "engine", None), "dialect", None)
    return getattr(dialect, "name", "") in _INSERTS and all(
        set(_table(name).columns.keys()) == set(columns.split()) for name, columns in _COLUMNS.items()
    )


def _table(name: str) -> Any:
    made = getattr(models, name, None)
    return sqlalchemy.Table("absent", sqlalchemy.MetaData()) if made is None else made.__table__


@functools.lru_cache(maxsize=10_000)
def check_name(name: str) -> None:
    """Raise for the name of a parameter, metric or tag that MLflow would refuse, though its characters are right.

    Raises:
        MlflowException: it is a path that means another one.
    """
    if posixpath.normpath(name) != name or name == "." or name.startswith(("..", "/")):
        raise MlflowException.invalid_parameter_value(
            f"Invalid name '{name}'; names with '/' must be plain paths, such as '{posixpath.normpath('x/' + name)}'"
        )


def write_runs(store: Any, experiment: Any, writes: Sequence[RunWrite]) -> set[str]:
    """Write runs in one transaction: all of it or nothing.

    Args:
        store: of MLflow's, a database that :func:`is_known`.
        experiment: MLflow's, where new runs go.
        writes: one for each run.

    Returns:
        Runs that are deleted, of which nothing was written.

    Raises:
        MlflowException: the experiment is deleted, or the database fails.
    """
    upsert = _INSERTS[store.engine.dialect.name]
    with store.ManagedSessionMaker(read_only=False) as session:
        connection = session.connection()
        created = [write for write in writes if write.created is not None]
        there = _active(connection, [write.run_id for write in writes if write.created is None])
        sound = [write for write in writes if write.created is not None or write.run_id in there]
        if created:
            _create(connection, experiment, created)
        _insert(connection, upsert(_table("SqlParam")).on_conflict_do_nothing(), _params(sound))
        _insert(connection, upsert(_table("SqlMetric")).on_conflict_do_nothing(), _points(store, sound))
        _insert(connection, _newer(upsert(_table("SqlLatestMetric"))), _latest(store, sound))
        tags = upsert(_table("SqlTag"))
        tags = tags.on_conflict_do_update(index_elements=["key", "run_uuid"], set_={"value": tags.excluded.value})
        _insert(connection, tags, [_tag(w.run_id, key, value) for w in sound for key, value in w.tags.items()])
        _add_datasets(connection, upsert, int(experiment.experiment_id), sound)
        _set_statuses(connection, sound)
    return {write.run_id for write in writes} - {write.run_id for write in sound}


def _insert(connection: Any, statement: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(statement, rows)


def _active(connection: Any, run_ids: Sequence[str]) -> set[str]:
    runs = _table("SqlRun").c
    found: set[str] = set()
    for start in range(0, len(run_ids), _CHUNK):
        chosen = sqlalchemy.select(runs.run_uuid).where(
            runs.run_uuid.in_(run_ids[start : start + _CHUNK]), runs.lifecycle_stage == LifecycleStage.ACTIVE
        )
        found.update(connection.execute(chosen).scalars())
    return found


def _create(connection: Any, experiment: Any, writes: Sequence[RunWrite]) -> None:
    table = _table("SqlExperiment").c
    stage = sqlalchemy.select(table.lifecycle_stage).where(table.experiment_id == int(experiment.experiment_id))
    if connection.execute(stage).scalar() != LifecycleStage.ACTIVE:
        raise MlflowException.invalid_parameter_value(f"experiment '{experiment.name}' is deleted in MLflow")
    rows = []
    for write in writes:
        assert write.created is not None
        start_ms, name = write.created
        rows.append(
            {
                "run_uuid": write.run_id,
                "name": name,
                "artifact_uri": append_to_uri_path(experiment.artifact_location, write.run_id, "artifacts"),
                "experiment_id": int(experiment.experiment_id),
                "source_type": "UNKNOWN",
                "source_name": "",
                "entry_point_name": "",
                "user_id": "unknown",
                "status": "RUNNING",
                "start_time": start_ms,
                "end_time": None,
                "deleted_time": None,
                "source_version": "",
                "lifecycle_stage": LifecycleStage.ACTIVE,
            }
        )
    _insert(connection, sqlalchemy.insert(_table("SqlRun")), rows)
    names = [_tag(write.run_id, _NAME, row["name"]) for write, row in zip(writes, rows, strict=True)]
    _insert(connection, sqlalchemy.insert(_table("SqlTag")), names)


def _tag(run_id: str, key: str, value: str) -> dict[str, Any]:
    return {"run_uuid": run_id, "key": key, "value": value}


def _params(writes: Sequence[RunWrite]) -> list[dict[str, Any]]:
    return [_tag(write.run_id, key, value) for write in writes for key, value in write.params.items()]


def _point(store: Any, run_id: str, metric: Metric) -> dict[str, Any]:
    is_nan, value = store.sanitize_metric_value(metric.value)
    at = {"timestamp": metric.timestamp, "step": metric.step}
    return {"run_uuid": run_id, "key": metric.key, "value": value, "is_nan": is_nan, **at}


def _points(store: Any, writes: Sequence[RunWrite]) -> list[dict[str, Any]]:
    return [_point(store, write.run_id, metric) for write in writes for metric in write.metrics]


def _latest(store: Any, writes: Sequence[RunWrite]) -> list[dict[str, Any]]:
    rows = []
    for write in writes:
        newest: dict[str, Metric] = {}
        for metric in write.metrics:
            known = newest.get(metric.key)
            if known is None or _order(metric) > _order(known):
                newest[metric.key] = metric
        rows += [_point(store, write.run_id, metric) for metric in newest.values()]
    return rows


def _order(metric: Metric) -> tuple[int, int, float]:
    return metric.step, metric.timestamp, metric.value


def _newer(insert: Any) -> Any:
    """Return the insertion of latest points that replaces older ones only."""
    names, there, new = ("step", "timestamp", "value"), insert.table.c, insert.excluded
    newer = sqlalchemy.tuple_(*(new[n] for n in names)) > sqlalchemy.tuple_(*(there[n] for n in names))
    values = {name: new[name] for name in (*names, "is_nan")}
    return insert.on_conflict_do_update(index_elements=["key", "run_uuid"], set_=values, where=newer)


def _add_datasets(connection: Any, upsert: Any, experiment_id: int, writes: Sequence[RunWrite]) -> None:
    """Link runs with their data; what the data are is kept once an experiment."""
    wanted = {(data.name, data.digest): data for write in writes for data in write.datasets}
    if not wanted:
        return
    rows = [
        {
            "dataset_uuid": uuid.uuid4().hex,
            "experiment_id": experiment_id,
            "name": data.name,
            "digest": data.digest,
            "dataset_source_type": data.source_type,
            "dataset_source": data.source,
            "dataset_schema": data.schema,
            "dataset_profile": data.profile,
        }
        for data in wanted.values()
    ]
    table = _table("SqlDataset")
    _insert(connection, upsert(table).on_conflict_do_nothing(), rows)
    known: dict[tuple[str, str], str] = {}
    for start in range(0, len(rows), _DATASETS):
        digests = [row["digest"] for row in rows[start : start + _DATASETS]]
        chosen = sqlalchemy.select(table.c.name, table.c.digest, table.c.dataset_uuid).where(
            table.c.experiment_id == experiment_id, table.c.digest.in_(digests)
        )
        known |= {(name, digest): found for name, digest, found in connection.execute(chosen)}
    inputs, tags = [], []
    for write in writes:
        for data in write.datasets:
            of = {"source_type": "DATASET", "source_id": known[data.name, data.digest]}
            to = {"destination_type": "RUN", "destination_id": write.run_id}
            inputs.append({"input_uuid": uuid.uuid4().hex, "step": 0, **of, **to})
            tags.append({"input_uuid": inputs[-1]["input_uuid"], "name": "mlflow.data.context", "value": "train"})
    table, made = _table("SqlInput"), [row["input_uuid"] for row in inputs]
    _insert(connection, upsert(table).on_conflict_do_nothing(), inputs)
    # a run that was linked before keeps its link: no tag of another one
    new: set[str] = set()
    for start in range(0, len(made), _CHUNK):
        chosen = sqlalchemy.select(table.c.input_uuid).where(table.c.input_uuid.in_(made[start : start + _CHUNK]))
        new.update(connection.execute(chosen).scalars())
    _insert(connection, sqlalchemy.insert(_table("SqlInputTag")), [row for row in tags if row["input_uuid"] in new])


def _set_statuses(connection: Any, writes: Sequence[RunWrite]) -> None:
    table = _table("SqlRun")
    of = table.c.run_uuid == sqlalchemy.bindparam("of")
    begun = [{"of": w.run_id, "to": w.status} for w in writes if w.status is not None and w.end_ms is None]
    ended = [{"of": w.run_id, "to": w.status, "at": w.end_ms} for w in writes if w.status and w.end_ms is not None]
    to: Any = sqlalchemy.bindparam("to")
    at: Any = sqlalchemy.bindparam("at")
    _insert(connection, sqlalchemy.update(table).where(of).values(status=to), begun)
    _insert(connection, sqlalchemy.update(table).where(of).values(status=to, end_time=at), ended)


def find_runs(store: Any, experiment_id: str, key: str, value: str) -> Iterator[Run]:
    """Yield the active runs of an experiment that have this tag, oldest first, with their tags only.

    A run whole, with its parameters and its last metrics, is some 100 rows; for what is asked of runs that have ended
    long ago, tags are enough.
    """
    runs, tags = _table("SqlRun").c, _table("SqlTag").c
    columns = (runs.run_uuid, runs.name, runs.user_id, runs.status, runs.start_time, runs.end_time, runs.artifact_uri)
    wanted = (
        sqlalchemy.select(*columns)
        .join(_table("SqlTag"), tags.run_uuid == runs.run_uuid)
        .where(runs.experiment_id == int(experiment_id), runs.lifecycle_stage == LifecycleStage.ACTIVE)
        .where(tags.key == key, tags.value == value)
        .order_by(runs.start_time, runs.run_uuid)
    )
    with store.ManagedSessionMaker(read_only=True) as session:
        connection = session.connection()
        found = connection.execute(wanted).all()
        for start in range(0, len(found), _CHUNK):
            rows = found[start : start + _CHUNK]
            named: dict[str, list[RunTag]] = {row.run_uuid: [] for row in rows}
            chosen = sqlalchemy.select(tags.run_uuid, tags.key, tags.value).where(tags.run_uuid.in_(list(named)))
            for run_id, name, text in connection.execute(chosen).all():
                named[run_id].append(RunTag(name, text))
            yield from (_run(row, experiment_id, named[row.run_uuid]) for row in rows)


def _run(row: Any, experiment_id: str, tags: Iterable[RunTag]) -> Run:
    info = RunInfo(
        run_id=row.run_uuid,
        run_name=row.name,
        experiment_id=experiment_id,
        user_id=row.user_id,
        status=row.status,
        start_time=row.start_time,
        end_time=row.end_time,
        lifecycle_stage=LifecycleStage.ACTIVE,
        artifact_uri=row.artifact_uri,
    )
    return Run(info, RunData(tags=list(tags)))
