"""Small populations of every strategy, and the space that they move in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from landscape_ray.domains import Domain
from landscape_ray.populations import STRATEGIES, Decision, Observation, Strategy
from landscape_ray.populations.simulation import LawCurves, Simulator
from landscape_ray.schedules import Schedule

SPACE = {
    "lr": Domain(log_uniform=[1e-4, 1e-1]),
    "depth": Domain(integers=[1, 8]),
    "shape": Domain(choices=["a", "b", "c"]),
}
NUM_STEPS = 400
SCHEDULE = Schedule(name="wsd", peak=1.0, num_steps=NUM_STEPS)

OPTIONS: dict[str, dict[str, Any]] = {
    "truncation": {},
    "significance": {"num_points": 4},
    "pb2": {"num_candidates": 60, "window": 40},
    "fire": {},
    "mf_pbt": {"frequencies": (1, 3)},
    "ipbt": {"num_candidates": 60, "window": 40, "patience": 1, "tolerance": 0.5},
    "forecast": {"schedule": SCHEDULE, "lr_name": "lr"},
    "independent": {},
}
"""Options of the strategies in tests; ipbt restarts early."""

History = list[tuple[Observation, list[Decision]]]


def make(name: str, **options: Any) -> Strategy:
    """Return a population of eight."""
    given = {"num_members": 8, "num_steps": NUM_STEPS, "interval_steps": 40, **OPTIONS[name], **options}
    return STRATEGIES[name](SPACE, **given)


def simulate(strategy: Strategy, *, seed: int = 3, spread: float = 0.3, **problem: Any) -> History:
    """Return the history of a population under a fake clock."""
    return list(Simulator(LawCurves(SCHEDULE, **problem), strategy, seed=seed, spread=spread).run())


def resumed(strategy: Strategy, fresh: Callable[[], Strategy]) -> Strategy:
    """Return another strategy with the state of this one, through JSON text as it would lie in a file."""
    other = fresh()
    other.load_state_dict(json.loads(json.dumps(strategy.state_dict(), allow_nan=False)))
    return other


@pytest.fixture(params=sorted(STRATEGIES))
def name(request: pytest.FixtureRequest) -> str:
    """Each registered strategy in turn."""
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["sync", "async"])
def synchronous(request: pytest.FixtureRequest) -> bool:
    """Both modes of operation."""
    return bool(request.param)
