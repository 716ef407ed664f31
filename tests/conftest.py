"""Shared by all tests: a small real corpus, tiny configurations, one Ray session."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from landscape_ray.config import parse

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder
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
def tiny_config(tiny: dict[str, Any]) -> "TrainConfig":
    from landscape_ray.training import TrainConfig  # not for tests of rooms that need no training

    return parse(TrainConfig, tiny, "tiny")


SPACE: dict[str, Any] = {
    "schedule.name": {"choices": ["constant", "linear", "cosine", "wsd"]},
    "schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]},
    "schedule.cooldown_fraction": {"uniform": [0.2, 0.8], "when": {"schedule.name": "wsd"}},
}


def to_toml(entry: Any) -> str:
    """Return a value as inline TOML. But for tables, JSON is TOML."""
    if isinstance(entry, dict):
        return "{ " + ", ".join(f'"{key}" = {to_toml(value)}' for key, value in entry.items()) + " }"
    return "[" + ", ".join(map(to_toml, entry)) + "]" if isinstance(entry, list) else json.dumps(entry)


@pytest.fixture
def sweep_text(tiny: dict[str, Any]) -> Callable[..., str]:
    """Return a function that writes a sweep file: five trials, or a population of four, of the tiny model."""

    def write(kind: str = "search", **changes: Any) -> str:
        data: dict[str, Any] = {"name": "tiny", "seed": 1, "commit_steps": 5, "train": tiny}
        data["resources"] = {"cpus_per_trial": 0.5}
        if kind == "search":
            first = [{"schedule.name": name, "schedule.peak_lr": 0.02} for name in ("constant", "linear", "cosine")]
            data |= {"space": SPACE, "search": {"num_trials": 5, "initial": first}}
        else:
            data |= {"space": {"schedule.peak_lr": SPACE["schedule.peak_lr"]}}
            data |= {"population": {"num_members": 4, "interval_steps": 5}}
        return "".join(f"{key} = {to_toml(entry)}\n" for key, entry in (data | changes).items())

    return write


@pytest.fixture(scope="session")
def fabricate() -> ModuleType:
    """The module that makes sweeps of runs with a known law."""
    spec = importlib.util.spec_from_file_location("fabricate", Path(__file__).with_name("fabricate.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def search_folder(fabricate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> "SweepFolder":
    """A search of twelve runs, fitted; nobody may change it."""
    from landscape_ray.analysis.annealing import fit_sweep

    folder: SweepFolder = fabricate.make_search(tmp_path_factory.mktemp("sweeps") / "search", steps=300)
    fit_sweep(folder, num_bootstrap=30)
    return folder


@pytest.fixture(scope="session")
def population_folder(fabricate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> "SweepFolder":
    folder: SweepFolder = fabricate.make_population(tmp_path_factory.mktemp("sweeps") / "members", steps=300)
    return folder
