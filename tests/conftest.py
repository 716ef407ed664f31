"""Shared by all tests: a small real corpus, tiny configurations, one Ray session."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.training import TrainConfig

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("RAY_ADDRESS", None)  # tests never join a cluster that happens to run here
os.environ.pop("MLFLOW_TRACKING_URI", None)
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def published_data() -> Path:
    """Folder with published curves; users don't have it."""
    if not DATA.is_dir():
        pytest.skip("published data is not here")
    return DATA


TINY: dict[str, Any] = {
    "num_steps": 10,
    "batch_size": 4,
    "data": {"context_length": 16},
    "model": {"depth": 1, "width": 16, "num_heads": 2},
    "schedule": {"name": "wsd", "peak_lr": 0.01, "warmup_steps": 2},
    "eval": {"every_steps": 5, "num_batches": 1, "batch_size": 4},
    "probes": {"sharpness": {"every_steps": 5, "batch_size": 2}},
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A training configuration that takes a tenth of a second."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}


@pytest.fixture
def tiny_config(tiny: dict[str, Any]) -> TrainConfig:
    return parse(TrainConfig, tiny, "tiny")
