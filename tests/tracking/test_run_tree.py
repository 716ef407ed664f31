"""What the runs of a sweep tell: the same from any machine, to any server, and nothing that is secret."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from landscape_ray.records import EventRecord
from landscape_ray.tracking import parent, server
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.tracking.points import closing_metrics, events_text, to_event
from landscape_ray.tracking.projector import Projector

DATA = {"name": "text", "source": "stdlib"}


@pytest.fixture
def database(results: Path) -> Path:
    return results / "mlflow.db"


def lose_everything(database: Path) -> None:
    """Empty every table of a store, as if the server had been set up anew."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            if table not in ("alembic_version", "workspaces") and not table.startswith("sqlite_"):
                connection.execute(f"DELETE FROM {table}")


def run_of(client: MlflowClient, database: Path, make: SimpleNamespace, name: str) -> Any:
    return client.get_run(make.active_runs(database)[name]["run_id"])


@pytest.fixture
def member(folder: SweepFolder, make: SimpleNamespace) -> SweepFolder:
    """A member t1 that copied t2 after step 20, with another learning rate from there on."""
    first = {"data": DATA, "lr": 0.01, "schedule": {"name": "wsd"}}
    varied = {"lr": 0.01, "schedule.name": "wsd"}
    trial = folder.trial("t1")
    writer = PartWriter(trial)
    rows = make.rows(1, 40)
    cut = next(index for index, row in enumerate(rows) if row.step == 21)
    for row in rows[:cut]:
        writer.append(row)
    trial.commit(make.summary("t1", config=first, varied=varied, step=20), writer.flush())
    place = {field.name: getattr(rows[cut - 1], field.name) for field in dataclasses.fields(EventRecord)[:5]}
    detail = json.dumps({"lr": 0.03, "schedule.name": "wsd", "reason": "lowest quarter"})
    writer.append(EventRecord(**place, event="exploit", donor="t2", donor_step=15, detail=detail))
    for row in rows[cut:]:
        writer.append(row)
    config = first | {"lr": 0.03}
    done = {"status": "finished", "step": 40, "num_tokens": 512 * 40, "elapsed_seconds": 10.0, "probe_seconds": 2.0}
    done |= {"peak_memory_bytes": 1e6, "final_loss_nats": 2.5, "flops": 1e9}
    trial.commit(make.summary("t1", config=config, varied=varied | {"lr": 0.03}, **done), writer.flush())
    trial.checkpoint_path.mkdir()
    (trial.checkpoint_path / "state.pt").write_bytes(b"weights")
    make.write(folder.trial("t2"), 1, 30, status="diverged", final_loss_nats=1.0)
    return folder


@pytest.mark.parametrize("emptied", [False, True])
def test_a_member_shows_what_it_began_with_and_every_change(
    member: SweepFolder, uri: str, database: Path, make: SimpleNamespace, emptied: bool
) -> None:
    """Also on a server that is first told of it when all is over."""
    projector = Projector(member, uri, "exp")
    projector.sync()
    if emptied:
        lose_everything(database)
    assert projector.close().error == ""
    client = server.open_client(uri)
    run = run_of(client, database, make, "t1")
    assert (run.data.params["lr"], run.data.params["data.source"]) == ("0.01", "stdlib")
    assert run.info.run_name == "t1 lr=0.01 wsd"
    rates = [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "hyperparameter/lr")]
    assert rates == [(0, 0.01), (3, 0.02), (20, 0.03)], "at first, by the mutation of the fixture, by the exploit"
    mutated, copied = json.loads(run.data.tags["landscape_ray.events"])
    assert (mutated["event"], mutated["step"], mutated["values"]) == ("mutate", 3, {"lr": 0.02})
    known = {name: copied[name] for name in ("event", "step", "donor", "donor_step", "reason", "values")}
    assert known == {
        "event": "exploit",
        "step": 20,
        "donor": "t2",
        "donor_step": 15,
        "reason": "lowest quarter",
        "values": {"lr": 0.03, "schedule.name": "wsd"},
    }
    for axis, factor in (("num_tokens", 512), ("flops", 6e6), ("elapsed_seconds", 0.25)):
        points = client.get_metric_history(run.info.run_id, f"progress/{axis}")
        assert [(p.step, p.value) for p in points] == [(step, factor * step) for step in range(1, 41)]
    assert run.data.metrics["system/peak_memory_bytes"] == 1e6
    assert run.data.metrics["system/tokens_per_second"] == 512 * 40 / 8.0
    assert run.data.tags["landscape_ray.checkpoint"] == member.trial("t1").checkpoint_path.as_uri()
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, json.loads(dataset.dataset.source)) == ("stdlib", DATA)
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]


