"""Sweeps, MLflow experiments and foreign files to the same columns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from landscape_ray.errors import UserError
from landscape_ray.tracking.collect import collect, collect_csv, collect_mlflow, columns_by_run, run_columns
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import ARROW_SCHEMA
from landscape_ray.tracking.projector import Projector

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def test_collect_gives_every_committed_row_and_summary(folder: SweepFolder, make: SimpleNamespace) -> None:
    make.write(folder.trial("t1"), 1, 30)
    make.write(folder.trial("t2"), 1, 12, status="diverged")
    folder.trial("t3").path.mkdir(parents=True)  # begun, nothing committed
    got = collect(str(folder.path))
    assert got.records.schema.equals(ARROW_SCHEMA, check_metadata=True)
    assert [(run.run_id, run.status, run.step) for run in got.runs] == [("t1", "running", 30), ("t2", "diverged", 12)]
    assert len(got.records) == len(make.rows(1, 30)) + len(make.rows(1, 12))
    assert got.warnings == []


def test_an_empty_sweep_is_an_empty_table(folder: SweepFolder) -> None:
    got = collect(folder)
    assert (len(got.records), got.runs, got.warnings) == (0, [], [])
    assert run_columns(got.records, "t1", "step")["lr"].shape == (0,)


def test_collect_names_what_is_damaged_and_keeps_the_rest(folder: SweepFolder, make: SimpleNamespace) -> None:
    for trial_id in ("t1", "t2", "t3"):
        make.write(folder.trial(trial_id), 1, 30, part_rows=10)
    whole = collect(folder).records
    broken = folder.trial("t1").part_path(1)
    broken.write_bytes(broken.read_bytes()[:-20])
    folder.trial("t2").part_path(2).unlink()
    folder.trial("t3").commit_path.write_text("{")
    got = collect(folder)
    assert [run.run_id for run in got.runs] == ["t1", "t2"]
    assert len(got.warnings) == 3
    assert "t1/records/part-000001.parquet is damaged" in got.warnings[0]
    assert "t2/records/part-000002.parquet: no such file" in got.warnings[1]
    assert "t3/trial.json is damaged" in got.warnings[2]
    lost = 10 + 10 + len(make.rows(1, 30))
    assert len(got.records) == len(whole) - lost


def test_collect_needs_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a sweep folder"):
        collect(tmp_path)


def test_run_columns_are_arrays_with_nan_where_nothing_is(folder: SweepFolder, make: SimpleNamespace) -> None:
    make.write(folder.trial("t1"), 1, 20)
    make.write(folder.trial("t2"), 1, 5)
    columns = run_columns(collect(folder).records, "t1", "step")
    np.testing.assert_array_equal(columns["step"], np.arange(1, 21))
    np.testing.assert_array_equal(columns["lr"], 1e-3 / np.arange(1, 21))
    assert columns["step"].dtype == np.int64
    assert np.isnan(columns["grad_norm"][6])
    assert np.isnan(columns["num_matvecs"]).all()
    probes = run_columns(collect(folder).records, "t1", "probe")
    assert probes["probe"].tolist() == ["sharpness", "sharpness"]
    assert probes["num_matvecs"].dtype == np.int64


# ---- MLflow


@pytest.mark.parametrize("route", ["auto", "parquet", "bulk", "history"])
def test_collect_mlflow_agrees_with_the_parts(folder: SweepFolder, uri: str, make: SimpleNamespace, route: Any) -> None:
    make.write(folder.trial("t1"), 1, 40, status="finished", final_loss_nats=2.5, best_loss_nats=math.nan)
    make.write(folder.trial("t2"), 1, 25, status="diverged", message="loss was inf at step 26")
    assert Projector(folder, uri, "exp").sync().error == ""
    ours, theirs = collect(folder), collect_mlflow(uri, "exp", route=route)
    assert theirs.warnings == []
    if route in ("auto", "parquet"):
        assert make.same_rows(theirs.records, ours.records), "the folder itself"
    assert theirs.records.schema.equals(ARROW_SCHEMA)
    for mine, other in zip(ours.runs, theirs.runs, strict=True):
        assert repr(dataclasses.asdict(other)) == repr(dataclasses.asdict(mine))
    for run in ours.runs:
        for kind, names in (
            ("eval", ("step", "loss_nats", "num_tokens", "flops")),
            ("probe", ("step", "probe", "value", "standard_error", "num_tokens", "flops")),
            ("step", ("step", "loss_nats", "lr", "grad_norm", "num_tokens", "flops", "elapsed_seconds")),
        ):
            left = run_columns(ours.records, run.run_id, kind)
            right = run_columns(theirs.records, run.run_id, kind)
            for name in names:
                np.testing.assert_array_equal(right[name], left[name], err_msg=f"{kind} {name}")
            np.testing.assert_allclose(right["time_unix"], left["time_unix"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("route", ["auto", "bulk"])
def test_collect_mlflow_tells_sweeps_apart(results: Path, uri: str, make: SimpleNamespace, route: Any) -> None:
    ids = []
    for name in ("a", "b"):
        sweep = SweepFolder.create(results / name, spec_text="", meta={})
        make.write(sweep.trial("t1"), 1, 5)
        Projector(sweep, uri, "exp").sync()
        ids.append(f"{sweep.meta['sweep_id'][:8]}/t1")
    got = collect_mlflow(uri, "exp", route=route)
    assert [run.run_id for run in got.runs] == sorted(ids)
    assert set(got.records["run_id"].to_pylist()) == set(ids)


def test_collect_mlflow_takes_the_parquet_copy_where_the_folder_is_not(
    folder: SweepFolder, uri: str, make: SimpleNamespace, tmp_path: Path
) -> None:
    """And only while the copy has everything that the runs have."""
    make.write(folder.trial("t1"), 1, 40, status="finished")
    make.write(folder.trial("t2"), 1, 20)
    folder.update_meta(status="finished")
    assert Projector(folder, uri, "exp").close().error == ""
    whole = collect(folder)
    folder.path.rename(tmp_path / "away")
    for route in ("auto", "parquet"):
        got = collect_mlflow(uri, "exp", route=route)
        assert make.same_rows(got.records, whole.records)
        assert repr(got.runs) == repr(whole.runs), "nan is not equal to itself"
    (tmp_path / "away").rename(folder.path)
    make.write(folder.trial("t2"), 21, 30, status="finished")
    assert Projector(folder, uri, "exp").sync().error == ""
    folder.path.rename(tmp_path / "away")
    assert len(collect_mlflow(uri, "exp", route="parquet").records) == 0
    thinner = collect_mlflow(uri, "exp").records
    assert thinner.equals(collect_mlflow(uri, "exp", route="bulk").records)
    assert max(thinner.filter(pc.equal(thinner["run_id"], "t2"))["step"].to_pylist()) == 30


def test_another_sweep_where_the_folder_was_is_not_read(
    results: Path, uri: str, make: SimpleNamespace, tmp_path: Path
) -> None:
    for experiment in ("first", "second"):
        sweep = SweepFolder.create(results / "a", spec_text="", meta={})
        make.write(sweep.trial("t1"), 1, 5)
        Projector(sweep, uri, experiment).sync()
        if experiment == "first":
            sweep.path.rename(tmp_path / "first")
    assert len(collect_mlflow(uri, "first", route="parquet").records) == 0
    assert len(collect_mlflow(uri, "first").records) > 0


def test_an_answer_of_the_server_that_may_be_cut_is_asked_for_in_pieces(
    folder: SweepFolder, uri: str, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bulk interface of a server cuts its answers without saying so, and has no pages."""
    from landscape_ray.tracking import histories, server

    for number in range(1, 5):
        make.write(folder.trial(f"t{number}"), 1, 10 * number)
    Projector(folder, uri, "exp").sync()
    client, sizes = server.open_client(uri), []

    def ask(_: Any, key: str, run_ids: list[str]) -> list[dict[str, Any]]:
        sizes.append(len(run_ids))
        points = [(run_id, p) for run_id in run_ids for p in client.get_metric_history(run_id, key)]
        fields = ("key", "step", "timestamp", "value")
        return [{"run_id": run_id} | {name: getattr(p, name) for name in fields} for run_id, p in points][:60]

    monkeypatch.setattr(histories, "_ask", ask)
    monkeypatch.setattr(histories, "_BULK_RESULTS", 60)
    monkeypatch.setattr(histories, "sqlite_path", lambda _: None)
    bulk = collect_mlflow(uri, "exp", route="bulk").records
    assert bulk.equals(collect_mlflow(uri, "exp", route="history").records)
    assert {1, 2, 4} <= set(sizes)

    def broken(*_: Any) -> Any:
        raise ValueError("a page of HTML")

    monkeypatch.setattr(histories, "_ask", broken)
    assert collect_mlflow(uri, "exp", route="bulk").records.equals(bulk), "a server without it is asked one by one"


