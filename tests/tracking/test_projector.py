"""The projection: whatever fails and whenever, every committed point is on the server once, and no run twice."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from landscape_ray.tracking import server
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter, to_table
from landscape_ray.tracking.points import (
    MAX_TRAIN_POINTS,
    charted_rows,
    mlflow_status,
    summary_text,
    to_points,
    train_stride,
)
from landscape_ray.tracking.projector import Projector

Faults = Callable[..., SimpleNamespace]


@pytest.fixture
def database(results: Path) -> Path:
    return results / "mlflow.db"


def _holds(database: Path, make: SimpleNamespace, last_steps: dict[str, int]) -> None:
    """Assert that the store holds exactly the points of these steps, and one run for each trial and the sweep."""
    assert make.stored_points(database) == make.expected_points(last_steps)
    assert set(make.active_runs(database)) == {"", *last_steps}


# ---- conservation


@pytest.mark.acceptance
def test_every_point_once_however_often_it_is_sent(
    folder: SweepFolder, uri: str, database: Path, results: Path, make: SimpleNamespace
) -> None:
    make.write(folder.trial("t1"), 1, 30)
    make.write(folder.trial("t2"), 1, 12)
    projector = Projector(folder, uri, "exp")
    first = projector.sync()
    assert (first.error, first.behind) == ("", 0)
    assert first.points == sum(make.expected_points({"t1": 30, "t2": 12}).values())
    _holds(database, make, {"t1": 30, "t2": 12})
    assert projector.sync().points == 0, "nothing is sent twice in one life"
    make.write(folder.trial("t1"), 31, 47)
    assert projector.sync().points > 0
    _holds(database, make, {"t1": 47, "t2": 12})
    assert Projector(folder, uri, "exp").sync().points == 0, "nor in the next one: the runs say how far they are"
    copy = results / "elsewhere" / "quick"
    shutil.copytree(folder.path, copy)
    assert Projector(SweepFolder.open(copy), uri, "exp").sync().points == 0, "nor from another machine"
    client = server.open_client(uri)
    for run in make.active_runs(database).values():
        client.set_tag(run["run_id"], "landscape_ray.num_parts", "0")
    again = Projector(folder, uri, "exp").sync()
    assert again.points == sum(make.expected_points({"t1": 47, "t2": 12}).values())
    _holds(database, make, {"t1": 47, "t2": 12})


@pytest.mark.acceptance
@pytest.mark.parametrize("together", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_at_any_call_then_resumed_nothing_is_lost_or_doubled(
    results: Path,
    store_template: Path,
    make: SimpleNamespace,
    faults: Faults,
    killed: type[BaseException],
    one_by_one: Callable[[], None],
    together: bool,
) -> None:
    if not together:
        one_by_one()
    calls = 1
    case = 0
    while case < 2 * calls:
        results_here = results / f"case{case}"
        results_here.mkdir()
        database = results_here / "mlflow.db"
        shutil.copy(store_template, database)
        uri = f"sqlite:///{database}"
        folder = SweepFolder.create(results_here / "quick", spec_text=make.spec, meta={})
        make.write(folder.trial("t1"), 1, 10, status="finished")
        make.write(folder.trial("t2"), 1, 5)
        if case == 0:
            counted = faults()
            Projector(folder, uri, "exp").close()
            calls = len(counted.calls)
            assert calls >= (6 if together else 10)
        else:
            faults(case // 2, "before" if case % 2 else "after")
            with pytest.raises(killed):
                Projector(folder, uri, "exp").close()
            faults()
            make.write(folder.trial("t2"), 6, 7)
            assert Projector(folder, uri, "exp").close().error == ""
            _holds(database, make, {"t1": 10, "t2": 7})
            assert make.active_runs(database)["t1"]["status"] == "FINISHED"
        case += 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("fail_at", "together"), [(n, False) for n in range(8)] + [(n, True) for n in range(5)])
def test_a_request_that_fails_is_sent_again_by_the_same_projector(
    folder: SweepFolder,
    uri: str,
    database: Path,
    make: SimpleNamespace,
    faults: Faults,
    one_by_one: Callable[[], None],
    fail_at: int,
    together: bool,
    when: str,
) -> None:
    if not together:
        one_by_one()
    make.write(folder.trial("t1"), 1, 10)
    make.write(folder.trial("t2"), 1, 5)
    faults(fail_at, when, MlflowException("no route to https://ada:s3cret@host/api"))
    projector = Projector(folder, uri, "exp")
    broken = projector.sync()
    assert broken.error == "no route to https://***@host/api"
    healed = projector.sync()
    assert (healed.error, healed.behind) == ("", 0)
    _holds(database, make, {"t1": 10, "t2": 5})


def test_discarded_and_rewritten_parts_leave_no_trace(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace
) -> None:
    trial = folder.trial("t1")
    make.write(trial, 1, 10)
    projector = Projector(folder, uri, "exp")
    projector.sync()
    committed = trial.num_parts()
    stray = PartWriter(trial, committed)  # written, never committed: the worker died
    for record in make.rows(11, 15, base=1.8e9):
        stray.append(record)
    stray.flush()
    projector.sync()
    _holds(database, make, {"t1": 10})
    make.write(trial, 11, 20)
    projector.sync()
    _holds(database, make, {"t1": 20})


@pytest.mark.parametrize("same_projector", [True, False])
def test_committed_rows_that_are_given_up_start_the_run_afresh(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace, same_projector: bool
) -> None:
    trial = folder.trial("t1")
    make.write(trial, 1, 10, part_rows=5)
    projector = Projector(folder, uri, "exp")
    projector.sync()
    before = make.active_runs(database)["t1"]["run_id"]
    writer = PartWriter(trial, 0)  # the checkpoint was lost: all work is done again, at another time
    for record in make.rows(1, 8, seed=1):
        writer.append(record)
    trial.commit(make.summary("t1", step=8), writer.flush())
    report = (projector if same_projector else Projector(folder, uri, "exp")).sync()
    assert report.error == ""
    assert make.active_runs(database)["t1"]["run_id"] != before
    _holds(database, make, {"t1": 8})


@pytest.mark.parametrize("same_projector", [True, False])
def test_doubles_on_the_server_are_removed(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace, same_projector: bool
) -> None:
    make.write(folder.trial("t1"), 1, 10)
    projector = Projector(folder, uri, "exp")
    projector.sync()
    client = server.open_client(uri)
    for run in (*make.active_runs(database).values(),):  # as a creation whose answer came too late leaves them
        tags = client.get_run(run["run_id"]).data.tags
        client.create_run("1", tags={**tags, "mlflow.parentRunId": "gone"})
    report = (projector if same_projector else Projector(folder, uri, "exp")).close()
    assert report.error == ""
    _holds(database, make, {"t1": 10})
    runs = make.active_runs(database)
    assert runs["t1"]["mlflow.parentRunId"] == runs[""]["run_id"]


@pytest.mark.parametrize("which", ["t1", ""])
def test_a_run_deleted_by_hand_comes_back_whole(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace, which: str
) -> None:
    make.write(folder.trial("t1"), 1, 10)
    make.write(folder.trial("t2"), 1, 10)
    projector = Projector(folder, uri, "exp")
    projector.sync()
    server.open_client(uri).delete_run(make.active_runs(database)[which]["run_id"])
    make.write(folder.trial("t1"), 11, 20)
    make.write(folder.trial("t2"), 11, 20)
    folder.update_meta(status="finished")
    for _ in range(2):
        report = projector.sync()
    assert report.error == ""
    _holds(database, make, {"t1": 20, "t2": 20})
    runs = make.active_runs(database)
    assert {runs[name]["mlflow.parentRunId"] for name in ("t1", "t2")} == {runs[""]["run_id"]}


def test_a_damaged_part_is_reported_and_stops_nothing(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace
) -> None:
    make.write(folder.trial("t1"), 1, 10, part_rows=5)
    make.write(folder.trial("t2"), 1, 10)
    broken = folder.trial("t1").part_path(1)
    broken.write_bytes(broken.read_bytes()[:-9])
    missing = folder.trial("t3")
    make.write(missing, 1, 10)
    missing.part_path(0).unlink()
    make.write(folder.trial("t4"), 1, 10)
    folder.trial("t4").commit_path.write_text("{")
    report = Projector(folder, uri, "exp").sync()
    assert "part-000001.parquet is damaged" in report.error
    assert "(and 2 more)" in report.error
    stored = make.stored_points(database)
    assert {point[0] for point in stored} == {"t1", "t2"}
    assert stored <= make.expected_points({"t1": 10, "t2": 10})
    assert max(step for trial, _, _, step, _ in stored if trial == "t1") == 10


# ---- cost


def test_a_request_waits_for_ten_commits_but_not_for_ever(
    folder: SweepFolder, uri: str, make: SimpleNamespace, faults: Faults
) -> None:
    """A trial that commits rarely shares a request between its commits as well, a tenth of its age late at most."""
    make.write(folder.trial("t1"), 1, 5)
    state = faults()
    projector = Projector(folder, uri, "exp", batch_seconds=60.0)
    projector._sync(closing=False, patient=True)
    state.calls.clear()
    assert projector._runs is not None
    run = projector._runs.trials["t1"]
    run.found_at -= 10_000.0
    for step in (6, 7, 8):
        make.write(folder.trial("t1"), step, step)
    run.sent_at -= 400.0
    assert projector._sync(closing=False, patient=True).behind == 3
    run.sent_at -= 190.0
    assert projector._sync(closing=False, patient=True).behind == 3, "ten pauses, as it is old"
    run.sent_at -= 20.0
    assert projector._sync(closing=False, patient=True).behind == 0
    assert state.calls == ["write_runs"]


def test_what_the_sweeps_own_run_is_made_of_is_read_again_only_when_a_file_changed(
    folder: SweepFolder, uri: str, make: SimpleNamespace, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from landscape_ray.tracking import parent

    read: list[SweepFolder] = []
    original = parent.spec_params
    monkeypatch.setattr(parent, "spec_params", lambda sweep: read.append(sweep) or original(sweep))
    projector = Projector(folder, uri, "exp")
    for _ in range(3):
        assert projector.sync().error == ""
    assert len(read) == 1
    projector.set_parent({"best": 1.0}, {}, "")
    assert projector.sync().error == ""
    assert len(read) == 2
    folder.report_path.write_text("<html>")
    assert projector.sync().error == ""
    assert len(read) == 3
    assert "report.html" in make.active_runs(database)[""]["landscape_ray.artifacts"]


def test_a_request_is_what_mlflow_itself_would_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is written directly, as MLflow's own way to it takes most of the time; it must say the same."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.store.tracking.rest_store import RestStore

    sent: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        RestStore, "_call_endpoint", lambda self, api, body: sent.append((api.__name__, json.loads(body)))
    )
    points = [Metric("train/loss_nats", 0.1 + 0.2, 1_700_000_000_123, 7), Metric("ä b", -1e-300, 0, 0)]
    content = (points, [Param("lr", '"1"')], [RunTag("landscape_ray.num_parts", "12")])
    server.open_client("http://127.0.0.1:9").log_batch("run", *content)
    MlflowClient("http://127.0.0.1:9").log_batch("run", *content)
    ours, theirs = sent
    assert ours == theirs
    with pytest.raises(ValueError, match="not JSON compliant"):
        server.open_client("http://127.0.0.1:9").log_batch("run", [Metric("x", math.nan, 0, 0)])


# ---- shape


def test_parent_and_children(folder: SweepFolder, uri: str, results: Path, make: SimpleNamespace) -> None:
    make.write(folder.trial("t1"), 1, 10)
    projector = Projector(folder, uri, "my experiment")
    projector.set_parent({"num_trials": 1.0, "best": math.nan}, {"landscape_ray.searcher": "tpe"}, "# Sweep")
    figure = results / "figure.png"
    figure.write_bytes(b"png")
    projector.log_artifacts([figure])
    assert projector.sync().error == ""
    client = server.open_client(uri)
    runs = make.active_runs(results / "mlflow.db")
    parent, child = client.get_run(runs[""]["run_id"]), client.get_run(runs["t1"]["run_id"])
    assert client.get_experiment(parent.info.experiment_id).name == "my experiment"
    assert parent.info.run_name == "quick"
    assert parent.data.params == {
        "name": "quick",
        "train.model.name": "gpt",
        "train.model.depth": "2",
        "search.lr.low": "0.0001",
        "search.lr.high": "0.1",
    }
    assert parent.data.metrics == {"num_trials": 1.0}
    assert parent.data.tags["landscape_ray.searcher"] == "tpe"
    assert parent.data.tags["landscape_ray.sweep_id"] == folder.meta["sweep_id"]
    assert parent.data.tags["mlflow.note.content"] == "# Sweep"
    assert child.info.run_name == "t1 lr=0.01 wsd"
    assert child.data.params == {
        "model.name": "gpt",
        "model.depth": "2",
        "model.tied": "true",
        "lr": "0.01",
        "betas": "[0.9, 0.95]",
        "note": '"1"',
    }
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["landscape_ray.sweep_id"] == folder.meta["sweep_id"]
    assert child.info.start_time == round(1.7e9 * 1000)
    places = {path.name for path in (results / "mlartifacts" / parent.info.run_id / "artifacts").iterdir()}
    assert places == {"spec.toml", "environment.json", "figure.png"}


def test_nothing_is_written_outside_the_results(
    folder: SweepFolder, uri: str, make: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    environment, address = dict(os.environ), mlflow.get_tracking_uri()
    make.write(folder.trial("t1"), 1, 3)
    assert Projector(folder, None, "exp").close().error == ""
    assert list(elsewhere.iterdir()) == []
    assert dict(os.environ) == environment
    assert mlflow.get_tracking_uri() == address
    default = folder.path.parent / "mlflow.db"
    assert len(make.stored_points(default)) > 0, "no address given: the store beside the sweeps"


@pytest.mark.parametrize(
    ("status", "open_word", "closed_word"),
    [
        ("pending", "RUNNING", "KILLED"),
        ("running", "RUNNING", "KILLED"),
        ("finished", "FINISHED", "FINISHED"),
        ("stopped", "FINISHED", "FINISHED"),
        ("diverged", "FINISHED", "FINISHED"),
        ("failed", "FAILED", "FAILED"),
    ],
)
def test_status_words(status: str, open_word: str, closed_word: str) -> None:
    assert (mlflow_status(status, False), mlflow_status(status, True)) == (open_word, closed_word)


def test_statuses_through_close_and_resume(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace
) -> None:
    def statuses() -> dict[str, str]:
        return {name: run["status"] for name, run in make.active_runs(database).items()}

    make.write(folder.trial("t1"), 1, 5, status="diverged")
    make.write(folder.trial("t2"), 1, 5)
    folder.trial("t3").set_status("failed", "it died")
    projector = Projector(folder, uri, "exp")
    projector.sync()
    assert statuses() == {"": "RUNNING", "t1": "FINISHED", "t2": "RUNNING", "t3": "FAILED"}
    folder.update_meta(status="interrupted")
    projector.close()
    assert statuses() == {"": "KILLED", "t1": "FINISHED", "t2": "KILLED", "t3": "FAILED"}
    runs = make.active_runs(database)
    assert runs["t1"]["landscape_ray.status"] == "diverged"
    assert json.loads(runs["t3"]["landscape_ray.summary"])["message"] == "it died"
    end = make.query(database, f"SELECT end_time FROM runs WHERE run_uuid = '{runs['t1']['run_id']}'")
    assert end == [(round((1.7e9 + 0.25 * 5) * 1000),)], "a run ends with its last row"
    folder.update_meta(status="running")
    resumed = Projector(folder, uri, "exp")
    resumed.sync()
    assert statuses() == {"": "RUNNING", "t1": "FINISHED", "t2": "RUNNING", "t3": "FAILED"}
    make.write(folder.trial("t2"), 6, 8, status="finished")
    folder.update_meta(status="finished")
    resumed.close()
    assert statuses() == {"": "FINISHED", "t1": "FINISHED", "t2": "FINISHED", "t3": "FAILED"}


def test_a_trial_that_failed_and_goes_on_is_one_run(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace
) -> None:
    """A member of a population that was replaced: while it waits its run has failed, then it runs again."""

    def seen() -> tuple[str, int]:
        (run,) = (run for name, run in make.active_runs(database).items() if name)
        key = f"run_uuid = '{run['run_id']}' AND key = 'train/loss_nats'"
        return run["status"], make.query(database, f"SELECT COUNT(*) FROM metrics WHERE {key}")[0][0]

    trial = folder.trial("t1")
    make.write(trial, 1, 5)
    projector = Projector(folder, uri, "exp")
    projector.sync()
    status, count = seen()
    assert (status, count > 0) == ("RUNNING", True)
    trial.set_status("failed", "RuntimeError: a faulty batch")
    projector.sync()
    assert seen() == ("FAILED", count)
    make.write(trial, 6, 10)
    projector.sync()
    assert seen() == ("RUNNING", 2 * count)
    make.write(trial, 11, 15, status="finished")
    projector.close()
    assert seen() == ("FINISHED", 3 * count)


def test_two_sweeps_of_one_name_stay_apart(results: Path, uri: str, database: Path, make: SimpleNamespace) -> None:
    sweeps = [SweepFolder.create(results / place / "quick", spec_text="", meta={}) for place in ("a", "b")]
    for sweep in sweeps:
        make.write(sweep.trial("t1"), 1, 5)
        assert Projector(sweep, uri, "exp").sync().error == ""
    tagged = make.query(database, "SELECT value, COUNT(*) FROM tags WHERE key = 'landscape_ray.sweep_id' GROUP BY 1")
    assert dict(tagged) == {sweep.meta["sweep_id"]: 2 for sweep in sweeps}


def test_a_deleted_experiment_is_named(folder: SweepFolder, uri: str) -> None:
    client = server.open_client(uri)
    client.delete_experiment(client.create_experiment("exp"))
    assert "experiment 'exp' is deleted in MLflow; restore it" in Projector(folder, uri, "exp").sync().error


def test_an_experiment_made_by_another_sweep_meanwhile(
    folder: SweepFolder, uri: str, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.open_client(uri)
    wanted = client.create_experiment("exp")
    answers = [None, client.get_experiment_by_name("exp")]
    monkeypatch.setattr(client, "get_experiment_by_name", lambda _: answers.pop(0))
    assert server.experiment_id(client, uri, "exp", folder.path.parent) == wanted


def test_many_large_parameters_and_a_long_message(
    folder: SweepFolder, uri: str, make: SimpleNamespace, database: Path
) -> None:
    config = {f"p{k:03d}": "ä" * 5999 for k in range(250)} | {"long": "x" * 7000, "bad*key": 1}
    trial = folder.trial("t1")
    trial.commit(make.summary("t1", config=config, message="m" * 9000), 0)
    projector = Projector(folder, uri, "exp")
    assert projector.sync().error == ""
    run = server.open_client(uri).get_run(make.active_runs(database)["t1"]["run_id"])
    assert run.data.params["p249"] == "ä" * 5999
    assert run.data.params["long"] == "x" * 5999 + "…"
    assert run.data.params["bad_key"] == "1"
    assert len(json.loads(run.data.tags["landscape_ray.summary"])["message"]) == 500
    for batch in server.param_batches(server.to_params(config)):
        assert len(batch) <= 100
        assert len(json.dumps([(param.key, param.value) for param in batch])) < 1_000_000


def test_a_summary_too_large_for_a_tag_loses_what_it_can_spare(make: SimpleNamespace) -> None:
    text = summary_text(make.summary("t1", varied={"x": "y" * 9000}))
    assert len(text) <= server.MAX_TAG_CHARACTERS
    assert json.loads(text)["varied"] == {}
    assert "config" not in json.loads(text)


@pytest.mark.parametrize(
    "value", ["wsd", "", "1", "null", "[1]", "true", "NaN", 0.1, 1e-300, 3, True, None, [1, "a"], "é"]
)
def test_parameter_text_comes_back_as_the_value(value: Any) -> None:
    back = server.decode_value(server.encode_value(value))
    assert (type(back), back) == (type(value), value)


# ---- thinning


def _points(table: Any, num_steps: int) -> list[Any]:
    return [point for rows in charted_rows(table, num_steps) for point in to_points(rows, num_steps)]


def test_thinning_keeps_evaluations_probes_and_few_steps(make: SimpleNamespace) -> None:
    for num_steps in (0, 100, 500, 501, 3000):
        last = num_steps or 700
        points = _points(to_table("t1", make.rows(1, last)), num_steps)
        charted = [point.step for point in points if point.key == "train/lr"]
        assert [point.step for point in points if point.key == "eval/loss_nats"] == list(range(5, last + 1, 5))
        assert [point.step for point in points if point.key == "probe/sharpness"] == list(range(10, last + 1, 10))
        stride = train_stride(num_steps)
        assert charted == [step for step in range(1, last + 1) if step % stride == 0 or step in (1, num_steps)]
        assert len(charted) <= (MAX_TRAIN_POINTS + 2 if num_steps else last)


def test_thinning_does_not_depend_on_how_rows_fall_into_parts(make: SimpleNamespace) -> None:
    rows = make.rows(1, 1500)
    whole = _points(to_table("t1", rows), 1500)
    cuts = np.sort(np.random.default_rng(0).choice(len(rows), 40, replace=False)).tolist()
    pieces = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    assert [p for piece in pieces if piece for p in _points(to_table("t1", piece), 1500)] == whole


def test_more_points_than_one_request_may_carry(
    folder: SweepFolder,
    uri: str,
    database: Path,
    make: SimpleNamespace,
    faults: Faults,
    one_by_one: Callable[[], None],
) -> None:
    one_by_one()
    make.write(folder.trial("t1"), 1, 450, part_rows=100, num_steps=450)
    state = faults()
    assert Projector(folder, uri, "exp").sync().error == ""
    assert state.calls.count("log_batch") == 6, "two for the sweep, four for 2,800 points, parameters and tags"
    _holds(database, make, {"t1": 450})


# ---- the thread


def test_the_thread_follows_a_running_sweep(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace
) -> None:
    projector = Projector(folder, uri, "exp", interval_seconds=0.05)
    projector.start()
    make.write(folder.trial("t1"), 1, 10)
    patience = time.monotonic() + 30
    while not make.stored_points(database) and time.monotonic() < patience:
        time.sleep(0.02)
    make.write(folder.trial("t1"), 11, 20)
    report = projector.close()
    assert (report.error, report.behind) == ("", 0)
    assert report == projector.report
    assert report.total == sum(make.expected_points({"t1": 20}).values())
    _holds(database, make, {"t1": 20})
    assert not [thread for thread in threading.enumerate() if thread.name == "landscape_ray-projector"]


def test_the_thread_survives_any_error_and_waits_longer_each_time(
    folder: SweepFolder, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []

    def broken(_: str) -> Any:
        times.append(time.monotonic())
        raise RuntimeError("broken\nsecond line")

    monkeypatch.setattr(server, "open_client", broken)
    projector = Projector(folder, uri, "exp", interval_seconds=0.02)
    projector.start()
    patience = time.monotonic() + 30
    while len(times) < 5 and time.monotonic() < patience:
        time.sleep(0.01)
    assert projector.close().error == "broken"
    gaps = np.diff(times[:5])
    assert (gaps >= 0.02 * 2.0 ** np.arange(1, 5)).all()


def test_close_gives_up_in_time_and_says_how_much_is_left(
    folder: SweepFolder, uri: str, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 6):
        make.write(folder.trial(f"t{number}"), 1, 10, part_rows=5)
    original = server.to_params

    def slow(config: Any) -> Any:
        time.sleep(0.3)
        return original(config)

    monkeypatch.setattr(server, "to_params", slow)
    projector = Projector(folder, uri, "exp")
    begun = time.monotonic()
    report = projector.close(timeout_seconds=0.5)
    assert time.monotonic() - begun < 5
    assert "not everything was sent before the time was up; `landscape-ray sync`" in report.error
    assert 0 < report.behind < 20
    monkeypatch.undo()
    healed = projector.close()
    assert (healed.error, healed.behind) == ("", 0)


def test_closing_interrupts_a_thread_that_has_much_to_send(
    folder: SweepFolder, uri: str, database: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 4):
        make.write(folder.trial(f"t{number}"), 1, 5)
    begun = threading.Event()
    original = server.to_params

    def slow(config: Any) -> Any:
        begun.set()
        time.sleep(0.2)
        return original(config)

    monkeypatch.setattr(server, "to_params", slow)
    projector = Projector(folder, uri, "exp")
    projector.start()
    begun.wait(30)
    assert projector.close().error == ""
    _holds(database, make, {"t1": 5, "t2": 5, "t3": 5})


def test_a_store_that_hangs_does_not_hold_the_driver(
    folder: SweepFolder, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from landscape_ray.tracking import projector as module

    monkeypatch.setattr(module, "_REQUEST_SECONDS", 0.2)
    release, begun = threading.Event(), threading.Event()

    def hang(_: str) -> Any:
        begun.set()
        release.wait(30)
        raise RuntimeError("at last")

    monkeypatch.setattr(server, "open_client", hang)
    projector = Projector(folder, uri, "exp")
    projector.start()
    begun.wait(30)
    start = time.monotonic()
    report = projector.close(timeout_seconds=0.3)
    assert time.monotonic() - start < 3
    assert "did not answer in time" in report.error
    release.set()


def test_what_the_server_refuses_for_the_parent_is_dropped_after_a_few_attempts(
    folder: SweepFolder, uri: str, make: SimpleNamespace, database: Path
) -> None:
    make.write(folder.trial("t1"), 1, 5)
    projector = Projector(folder, uri, "exp")
    projector.log_artifacts([folder.path / "missing.png"])
    projector.set_parent({}, {"//": "no such key"})
    for _ in range(3):
        report = projector.sync()
        assert "tags and metrics of the sweep" in report.error
        assert "(and 1 more)" in report.error
    assert projector.sync().error == ""
    _holds(database, make, {"t1": 5})


def test_reports_cannot_be_changed() -> None:
    from landscape_ray.tracking.projector import SyncReport

    with pytest.raises(dataclasses.FrozenInstanceError):
        SyncReport().points = 1  # type: ignore[misc]
