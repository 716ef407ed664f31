"""Many runs in one transaction: the store holds what MLflow's own client would have put there, and nothing else."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels import models

from landscape_ray.tracking import database, server
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import Projector

TABLES = (
    "runs",
    "tags",
    "params",
    "metrics",
    "latest_metrics",
    "datasets",
    "inputs",
    "input_tags",
    "experiments",
)


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of all tables, with what is drawn at random or read off a clock replaced by what that is."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}
        names = dict(connection.execute("SELECT run_uuid, value FROM tags WHERE key = 'mlflow.runName'").fetchall())
        names |= dict(connection.execute("SELECT dataset_uuid, name FROM datasets").fetchall())
        inputs = connection.execute("SELECT input_uuid, destination_id FROM inputs").fetchall()
    names |= {name: f"input of {names[run]}" for name, run in inputs}

    def plain(value: Any) -> Any:
        if isinstance(value, int) and value > 1_750_000_000_000:
            return "now"
        for name, stands_for in names.items() if isinstance(value, str) else ():
            value = value.replace(name, stands_for)
        return value

    files = {server.ARTIFACTS, server.SWEEP_ID}  # when they were written; drawn for each sweep
    return {
        table: sorted((tuple(map(plain, row)) for row in rows if row[0] not in files), key=repr)
        for table, rows in tables.items()
    }


def story(folder: SweepFolder, uri: str, make: SimpleNamespace) -> None:
    """Trials that begin, go on, end, diverge and go on, go back; and what they were trained on."""
    data = {"data": {"name": "text", "source": "books"}, "lr": 0.01}
    make.write(folder.trial("t1"), 1, 10, config=data)
    make.write(folder.trial("t2"), 1, 12, status="finished", config=data)
    make.write(folder.trial("t3"), 1, 7, status="diverged", config=data)
    folder.trial("t4").set_status("failed", "no memory")
    projector = Projector(folder, uri, "exp")
    assert projector.sync().error == ""
    make.write(folder.trial("t1"), 11, 25, config=data | {"lr": 0.02}, varied={"optimizer.lr": 0.02})
    make.write(folder.trial("t3"), 8, 9, config=data)
    make.write(folder.trial("t5"), 1, 4, config={f"p{k}": k for k in range(250)})
    assert projector.sync().error == ""
    folder.trial("t5").rewind(0)
    make.write(folder.trial("t5"), 1, 3)
    make.write(folder.trial("t1"), 26, 30, status="finished", config=data | {"lr": 0.02})
    make.write(folder.trial("t3"), 10, 11, status="finished", config=data)
    make.write(folder.trial("t5"), 4, 5, status="finished")
    folder.update_meta(status="finished")
    assert projector.close().error == ""


@pytest.mark.acceptance
def test_the_store_holds_what_mlflows_own_client_puts_there(
    results: Path, store_template: Path, make: SimpleNamespace, one_by_one: Callable[[], None]
) -> None:
    found = []
    for way in ("together", "alone"):
        path = results / f"{way}.db"
        path.write_bytes(store_template.read_bytes())
        if way == "alone":
            one_by_one()
        folder = SweepFolder.create(results / "quick", spec_text=make.spec, meta={"created_unix": 1.7e9})
        story(folder, f"sqlite:///{path}", make)
        found.append(contents(path))
        folder.path.rename(results / way)
    together, alone = found
    for table in TABLES:
        assert together[table] == alone[table], table
    assert len(together["metrics"]) > 300
    assert len(together["runs"]) == 7


def test_a_store_with_other_tables_is_written_by_mlflows_client(
    folder: SweepFolder,
    uri: str,
    make: SimpleNamespace,
    faults: Callable[..., SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Newer:
        __table__ = sqlalchemy.Table("tags", sqlalchemy.MetaData(), sqlalchemy.Column("colour", sqlalchemy.String))

    state = faults()
    make.write(folder.trial("t1"), 1, 5, status="finished")
    with monkeypatch.context() as patch:
        patch.setattr(models, "SqlTag", Newer)
        assert not server.open_client(uri).writes_runs
        patch.delattr(models, "SqlTag")
        assert not server.open_client(uri).writes_runs
    assert server.open_client(uri).writes_runs
    assert not server.open_client("http://127.0.0.1:9").writes_runs
    assert Projector(folder, uri, "exp").sync().error == ""
    assert "write_runs" in state.calls


def test_what_the_database_refuses_is_sent_one_by_one(
    folder: SweepFolder,
    uri: str,
    make: SimpleNamespace,
    faults: Callable[..., SimpleNamespace],
    results: Path,
) -> None:
    """A row that does not fit takes the others of its transaction along; the store's own client says which it is."""
    for name in ("t1", "t2"):
        make.write(folder.trial(name), 1, 5, status="finished")
    with contextlib.closing(sqlite3.connect(results / "mlflow.db")) as connection, connection:
        connection.execute(
            "CREATE TRIGGER no BEFORE INSERT ON tags WHEN NEW.value = 't1' BEGIN SELECT RAISE(FAIL, 'not t1'); END"
        )
    state = faults()
    projector = Projector(folder, uri, "exp")
    first = projector.sync()
    assert "not t1" in first.error
    assert first.behind > 0
    assert "t2" not in make.active_runs(results / "mlflow.db")
    state.calls.clear()
    projector.sync()
    assert "write_runs" not in state.calls
    assert "create_run" in state.calls


