"""Successive halving on Ray: trials wait on rungs, in folders; a kill in the middle loses and doubles nothing."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from landscape_ray.records import RunSummary
from landscape_ray.tracking.collect import collect
from tests.ray.driver import finish, launch, wait_until

STEPS, RUNGS = 90, (10, 30)

pytestmark = pytest.mark.timeout(600)


def text_of(sweep_text: Callable[..., str], tiny: dict[str, Any], **search: Any) -> str:
    train = {**tiny, "num_steps": STEPS, "batch_size": 32, "eval": {**tiny["eval"], "every_steps": 5}}
    space = {"schedule.peak_lr": {"log_uniform": [1e-4, 1e-1]}}
    table = {"num_trials": 9, "sampler": "random", "stopping": {"name": "asha", "min_steps": 10}, **search}
    resources = {"cpus_per_trial": 1}
    return sweep_text(train={**train, "probes": {}}, space=space, search=table, commit_steps=30, resources=resources)


def check(path: Path, num_trials: int) -> None:
    """Every trial ended where a rung or the end is, with every row once, and the study says the same."""
    collected = collect(path)
    assert collected.warnings == []
    statuses = Counter(run.status for run in collected.runs)
    assert statuses.keys() <= {"finished", "stopped", "diverged"}
    assert sum(statuses.values()) == num_trials
    assert statuses["finished"] >= 1
    assert statuses["stopped"] >= num_trials // 3
    rows = collected.records.to_pylist()
    study = optuna.load_study(
        study_name="tiny", storage=JournalStorage(JournalFileBackend(str(path / "study.journal")))
    )
    assert len(study.trials) == num_trials
    reached: dict[int, dict[str, float]] = {rung: {} for rung in RUNGS}
    for run in collected.runs:
        own = [r for r in rows if r["run_id"] == run.run_id]
        steps = [r["step"] for r in own if r["kind"] == "step"]
        assert steps == list(range(1, run.step + 1))
        evals = {r["step"]: r["loss_nats"] for r in own if r["kind"] == "eval"}
        trial = study.trials[int(run.run_id[1:])]
        assert trial.intermediate_values == evals
        if run.status == "stopped":
            assert run.step in RUNGS
            assert trial.state == TrialState.PRUNED
            assert trial.value == evals[run.step]
        elif run.status == "finished":
            assert run.step == STEPS
            assert trial.state == TrialState.COMPLETE
            assert trial.value == run.final_loss_nats
        for rung in RUNGS:
            if rung in evals:
                reached[rung][run.run_id] = evals[rung]
    beyond = set(reached[30])
    best = sorted(reached[10], key=lambda name: reached[10][name])
    assert best[0] in beyond, "the best of a rung goes on"


@pytest.mark.slow
@pytest.mark.acceptance
def test_kill_9_in_the_middle_of_halving(sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(text_of(sweep_text, tiny))
    path = tmp_path / "runs" / "halved"

    def some_wait(found: dict[str, RunSummary]) -> bool:
        return sum(s.step == 10 for s in found.values()) >= 3 and any(s.step > 10 for s in found.values())

    with launch(tmp_path, "sweep", "s.toml", "--name", "halved") as driver:
        wait_until(driver, path, some_wait)
        os.kill(driver.pid, signal.SIGKILL)
    with launch(tmp_path, "resume") as second:
        out = finish(second)
    assert second.returncode == 0, out
    assert "stopped" in out
    check(path, 9)
