"""Sweep files of small populations."""

from collections.abc import Callable
from typing import Any

import pytest

TRAIN: dict[str, Any] = {
    "num_steps": 20,
    "batch_size": 8,
    "data": {"name": "images"},
    "model": {"name": "mlp", "width": 8},
    "schedule": {"name": "wsd", "warmup_steps": 2},
    "eval": {"every_steps": 5, "num_batches": 1, "batch_size": 16},
}


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't wait for the disk: here processes die, not machines."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def text(sweep_text: Callable[..., str]) -> Callable[..., str]:
    """Return a function that writes a sweep file: four members of a tiny network, with changes of [population]."""

    def write(train: dict[str, Any] | None = None, commit_steps: int = 3, **population: Any) -> str:
        table = {"num_members": 4, "interval_steps": 5} | population
        space = {"schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]}, "optimizer.weight_decay": {"uniform": [0.0, 0.3]}}
        given = TRAIN | (train or {})
        return sweep_text("population", train=given, space=space, population=table, commit_steps=commit_steps)

    return write