@pytest.mark.parametrize("name", ["a//b", "../a", "/a", ".", "a/../b", "a/"])
def test_names_that_mlflow_refuses(uri: str, name: str) -> None:
    with pytest.raises(MlflowException, match="names with '/' must be plain paths"):
        database.check_name(name)
    client = server.open_client(uri)
    run = client.create_run("0")
    with pytest.raises(MlflowException, match="Invalid value"):
        client.log_batch(run.info.run_id, metrics=[Metric(name, 1.0, 0, 0)])
    database.check_name("probe/my.module:top_2")


def test_an_experiment_that_is_deleted_meanwhile(folder: SweepFolder, uri: str, make: SimpleNamespace) -> None:
    make.write(folder.trial("t1"), 1, 5)
    projector = Projector(folder, uri, "exp")
    assert projector.sync().error == ""
    client = server.open_client(uri)
    experiment = client.get_experiment_by_name("exp")
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(MlflowException, match="experiment 'exp' is deleted in MLflow"):
        client.write_runs(experiment, [database.RunWrite("0" * 32, created=(0, "t9"))])
    make.write(folder.trial("t2"), 1, 5)
    assert "deleted" in projector.sync().error


def test_points_and_newest_values_are_each_there_once(uri: str) -> None:
    """However they are sent: in any order, twice, or again after others."""
    client = server.open_client(uri)
    experiment = client.get_experiment("0")
    run_id = "1" * 32
    points = [Metric("loss", 1.0 / step, 1000 + step, step) for step in (3, 1, 2, 2)]
    client.write_runs(experiment, [database.RunWrite(run_id, created=(0, "t1"), metrics=points)])
    older = database.RunWrite(run_id, metrics=[Metric("loss", 9.0, 0, 0), points[0]], params={"a": "1"})
    client.write_runs(experiment, [older])
    client.write_runs(experiment, [database.RunWrite(run_id, params={"a": "2", "b": "3"}, tags={"x": "1"})])
    assert client.write_runs(experiment, [database.RunWrite("2" * 32, tags={"x": "1"})]) == {"2" * 32}
    run = client.get_run(run_id)
    assert run.data.metrics == {"loss": 1.0 / 3}
    assert run.data.params == {"a": "1", "b": "3"}
    assert {point.step for point in client.get_metric_history(run_id, "loss")} == {0, 1, 2, 3}
    assert len(client.get_metric_history(run_id, "loss")) == 4


def test_runs_that_have_ended_are_let_go_of_and_may_go_on(
    folder: SweepFolder, uri: str, make: SimpleNamespace, results: Path
) -> None:
    """What is kept of a run that has ended does not grow with what was sent; a member that is rescued goes on."""
    make.write(folder.trial("t1"), 1, 20, status="diverged")
    make.write(folder.trial("t2"), 1, 5)
    projector = Projector(folder, uri, "exp")
    assert projector._sync(closing=False, patient=True).error == ""
    assert projector._runs is not None
    ended, open_ = projector._runs.trials["t1"], projector._runs.trials["t2"]
    assert (ended.params, ended.tags, ended.metrics, ended.events) == (set(), {}, {}, [])
    assert len(open_.params) * len(open_.tags) > 0
    make.write(folder.trial("t1"), 21, 30)
    assert projector.close().error == ""
    assert make.stored_points(results / "mlflow.db") == make.expected_points({"t1": 30, "t2": 5})


def test_the_next_driver_asks_nothing_about_runs_that_have_ended(
    folder: SweepFolder, uri: str, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, results: Path
) -> None:
    make.write(folder.trial("t1"), 1, 9, status="finished")
    make.write(folder.trial("t2"), 1, 9, status="finished")
    make.write(folder.trial("t3"), 1, 5)
    assert Projector(folder, uri, "exp").close().error == ""
    folder.trial("t2").set_status("finished", "looked at by hand")
    asked: list[str] = []
    get_run = server.Client.get_run
    monkeypatch.setattr(server.Client, "get_run", lambda self, run_id: asked.append(run_id) or get_run(self, run_id))
    assert Projector(folder, uri, "exp").sync().error == ""
    runs = make.active_runs(results / "mlflow.db")
    assert asked == [runs[name]["run_id"] for name in ("", "t2", "t3")]
    assert "by hand" in runs["t2"]["landscape_ray.summary"]
    assert make.stored_points(results / "mlflow.db") == make.expected_points({"t1": 9, "t2": 9, "t3": 5})


def test_the_thread_looks_at_what_has_ended_now_and_then_only(
    folder: SweepFolder, uri: str, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 9):
        make.write(folder.trial(f"t{number}"), 1, 3, status="finished" if number < 8 else "running")
    projector = Projector(folder, uri, "exp")
    projector._sync(closing=False, patient=True)
    looked: list[str] = []
    stamp = projector._stamp
    monkeypatch.setattr(projector, "_stamp", lambda trial_id: looked.append(trial_id) or stamp(trial_id))
    projector._sync(closing=False, patient=True)
    assert set(looked) == {"t8"}
    projector.sync()
    assert len(set(looked)) == 8
