"""Whole sweeps on Ray: everything that was asked for is there, once, in the folder, in the study and in MLflow."""

import io
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.population.book import population_of
from landscape_ray.sweep.session import Outcome, exit_status, new_sweep, outcome_text, reason
from landscape_ray.sweep.spec import SweepSpec, spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.uris import default_tracking_uri

SweepText = Callable[..., str]

pytestmark = pytest.mark.usefixtures("ray_session")


def start(text: str, path: Path, name: str = "sweep") -> SweepFolder:
    return new_sweep(parse(SweepSpec, tomllib.loads(text), "file"), text, path / "runs", name, None)


def drive(folder: SweepFolder) -> tuple[Outcome, str]:
    from landscape_ray.sweep.tuner import drive as drive_sweep

    out = io.StringIO()
    return drive_sweep(folder, Console(file=out, width=200)), out.getvalue()


def check_records(folder: SweepFolder, num_trials: int, num_steps: int) -> None:
    """Every update of every trial is recorded once, in order of its own course."""
    collected = collect(folder.path)
    assert collected.warnings == []
    assert [run.status for run in collected.runs] == ["finished"] * num_trials
    rows = collected.records.to_pylist()
    for run in collected.runs:
        steps = [row["step"] for row in rows if row["run_id"] == run.run_id and row["kind"] == "step"]
        copied = any(row["event"] == "exploit" for row in rows if row["run_id"] == run.run_id)
        if copied:  # a donor may have been at another step: updates are skipped or made again
            assert steps[-1] == num_steps
            assert all(a != b for a, b in pairwise(steps))
        else:
            assert steps == list(range(1, num_steps + 1))


def check_mlflow(folder: SweepFolder, num_trials: int) -> None:
    """One parent, one child a trial, and every evaluation and probe of the folder exactly once."""
    client = MlflowClient(default_tracking_uri(folder.path.parent))
    experiment = client.get_experiment_by_name(folder.meta["experiment"])
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId")]
    parents = [run for run in runs if run not in children]
    assert len(parents) == 1
    assert Counter(run.data.tags["landscape_ray.trial_id"] for run in children) == Counter(
        [trial.trial_id for trial in folder.trials()]
    )
    assert len(children) == num_trials
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    rows = collect(folder.path).records.to_pylist()
    for run in children:
        trial_id = run.data.tags["landscape_ray.trial_id"]
        for key, kind, column in (("eval/loss_nats", "eval", "loss_nats"), ("probe/sharpness", "probe", "value")):
            history = client.get_metric_history(run.info.run_id, key)
            expected = [(r["step"], r[column]) for r in rows if r["run_id"] == trial_id and r["kind"] == kind]
            assert sorted((m.step, m.value) for m in history) == sorted(expected)


def study_of(folder: SweepFolder) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder.study_path)))
    return optuna.load_study(study_name=None, storage=storage)


@pytest.mark.acceptance
def test_a_search_runs_tracks_and_ends(sweep_text: SweepText, tmp_path: Path) -> None:
    """From nothing: here the MLflow store is made too. Five trials share two actors."""
    folder = start(sweep_text(resources={"cpus_per_trial": 1}), tmp_path)
    outcome, shown = drive(folder)
    assert outcome.status == "finished"
    assert outcome.counts == {"finished": 5}
    assert outcome.failures == {}
    check_records(folder, 5, 10)
    check_mlflow(folder, 5)
    values = [t.value for t in study_of(folder).get_trials()]
    losses = {run.run_id: run.final_loss_nats for run in collect(folder.path).runs}
    assert values == [losses[f"t{number:04d}"] for number in range(5)]
    assert outcome.best is not None
    assert outcome.best.final_loss_nats == min(losses.values())
    assert "t0004 finished" in shown
    text = outcome_text(outcome)
    assert "next: landscape-ray report sweep" in text
    assert not folder.ray_path.exists()

    again, _ = drive(folder)  # nothing is left to do
    assert again.counts == {"finished": 5}
    check_mlflow(folder, 5)