def test_the_sweep_shows_how_it_was_made_and_what_it_came_to(
    member: SweepFolder, uri: str, database: Path, make: SimpleNamespace, tmp_path: Path
) -> None:
    member.report_path.write_text("<html>report</html>")
    member.update_meta(
        status="finished", git={"commit": "abc", "dirty": True}, packages={"torch": "2"}, hardware={"cpus": 2}
    )
    projector = Projector(member, uri, "exp")
    projector.set_parent({"sweep/best_loss_nats": 2.25, "nan": float("nan")}, {"searcher": "pbt"}, "# Result")
    assert projector.close().error == ""
    client = server.open_client(uri)
    run = run_of(client, database, make, "")
    assert run.info.status == "FINISHED"
    metrics = run.data.metrics
    assert (metrics["sweep/num_finished"], metrics["sweep/num_diverged"], metrics["sweep/num_failed"]) == (1, 1, 0)
    assert (metrics["sweep/flops"], metrics["sweep/elapsed_seconds"], metrics["sweep/probe_share"]) == (1e9, 10.0, 0.2)
    assert metrics["sweep/best_loss_nats"] == 2.25, "what the driver says wins over what is computed here"
    assert run.data.tags["mlflow.note.content"] == "# Result"
    wanted = {"spec.toml", "report.html", "environment.json", "events.json", "checkpoints.json", "records.parquet"}
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == wanted
    got = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    environment = json.loads((got / "environment.json").read_text())
    assert environment["git"] == {"commit": "abc", "dirty": True}
    assert (environment["seed"], environment["packages"], environment["hardware"]) == (0, {"torch": "2"}, {"cpus": 2})
    events = json.loads((got / "events.json").read_text())
    assert [(e["run_id"], e["event"]) for e in events] == [("t1", "mutate"), ("t1", "exploit"), ("t2", "mutate")]
    (checkpoint,) = json.loads((got / "checkpoints.json").read_text())
    assert checkpoint["path"] == "trials/t1/checkpoint/state.pt"
    assert (checkpoint["run_id"], checkpoint["step"], checkpoint["bytes"]) == ("t1", 40, 7)
    assert (got / "report.html").read_text() == "<html>report</html>"


