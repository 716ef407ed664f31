"""What these strategies promise, asked of Ray Tune's own scheduler too, which is why it is asked at all.

The scheduler is the object that the benchmark's row "stock Ray" is made with.
"""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from landscape_ray.domains import Domain
from landscape_ray.populations import STRATEGIES, Decision, Observation, Point, Strategy

SPACE = {"lr": Domain(log_uniform=[1e-3, 1e-1])}
SCRIPT = Path(__file__).parents[2] / "scripts" / "population_rivals.py"

Make = Callable[..., Strategy]


@pytest.fixture(scope="module")
def rivals() -> Iterator[Any]:
    """The benchmark's module, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("population_rivals", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture
def stock(rivals: Any) -> Iterator[Make]:
    """Ray's scheduler as a strategy; the global generators that it draws from are put back."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002  # Ray draws from these
    yield rivals.StockRay
    random.setstate(before)
    np.random.set_state(numpy_before)  # noqa: NPY002


def run(strategy: Strategy, losses: Callable[[int, int], float], rounds: int) -> list[Decision]:
    """Let every member report at every interval; return all decisions."""
    decisions = waiting = strategy.start()
    for _ in range(rounds):
        made: list[Decision] = []
        for decision in waiting:
            if decision.action != "stop":
                step = decision.until_step
                point = Point(step, losses(decision.member, step), float(decision.values["lr"]))
                made += strategy.observe(Observation(decision.member, (point,)))
        decisions, waiting = decisions + made, made
    return decisions


def make(kind: Make, **options: Any) -> Strategy:
    return kind(SPACE, **{"num_members": 8, "num_steps": 10_000, "interval_steps": 10, **options})


@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_the_worst_quarter_takes_weights_of_the_best_as_ray_decides(stock: Make, synchronous: bool) -> None:
    strategy = make(stock, synchronous=synchronous)
    decisions = run(strategy, lambda member, step: 1.0 + member - step / 1000, 3)
    copies = [d for d in decisions if d.donor is not None]
    assert copies
    assert {d.donor for d in copies} <= {0, 1}
    if synchronous:
        assert [d.member for d in copies] == [6, 7] * 3
        factors = {round(float(d.values["lr"]) / float(strategy.members[d.donor].values["lr"]), 9) for d in copies}
        assert factors & {0.8, 1.2}


@pytest.mark.acceptance
def test_values_stay_inside_their_domain_and_rays_do_not(stock: Make) -> None:
    def outside(kind: Make) -> int:
        strategy = make(kind, initial=[{"lr": 1e-1}] * 8)
        return sum(
            not SPACE["lr"].contains(d.values["lr"]) for d in run(strategy, lambda member, step: 1.0 + member, 20)
        )

    assert outside(STRATEGIES["truncation"]) == 0
    assert outside(stock) > 0


@pytest.mark.acceptance
def test_a_diverged_member_is_replaced_and_by_ray_it_is_not(stock: Make) -> None:
    def rescued(kind: Make) -> bool:
        decisions = run(make(kind), lambda member, step: math.nan if (member, step) == (3, 20) else 1.0 + member, 4)
        return any(d.member == 3 and d.donor is not None for d in decisions)

    assert rescued(STRATEGIES["truncation"])
    assert not rescued(stock)
