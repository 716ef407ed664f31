"""The best model as MLflow keeps models: a folder beside the sweep, and a logged model on the server.

`mlflow.pytorch.load_model` gives back the module itself, which needs this package to be installed where it is loaded,
as it is pickled: load models of people you trust. The folder is made without a server, so that any machine can send it.
"""

from __future__ import annotations

import logging
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlflow.entities import LoggedModelOutput

from landscape_ray.tracking import server
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.runs import SweepRuns

NAME = "best_model"
MAX_MODEL_BYTES = 2**30
"""Larger models stay where their checkpoint is: copying them would hold up the end of a sweep."""

_RUN_ID, _STEP = "landscape_ray.run_id", "landscape_ray.step"


def save_model(folder: SweepFolder, module: Any, run_id: str, step: int, requirements: Mapping[str, str]) -> None:
    """Write a module into the sweep folder as an MLflow model; an older one is replaced.

    Args:
        folder: the sweep.
        module: a torch module on the CPU.
        run_id: the trial that it is of.
        step: updates that it was trained for.
        requirements: versions of the packages that loading it takes.
    """
    with _quiet():
        import mlflow.pytorch  # imports torch, which most of this package does without
        from mlflow.models import Model

    temporary = folder.path / f".model.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _quiet():
            mlflow.pytorch.save_model(
                module,
                str(temporary),
                mlflow_model=Model(metadata={_RUN_ID: run_id, _STEP: step}),
                serialization_format="pickle",
                pip_requirements=[f"{name}=={version}" for name, version in requirements.items()],
            )
        shutil.rmtree(folder.model_path, ignore_errors=True)
        temporary.rename(folder.model_path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def saved_model(folder: SweepFolder) -> tuple[str, int, str] | None:
    """Return run, step and identity of the model in the sweep folder, None without one."""
    if not (folder.model_path / "MLmodel").is_file():
        return None
    with _quiet():
        from mlflow.models import Model
    model = Model.load(str(folder.model_path))
    noted = model.metadata or {}
    return str(noted.get(_RUN_ID, "")), int(noted.get(_STEP, 0)), str(model.model_uuid)


def log_model(runs: SweepRuns, folder: SweepFolder) -> None:
    """Send the model in the sweep folder to the server, as an output of the sweep's run, unless it is there."""
    found = saved_model(folder)
    if found is None or runs.parent.tags.get(server.MODEL) == found[2]:
        return
    run_id, step, identity = found
    client = runs.client
    tags = {server.SWEEP_ID: runs.parent.tags.get(server.SWEEP_ID, ""), server.TRIAL_ID: run_id}
    model = client.create_logged_model(runs.experiment_id, NAME, runs.parent.run_id, tags, model_type="pytorch")
    try:
        client.log_model_artifacts(model.model_id, str(folder.model_path))
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(runs.parent.run_id, [LoggedModelOutput(model.model_id, step)])
    runs.log(runs.parent, tags={server.MODEL: identity, server.MODEL_URI: f"models:/{model.model_id}"})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what MLflow says to its developers when it is imported, and that pickles run code when they are loaded.

    The documentation says the latter.
    """
    logger = logging.getLogger("mlflow.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