def test_the_bulk_answer_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.utils.rest_utils as rest

    from landscape_ray.tracking import histories

    store = SimpleNamespace(get_host_creds=lambda: None)
    client = SimpleNamespace(_tracking_client=SimpleNamespace(store=store))
    monkeypatch.setattr(rest, "http_request", lambda *_, **__: None)
    monkeypatch.setattr(rest, "verify_rest_response", lambda *_: SimpleNamespace(text='{"metrics": 3}'))
    with pytest.raises(ValueError, match="metrics must be a list, got int"):
        histories._ask(client, "x", ["a"])


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    from landscape_ray.tracking.parent import read_records

    pq.write_table(pa.table({"x": [1]}), tmp_path / "records.parquet")
    with pytest.raises(ValueError, match=r"records.parquet must hold the summaries of its runs"):
        read_records(tmp_path / "records.parquet")


def test_collect_mlflow_reads_runs_of_other_programs(uri: str) -> None:
    from landscape_ray.tracking.server import open_client

    client = open_client(uri)
    experiment = client.create_experiment("theirs")
    run_id = client.create_run(experiment).info.run_id
    client.log_param(run_id, "model.depth", "3")
    for step in (10, 20):
        client.log_metric(run_id, "eval/loss_nats", 5.0 / step, timestamp=1000 * step, step=step)
        client.log_metric(run_id, "probe/top_standard_error", 1.0, timestamp=1000 * step, step=step)
    other = client.create_run(experiment).info.run_id
    client.log_metric(other, "accuracy", 1.0)
    broken = client.create_run(experiment, tags={"landscape_ray.summary": "{"}).info.run_id
    client.log_metric(broken, "eval/loss_nats", 1.0, step=1)
    got = collect_mlflow(uri, "theirs")
    assert {run.run_id for run in got.runs} == {run_id, broken}
    summary = next(run for run in got.runs if run.run_id == run_id)
    assert (summary.status, summary.config, summary.step) == ("finished", {"model": {"depth": 3}}, 20)
    assert (summary.final_loss_nats, summary.best_loss_nats) == (0.25, 0.25)
    # a probe of that very name, not the error of a probe that does not exist
    assert run_columns(got.records, run_id, "probe")["probe"].tolist() == ["top_standard_error"] * 2
    assert got.warnings == [f"run {broken}: its summary is damaged; rebuilt from its rows"]