@pytest.mark.acceptance
@pytest.mark.parametrize("synchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("ready_store")
def test_a_population_trains_copies_and_mutates(
    tiny: dict[str, Any], sweep_text: SweepText, tmp_path: Path, synchronous: bool
) -> None:
    """The first begins with a rate that makes it diverge. In synchrony there is room for two of the four only.

    In asynchrony the first it must be: a member that diverges when all others are at their end has nobody to copy.
    """
    lr = "schedule.peak_lr"
    text = sweep_text(
        "population",
        train={**tiny, "num_steps": 30},
        space={lr: {"log_uniform": [1e-3, 1e30]}},
        population={
            "num_members": 4,
            "interval_steps": 10,
            "quantile_fraction": 0.5,
            "synchronous": synchronous,
            "resample_probability": 0.0,
            "initial": [{lr: value} for value in (1e30, 0.01, 0.02, 0.005)],
        },
        commit_steps=5,
        resources={"cpus_per_trial": 1.0 if synchronous else 0.5},
    )
    folder = start(text, tmp_path)
    outcome, _ = drive(folder)
    assert outcome.counts == {"finished": 4}
    check_records(folder, 4, 30)
    check_mlflow(folder, 4)
    rows = collect(folder.path).records.to_pylist()
    assert [row["event"] for row in rows if row["run_id"] == "t0000" and row["event"]][:2] == ["diverged", "exploit"]
    exploits = [row for row in rows if row["event"] == "exploit"]
    for event in exploits:
        assert event["donor"] != event["run_id"]
        assert event["step"] == event["donor_step"]
        donor_evals = [r["step"] for r in rows if r["run_id"] == event["donor"] and r["kind"] == "eval"]
        assert event["donor_step"] in donor_evals
        own = [r for r in rows if r["run_id"] == event["run_id"]]
        after = next(r for r in own[own.index(event) :] if r["kind"] == "step")
        assert after["step"] == event["step"] + 1
        value = json.loads(event["detail"])[lr]
        assert 1e-3 <= value <= 1e30
        assert after["lr"] == pytest.approx(value)
    strategy = population_of(spec_of(folder), folder)
    assert strategy.finished
    for member in range(4):
        (summary,) = (run for run in collect(folder.path).runs if run.run_id == f"t{member:04d}")
        path = strategy.lineage.path(member)
        assert path[0].start_step == 0
        assert (path[-1].stop_step, path[-1].points[-1].loss) == (30, summary.final_loss_nats)
        assert path[-1].values == summary.varied


@pytest.mark.slow
@pytest.mark.usefixtures("ready_store")
def test_a_failed_trial_is_reported_and_tried_again(sweep_text: SweepText, tmp_path: Path) -> None:
    text = sweep_text(resources={"cpus_per_trial": 1, "max_failures": 0})
    folder = start(text, tmp_path)
    checkpoint = folder.trial("t0001").checkpoint_path / "state.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"rubbish")
    outcome, shown = drive(folder)
    assert outcome.status == "incomplete"
    assert outcome.counts == {"finished": 4, "failed": 1}
    assert "delete it to start this run anew" in reason(outcome.failures["t0001"])
    assert "t0001 failed" in shown
    assert exit_status(outcome) == 2, "the user can mend it"
    assert "to go on: landscape-ray resume sweep" in outcome_text(outcome)

    checkpoint.unlink()
    outcome, _ = drive(folder)
    assert outcome.counts == {"finished": 5}
    check_records(folder, 5, 10)
    check_mlflow(folder, 5)


@pytest.mark.usefixtures("ready_store")
def test_a_trial_that_fits_no_node_is_refused(sweep_text: SweepText, tmp_path: Path) -> None:
    text = sweep_text(resources={"cpus_per_trial": 64})
    with pytest.raises(UserError, match=r"resources.cpus_per_trial must fit on one node, got 64; the largest .* 2 CPU"):
        drive(start(text, tmp_path, "cpu"))
    text = sweep_text(resources={"gpus_per_trial": 1})
    with pytest.raises(UserError, match=r"resources.gpus_per_trial must fit on one node, got 1; the largest .* 0 GPU"):
        drive(start(text, tmp_path, "gpu"))
    text = sweep_text(resources={"memory_gib_per_trial": 1e6})
    with pytest.raises(UserError, match=r"resources.memory_gib_per_trial must fit on one node.*GiB of memory"):
        drive(start(text, tmp_path, "memory"))


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.usefixtures("ready_store")
def test_a_sweep_attaches_to_a_cluster_by_its_address(sweep_text: SweepText, tmp_path: Path) -> None:
    import ray

    (tmp_path / "s.toml").write_text(sweep_text(resources={"cpus_per_trial": 1}))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "landscape_ray.cli", "sweep", "s.toml", "--name", "there", "--address", address]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"starting Ray at {address}" in done.stdout
    assert "5 finished" in done.stdout
    assert ray.is_initialized()


