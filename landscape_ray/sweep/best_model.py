"""The best run's network, taken out of its checkpoint and left in the sweep folder as an MLflow model."""

from __future__ import annotations

import importlib.metadata

import torch

from landscape_ray import __version__
from landscape_ray.config import parse
from landscape_ray.data import open_data
from landscape_ray.models import build_model
from landscape_ray.sweep.run import CHECKPOINT
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.model import MAX_MODEL_BYTES, save_model, saved_model
from landscape_ray.training import TrainConfig, read_checkpoint


def keep_best_model(folder: SweepFolder, run_id: str) -> bool:
    """Leave the network of a run in the sweep folder, in evaluation mode and on the CPU; return whether it is there.

    It isn't where the run has no checkpoint, or one so large that only its path is tracked.

    Args:
        folder: the sweep.
        run_id: the run.

    Raises:
        UserError: the checkpoint is damaged, or the data that says what the network looks like is not at hand.
    """
    path = folder.trial(run_id).checkpoint_path / CHECKPOINT
    if not path.is_file():
        return False
    payload = read_checkpoint(path)
    weights = payload["module"]
    if sum(value.numel() * value.element_size() for value in weights.values()) > MAX_MODEL_BYTES:
        return False
    step = int(payload["counters"]["step"])
    known = saved_model(folder)
    if known is not None and known[:2] == (run_id, step):
        return True
    config = parse(TrainConfig, payload["config"], f"checkpoint {path}")
    module = build_model(config.model, open_data(config.data).signature, torch.Generator().manual_seed(config.seed))
    module.load_state_dict(weights)
    versions = {"landscape_ray": __version__, "torch": importlib.metadata.version("torch")}
    save_model(folder, module.eval(), run_id, step, versions)
    return True