def test_nothing_is_sent_again_that_the_server_has(
    member: SweepFolder, uri: str, faults: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    member.update_meta(status="finished")
    first = Projector(member, uri, "exp")
    first.set_parent({"sweep/best_loss_nats": 2.25}, {"searcher": "pbt"}, "# Result " + "x" * 9000)
    assert first.close().error == ""
    state = faults()
    uploads: list[str] = []
    monkeypatch.setattr(MlflowClient, "log_artifact", lambda *a, **k: uploads.append(a[2]))
    assert Projector(member, uri, "exp").close().error == ""
    assert (state.calls, uploads) == ([], [])
    member.report_path.write_text("new")
    assert Projector(member, uri, "exp").close().error == ""
    assert [Path(path).name for path in uploads] == ["report.html"]
    assert state.calls == ["log_batch"]
    member.report_path.write_text("newer")
    handed_over = Projector(member, uri, "exp")
    handed_over.log_artifacts([member.report_path])
    assert handed_over.close().error == ""
    assert Projector(member, uri, "exp").close().error == ""
    assert len(uploads) == 2, "once, whichever way it comes"


@pytest.mark.acceptance
@pytest.mark.parametrize("when", ["running", "ended", "later"])
def test_a_server_that_lost_everything_has_everything_again(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace, when: str, tmp_path: Path
) -> None:
    """While the sweep goes on; between its last rows and its end; or from a copy on another machine."""
    make.write(folder.trial("t1"), 1, 30, status="finished")
    make.write(folder.trial("t2"), 1, 12)
    projector = Projector(folder, uri, "exp")
    projector.set_parent({"best": 1.0}, {"searcher": "tpe"}, "# Sweep")
    assert projector.sync().error == ""
    lose_everything(database)
    last = 12
    if when == "running":
        make.write(folder.trial("t2"), 13, 20)
        last = 20
        assert "not found" in projector.sync().error.lower()
        assert projector.sync().error == ""
    elif when == "ended":
        assert projector.close().error == ""
    else:
        shutil.copytree(folder.path, tmp_path / "copy")
        assert Projector(SweepFolder.open(tmp_path / "copy"), uri, "exp").close().error == ""
    assert make.stored_points(database) == make.expected_points({"t1": 30, "t2": last})
    runs = make.active_runs(database)
    assert set(runs) == {"", "t1", "t2"}
    assert runs[""]["mlflow.note.content"] == "# Sweep"
    assert {runs[name]["mlflow.parentRunId"] for name in ("t1", "t2")} == {runs[""]["run_id"]}
    names = {item.path for item in server.open_client(uri).list_artifacts(runs[""]["run_id"])}
    assert {"spec.toml", "environment.json"} <= names


def test_a_store_from_a_backup_is_filled_up(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace, tmp_path: Path
) -> None:
    make.write(folder.trial("t1"), 1, 12)
    projector = Projector(folder, uri, "exp")
    projector.sync()
    run_id = make.active_runs(database)["t1"]["run_id"]
    parts = make.active_runs(database)["t1"]["landscape_ray.num_parts"]
    make.write(folder.trial("t1"), 13, 40)
    assert projector.sync().error == ""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM metrics WHERE run_uuid = ? AND step > 12", (run_id,))
        update = "UPDATE tags SET value = ? WHERE run_uuid = ? AND key = 'landscape_ray.num_parts'"
        connection.execute(update, (parts, run_id))
    assert projector.close().error == ""
    assert make.stored_points(database) == make.expected_points({"t1": 40})


@pytest.mark.acceptance
def test_a_read_only_store_costs_nothing_but_time(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace
) -> None:
    make.write(folder.trial("t1"), 1, 10)
    projector = Projector(folder, uri, "exp")
    assert projector.sync().error == ""
    triggers = [
        f"CREATE TRIGGER no_{action}_{table} BEFORE {action} ON {table} BEGIN SELECT RAISE(FAIL, 'read only'); END"
        for table in ("metrics", "params", "tags", "runs", "latest_metrics")
        for action in ("INSERT", "UPDATE")
    ]
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for trigger in triggers:
            connection.execute(trigger)
    make.write(folder.trial("t1"), 11, 20)
    make.write(folder.trial("t2"), 1, 10)
    failed = projector.sync()
    assert failed.error != ""
    assert failed.behind > 0
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for trigger in triggers:
            connection.execute(f"DROP TRIGGER {trigger.split()[2]}")
    assert projector.close().error == ""
    assert make.stored_points(database) == make.expected_points({"t1": 20, "t2": 10})


def test_what_comes_in_quickly_goes_in_one_request(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace, faults: Callable[..., SimpleNamespace]
) -> None:
    """The thread's way: a trial that is training waits for its batch, one that has begun or ended does not."""
    projector = Projector(folder, uri, "exp", batch_seconds=60.0)
    make.write(folder.trial("t1"), 1, 5)
    projector._sync(closing=False, patient=True)
    state = faults()
    projector._must_find_runs = True  # with the client that counts
    projector._sync(closing=False, patient=True)
    state.calls.clear()
    for step in range(6, 16):
        make.write(folder.trial("t1"), step, step)
        report = projector._sync(closing=False, patient=True)
        assert report.error == ""
    assert state.calls == []
    assert report.behind == 10
    assert projector._runs is not None
    run = projector._runs.trials["t1"]
    run.found_at -= 10_000.0  # followed for hours: the pause is as long as it gets
    run.sent_at -= 170.0
    assert projector._sync(closing=False, patient=True).behind == 10
    run.sent_at -= 20.0
    assert projector._sync(closing=False, patient=True).behind == 0
    assert state.calls == ["write_runs"]
    state.calls.clear()
    make.write(folder.trial("t1"), 16, 20, status="finished")
    assert projector._sync(closing=False, patient=True).behind == 0
    assert state.calls == ["write_runs"]
    assert make.stored_points(database) == make.expected_points({"t1": 20})


# ---- secrets


def everything_in(results: Path, database: Path) -> Iterator[str]:
    """Yield every text of the store and every file of its artifacts."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        yield "\n".join(connection.iterdump())
    for path in (results / "mlartifacts").rglob("*"):
        if path.is_file():
            yield path.read_bytes().decode("utf-8", "replace")


@pytest.mark.acceptance
def test_no_secret_of_the_environment_is_logged(
    member: SweepFolder, uri: str, results: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from landscape_ray.sweep.provenance import git_state, packages
    from landscape_ray.sweep.session import hardware, versions

    secret = "hunter2-tr0ub4dor"
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "DATABASE_URL"):
        monkeypatch.setenv(name, f"postgresql://ada:{secret}@db" if name == "DATABASE_URL" else secret)
    made = {"versions": versions(), "hardware": hardware(), "packages": packages(), "git": git_state(Path.cwd())}
    member.update_meta(status="finished", tracking_uri=f"https://ada:{secret}@mlflow.example.org", **made)
    projector = Projector(member, uri, "exp")
    assert projector.close().error == ""
    texts = list(everything_in(results, database))
    assert any("environment.json" in text for text in texts)
    assert any("torch" in text for text in texts), "the search sees what is there"
    assert not [text for text in texts if secret in text]
    for name in os.environ:
        assert f'"{name}"' not in parent.environment(member.meta)


def test_a_password_in_the_address_of_data_is_masked(
    results: Path, uri: str, database: Path, make: SimpleNamespace
) -> None:
    source = "https://ada:s3cret@data.example.org/tokens"
    text = f'[train.data]\nsource = "{source}"\n'
    folder = SweepFolder.create(results / "masked", spec_text=text, meta={"status": "finished"})
    config = {"data": {"name": "text", "source": source}}
    make.write(folder.trial("t1"), 1, 5, config=config, status="failed", message=f"no answer from {source}")
    assert Projector(folder, uri, "exp").close().error == ""
    assert not [text for text in everything_in(results, database) if "s3cret" in text]


# ---- pieces


def test_events_that_do_not_fit_a_tag_give_way_oldest_first() -> None:
    events = [{"step": step, "event": "mutate", "values": {"lr": 0.5}} for step in range(1000)]
    text = events_text(events)
    kept = json.loads(text)
    assert len(text) <= server.MAX_TAG_CHARACTERS
    assert kept == events[-len(kept) :]
    assert len(kept) > 100
    assert json.loads(events_text([])) == []


@pytest.mark.parametrize(
    ("detail", "values", "more"),
    [
        ('{"lr": 0.1}', {"lr": 0.1}, {}),
        ('{"values": {"lr": 0.1}, "reason": "won"}', {"lr": 0.1}, {"reason": "won"}),
        ("not JSON", {"text": "not JSON"}, {}),
        ("[1]", {"text": [1]}, {}),
        ("", {}, {}),
    ],
)
def test_events_are_read_leniently(detail: str, values: dict[str, Any], more: dict[str, Any]) -> None:
    place = dict.fromkeys(("step", "num_tokens", "flops", "elapsed_seconds", "time_unix"), 1)
    event = to_event(place | {"event": "exploit", "donor": None, "donor_step": None, "detail": detail})
    assert event == place | {"event": "exploit", "values": values} | more


def test_costs_that_are_not_known_are_left_out(make: SimpleNamespace) -> None:
    assert closing_metrics(make.summary("t1")) == {}
    spent = make.summary("t1", elapsed_seconds=4.0, num_tokens=8)
    assert closing_metrics(spent) == {"system/elapsed_seconds": 4.0, "system/tokens_per_second": 2.0}


def test_an_edited_list_of_artifacts_means_that_all_are_sent(
    member: SweepFolder, uri: str, database: Path, make: SimpleNamespace
) -> None:
    assert Projector(member, uri, "exp").sync().error == ""
    client = server.open_client(uri)
    for text in ("{", "[]"):
        client.set_tag(make.active_runs(database)[""]["run_id"], "landscape_ray.artifacts", text)
        assert Projector(member, uri, "exp").sync().error == ""
        again = json.loads(make.active_runs(database)[""]["landscape_ray.artifacts"])
        assert set(again) == {"spec.toml", "environment.json"}
    client.set_tag(make.active_runs(database)["t1"]["run_id"], "landscape_ray.events", "[{")
    assert Projector(member, uri, "exp").sync().error == ""