def test_collect_mlflow_names_the_experiments_there_are(uri: str) -> None:
    with pytest.raises(UserError, match=r"experiment must exist in sqlite.*, got 'nope'; there are: Default"):
        collect_mlflow(uri, "nope")


# ---- foreign files


def _csv(tmp_path: Path, text: str, name: str = "log.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_csv_line_is_a_step_and_an_evaluation(tmp_path: Path) -> None:
    path = _csv(tmp_path, "it,eta,val,tok\n30,,nan,300\n10,0.1,3.5,100\n20,0.2,,200\n")  # not sorted by step
    got = collect_csv(path, {"step": "it", "lr": "eta", "loss_nats": "val", "num_tokens": "tok"})
    keys = ("kind", "step", "lr", "loss_nats", "num_tokens")
    assert [tuple(row[key] for key in keys) for row in got.records.to_pylist()][:3] == [
        ("step", 10, 0.1, None, 100),
        ("eval", 10, None, 3.5, 100),
        ("step", 20, 0.2, None, 200),
    ]
    assert len(got.records) == 4
    assert math.isnan(got.records.to_pylist()[3]["loss_nats"]), "nan is a loss that diverged, not a missing one"
    assert got.records.schema.equals(ARROW_SCHEMA)
    (run,) = got.runs
    assert (run.run_id, run.step, run.num_tokens, run.best_loss_nats) == ("log", 30, 300, 3.5)
    assert math.isnan(run.final_loss_nats)


def test_runs_and_their_sizes(tmp_path: Path) -> None:
    path = _csv(tmp_path, "run,step,loss_nats,N\n1,1,3.0,10\n1,2,2.0,10\n2,1,4.0,20\n")
    got = collect_csv(path, {"run_id": "run", "step": "step", "loss_nats": "loss_nats", "num_params": "N"})
    assert [(r.run_id, r.num_params, r.final_loss_nats) for r in got.runs] == [("1", 10, 2.0), ("2", 20, 4.0)]
    assert set(got.records["kind"].to_pylist()) == {"eval"}


def test_columns_under_our_names_need_no_map_and_kinds_are_taken(tmp_path: Path) -> None:
    path = _csv(tmp_path, "kind,step,loss_nats,probe,value,other\nstep,1,3.0,,,x\nprobe,1,,sharpness,7.5,x\n")
    got = collect_csv(path)
    assert [row["kind"] for row in got.records.to_pylist()] == ["step", "probe"]
    assert run_columns(got.records, "log", "probe")["value"].tolist() == [7.5]


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    pq.write_table(pa.table({"step": [1, 2], "lr": [0.1, 0.2]}), tmp_path / "x.parquet")
    got = collect_csv(tmp_path / "x.parquet")
    assert run_columns(got.records, "x", "step")["lr"].tolist() == [0.1, 0.2]
    assert math.isnan(got.runs[0].final_loss_nats)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"step": "it", "loss": "val"}, "unknown column 'loss'; .*loss_nats"),
        ({"step": "it", "loss_nats": "value"}, "no column 'value' .*did you mean 'val'. valid: it, tag, val"),
        ({"step": "it"}, "must map 'step' and one of 'lr' and 'loss_nats', got .*has: it, tag, val"),
        (None, "must map 'step'"),
        ({"step": "it", "loss_nats": "tag"}, "loss_nats must be double, got column 'tag' of string"),
        ({"step": "val", "loss_nats": "val"}, "step must be int64, got column 'val'"),
        ({"step": "it", "loss_nats": "val", "kind": "tag"}, "kind must be one of .*, got 'a'"),
        ({"step": "it", "loss_nats": "val", "num_steps": "it"}, r"num_steps must be one number a run, got \[1, 2\]"),
    ],
)
def test_a_map_that_does_not_fit(tmp_path: Path, columns: dict[str, str] | None, message: str) -> None:
    path = _csv(tmp_path, "it,val,tag\n1,3.5,a\n2,3.25,b\n")
    with pytest.raises(UserError, match=message):
        collect_csv(path, columns)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        collect_csv(tmp_path / "none.csv", {})
    with pytest.raises(UserError, match=r"cannot read .*empty.csv as a table"):
        collect_csv(_csv(tmp_path, "", "empty.csv"), {})
    with pytest.raises(UserError, match=r"cannot read .*x.parquet as a table"):
        collect_csv(_csv(tmp_path, "no", "x.parquet"), {})
    with pytest.raises(UserError, match="step must have a value in every line, got 1 empty"):
        collect_csv(_csv(tmp_path, "step,lr\n,0.1\n2,0.2\n"))
    with pytest.raises(UserError, match="run_id must have a value in every line, got 1 empty"):
        collect_csv(_csv(tmp_path, "run_id,step,lr\nNA,1,0.1\na,2,0.2\n"))


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="published data not at hand")
def test_published_curves_come_in_whole() -> None:
    path = DATA / "multi_power_law" / "25M" / "cosine_24000.csv"
    raw = np.genfromtxt(path, delimiter=",", names=True)
    got = collect_csv(path, {"step": "step", "lr": "lr", "loss_nats": "loss"})
    steps, evals = (run_columns(got.records, "cosine_24000", kind) for kind in ("step", "eval"))
    np.testing.assert_array_equal(steps["lr"], raw["lr"])
    np.testing.assert_array_equal(evals["loss_nats"], raw["loss"])
    np.testing.assert_array_equal(evals["step"], raw["step"])


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="published data not at hand")
def test_published_runs_in_one_compressed_file() -> None:
    got = collect_csv(
        DATA / "cooldown_runs" / "curves.csv.gz",
        {"run_id": "run_id", "step": "iter", "loss_nats": "loss", "lr": "lr", "grad_norm": "grad_norm"},
    )
    assert len(got.runs) > 10
    for run in got.runs:
        evals = run_columns(got.records, run.run_id, "eval")
        assert (np.diff(evals["step"]) >= 0).all()
        assert run.final_loss_nats == evals["loss_nats"][-1]
        assert 2.0 < run.best_loss_nats <= run.final_loss_nats < 10.0
    assert got.records["loss_nats"].null_count == pc.sum(pc.equal(got.records["kind"], "step")).as_py()


