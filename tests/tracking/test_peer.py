"""Ray's MLflowLoggerCallback on what a population does, and ours."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from landscape_ray.records import EventRecord
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.tracking.projector import Projector


class Trial:
    """A trial as the callback sees it."""

    def __init__(self, lr: float) -> None:
        self.config = {"lr": lr}

    def __str__(self) -> str:
        return "t1"


@pytest.fixture
def callback(uri: str, global_address: None) -> Any:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    made = MLflowLoggerCallback(tracking_uri=uri, experiment_name="peer")
    made.setup()
    return made


@pytest.mark.acceptance
def test_an_exploit_that_raises_in_rays_callback_is_a_point_of_ours(
    callback: Any, folder: SweepFolder, uri: str, results: Path, make: SimpleNamespace
) -> None:
    """A population restarts a member under another learning rate; the callback logs it as the same parameter."""
    from mlflow.exceptions import MlflowException

    trial = Trial(0.1)
    callback.log_trial_start(trial)
    callback.log_trial_result(1, trial, {"loss": 2.0, "training_iteration": 1})
    trial.config["lr"] = 0.02
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        callback.log_trial_start(trial)

    ours = folder.trial("t1")
    writer = PartWriter(ours)
    rows = make.rows(4, 10)
    for lr, part in ((0.1, rows[:6]), (0.02, rows[6:])):
        if lr != 0.1:
            last = rows[5]
            place = {key: getattr(last, key) for key in ("step", "num_tokens", "flops", "elapsed_seconds", "time_unix")}
            writer.append(
                EventRecord(**place, event="exploit", donor="t2", donor_step=6, detail=json.dumps({"lr": lr}))
            )
        for record in part:
            writer.append(record)
        step = part[-1].step
        done = make.summary("t1", config={"lr": lr}, varied={"lr": lr}, step=step)
        ours.commit(done, writer.flush())
        assert Projector(folder, uri, "exp").sync().error == ""
    values = make.query(
        results / "mlflow.db", "SELECT value FROM metrics WHERE key = 'hyperparameter/lr' ORDER BY step"
    )
    assert values == [(0.1,), (0.02,)]
