"""Sweeps that take a second: the tiny model of all tests, two values searched."""

from pathlib import Path
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder

SPACE = {
    "schedule.name": {"choices": ["constant", "linear", "cosine", "wsd"]},
    "schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]},
    "schedule.cooldown_fraction": {"uniform": [0.2, 0.8], "when": {"schedule.name": "wsd"}},
}


def sweep_text(tiny: dict[str, Any], kind: str, **changes: Any) -> str:
    """Return a sweep file. JSON values are TOML values, but for null."""
    import json

    def table(data: dict[str, Any]) -> str:
        return "{ " + ", ".join(f'"{k}" = {value(v)}' for k, v in data.items()) + " }"

    def value(data: Any) -> str:
        if isinstance(data, dict):
            return table(data)
        return "[" + ", ".join(value(v) for v in data) + "]" if isinstance(data, list) else json.dumps(data)

    data: dict[str, Any] = {
        "name": "tiny",
        "seed": 1,
        "commit_steps": 5,
        "train": tiny,
        "resources": {"cpus_per_trial": 0.5},
    }
    if kind == "search":
        first = [{"schedule.name": name, "schedule.peak_lr": 0.02} for name in ("constant", "linear", "cosine")]
        data |= {"space": SPACE, "search": {"num_trials": 5, "initial": first}}
    else:
        data |= {
            "space": {"schedule.peak_lr": SPACE["schedule.peak_lr"]},
            "population": {"num_members": 4, "interval_steps": 5},
        }
    data |= changes
    return "\n".join(f"{key} = {value(entry)}" for key, entry in data.items()) + "\n"


@pytest.fixture
def search_text(tiny: dict[str, Any]) -> str:
    return sweep_text(tiny, "search")


@pytest.fixture
def population_text(tiny: dict[str, Any]) -> str:
    return sweep_text(tiny, "population")


@pytest.fixture
def search_spec(search_text: str) -> SweepSpec:
    import tomllib

    return parse(SweepSpec, tomllib.loads(search_text), "search")


@pytest.fixture
def population_spec(population_text: str) -> SweepSpec:
    import tomllib

    return parse(SweepSpec, tomllib.loads(population_text), "population")


@pytest.fixture
def folder(tmp_path: Path, search_text: str) -> SweepFolder:
    return SweepFolder.create(tmp_path / "sweep", spec_text=search_text, meta={"experiment": "e"})