def test_foreign_parameters_that_do_not_nest_are_kept_as_they_are() -> None:
    from landscape_ray.tracking.from_mlflow import _config

    def run(params: dict[str, str]) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=params))

    assert _config(run({"model.depth": "4", "seed": "0"})) == {"model": {"depth": 4}, "seed": 0}
    assert _config(run({"model": "gpt", "model.depth": "4"})) == {"model": "gpt", "model.depth": 4}


@pytest.mark.parametrize("shuffled", [False, True])
def test_one_pass_gives_what_a_filter_for_each_run_gives(search_folder, shuffled):
    collected = collect(search_folder.path)
    table = collected.records
    if shuffled:
        table = table.take(np.random.default_rng(0).permutation(len(table)))
    for kind in ("step", "eval", "probe", "event"):
        by_run = columns_by_run(table, kind)
        for run in collected.runs[::3]:  # a filter of the whole table for each is what one pass spares
            expected = run_columns(table, run.run_id, kind)
            if run.run_id not in by_run:
                assert len(expected["step"]) == 0
                continue
            for name, values in expected.items():
                found = by_run[run.run_id][name]
                assert found.dtype == values.dtype
                np.testing.assert_array_equal(found, values)


def test_what_is_missing_everywhere_takes_no_memory(search_folder):
    """Of the columns of a table most are empty for one kind of row; and names of runs are shared, not copied."""
    table = collect(search_folder.path).records
    rows = next(iter(columns_by_run(table, "eval").values()))
    assert np.isnan(rows["lr"]).all()
    assert rows["lr"].strides == (0,)
    assert rows["loss_nats"].strides == (8,)
    assert rows["run_id"][0] is rows["run_id"][-1]


def test_empty_columns_of_all_parts_share_one_memory(folder: SweepFolder, make: SimpleNamespace) -> None:
    make.write(folder.trial("t1"), 1, 30)
    make.write(folder.trial("t2"), 1, 12)
    records = collect(folder.path).records
    empty = [name for name in records.column_names if records[name].null_count == len(records)]
    assert empty
    for name in empty:
        addresses = {chunk.buffers()[-1].address for chunk in records[name].chunks if len(chunk)}
        assert len(addresses) == 1, name
