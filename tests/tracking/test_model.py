"""The best model: kept beside the sweep, logged once, and the same network when it comes back through MLflow."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.best_model import keep_best_model
from landscape_ray.sweep.run import CHECKPOINT
from landscape_ray.tracking import model, server
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import Projector
from landscape_ray.training import TrainConfig, TrainState

CONFIG = {
    "num_steps": 10,
    "data": {"name": "images", "source": "digits"},
    "model": {"name": "resnet", "width": 4, "depth": 8},
    "schedule": {"name": "constant", "peak_lr": 0.01},
}


@pytest.fixture
def trained(folder: SweepFolder, make: SimpleNamespace) -> tuple[SweepFolder, TrainState]:
    """A sweep with the checkpoint of a network that is not as it was drawn."""
    state = TrainState.create(parse(TrainConfig, CONFIG, "test"))
    with torch.no_grad():
        for index, parameter in enumerate(state.module.parameters()):
            parameter.add_(0.01 * (index + 1))
        for buffer in state.module.buffers():
            buffer.add_(1)
    state.step = 7
    make.write(folder.trial("t1"), 1, 7, status="finished", final_loss_nats=1.0)
    state.save(folder.trial("t1").checkpoint_path / CHECKPOINT, num_parts=1)
    folder.update_meta(status="finished")
    return folder, state


@pytest.mark.acceptance
def test_the_model_that_comes_back_predicts_the_same(
    trained: tuple[SweepFolder, TrainState],
    uri: str,
    results: Path,
    make: SimpleNamespace,
    caplog: Any,
    global_address: None,
) -> None:
    import mlflow

    folder, state = trained
    with caplog.at_level(logging.WARNING):
        assert keep_best_model(folder, "t1")
    assert not [record for record in caplog.records if record.name.startswith("mlflow")]
    assert Projector(folder, uri, "exp").close().error == ""
    run = make.active_runs(results / "mlflow.db")[""]
    mlflow.set_tracking_uri(uri)
    loaded = [mlflow.pytorch.load_model(run["landscape_ray.model_uri"])]
    loaded.append(mlflow.pytorch.load_model(f"runs:/{run['run_id']}/best_model"))
    inputs = state.validation[0][0]
    expected = state.module.eval()(inputs)
    for network in loaded:
        assert type(network) is type(state.module)
        assert not network.training
        assert torch.equal(network(inputs), expected)
    logged = server.open_client(uri).get_logged_model(run["landscape_ray.model_uri"].removeprefix("models:/"))
    assert (logged.name, str(logged.status), logged.source_run_id) == ("best_model", "READY", run["run_id"])
    assert logged.tags["landscape_ray.trial_id"] == "t1"


def test_a_model_is_made_and_sent_once(
    trained: tuple[SweepFolder, TrainState], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    assert keep_best_model(folder, "t1")
    first = model.saved_model(folder)
    assert first is not None
    assert first[:2] == ("t1", 7)
    assert keep_best_model(folder, "t1")
    assert model.saved_model(folder) == first
    client = server.open_client(uri)
    for _ in range(2):
        assert Projector(folder, uri, "exp").close().error == ""
    experiment = client.get_experiment_by_name("exp").experiment_id
    assert len(client.search_logged_models([experiment])) == 1

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(client), "log_model_artifacts", full)
    (folder.trial("t1").checkpoint_path / "x").write_text("")
    folder.trial("t2").path.mkdir()
    model.save_model(folder, torch.nn.Linear(1, 1), "t2", 3, {"torch": "1"})
    report = Projector(folder, uri, "exp").close()
    assert report.error == "the best model: no space left"
    assert report.behind == 0
    statuses = sorted(str(each.status) for each in client.search_logged_models([experiment]))
    assert statuses == ["FAILED", "READY"]


def test_what_cannot_be_kept(trained: tuple[SweepFolder, TrainState], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = trained
    assert not keep_best_model(folder, "t9"), "no checkpoint"
    monkeypatch.setattr("landscape_ray.sweep.best_model.MAX_MODEL_BYTES", 100)
    assert not keep_best_model(folder, "t1"), "too large"
    assert model.saved_model(folder) is None
    (folder.trial("t1").checkpoint_path / CHECKPOINT).write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        keep_best_model(folder, "t1")
    assert not list(folder.path.glob(".model*"))
