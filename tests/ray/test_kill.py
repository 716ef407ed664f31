"""The driver is killed, or interrupted, in the middle of a sweep; another goes on. Nothing is lost, nothing doubled."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from landscape_ray.records import RunSummary
from landscape_ray.sweep.population.book import population_of
from landscape_ray.sweep.spec import spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from tests.ray.driver import finish, launch, summaries, wait_until
from tests.sweep.population.local import Local, history, make

STEPS = 120

pytestmark = pytest.mark.timeout(600)


def check_whole(path: Path, num_trials: int, *, fixed_schedules: bool) -> None:
    """Every trial is there once, ended, with every record once in the folder and in MLflow."""
    collected = collect(path)
    assert collected.warnings == []
    assert Counter(run.status for run in collected.runs) == {"finished": num_trials}
    rows = collected.records.to_pylist()
    if fixed_schedules:
        for run in collected.runs:
            steps = [r["step"] for r in rows if r["run_id"] == run.run_id and r["kind"] == "step"]
            assert steps == list(range(1, STEPS + 1))
    client = MlflowClient(f"sqlite:///{path.parent / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "landscape_ray")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    trials = Counter(run.data.tags.get("landscape_ray.trial_id", "parent") for run in runs)
    assert trials == Counter(["parent", *(run.run_id for run in collected.runs)])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if (trial_id := run.data.tags.get("landscape_ray.trial_id")) is None:
            continue
        history = client.get_metric_history(run.info.run_id, "eval/loss_nats")
        expected = [(r["step"], r["loss_nats"]) for r in rows if r["run_id"] == trial_id and r["kind"] == "eval"]
        assert Counter((m.step, m.value) for m in history) == Counter(expected)


def some_done_some_not(found: dict[str, RunSummary]) -> bool:
    statuses = Counter(s.status for s in found.values())
    under_way = [s.step for s in found.values() if s.status == "running"]
    return statuses["finished"] >= 1 and any(10 <= step <= STEPS // 2 for step in under_way)


@pytest.mark.slow
@pytest.mark.acceptance
def test_kill_9_in_the_middle_of_a_search(sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path) -> None:
    train = {**tiny, "num_steps": STEPS, "batch_size": 32}
    (tmp_path / "s.toml").write_text(sweep_text(train=train, resources={"cpus_per_trial": 1}))
    path = tmp_path / "runs" / "killed"
    with launch(tmp_path, "sweep", "s.toml", "--name", "killed") as driver:
        wait_until(driver, path, some_done_some_not)
        os.kill(driver.pid, signal.SIGKILL)
    before = summaries(path)
    assert any(s.status == "running" for s in before.values())

    with launch(tmp_path, "resume") as second:  # needs no name: the newest unfinished sweep
        out = finish(second)
    assert second.returncode == 0, out
    assert "resuming killed" in out
    check_whole(path, 5, fixed_schedules=True)
    after = summaries(path)
    for trial_id, summary in before.items():
        if summary.status == "finished":
            assert after[trial_id] == summary, "a finished trial was run again"


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("synchronous", [False, True])
def test_kill_9_in_the_middle_of_a_population(
    sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path, synchronous: bool
) -> None:
    population = {"num_members": 4, "interval_steps": 20, "synchronous": synchronous}
    train = {**tiny, "num_steps": STEPS, "batch_size": 32}
    (tmp_path / "p.toml").write_text(sweep_text("population", train=train, population=population))
    path = tmp_path / "runs" / "killed"
    with launch(tmp_path, "sweep", "p.toml", "--name", "killed") as driver:
        wait_until(driver, path, lambda found: len(found) == 4 and all(s.step >= 40 for s in found.values()))
        os.kill(driver.pid, signal.SIGKILL)
    with launch(tmp_path, "resume", "killed") as second:
        out = finish(second)
    assert second.returncode == 0, out
    check_whole(path, 4, fixed_schedules=False)
    rows = collect(path).records.to_pylist()
    for run_id in summaries(path):
        steps = [r["step"] for r in rows if r["run_id"] == run_id and r["kind"] == "step"]
        assert steps[-1] == STEPS
    assert all(r["donor"] != r["run_id"] for r in rows if r["event"] == "exploit")
    resumed = Counter(r["run_id"] for r in rows if r["event"] == "resume")
    assert resumed
    assert set(resumed.values()) == {1}
    folder = SweepFolder.open(path)
    assert population_of(spec_of(folder), folder).finished
    if synchronous:  # in asynchrony decisions depend on who comes first
        torch.set_num_threads(1)  # as the trials had
        whole = make(tmp_path / "whole", (tmp_path / "p.toml").read_text())
        Local(whole).run()
        assert history(folder) == history(whole)


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(
    sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    train = {**tiny, "num_steps": 20_000, "batch_size": 32}
    (tmp_path / "s.toml").write_text(sweep_text(train=train, resources={"cpus_per_trial": 1}))
    path = tmp_path / "runs" / "stopped"
    with launch(tmp_path, "sweep", "s.toml", "--name", "stopped") as driver:
        wait_until(driver, path, lambda found: any(s.step >= 10 for s in found.values()))
        os.kill(driver.pid, number)
        out = finish(driver)
    assert driver.returncode == 130, out
    assert "to go on: landscape-ray resume stopped" in out
    assert "Traceback" not in out
    assert json.loads((path / "sweep.json").read_text())["status"] == "interrupted"
    client = MlflowClient(f"sqlite:///{path.parent / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "landscape_ray")
    statuses = {run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert statuses == {"KILLED"}