COHORT_TRAIN: dict[str, Any] = {
    "num_steps": 10,
    "batch_size": 8,
    "data": {"name": "images"},
    "model": {"name": "mlp", "width": 16},
    "eval": {"every_steps": 5, "num_batches": 2, "batch_size": 16},
}


@pytest.mark.acceptance
@pytest.mark.usefixtures("ready_store")
def test_one_ray_trial_holds_a_cohort(sweep_text: SweepText, tmp_path: Path) -> None:
    """Five trials in cohorts of three, in one actor: each is told to the study and tracked as if it had been alone."""
    resources = {"cpus_per_trial": 1.5}
    folder = start(sweep_text("search", train=COHORT_TRAIN, cohort={"num_members": 3}, resources=resources), tmp_path)
    outcome, shown = drive(folder)
    assert outcome.counts == {"finished": 5}
    assert "5/5 trials ended" in shown
    check_records(folder, 5, 10)
    backend = JournalFileBackend(str(folder.study_path))
    study = optuna.load_study(study_name="tiny", storage=JournalStorage(backend))
    told = {trial.number: trial.value for trial in study.trials}
    assert told == {int(run.run_id[1:]): run.final_loss_nats for run in collect(folder.path).runs}


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.usefixtures("ready_store")
def test_a_search_pauses_at_its_bound_and_ends_in_its_storage(sweep_text: SweepText, tmp_path: Path) -> None:
    """The disk is full to its bound at once: the sweep pauses; with a higher one it ends, here and in the storage."""
    from landscape_ray.sweep.extension import extend
    from landscape_ray.sweep.tuner import drive as drive_sweep
    from landscape_ray.tracking.cache import bring_sweep
    from landscape_ray.tracking.storage import open_storage

    def text(gib: float) -> str:
        return sweep_text(search={"num_trials": 3}, resources={"cpus_per_trial": 0.5, "max_disk_gib": gib})

    uri, out = f"file://{tmp_path}/store", io.StringIO()
    spec = parse(SweepSpec, tomllib.loads(text(1e-6)), "file")
    folder = new_sweep(spec, text(1e-6), tmp_path / "runs", "sweep", None, uri)
    paused = drive_sweep(folder, Console(file=out, width=200), storage_uri=uri)
    assert paused.status == "interrupted"
    assert exit_status(paused) == 130
    assert "paused: " in outcome_text(paused)
    assert "over resources.max_disk_gib = 1e-06" in outcome_text(paused)
    assert paused.num_not_stored == 0
    (tmp_path / "more.toml").write_text(text(1.0))
    assert extend(folder, tmp_path / "more.toml") == {"resources.max_disk_gib": 1.0}
    ended = drive_sweep(folder, Console(file=out, width=200), storage_uri=uri)
    assert (ended.status, ended.num_not_stored, ended.storage_problem) == ("finished", 0, "")
    check_records(folder, 3, 10)
    back = bring_sweep(open_storage(uri).at("sweep"), tmp_path / "back", checkpoints=True)
    assert str(collect(back).records.to_pylist()) == str(collect(folder).records.to_pylist())  # a nan is unequal
    assert back.meta["status"] == "finished"
    assert (back.path / "study.journal").read_bytes() == folder.study_path.read_bytes()
    for trial in back.trials():
        original = folder.trial(trial.trial_id).checkpoint_path / "state.pt"
        assert (trial.checkpoint_path / "state.pt").read_bytes() == original.read_bytes()
    store = open_storage(uri).at("sweep/trials/t0000")
    assert len(store.versions()) == 1
